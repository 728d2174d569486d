"""Which primitives are affine, and the exact bounds of an affine function over a box.

The table is shared by every method: interval arithmetic folds the affine tail of a
function with it, linear bounds pull coefficients back through it with `jax.vjp`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from certjax.types import Array
from certjax.walk import (
    Atom,
    Equation,
    Graph,
    Node,
    primitives as p,
    split_p,
    stack_p,
    tile_p,
)


# affine in all operands at once
JOINTLY = {
    p.add_p,
    p.sub_p,
    p.neg_p,
    p.reshape_p,
    p.squeeze_p,
    p.transpose_p,
    p.broadcast_in_dim_p,
    p.slice_p,
    split_p,
    stack_p,
    tile_p,
    p.concatenate_p,
    p.pad_p,
    p.rev_p,
    p.reduce_sum_p,
    p.cumsum_p,
    p.reduce_window_sum_p,
    p.copy_p,
    p.stop_gradient_p,
}
# affine in either operand while the other one is constant
BILINEAR = {p.mul_p, p.dot_general_p, p.conv_general_dilated_p}
# affine in these operands; the others must be constant
IN_OPERANDS: dict = {
    p.div_p: {0},
    p.gather_p: {0},
    p.dynamic_slice_p: {0},
    p.dynamic_update_slice_p: {0, 1},
}
# an output entry that mixes several entries of one operand
MIXING = {
    p.dot_general_p,
    p.conv_general_dilated_p,
    p.reduce_sum_p,
    p.cumsum_p,
    p.reduce_window_sum_p,
}


def is_affine(equation: Equation, bounded: list[bool]) -> bool:
    """Is the equation affine in those operands that are bounded?"""
    primitive = equation.primitive
    if primitive is p.convert_element_type_p:
        return _floats(equation)
    if primitive is p.select_n_p:
        return not bounded[0]
    if primitive in BILINEAR:
        return sum(bounded) == 1
    if primitive in IN_OPERANDS:
        return all(i in IN_OPERANDS[primitive] for i, on in enumerate(bounded) if on)
    return primitive in JOINTLY


def _floats(equation: Equation) -> bool:
    (source,), (target,) = equation.inputs, equation.outputs
    return all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (source, target))


def affine_tail(graph: Graph) -> tuple[list[Equation], list[Node]]:
    """The affine end of a graph.

    Returns:
      The equations through which the outputs depend affinely on `cut`, in order, and
      `cut`: the nodes where something nonlinear (or an input) ends.
    """
    needed = {a for a in graph.outputs if a in graph.depends}
    tail: list[Equation] = []
    for equation in reversed(graph.equations):
        if not needed.intersection(equation.outputs):
            continue
        bounded = [a in graph.depends for a in equation.inputs]
        if is_affine(equation, bounded):
            needed.difference_update(equation.outputs)
            needed.update(a for a in equation.inputs if a in graph.depends)
            tail.append(equation)
    return tail[::-1], sorted_nodes(graph, needed)


def sorted_nodes(graph: Graph, nodes: set[Node]) -> list[Node]:
    """The nodes in the order in which the graph defines them."""
    defined = [*graph.inputs, *(o for e in graph.equations for o in e.outputs)]
    return [node for node in defined if node in nodes]


def mixing_steps(tail: list[Equation], depends: frozenset) -> int:
    """How many equations of the tail add up entries: one alone needs no folding."""

    def mixes(equation: Equation) -> bool:
        joins = sum(a in depends for a in equation.inputs) > 1
        sums = equation.primitive in (p.add_p, p.sub_p) and joins
        return equation.primitive in MIXING or sums

    return sum(map(mixes, tail))


def jacobian_rows(
    g: Callable[..., list[Array]], at: list[Array]
) -> tuple[list[Array], list[tuple[Array, ...]]]:
    """An affine function's values and the coefficients of each output entry.

    Args:
      g: affine, arrays -> list of arrays.
      at: the arguments.

    Returns:
      g(*at), and for each output the tuple (one per argument) of [size, *argument]
      coefficients, row i belonging to entry i of the flattened output.
    """
    values, pull = jax.vjp(g, *at)
    sizes = [int(np.prod(v.shape)) for v in values]
    coefficients = []
    for i, (value, size) in enumerate(zip(values, sizes, strict=True)):
        eye = jnp.eye(size, dtype=value.dtype).reshape(size, *value.shape)

        def row(e: Array, i: int = i) -> tuple[Array, ...]:
            zeros = [jnp.zeros_like(v) for v in values]
            return pull([e if j == i else z for j, z in enumerate(zeros)])

        coefficients.append(jax.vmap(row)(eye))
    return values, coefficients


def replay(
    tail: list[Equation], cut: list[Node], outputs: tuple[Atom, ...], env: dict
) -> Callable[..., list[Array]]:
    """The affine tail as a function of the cut's values; `env` holds the constants."""

    def g(*values: Array) -> list[Array]:
        local = {**env, **dict(zip(cut, values, strict=True))}

        def value(atom: Atom) -> Array:
            return local[atom] if isinstance(atom, Node) else atom.value

        for equation in tail:
            outs = equation.bind(*map(value, equation.inputs))
            local.update(zip(equation.outputs, outs, strict=True))
        return [jnp.asarray(value(atom)) for atom in outputs]

    return g
