"""Linear bound propagation as a transformation: `crown(f)(threat, x) -> Interval`.

A linear function of a node is pulled back, equation by equation, to a linear function
of the input that lies below it on the whole set; the set's own minimum closes it. An
affine equation is pulled back by `jax.vjp` of the equation itself; a nonlinear one
through the two affine functions of `relax`, chosen by the sign of each coefficient.

The relaxations need intervals of the operands: these come from the same pass, from the
input on (`intermediate="crown"`), from interval arithmetic, or from a forward pass; and
always intersected with interval arithmetic. Bounds hold in exact arithmetic; NaN and
infinite coefficients prove nothing and leave the interval bound in place.

Sources: Zhang et al. 2018, arXiv:1811.00866; Xu et al. 2020, arXiv:2002.12920.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.bounds import patches, slopes
from certjax.bounds.chunks import in_chunks, rows_that_fit
from certjax.bounds.convolution import function_of
from certjax.bounds.forward import by_forward
from certjax.bounds.interval import halved, ibp
from certjax.bounds.patches import Patches, Window
from certjax.bounds.problem import (
    Anchors,
    anchors_of,
    distance_at,
    intersect,
    intersect_trees,
    is_exact,
    MAX_BYTES,
    mixings,
    pose,
    Problem,
    Refine,
    Slope,
    solve,
    unflatten,
    values_of,
)
from certjax.bounds.relax import is_float, operands, relax, Relaxation
from certjax.bounds.rounding_linear import sound_crown
from certjax.threat import Threat
from certjax.types import Array, Interval, PyTree
from certjax.walk import Equation, Node, read


Bound = Callable[[Threat, PyTree], Interval]
# what the rows are closed with: see `lower_bounds`
Closing = Callable[[Problem, Node, "Rows"], Array]
# the share of equation i for the coefficients of its result; None: the default one
Shares = Callable[[int, Any], Array | None]


def crown(
    f: Callable[[PyTree], PyTree],
    intermediate: str = "crown",
    *,
    slope: Slope = slopes.adaptive,
    max_bytes: int = MAX_BYTES,
    sound: bool = False,
) -> Bound:
    """Sound elementwise bounds of `f` over a threat set, by linear relaxation.

    For every z in the set, lower <= f(z) <= upper in exact arithmetic; never looser
    than `ibp(f)`. Differentiable; works under jit and vmap. On a GPU or TPU, certify
    under `jax.default_matmul_precision("highest")`, as for `ibp`.

    Args:
      f: a function of one example (or of one tree of arrays).
      intermediate: where the intervals in front of each nonlinearity come from:
        "crown" (the same method), "ibp" (CROWN-IBP) or "forward".
      slope: interval -> share of the right slope in the lower line of relu-like
        functions, from `slopes`; any value in [0, 1] is sound.
      max_bytes: what the coefficients of ONE example may occupy at a time; rows are
        taken in chunks that fit, with the same result.
      sound: enclose whatever a float evaluation of f returns, in any order of
        summation, not only the exact values; float_soundness.md states the model.

    Returns:
      `bound(threat, x) -> Interval`, lower and upper each like f(x).

    Raises:
      UnsupportedPrimitive: f uses an operation without an interval rule.
      ValueError: unknown `intermediate`, or not even one row fits into `max_bytes`.
    """
    if sound:
        return sound_crown(f, intermediate, slope=slope, max_bytes=max_bytes)
    refine = refinement(intermediate)

    def bound(threat: Threat, x: PyTree) -> Interval:
        problem, tree = pose(f, threat, x, slope=slope, max_bytes=max_bytes)
        solve(problem, refine)
        found = [enclose_output(problem, atom) for atom in problem.graph.outputs]
        return intersect_trees(ibp(f)(threat, x), unflatten(tree, found))

    return bound


# ------------------------------------------------------------------------ the way back


class Rows(NamedTuple):
    """`sum_node <coefficients[node], node - anchor> + value`, for each of R rows.

    coefficients: node -> [R, *node]; or, while all of them are local, `Patches` with
      R channels at every position.
    value: [R], with patches [R, *grid or 1s]; where every node has its anchor's value.
    """

    coefficients: dict[Node, Any]
    value: Array


def rows_of(problem: Problem, target: Node, rows: Array) -> Rows:
    """`<rows, target>`; rows: [R, *target]."""
    return Rows({target: rows}, _contract(rows, problem.anchors[target]))


def _by_default(i: int, coefficients: Any) -> None:
    """Every equation keeps the relaxation that it was solved with."""


def pull_back(
    problem: Problem,
    target: Node,
    state: Rows,
    share_of: Shares = _by_default,
    *,
    affine_only: bool = False,
    both: bool = True,
) -> Rows:
    """Linear functions of the input below `state` and below its negative.

    Args:
      target: a node whose equation's past is solved.
      state: R rows in the target alone.
      share_of: optimised shares; like the coefficients that arrive at an equation.
      affine_only: stop at the results of nonlinear equations.
      both: also the negatives; without, half the work.

    Returns:
      2R rows in the input nodes: R below the rows, then R below their negatives.
    """
    mirrored, settled = not both, {}
    for i in range(problem.positions.get(target, -1), -1, -1):
        equation = problem.graph.equations[i]
        if not any(o in state.coefficients for o in equation.outputs):
            continue
        if affine_only and i in problem.relaxations:
            settled.update(_take(state, equation))
            continue
        if i in problem.relaxations and not mirrored:
            state, mirrored = mirror(state), True
        state = _step(problem, i, state, share_of)
    state.coefficients.update(settled)
    return state if mirrored else mirror(state)


def lower_bounds(problem: Problem, target: Node, state: Rows) -> Array:
    """[2R] or, from patches, [2R, *grid] lower bounds of R rows and their negatives."""
    return close(problem, pull_back(problem, target, state))


def lower_ends(problem: Problem, target: Node, state: Rows) -> Array:
    """`lower_bounds` that leave the negatives of the rows unbounded."""
    found = close(problem, pull_back(problem, target, state, both=False))
    return jnp.concatenate([found, jnp.full_like(found, -jnp.inf)])


def _take(state: Rows, equation: Equation) -> dict[Node, Any]:
    """Remove and return the coefficients of an equation's results."""
    found = {o: state.coefficients.pop(o, None) for o in equation.outputs}
    return {o: c for o, c in found.items() if c is not None}


def _step(problem: Problem, i: int, state: Rows, share_of: Shares) -> Rows:
    """The rows with the results of equation i replaced by its operands."""
    equation = problem.graph.equations[i]
    values = values_of(problem, equation)
    taken = _take(state, equation)
    pulled = _pull_local(problem, i, values, taken, share_of)
    if pulled is None:
        state.coefficients.update(taken)
        state = spread(state)
        dense = [state.coefficients.pop(o, None) for o in equation.outputs]
        if i in problem.relaxations:
            share = share_of(i, dense[0])
            pulled = _pull_relaxed(problem, i, values, dense[0], share)
        else:
            pulled = _pull_affine(equation, values, dense), None
    parts, more = pulled
    if more is not None:
        state = state._replace(value=state.value + more)
    state = _add(state, equation, parts)
    return spread(state) if _too_wide(state) else state


def _pull_local(
    problem: Problem,
    i: int,
    values: list,
    taken: dict[Node, Any],
    share_of: Shares,
) -> tuple[dict[int, Any], Array | None] | None:
    """The step in patches, where there is one."""
    first = next(iter(taken.values()))
    if not isinstance(first, Patches):
        return None
    equation = problem.graph.equations[i]
    if i not in problem.relaxations:
        parts = patches.pull_affine(equation, values, first)
        return None if parts is None else (parts, None)
    relaxation = problem.relaxations[i]
    assert relaxation is not None
    anchors, window = anchors_of(problem, i, values), first.window
    if not patches.elementwise(relaxation, values, window.shape):
        return None
    share = share_of(i, first)
    if share is None:
        lines = patches.lines_under(relaxation, anchors, window)
    else:
        lines = patches.own_lines_under(equation, values, anchors, share, window)
    return patches.pull_relaxed(lines, operands(values), first)


def _too_wide(state: Rows) -> bool:
    found = state.coefficients.values()
    return any(isinstance(c, Patches) and c.window.covers() for c in found)


def spread(state: Rows) -> Rows:
    """The rows with every patch written out as an image."""
    local = [c for c in state.coefficients.values() if isinstance(c, Patches)]
    value = state.value
    if value.ndim > 1:
        grid = local[0].window.grid if local else value.shape[1:]
        value = jnp.broadcast_to(value, (value.shape[0], *grid)).ravel()
    return Rows({n: patches.images(c) for n, c in state.coefficients.items()}, value)


def mirror(state: Rows) -> Rows:
    """The rows and their negatives."""
    coefficients = {node: _both_signs(c) for node, c in state.coefficients.items()}
    return Rows(coefficients, _both_signs(state.value))


def _both_signs(c: Any) -> Any:
    if isinstance(c, Patches):
        return c._replace(values=_both_signs(c.values))
    return jnp.concatenate([c, -c])


def _add(state: Rows, equation: Equation, parts: dict[int, Any]) -> Rows:
    """The rows with more coefficients of an equation's operands."""
    sums = dict(state.coefficients)
    for i, part in parts.items():
        node = equation.inputs[i]
        total = patches.plus(sums.get(node), part)
        if total is None:  # windows that do not line up: everything as images
            images = {i: patches.images(part) for i, part in parts.items()}
            return _add(spread(state), equation, images)
        sums[node] = total
    return state._replace(coefficients=sums)


def _contract(rows: Array, value: Array) -> Array:
    """`<row, value>` for each row."""
    return jnp.matmul(
        rows.reshape(rows.shape[0], -1),
        value.ravel(),
        precision=jax.lax.Precision.HIGHEST,
    )


def _weigh(rows: Array, value: Array) -> Array:
    """`_contract` of rows that are not in memory yet: the product fuses with them."""
    return jnp.sum(rows * value[None], axis=tuple(range(1, rows.ndim)))


def _pull_affine(
    equation: Equation, values: list, taken: list[Array | None]
) -> dict[int, Array]:
    """Coefficients of the operands: the value at the anchors stays as it is."""
    chosen = operands(values)
    zeros = [jnp.zeros_like(values[i].lower) for i in chosen]
    outputs, pull = jax.vjp(function_of(equation, values, chosen), *zeros)
    rows = next(c for c in taken if c is not None)
    filled = [
        jnp.zeros((rows.shape[0], *v.shape), v.dtype) if c is None else c
        for c, v in zip(taken, outputs, strict=True)
    ]
    return dict(zip(chosen, jax.vmap(pull)(filled), strict=True))


def _pull_relaxed(
    problem: Problem, i: int, values: list, rows: Array, share: Array | None
) -> tuple[dict[int, Array], Array]:
    """Positive coefficients go through the lower function, negative ones the upper."""
    equation, chosen = problem.graph.equations[i], operands(values)
    anchors = anchors_of(problem, i, values)
    if share is None:
        relaxation = problem.relaxations[i]
        assert relaxation is not None
        shape = equation.outputs[0].aval.shape
        lines = patches.elementwise(relaxation, values, shape)
        through = _through_lines if problem.trained and lines else _through
        parts, more = through(relaxation, anchors, rows)
        return dict(zip(chosen, parts, strict=True)), more

    def one(row: Array, own: Array) -> tuple[list[Array], Array]:
        sides = relax(equation, values, own)
        # the anchor lies on the line of the default share, not on this one
        relaxation = Relaxation(*(s._replace(homogeneous=False) for s in sides))
        parts, more = _through(relaxation, anchors, row[None])
        return [part[0] for part in parts], more[0]

    parts, more = jax.vmap(one)(rows, share)
    return dict(zip(chosen, parts, strict=True)), more


def _through(
    relaxation: Relaxation, anchors: Anchors, rows: Array
) -> tuple[list[Array], Array]:
    """Coefficients of the operands, and the lines' distances at the anchors."""
    total, more = None, jnp.zeros(rows.shape[0], rows.dtype)
    signs = (jnp.maximum(rows, 0.0), jnp.minimum(rows, 0.0))
    for part, side in zip(signs, relaxation, strict=True):
        zeros = [jnp.zeros_like(anchor) for anchor in anchors.operands]
        pulled = jax.vmap(jax.vjp(side.linear, *zeros)[1])(part) if zeros else []
        distance = distance_at(side, anchors)
        if distance is not None:
            more = more + _weigh(part, distance)
        total = (
            pulled
            if total is None
            else [a + b for a, b in zip(total, pulled, strict=True)]
        )
    return list(total), more


def _through_lines(
    relaxation: Relaxation, anchors: Anchors, rows: Array
) -> tuple[list[Array], Array]:
    """`_through` for training: the rows are kept as halves, and so is their gradient.

    Each coefficient meets one line alone, that of its sign. A step of CROWN-IBP takes
    0.8 of the time; where no kernel gradient follows and rows are many, it costs more.
    """
    positive, halves = rows > 0, halved(rows)

    def times(below: Array | float, above: Array | float) -> Array:
        return 2 * (halves * jnp.where(positive, below, above))

    slopes_of = [side.slopes or () for side in relaxation]
    pulled = [times(*pair) for pair in zip(*slopes_of, strict=True)]
    distances = [distance_at(side, anchors) for side in relaxation]
    if all(distance is None for distance in distances):
        return pulled, jnp.zeros(rows.shape[0], rows.dtype)
    ends = [0.0 if distance is None else distance for distance in distances]
    return pulled, jnp.sum(times(*ends), axis=tuple(range(1, rows.ndim)))


# ------------------------------------------------------------------------- closing rows


def close(problem: Problem, rows: Rows) -> Array:
    """[R] lower bounds of the rows over the threat set."""
    if any(isinstance(c, Patches) for c in rows.coefficients.values()):
        if len(rows.coefficients) == len(problem.graph.inputs) == 1:
            (found,) = rows.coefficients.values()
            x = jax.tree.leaves(problem.x)[0]
            return patches.minimum(problem.threat, x, found) + rows.value
        rows = spread(rows)
    leaves, tree = jax.tree.flatten(problem.x)
    count = rows.value.shape[0]
    filled = [
        rows.coefficients.get(node, jnp.zeros((count, *jnp.shape(leaf))))
        for node, leaf in zip(problem.graph.inputs, leaves, strict=True)
    ]

    def one(*coefficients: Array) -> Array:
        return problem.threat.minimum(problem.x, jax.tree.unflatten(tree, coefficients))

    return jax.vmap(one)(*filled) + rows.value


def enclose(
    problem: Problem, node: Node, closing: Closing = lower_bounds, *, copies: int = 1
) -> Interval:
    """Bounds of every entry of a node, in chunks of rows that fit the budget.

    Args:
      closing: (problem, node, R rows) -> [2R] bounds of the rows and their negatives.
      copies: how many times the memory of `lower_bounds` it needs.
    """
    window = patches.identity(problem, node)
    if window is not None:
        return _enclose_channels(problem, node, window, closing, copies)
    shape, dtype = node.aval.shape, node.aval.dtype
    size = int(np.prod(shape))

    def some(index: Array) -> Interval:
        rows = jax.nn.one_hot(index, size, dtype=dtype).reshape(-1, *shape)
        found = closing(problem, node, rows_of(problem, node, rows))
        lower, negated = jnp.split(found, 2)
        return Interval(lower, -negated)

    fit = rows_that_fit(problem.max_bytes, copies * _bytes_of_a_row(problem, node))
    found = in_chunks(some, size, fit)
    return _shaped(found, shape)


def _enclose_channels(
    problem: Problem, node: Node, window: Window, closing: Closing, copies: int
) -> Interval:
    """The entries of a convolution's result: its channels, at all positions at once."""

    def start(index: Array) -> Rows:
        rows = patches.channels(window, index, node.aval.dtype)
        return Rows({node: rows}, patches.weigh(rows, problem.anchors[node]))

    def some(index: Array) -> Interval:
        found = closing(problem, node, start(index))
        return patches.split_signs(found, window)

    def plain(index: Array) -> Array:
        return lower_bounds(problem, node, start(index))

    fit = rows_that_fit(problem.max_bytes, copies * patches.bytes_of(plain))
    return patches.placed(in_chunks(some, window.channels, fit), window)


def _shaped(found: Interval, shape: Sequence[int]) -> Interval:
    return Interval(*(v.reshape(shape) for v in found))


def _bytes_of_a_row(problem: Problem, node: Node) -> int:
    """Both signs; about three copies of the widest node live at once."""
    last = problem.positions.get(node, -1)
    past = [o for e in problem.graph.equations[: last + 1] for o in e.outputs]
    sizes = [
        int(np.prod(v.aval.shape)) * v.aval.dtype.itemsize
        for v in (*problem.graph.inputs, *past)
        if v in problem.graph.depends
    ]
    return 6 * max(sizes)


def enclose_output(
    problem: Problem, atom: Any, closing: Closing = lower_bounds, *, copies: int = 1
) -> Interval:
    """Bounds of one output of the graph."""
    known = read(problem.env, atom)
    if not isinstance(known, Interval):
        return Interval(known, known)
    if not is_float(known.lower):
        return known
    return intersect(known, enclose(problem, atom, closing, copies=copies))


# ------------------------------------------------------------ intervals of the operands


def refinement(name: str) -> Refine:
    """The method that gives the intervals in front of the nonlinearities."""
    methods = {"crown": by_crown, "ibp": by_ibp, "forward": by_forward()}
    if name not in methods:
        raise ValueError(
            f"intermediate must be one of {sorted(methods)}, got {name!r}; "
            '"crown" is the tightest'
        )
    return methods[name]


def by_crown(problem: Problem, node: Node) -> Interval | None:
    """The node's own linear bounds, unless its interval is exact already."""
    return None if is_exact(problem, node) else enclose(problem, node)


FOLD = 1024  # entries up to which the affine part behind an operand is folded


def by_ibp(problem: Problem, node: Node) -> Interval | None:
    """Interval arithmetic, with the affine part since the last nonlinearity folded."""
    size = int(np.prod(node.aval.shape))
    if size > FOLD or mixings(problem, node, since_nonlinear=True) < 2:
        return None
    rows = jnp.eye(size, dtype=node.aval.dtype).reshape(size, *node.aval.shape)
    state = rows_of(problem, node, rows)
    state = pull_back(problem, node, state, affine_only=True, both=False)
    middle, spread = state.value, jnp.zeros_like(state.value)
    for cut, coefficients in state.coefficients.items():
        centre, radius = (
            problem.env[cut].upper + sign * problem.env[cut].lower for sign in (1, -1)
        )
        middle = middle + _contract(coefficients, centre / 2 - problem.anchors[cut])
        spread = spread + _contract(jnp.abs(coefficients), radius / 2)
    return _shaped(Interval(middle - spread, middle + spread), node.aval.shape)
