"""Linear bounds that hold for the floating point program: `crown(f, sound=True)`.

The pass of `linear`, with a running error. Along the way back one invariant is kept,
in exact arithmetic, for the values that a float program may give its nodes:

    <rows, target>  >=  sum_node <coefficients[node], node - anchor> + value - error

Every step charges `error` for the program's roundings in the equation and in the
anchors, for those of the coefficients it computes, and for those of the value: each is
at most some gamma times <|coefficients|, sizes>, where the sizes of the nodes come from
the enclosures of `rounding`. What is to be charged for the same coefficients is added
up first. float_soundness.md has the proof of each charge.

The lines around a nonlinear function take their slopes from `relax`, where any slope
will do, and get an offset that is proved on a grid with a bound on the second
derivative. An equation with neither gives way to the two ends of its enclosure.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.bounds import composite, patches, rounding, slopes
from certjax.bounds.affine import BILINEAR, is_affine, MIXING
from certjax.bounds.chunks import in_chunks, rows_that_fit
from certjax.bounds.climb import best_of, Climb
from certjax.bounds.convolution import function_of
from certjax.bounds.patches import Patches, Window
from certjax.bounds.problem import default_share, is_exact
from certjax.bounds.relax import HALF, relax, SHARED
from certjax.bounds.rewrite import live
from certjax.bounds.rounding import Thin
from certjax.threat import L2, Threat
from certjax.types import Array, Interval, PyTree
from certjax.walk import Equation, Graph, Node, primitives as p, read


Bound = Callable[[Threat, PyTree], Interval]
Slope = Callable[[Interval], Array]


class Lines(NamedTuple):
    """Below and above a function of one operand.

    slopes, offsets: [1, *result], or one for each row.
    homogeneous: (lower, upper) is the offset 0, up to roundings?
    """

    operand: int
    slopes: tuple[Array, Array]
    offsets: tuple[Array, Array]
    homogeneous: tuple[bool, bool]


class Problem(NamedTuple):
    """A graph over a threat set, the enclosures of its nodes and the lines so far.

    apart: node -> how far two evaluations of it by one program may lie apart.
    """

    graph: Graph
    threat: Threat
    x: PyTree
    env: dict[Any, Any]
    lines: dict[int, Lines]
    anchors: dict[Node, Array]
    apart: dict[Node, Array]
    positions: dict[Node, int]
    slope: Slope
    max_bytes: int


class Rows(NamedTuple):
    """`sum_node <coefficients[node], node - anchor> + value - error`, for R rows.

    coefficients: node -> [R, *node], or `Patches` as in `linear`.
    value, error: [R], with patches [R, *grid or 1s].
    charges: node -> [*node]: `<|coefficients[node]|, charges[node]>` is still to be
      added to the error.
    """

    coefficients: dict[Any, Any]
    value: Array
    error: Array
    charges: dict[Any, Array]


def sound_crown(
    f: Callable[[PyTree], PyTree],
    intermediate: str = "crown",
    *,
    slope: Slope = slopes.adaptive,
    max_bytes: int = 2**30,
    climb: Climb | None = None,
) -> Bound:
    """`crown(f, sound=True)`: linear bounds of what a float evaluation can return.

    Never looser than `ibp(f, sound=True)`, in the same model.

    Args:
      f: a function of one example (or of one tree of arrays).
      intermediate: where the intervals in front of each nonlinearity come from:
        "crown" (the same method) or "ibp" (CROWN-IBP).
      slope: interval -> share of the right slope in the lower line of relu-like
        functions; any value in [0, 1] is sound.
      max_bytes: what the coefficients of one example may occupy at a time.
      climb: how the slopes behind the outputs are optimised; None: they are not. What
        is ascended leaves out the errors, the best is chosen with them.

    Returns:
      `bound(threat, x) -> Interval`, lower and upper each like f(x).
    """
    if intermediate not in ("crown", "ibp"):
        raise ValueError(
            f'intermediate must be "crown" or "ibp" where sound=True, got '
            f'{intermediate!r}; "crown" is the tightest'
        )

    def bound(threat: Threat, x: PyTree) -> Interval:
        problem, tree = _pose(f, threat, x, slope, max_bytes)
        _solve(problem, refine=intermediate == "crown")
        known = rounding.outputs_of(problem.graph, problem.env)
        found = [
            _output(problem, atom, interval, climb)
            for atom, interval in zip(problem.graph.outputs, known, strict=True)
        ]
        ends = zip(*found, strict=True)
        return Interval(*(jax.tree.unflatten(tree, e) for e in ends))

    return bound


def _pose(
    f: Callable, threat: Threat, x: PyTree, slope: Slope, max_bytes: int
) -> tuple[Problem, Any]:
    graph, tree = rounding.graph_of(f, x)
    graph = live(graph)
    env = dict(zip(graph.inputs, rounding.domain(threat, x), strict=True))
    positions = {o: i for i, e in enumerate(graph.equations) for o in e.outputs}
    anchors = {node: jnp.zeros_like(env[node].lower) for node in graph.inputs}
    settings = (positions, slope, max_bytes)
    return Problem(graph, threat, x, env, {}, anchors, {**anchors}, *settings), tree


def _solve(problem: Problem, refine: bool) -> None:
    """The enclosure of every node, and the lines around every function with a rule."""
    for i, equation in enumerate(problem.graph.equations):
        values = [read(problem.env, atom) for atom in equation.inputs]
        operand = _operand(equation, values)
        if operand is not None:
            node = equation.inputs[operand]
            if refine and not is_exact(problem, node):
                found = _enclose(problem, node)
                best = _intersect(problem.env[node], found)
                problem.env[node] = Interval(*rounding.unfused(*best))
                values[operand] = problem.env[node]
            share = default_share(problem.slope, equation, values)
            problem.lines[i] = _lines(equation, values, operand, share)
        outputs = rounding.step_once(equation, values)
        problem.env.update(zip(equation.outputs, outputs, strict=True))
        problem.anchors.update(_anchored(problem, i, values))
        problem.apart.update(_set_apart(problem, equation, values))


def _anchored(problem: Problem, i: int, values: list) -> dict[Node, Array]:
    """One value of each result, near to what the equation makes of the anchors.

    An affine step then leaves the value of the rows there as it is, up to roundings. On
    nonlinear results a homogeneous line goes through it; elsewhere it is 0.
    """
    equation = problem.graph.equations[i]
    lines, outputs = problem.lines.get(i), equation.outputs
    if lines is not None and any(lines.homogeneous):
        slope = lines.slopes[lines.homogeneous.index(True)][0]
        return {outputs[0]: slope * problem.anchors[equation.inputs[lines.operand]]}
    if _stays_affine(equation, values, [problem.env[o] for o in outputs]):
        bounded = _bounded(equation, values)
        full = _fixed(values, bounded)
        for j, on in enumerate(bounded):
            full[j] = problem.anchors[equation.inputs[j]] if on else full[j]
        return dict(zip(outputs, equation.bind(*full), strict=True))
    floats = [o for o in outputs if rounding.is_float(o.aval.dtype)]
    return {o: jnp.zeros(o.aval.shape, o.aval.dtype) for o in floats}


# how a difference of operands is handed on: no steeper than 1; than 1.2 + |parameter|
LEVEL = {p.max_p, p.min_p, p.abs_p, p.clamp_p, composite.hard_tanh}
SMOOTH = {
    composite.leaky_relu,
    composite.elu,
    composite.softplus,
    composite.silu,
    composite.gelu_erf,
    composite.gelu_tanh,
}
# computed once, whoever reads them
COSTLY = {
    *MIXING,
    *(p.exp_p, p.exp2_p, p.expm1_p, p.log_p, p.log1p_p, p.pow_p, p.div_p),
    *(p.sqrt_p, p.rsqrt_p, p.cbrt_p, p.sin_p, p.cos_p, p.atan_p, p.asinh_p),
    *(p.tanh_p, p.logistic_p, p.erf_p, p.erfc_p, p.sinh_p, p.cosh_p),
    *(p.reduce_max_p, p.reduce_min_p, p.reduce_window_max_p, p.reduce_window_min_p),
}


def _set_apart(problem: Problem, equation: Equation, values: list) -> dict[Node, Array]:
    """How far two evaluations of each result may lie apart.

    XLA repeats what is cheap wherever it is read, and combines the constants that it
    meets there: each evaluation has roundings of its own. Sums of products and costly
    functions are computed once. No two lie further apart than the enclosure is wide.
    """
    outputs = [o for o in equation.outputs if rounding.is_float(o.aval.dtype)]
    results = [problem.env[o] for o in outputs]
    if not (results and isinstance(results[0], Interval)):
        return {}
    found = widths = [v.upper - v.lower for v in results]
    if equation.primitive not in MIXING and _stays_affine(equation, values, results):
        found = _moved_apart(problem, equation, values)
    elif isinstance(results[0], Thin):
        pass
    elif equation.primitive in COSTLY:
        found = [jnp.zeros_like(width) for width in widths]
    elif equation.primitive in LEVEL:
        found = [sum(_each_apart(problem, equation, values))]
    elif equation.primitive in SMOOTH and not any(_bounded(equation, values)[1:]):
        found = [_smoothly_apart(problem, equation, values)]
    least = [jnp.minimum(*pair) for pair in zip(found, widths, strict=True)]
    # computed once, and not again wherever rows are charged with it
    return dict(zip(outputs, jax.lax.optimization_barrier(least), strict=True))


def _smoothly_apart(problem: Problem, equation: Equation, values: list) -> Array:
    """Of an activation with errors up to 16 u (1 + |x|), and a constant parameter."""
    (x, *parameters), (before, *_) = values, _each_apart(problem, equation, values)
    steep = 1.25 + sum(map(jnp.abs, parameters))
    unit, size = _coarsest(equation).unit, rounding.magnitude(x)
    return steep * (before + 32 * unit * (1 + size))


def _each_apart(problem: Problem, equation: Equation, values: list) -> list:
    """Of every operand; factors stay as they are, other constants lie nowhere else."""

    def of(atom: Any, value: Any) -> Any:
        constant = not isinstance(value, Interval) or isinstance(value, Thin)
        if constant and equation.primitive in MULTIPLIES:
            return rounding.coefficient_size(value, equation.primitive)
        if isinstance(value, Interval):
            return problem.apart[atom]
        floating = rounding.is_float(jnp.result_type(value))
        return jnp.zeros_like(value) if floating else value

    return [of(*pair) for pair in zip(equation.inputs, values, strict=True)]


def _moved_apart(problem: Problem, equation: Equation, values: list) -> list[Array]:
    """Of the results of an affine equation that sums nothing."""
    moved = rounding.absolute_step(equation, _each_apart(problem, equation, values))
    if equation.primitive in ARITHMETIC:
        sizes = rounding.absolute_step(equation, _sizes(problem, equation, values))
        gamma, inverse = rounding.growth(6, _coarsest(equation).unit)
        per = 2 * gamma * (1 + inverse)
        moved = [v + per * size for v, size in zip(moved, sizes, strict=True)]
    unit = _coarsest(equation).unit
    return [v * (1 + 8 * unit) for v in moved]


def _stays_affine(equation: Equation, values: list, results: list) -> bool:
    """Is it pulled back through its adjoint?"""
    return is_affine(equation, _bounded(equation, values)) and not isinstance(
        results[0], Thin
    )


def _fixed(values: list, bounded: list[bool]) -> list:
    """The operands; those that the program computes from constants at their centre."""
    return [
        rounding.ball(v)[0] if isinstance(v, Interval) and not on else v
        for v, on in zip(values, bounded, strict=True)
    ]


def _output(
    problem: Problem, atom: Any, known: Interval, climb: Climb | None
) -> Interval:
    value = read(problem.env, atom)
    wide = isinstance(value, Interval) and not isinstance(value, Thin)
    if not wide or not rounding.is_float(known.lower.dtype):
        return known
    return _intersect(known, _enclose(problem, atom, climb))


def _intersect(known: Interval, found: Interval) -> Interval:
    """Both enclose the program's values; what is NaN says nothing."""
    return Interval(
        jnp.where(found.lower > known.lower, found.lower, known.lower),
        jnp.where(found.upper < known.upper, found.upper, known.upper),
    )


# ------------------------------------------------------------------------------- lines

# the greatest second derivative; 0: straight between its bends
CURVATURE: dict[Any, float] = {
    p.max_p: 0.0,
    p.min_p: 0.0,
    p.abs_p: 0.0,
    composite.leaky_relu: 0.0,
    p.square_p: 2.0,
    p.tanh_p: 0.78,
    p.logistic_p: 0.1,
    p.erf_p: 1.0,
    p.sin_p: 1.0,
    p.cos_p: 1.0,
    composite.softplus: 0.26,
    composite.silu: 0.51,
    composite.gelu_erf: 0.81,
    composite.gelu_tanh: 1.0,
}
GRID = 32


def _operand(equation: Equation, values: list) -> int | None:
    """The position of the one bounded operand of a function that has lines."""
    bounded = [i for i, v in enumerate(values) if isinstance(v, Interval)]
    known = equation.primitive in CURVATURE and len(bounded) == 1
    if not known or isinstance(values[bounded[0]], Thin):
        return None
    x, out = values[bounded[0]].lower, equation.outputs[0].aval
    return bounded[0] if rounding.is_float(x.dtype) and x.shape == out.shape else None


def _lines(
    equation: Equation, values: list, operand: int, shares: Array | None
) -> Lines:
    """Slopes from `relax`; offsets proved: the extremes of f(x) - slope x on a grid.

    Between two neighbours of the grid a function with second derivatives in [-M, M]
    leaves its chord by at most M (distance)^2 / 8.

    Args:
      shares: [R, *result], or one for all rows that broadcasts there, or None.
    """
    x = values[operand]
    sides, homogeneous = _slopes(equation, values, shares)
    grid = _grid(equation, values, operand)

    def evaluate(point: Array) -> Interval:
        here = [Thin(point, point) if i == operand else v for i, v in enumerate(values)]
        return Interval(*rounding.sound_step(equation, here)[0])

    low, high = jax.vmap(evaluate)(grid)
    unit, tiny, _ = rounding.format_of(x.lower.dtype)
    size, value = rounding.magnitude(x), rounding.magnitude(Interval(low, high)).max(0)
    distance = 1.01 * (x.upper - x.lower) / GRID + 4 * unit * size
    sagitta = CURVATURE[equation.primitive] * distance * distance / 7
    slack = sagitta + 2 * (high - low).max(0) + 16 * tiny
    rounded = lambda slope: 16 * unit * (jnp.abs(slope) * size + value)

    # not a reduction of an array: for three points XLA:CPU takes ten times as long
    def below(slope: Array) -> Array:
        gaps = [v - slope * point for v, point in zip(low, grid, strict=True)]
        return reduce(jnp.minimum, gaps) - slack - rounded(slope)

    def above(slope: Array) -> Array:
        gaps = [v - slope * point for v, point in zip(high, grid, strict=True)]
        return reduce(jnp.maximum, gaps) + slack + rounded(slope)

    offsets = rounding.unfused(jax.vmap(below)(sides[0]), jax.vmap(above)(sides[1]))
    sides = rounding.unfused(*sides)
    return Lines(operand, sides, offsets, homogeneous)


def _slopes(
    equation: Equation, values: list, shares: Array | None
) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
    """[R or 1, *result] each: of the lower and the upper line; which go through 0."""
    output = equation.outputs[0].aval
    flags: list[bool] = []

    def slopes(share: Array | None) -> tuple[Array, ...]:
        sides = relax(equation, values, share)
        flags[:] = [side.homogeneous for side in sides]
        found = [side.slopes[0] for side in sides]
        return tuple(
            jnp.broadcast_to(s, output.shape).astype(output.dtype) for s in found
        )

    if shares is None or shares.ndim <= len(output.shape):
        low, high = slopes(shares)
        return (low[None], high[None]), (flags[0], flags[1])
    low, high = jax.vmap(slopes)(shares)
    return (low, high), (False, False)  # the anchor lies on the default line


def _grid(equation: Equation, values: list, operand: int) -> Array:
    """Points of the operand's interval: the ends, the bend, and what lies between."""
    x = values[operand]
    if CURVATURE[equation.primitive]:
        steps = jnp.arange(1, GRID, dtype=x.lower.dtype) / GRID
        between = jax.vmap(lambda t: x.lower + t * (x.upper - x.lower))(steps)
        between = jnp.clip(between, x.lower[None], x.upper[None])
    else:
        others = [v for i, v in enumerate(values) if i != operand]
        compares = equation.primitive in (p.max_p, p.min_p)
        bend = others[0] if compares else jnp.zeros((), x.lower.dtype)
        between = jnp.clip(jnp.broadcast_to(bend, x.lower.shape), *x)[None]
    return jnp.concatenate([x.lower[None], between, x.upper[None]])


# ------------------------------------------------------------------------ the way back


def _enclose(problem: Problem, node: Node, climb: Climb | None = None) -> Interval:
    """Bounds of every entry of a node, in chunks of rows that fit the budget."""
    window = None if climb else patches.identity(problem, node)
    if window is not None:
        return _enclose_channels(problem, node, window)
    shape, dtype = node.aval.shape, node.aval.dtype
    size = max(1, int(np.prod(shape)))
    widest = max(v.aval.size for v in (*problem.positions, *problem.graph.inputs))

    def some(index: Array) -> Interval:
        rows = jax.nn.one_hot(index, size, dtype=dtype).reshape(-1, *shape)
        both = jnp.concatenate([rows, -rows])
        lower, negated = jnp.split(_bounded_below(problem, node, both, climb), 2)
        return Interval(lower, -negated)

    fit = rows_that_fit(problem.max_bytes, 8 * widest * dtype.itemsize)
    found = in_chunks(some, size, fit)
    return Interval(*(v.reshape(shape) for v in found))


def _enclose_channels(problem: Problem, node: Node, window: Window) -> Interval:
    """The entries of a convolution's result: its channels, at all positions at once."""

    def lower(index: Array) -> Array:
        rows = patches.channels(window, index, node.aval.dtype)
        both = jnp.concatenate([rows.values, -rows.values])
        rows = rows._replace(values=both)
        return _close(problem, _pull_back(problem, node, rows, {}))[0]

    fit = rows_that_fit(problem.max_bytes, patches.bytes_of(lower))
    some = lambda index: patches.split_signs(lower(index), window)
    return patches.placed(in_chunks(some, window.channels, fit), window)


def _bounded_below(
    problem: Problem, node: Node, rows: Array, climb: Climb | None
) -> Array:
    """[R] proved lower bounds of `<rows, node>`; the best of the climb."""

    def lower(shares: dict[int, Array]) -> tuple[Array, Array]:
        return _close(problem, _pull_back(problem, node, rows, shares))

    start = _starting_shares(problem, node, len(rows)) if climb else {}
    return best_of(climb, lower, start) if climb and start else lower({})[0]


def _starting_shares(problem: Problem, node: Node, count: int) -> dict[int, Array]:
    """[count, *output] for every equation in front of a node that reads a share."""
    shares: dict[int, Array] = {}
    for i in problem.lines:
        equation = problem.graph.equations[i]
        if equation.primitive not in SHARED or i > problem.positions.get(node, -1):
            continue
        values = [read(problem.env, atom) for atom in equation.inputs]
        share = default_share(problem.slope, equation, values)
        output = equation.outputs[0].aval
        share = jnp.asarray(HALF if share is None else share, output.dtype)
        whole = jnp.broadcast_to(_like(share, output.ndim), output.shape)
        shares[i] = jnp.broadcast_to(whole[None], (count, *output.shape))
    return shares


def _like(share: Array, rank: int) -> Array:
    return share.reshape((1,) * (rank - share.ndim) + share.shape)


def _pull_back(
    problem: Problem, target: Node, rows: Any, shares: dict[int, Array]
) -> Rows:
    """Linear functions of the input nodes below `<rows, target>`."""
    value = _contract(rows, problem.anchors[target])  # one product a row: exact
    state = Rows({target: rows}, value, jnp.zeros_like(value), {})
    for i in range(problem.positions.get(target, -1), -1, -1):
        equation = problem.graph.equations[i]
        if any(o in state.coefficients for o in equation.outputs):
            state = _step(problem, state, i, shares.get(i))
    return state


def _step(problem: Problem, state: Rows, i: int, share: Array | None) -> Rows:
    """One equation, in patches where that works."""
    equation = problem.graph.equations[i]
    taken = [state.coefficients.get(o) for o in equation.outputs]
    pulled = _pull(problem, i, taken, share)
    if pulled is None:
        return _step(problem, _spread(state), i, share)
    state = _charged(problem, i, state, pulled)
    state = _add(problem, state, equation, pulled)
    found = state.coefficients.values()
    wide = any(isinstance(c, Patches) and c.window.covers() for c in found)
    return _spread(state) if wide else state


def _charged(problem: Problem, i: int, state: Rows, pulled: Rows) -> Rows:
    """The rows without equation i's results; what these are charged is paid.

    An equation that hands its coefficients on hands on the charges as well.
    """
    equation, error = problem.graph.equations[i], state.error
    rows, charges = dict(state.coefficients), dict(state.charges)
    heir = _heir(equation, pulled)
    for k, node in enumerate(equation.outputs):
        taken = rows.pop(node, None)
        due = [
            v for v in (charges.pop(node, None), pulled.charges.get(k)) if v is not None
        ]
        if taken is None or not due:
            continue
        if heir is None or heir in rows:
            error = _plus(error, _charge(taken, sum(due[1:], due[0]), 1.0))
        else:
            charges[heir] = sum(due[1:], due[0]).reshape(heir.aval.shape)
    return state._replace(coefficients=rows, error=error, charges=charges)


PASSED_ON = {
    p.add_p,
    p.sub_p,
    p.neg_p,
    p.reshape_p,
    p.squeeze_p,
    p.broadcast_in_dim_p,
    p.copy_p,
    p.stop_gradient_p,
}


def _heir(equation: Equation, pulled: Rows) -> Node | None:
    """The operand whose coefficients are those of the result, up to signs."""
    if equation.primitive not in PASSED_ON or len(pulled.coefficients) != 1:
        return None
    (i,) = pulled.coefficients
    node = equation.inputs[i]
    return node if node.aval.size == equation.outputs[0].aval.size else None


def _spread(state: Rows) -> Rows:
    """The rows with every patch written out as an image."""
    local = [c for c in state.coefficients.values() if isinstance(c, Patches)]
    grid = local[0].window.grid if local else state.value.shape[1:]

    def flat(sums: Array) -> Array:
        if sums.ndim < 2:
            return sums
        return jnp.broadcast_to(sums, (len(sums), *grid)).ravel()

    dense = {n: patches.images(c) for n, c in state.coefficients.items()}
    return Rows(dense, flat(state.value), flat(state.error), state.charges)


def _pull(problem: Problem, i: int, taken: list, share: Array | None) -> Rows | None:
    """Through lines, through the adjoint, or to the enclosure.

    Returns:
      rows in the positions of equation i's operands, what they add, and the charges of
      its results by their positions; None: there is no such step in patches.
    """
    equation = problem.graph.equations[i]
    values = [read(problem.env, atom) for atom in equation.inputs]
    results = [problem.env[o] for o in equation.outputs]
    if i in problem.lines and not isinstance(results[0], Thin):
        lines = problem.lines[i]
        if share is not None:
            lines = _lines(equation, values, lines.operand, share)
        return _through_lines(problem, i, lines, taken[0])
    if _stays_affine(equation, values, results):
        return _through_adjoint(problem, equation, values, taken)
    return _to_constants(results, taken)


def _add(problem: Problem, state: Rows, equation: Equation, pulled: Rows) -> Rows:
    """The parts join what is known of the operands; each sum is rounded once."""
    sums, charges = dict(state.coefficients), dict(state.charges)
    error = _plus(state.error, pulled.error)
    for i, part in pulled.coefficients.items():
        node = equation.inputs[i]
        known = sums.get(node)
        if known is not None:
            unit, size = rounding.format_of(node.aval.dtype).unit, _reach(problem, node)
            own = 4 * unit * size + problem.apart[node]
            due = charges.pop(node, jnp.zeros_like(size)) + own
            error = _plus(error, _charge(known, due, 1.0))
            error = _plus(error, _charge(part, own, 1.0))
            error = _plus(error, _underflow(size))
            part = patches.plus(known, part)  # noqa: PLW2901
        if part is None:  # windows that do not line up
            return _add(problem, _spread(state), equation, _spread(pulled))
        sums[node] = part
    total = state.value + pulled.value
    unit = rounding.format_of(total.dtype).unit
    return Rows(sums, total, _plus(error, 4 * unit * jnp.abs(total)), charges)


def _plus(error: Array, more: Array) -> Array:
    """Their sum, rounded up."""
    total = error + more
    return total * (1 + 4 * rounding.format_of(total.dtype).unit)


def _underflow(sizes: Array) -> Array:
    """What coefficients of such nodes lose when they are flushed to zero."""
    return 8 * rounding.format_of(sizes.dtype).tiny * (1 + jnp.sum(sizes))


def _reach(problem: Problem, node: Node) -> Array:
    """At least |z - anchor| for every value z of a node."""
    unit = rounding.format_of(node.aval.dtype).unit
    size = rounding.magnitude(problem.env[node]) + jnp.abs(problem.anchors[node])
    return size * (1 + 2 * unit)


def _bounded(equation: Equation, values: list) -> list[bool]:
    """Which operands stay variables: all intervals, but not a thin factor."""
    wide = [isinstance(v, Interval) and not isinstance(v, Thin) for v in values]
    if equation.primitive in BILINEAR and sum(wide) == 1:
        return wide
    return [isinstance(v, Interval) for v in values]


def _map(f: Callable[[Array], Array], rows: Any) -> Any:
    """`f` of every coefficient."""
    if isinstance(rows, Patches):
        return rows._replace(values=f(rows.values))
    return f(rows)


def _contract(rows: Any, value: Array) -> Array:
    """`<row, value>` for each row."""
    if isinstance(rows, Patches):
        return patches.weigh(rows, value)
    flat = rows.reshape(rows.shape[0], -1)
    value = jnp.broadcast_to(value, rows.shape[1:]).ravel()
    return jnp.matmul(flat, value, precision=jax.lax.Precision.HIGHEST)


def _weigh(rows: Any, values: Array) -> Array:
    """`<row, value>`, with one value for all rows or one for each."""
    if len(values) == 1:
        return _contract(rows, values[0])
    return jnp.sum(rows * values, axis=tuple(range(1, rows.ndim)))


def _charge(rows: Any, sizes: Array, per: float) -> Array:
    """At least `per <|row|, sizes>`, and what is flushed to zero on the way."""
    dtype = rows.values.dtype if isinstance(rows, Patches) else rows.dtype
    unit, tiny, _ = rounding.format_of(dtype)
    _, inverse = rounding.growth(sizes.size + 8, unit)
    sizes = sizes + tiny
    total = _contract(_map(jnp.abs, rows), sizes)
    total = total + 8 * tiny * (sizes.size + jnp.sum(sizes))
    return per * total * (1 + inverse) * (1 + 8 * unit)


def _through_lines(problem: Problem, i: int, lines: Lines, rows: Any) -> Rows:
    """Positive coefficients go through the lower line, negative ones the upper."""
    equation = problem.graph.equations[i]
    node = equation.inputs[lines.operand]
    before, after = problem.anchors[node], problem.anchors[equation.outputs[0]]
    ends = [_map(partial(cut, 0.0), rows) for cut in (jnp.maximum, jnp.minimum)]
    if isinstance(rows, Patches):
        low, high = (patches.unfold(s[0], rows.window)[None] for s in lines.slopes)
        part = rows._replace(values=ends[0].values * low + ends[1].values * high)
    else:
        part = ends[0] * lines.slopes[0] + ends[1] * lines.slopes[1]
    steepest, farthest = (
        jnp.maximum(*(jnp.abs(v).max(0) for v in pair))
        for pair in (lines.slopes, lines.offsets)
    )
    reach = _reach(problem, node)
    sizes = steepest * reach + farthest + jnp.abs(after)
    gamma, _ = rounding.growth(sizes.size + 16, rounding.format_of(sizes.dtype).unit)
    distances = [
        slope * before[None] + offset - after[None]
        for slope, offset in zip(lines.slopes, lines.offsets, strict=True)
    ]
    charge, value = gamma * sizes, jnp.zeros((), sizes.dtype)
    for k, (end, distance) in enumerate(zip(ends, distances, strict=True)):
        if lines.homogeneous[k]:
            charge = charge + jnp.abs(distance[0])
        elif len(distance) == 1:
            # max(r, 0) = (r + |r|) / 2 and min(r, 0) = (r - |r|) / 2: one pass over
            # the magnitudes pays for this and for the error
            value = value + _contract(rows, distance[0] / 2)
            charge = charge + (-0.5, 0.5)[k] * distance[0]
        else:
            value = value + _weigh(end, distance)
    charge = jnp.maximum(charge, 0.0)
    return Rows({lines.operand: part}, value, _underflow(reach), {0: charge})


def _to_constants(outputs: list, taken: list) -> Rows:
    """The ends of the enclosures: always true; the anchors are 0."""
    value, charges = jnp.zeros((), outputs[0].lower.dtype), {}
    for k, (rows, x) in enumerate(zip(taken, outputs, strict=True)):
        if rows is None:
            continue
        ends = [_map(partial(cut, 0.0), rows) for cut in (jnp.maximum, jnp.minimum)]
        value = value + sum(map(_contract, ends, x))
        unit = rounding.format_of(x.lower.dtype).unit
        gamma, _ = rounding.growth(x.lower.size + 8, unit)
        charges[k] = gamma * rounding.magnitude(x)
    return Rows({}, value, jnp.zeros_like(value), charges)


def _through_adjoint(
    problem: Problem, equation: Equation, values: list, taken: list
) -> Rows | None:
    """Coefficients by the adjoint of the equation; the value stays as it is."""
    bounded = _bounded(equation, values)
    chosen = [i for i, on in enumerate(bounded) if on]
    fixed = _fixed(values, bounded)

    zeros = [jnp.zeros_like(values[i].lower) for i in chosen]
    at_zero, pull = jax.vjp(function_of(equation, fixed, chosen), *zeros)
    given = next(c for c in taken if c is not None)
    if isinstance(given, Patches):
        parts = patches.pull_affine(equation, fixed, given)
    else:
        rows = [
            jnp.zeros((len(given), *v.shape), v.dtype) if c is None else c
            for c, v in zip(taken, at_zero, strict=True)
        ]
        parts = dict(zip(chosen, jax.vmap(pull)(rows), strict=True))
    if parts is None:
        return None
    charges, underflow = _adjoint_charges(problem, equation, values, chosen)
    return Rows(parts, jnp.zeros_like(underflow), underflow, charges)


MULTIPLIES = {*BILINEAR, p.div_p}
ARITHMETIC = {
    *MULTIPLIES,
    p.add_p,
    p.sub_p,
    p.reduce_sum_p,
    p.cumsum_p,
    p.reduce_window_sum_p,
    p.convert_element_type_p,
}


def _adjoint_charges(
    problem: Problem, equation: Equation, values: list, chosen: list[int]
) -> tuple[dict[int, Array], Array]:
    """What the program, the anchors and the coefficients may be off, and underflow.

    All are bounded by |equation|(sizes of the operands and their anchors): its
    roundings forwards, at z and at the anchors, and backwards. A factor that the
    program computes is replaced by its centre; its radius is charged.
    """
    dtype = equation.outputs[0].aval.dtype
    arithmetic = equation.primitive in ARITHMETIC
    forwards = rounding.roundings(equation) if arithmetic else 0
    backwards = _back_roundings(equation, values, chosen)
    if not (forwards or backwards):
        return {}, jnp.zeros((), dtype)
    sizes, factors = _sizes(problem, equation, values), rounding.factor_error(equation)
    unit, tiny, _ = _coarsest(equation)
    gamma, inverse = rounding.growth(forwards + 2, unit, factors)
    back, _ = rounding.growth(backwards + 2, unit, factors)
    per = (2 * gamma + back) * (1 + inverse) * (1 + 8 * unit)
    moved = rounding.absolute_step(equation, sizes)
    charges = {k: per * size for k, size in enumerate(moved)}
    if not arithmetic:  # copies are added up, which may be evaluated apart
        copies = [problem.apart[node] for node in equation.outputs]
        charges = {k: charge + copies[k] for k, charge in charges.items()}
    radii = _thin_radii(equation, values, sizes)
    if radii is not None:
        charges[0] = charges[0] + (1 + 2 * inverse) * (1 + 8 * unit) * radii
    flushed = sum(jnp.sum(sizes[i]) for i in chosen)
    return charges, 16 * (backwards + 2) * tiny * (1 + flushed)


def _sizes(problem: Problem, equation: Equation, values: list) -> list:
    """Of the operands and their anchors, and of constants."""
    return [
        _reach(problem, equation.inputs[i])
        if on
        else rounding.coefficient_size(values[i], equation.primitive)
        for i, on in enumerate(_bounded(equation, values))
    ]


def _coarsest(equation: Equation) -> rounding.Format:
    """The worst of the formats of an equation's operands and results."""
    formats = [
        rounding.format_of(v.aval.dtype)
        for v in (*equation.inputs, *equation.outputs)
        if rounding.is_float(v.aval.dtype)
    ]
    return rounding.Format(*map(max, zip(*formats, strict=True)))


def _thin_radii(equation: Equation, values: list, sizes: list) -> Array | None:
    """|x| times the radius of a factor that the program computes."""
    thin = [i for i, v in enumerate(values) if isinstance(v, Thin)]
    if equation.primitive not in BILINEAR or len(thin) != 1:
        return None
    operands = list(sizes)
    operands[thin[0]] = rounding.ball(values[thin[0]])[1]
    return rounding.absolute_step(equation, operands)[0]


def _back_roundings(equation: Equation, values: list, chosen: list[int]) -> int:
    """How many products or terms one coefficient of an operand adds up, at most."""
    outputs = sum(o.aval.size for o in equation.outputs)
    operand = max(1, *(values[i].lower.size for i in chosen))
    primitive = equation.primitive
    if primitive is p.dot_general_p:
        other = equation.inputs[1 - chosen[0]].aval
        batch = equation.params["dimension_numbers"][1][1 - chosen[0]]
        batches = int(np.prod([other.shape[i] for i in batch]))
        return other.size // max(1, rounding.products(equation) * batches)
    if primitive is p.conv_general_dilated_p and chosen == [0]:
        kernel = equation.inputs[1].aval
        features = equation.params["dimension_numbers"].rhs_spec[1]
        return kernel.size // max(1, kernel.shape[features])
    if primitive in (p.cumsum_p, p.reduce_window_sum_p):
        return rounding.roundings(equation)
    if primitive in (p.mul_p, p.div_p, p.convert_element_type_p):
        return 1 + outputs // operand
    if primitive in (p.gather_p, p.pad_p, p.conv_general_dilated_p):
        return outputs
    if primitive in (p.add_p, p.sub_p):  # an operand may be one number
        operand = max(1, min(values[i].lower.size for i in chosen))
    return 0 if outputs <= operand else -(-outputs // operand)


# ----------------------------------------------------------------------- closing rows


def _close(problem: Problem, rows: Rows) -> tuple[Array, Array]:
    """[R] or [R, *grid] lower bounds of the rows over the threat set, rounded down.

    And the same without errors: of these the gradient is cheap.
    """
    if len(problem.graph.inputs) > 1 or not rows.coefficients:
        rows = _spread(rows)
    leaves = jax.tree.leaves(problem.x)
    unit, _, largest = rounding.format_of(rows.value.dtype)
    error, eps = rows.error, getattr(problem.threat, "eps", 0.0)
    for node, leaf in zip(problem.graph.inputs, leaves, strict=True):
        if node in rows.coefficients:
            coarse, tiny, _ = rounding.format_of(node.aval.dtype)
            unit = max(unit, coarse)
            size = rounding.magnitude(problem.env[node])
            size = jnp.maximum(size, jnp.abs(leaf) + jnp.abs(eps))
            gamma, _ = rounding.growth(2 * leaf.size + len(leaves) + 32, coarse)
            due = 2 * gamma * size + rows.charges.get(node, jnp.zeros_like(size))
            error = _plus(error, _charge(rows.coefficients[node], due, 1.0))
            if isinstance(problem.threat, L2):  # squares that are flushed to zero
                error = _plus(error, 2 * math.sqrt(leaf.size * tiny))
    least = _least(problem, rows)
    total = least + rows.value
    size = jnp.abs(least) + jnp.abs(rows.value) + error
    lower = total - error * (1 + 16 * unit) - 8 * unit * size
    # overflow on the way, in the program or here: then nothing is known
    return jnp.where(size < largest / 2**10, lower, -jnp.inf), total


def _least(problem: Problem, rows: Rows) -> Array:
    """The minimum of the rows without constants over the enlarged set."""
    threat = rounding.enlarged(problem.threat, problem.x)
    leaves, tree = jax.tree.flatten(problem.x)
    found = [rows.coefficients.get(node) for node in problem.graph.inputs]
    if isinstance(found[0], Patches):
        return patches.minimum(threat, leaves[0], found[0])
    filled = [
        jnp.zeros((len(rows.value), *jnp.shape(leaf)), rows.value.dtype)
        if c is None
        else c
        for c, leaf in zip(found, leaves, strict=True)
    ]

    def one(*coefficients: Array) -> Array:
        return threat.minimum(problem.x, jax.tree.unflatten(tree, coefficients))

    return jax.vmap(one)(*filled)
