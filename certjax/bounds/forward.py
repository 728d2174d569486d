"""Linear bounds carried forward: two linear functions of the input around every node.

One pass whatever the number of outputs, at the price of one column per input entry and
of looser bounds than the way back: the method for few inputs and wide outputs.

Source: Xu et al. 2020, arXiv:2002.12920, section 3 (forward mode).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.bounds import slopes
from certjax.bounds.affine import BILINEAR
from certjax.bounds.interval import ibp
from certjax.bounds.problem import (
    intersect,
    intersect_trees,
    MAX_BYTES,
    pose,
    Problem,
    Refine,
    Slope,
    solve,
    unflatten,
    values_of,
)
from certjax.bounds.relax import constants, is_float, operands, Relaxation, Side
from certjax.threat import Threat
from certjax.types import Array, Interval, PyTree
from certjax.walk import Equation, Node, primitives as p, read


class Form(NamedTuple):
    """Entry e of a node is at least `<lower[:, e], input> + lower_constant[e]`.

    lower, upper: [D, *node], D entries of the input in all.  constants: like the node.
    """

    lower: Array
    lower_constant: Array
    upper: Array
    upper_constant: Array


def forward(
    f: Callable[[PyTree], PyTree], *, slope: Slope = slopes.adaptive
) -> Callable:
    """Sound elementwise bounds of `f` over a threat set, by forward linear bounds.

    For every z in the set, lower <= f(z) <= upper in exact arithmetic; never looser
    than `ibp(f)`. Differentiable; works under jit and vmap.

    Returns:
      `bound(threat, x) -> Interval`, lower and upper each like f(x).
    """

    def bound(threat: Threat, x: PyTree) -> Interval:
        problem, tree = pose(f, threat, x, slope=slope, max_bytes=MAX_BYTES)
        refine = by_forward()
        solve(problem, refine)
        found = []
        for atom in problem.graph.outputs:
            known = read(problem.env, atom)
            known = known if isinstance(known, Interval) else Interval(known, known)
            tighter = refine(problem, atom) if atom in problem.graph.depends else None
            found.append(known if tighter is None else intersect(known, tighter))
        return intersect_trees(ibp(f)(threat, x), unflatten(tree, found))

    return bound


def by_forward() -> Refine:
    """The refinement by forward linear bounds; remembers the form of every node."""
    forms: dict[Node, Form] = {}

    def refine(problem: Problem, node: Node) -> Interval | None:
        if not is_float(node.aval):
            return None
        return _close(problem, _form(problem, forms, node))

    return refine


def _form(problem: Problem, forms: dict[Node, Form], node: Node) -> Form:
    """The node's form, from those of the operands, as far back as necessary."""
    if node not in forms:
        if node in problem.positions:
            i = problem.positions[node]
            equation = problem.graph.equations[i]
            made = _step(problem, forms, i, equation)
            forms.update(zip(equation.outputs, made, strict=True))
        else:
            forms[node] = _input_form(problem, node)
    return forms[node]


def _input_form(problem: Problem, node: Node) -> Form:
    """The identity in its own columns, nothing in those of other inputs."""
    sizes = [int(np.prod(n.aval.shape)) for n in problem.graph.inputs]
    start = sum(sizes[: problem.graph.inputs.index(node)])
    shape, dtype = node.aval.shape, node.aval.dtype
    eye = jnp.eye(sum(sizes), int(np.prod(shape)), -start, dtype=dtype)
    columns, zero = eye.reshape(-1, *shape), jnp.zeros(shape, dtype)
    return Form(columns, zero, columns, zero)


def _step(problem: Problem, forms: dict, i: int, equation: Equation) -> list[Form]:
    values = values_of(problem, equation)
    chosen = operands(values)
    inputs = [_form(problem, forms, equation.inputs[j]) for j in chosen]
    if i not in problem.relaxations:
        return _through_affine(equation, values, chosen, inputs)
    relaxation = problem.relaxations[i]
    if relaxation.lower.slopes is None:  # not elementwise: the ends of its interval
        relaxation = constants(equation, values)
    count = sum(int(np.prod(n.aval.shape)) for n in problem.graph.inputs)
    return [_through_lines(relaxation, equation, inputs, count)]


def _through_affine(
    equation: Equation, values: list, chosen: list[int], inputs: list[Form]
) -> list[Form]:
    """The centre through the equation, the radius through its absolute value."""

    def replaced(args: tuple, constants: list) -> list:
        full = list(constants)
        for j, arg in zip(chosen, args, strict=True):
            full[j] = arg
        return full

    def plain(*args: Array) -> list[Array]:
        return equation.bind(*replaced(args, values))

    def absolute(*args: Array) -> list[Array]:
        return _absolute(equation, replaced(args, values), chosen)

    centres = [
        ((v.lower + v.upper) / 2, (v.lower_constant + v.upper_constant) / 2)
        for v in inputs
    ]
    radii = [
        ((v.upper - v.lower) / 2, (v.upper_constant - v.lower_constant) / 2)
        for v in inputs
    ]
    middle, middle_at = _columns(plain, centres)
    spread, spread_at = _columns(absolute, radii)
    at_zero = plain(*(jnp.zeros_like(c) for _, c in centres))
    return [
        Form(m - s, z + ma - sa, m + s, z + ma + sa)
        for m, ma, s, sa, z in zip(
            middle, middle_at, spread, spread_at, at_zero, strict=True
        )
    ]


def _columns(g: Callable, parts: list[tuple[Array, Array]]) -> tuple[list, list]:
    """The linear part of g on all columns and on the constants."""
    zeros = [jnp.zeros_like(constant) for _, constant in parts]
    linear = lambda *tangents: jax.jvp(g, zeros, list(tangents))[1]
    return jax.vmap(linear)(*(c for c, _ in parts)), linear(*(c for _, c in parts))


def _absolute(equation: Equation, full: list, chosen: list[int]) -> list[Array]:
    """The equation with every coefficient replaced by its absolute value."""
    if equation.primitive is p.neg_p:
        return [full[0]]
    if equation.primitive is p.sub_p:
        return [
            sum(full[j] for j in chosen) + jnp.zeros(equation.outputs[0].aval.shape)
        ]
    if equation.primitive in BILINEAR or equation.primitive is p.div_p:
        full = [v if j in chosen else jnp.abs(v) for j, v in enumerate(full)]
    return equation.bind(*full)


def _through_lines(
    relaxation: Relaxation, equation: Equation, inputs: list[Form], count: int
) -> Form:
    """Positive slopes keep the side, negative ones change it."""
    shape = equation.outputs[0].aval.shape

    def side(line: Side, own: list, other: list) -> tuple[Array, Array]:
        columns, constant = jnp.zeros((count, *shape)), line.offset
        for slope, same, opposite in zip(line.slopes or (), own, other, strict=True):
            full = jnp.broadcast_to(slope, shape)
            up, down = jnp.maximum(full, 0.0), jnp.minimum(full, 0.0)
            columns = columns + up[None] * same[0] + down[None] * opposite[0]
            constant = constant + up * same[1] + down * opposite[1]
        return columns, constant

    low = [(v.lower, v.lower_constant) for v in inputs]
    high = [(v.upper, v.upper_constant) for v in inputs]
    return Form(*side(relaxation.lower, low, high), *side(relaxation.upper, high, low))


def _close(problem: Problem, form: Form) -> Interval:
    """The interval of every entry over the threat set."""
    leaves, tree = jax.tree.flatten(problem.x)
    sizes = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]

    def least(columns: Array) -> Array:
        parts = jnp.split(columns, sizes)
        rows = [
            v.reshape(jnp.shape(leaf)) for v, leaf in zip(parts, leaves, strict=True)
        ]
        return problem.threat.minimum(problem.x, jax.tree.unflatten(tree, rows))

    def each(columns: Array) -> Array:
        flat = columns.reshape(columns.shape[0], -1)
        return jax.vmap(least, 1)(flat).reshape(columns.shape[1:])

    lower = each(form.lower) + form.lower_constant
    return Interval(lower, form.upper_constant - each(-form.upper))
