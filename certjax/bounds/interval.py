"""Interval bound propagation as a transformation: `ibp(f)(threat, x) -> Interval`.

A rule maps the equation and its operands, of which at least one is an `Interval`, to
the outputs. Rules are registered by family; a family is a theorem about its members:
"nondecreasing in every operand", "even, least at 0", ... What has no rule raises.

The bounds hold in exact arithmetic. An infinite bound is a true, empty statement; a
NaN bound states nothing, and nothing is ever certified from it.

Source: Gowal et al. 2018, arXiv:1810.12715; Moore 1966, "Interval analysis".
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from certjax.bounds import composite
from certjax.bounds.affine import (
    affine_tail,
    jacobian_rows,
    mixing_steps,
    replay,
)
from certjax.bounds.errors import unsupported
from certjax.convolution import convolve
from certjax.threat import Threat
from certjax.types import Array, Interval, PyTree
from certjax.walk import (
    environment,
    Equation,
    Graph,
    primitives as p,
    read,
    split_p,
    stack_p,
    tile_p,
    trace,
)


rules: dict[Any, Callable[..., Any]] = {}


def ibp(
    f: Callable[[PyTree], PyTree], sound: bool = False
) -> Callable[[Threat, PyTree], Interval]:
    """Sound elementwise bounds of `f` over a threat set, by interval arithmetic.

    For every z in the set, lower <= f(z) <= upper in exact arithmetic. The affine end
    of f is folded before it is bounded, so that `ibp(lambda z: margins(f(z), y))` is
    the "elided last layer" of the papers. Differentiable; works under jit and vmap.

    On a GPU or TPU, certify under `jax.default_matmul_precision("highest")`, as the
    runners do: by default, these keep 11 or 8 bits of the factors of float32 products.

    Args:
      f: a function of one example (or of one tree of arrays).
      sound: enclose what a float evaluation of f can return, in any order of summation,
        not only the exact values; float_soundness.md states the model.

    Returns:
      `bound(threat, x) -> Interval`, lower and upper each like f(x).

    Raises:
      UnsupportedPrimitive: f uses an operation without an interval rule.
    """
    if sound:
        from certjax.bounds.rounding import sound_ibp  # built on the rules below

        return sound_ibp(f)

    def bound(threat: Threat, x: PyTree) -> Interval:
        return ibp_with_layers(f)(threat, x)[0]

    return bound


def ibp_with_layers(
    f: Callable[[PyTree], PyTree],
) -> Callable[[Threat, PyTree], tuple[Interval, tuple[Interval, ...]]]:
    """`ibp`, together with the intervals that enter each activation, in order.

    Activations are the nonlinear functions of one tensor (relu, tanh, softmax, ...).
    """

    def bound(threat: Threat, x: PyTree) -> tuple[Interval, tuple[Interval, ...]]:
        graph, tree = trace(f, x)
        graph = composite.fuse_activations(graph)
        box = threat.box(x)
        inputs = map(Interval, jax.tree.leaves(box.lower), jax.tree.leaves(box.upper))
        env = environment(graph, interval_step, *inputs)
        outputs = _outputs(graph, env)
        lower, upper = (
            jax.tree.unflatten(tree, ends) for ends in zip(*outputs, strict=True)
        )
        return Interval(lower, upper), activations(graph, env)

    return bound


def interval_step(equation: Equation, values: list) -> list:
    """One equation in interval arithmetic; exact where no operand is an interval."""
    bounded = [isinstance(v, Interval) for v in values]
    if not any(bounded):
        return equation.bind(*values)
    rule = rules.get(equation.primitive)
    if rule is None:
        raise unsupported(equation, values, "interval")
    out = rule(equation, *values)
    return out if equation.primitive.multiple_results else [out]


def activations(graph: Graph, env: dict) -> tuple[Interval, ...]:
    """Intervals in front of every nonlinear function of one bounded tensor."""
    layers = []
    for equation in graph.equations:
        values = [read(env, atom) for atom in equation.inputs]
        bounded = [v for v in values if isinstance(v, Interval)]
        if equation.primitive in ACTIVATIONS and len(bounded) == 1:
            layers.append(bounded[0])
    return tuple(layers)


def _outputs(graph: Graph, env: dict) -> list[Interval]:
    """Bounds of the outputs, the affine tail folded where that tightens them."""
    values = [_interval(read(env, atom)) for atom in graph.outputs]
    tail, cut = affine_tail(graph)
    inexact = all(_is_float(node) for node in (*cut, *graph.outputs))
    if mixing_steps(tail, graph.depends) < 2 or not inexact:
        return values
    centres = [(env[node].lower + env[node].upper) / 2 for node in cut]
    radii = [(env[node].upper - env[node].lower) / 2 for node in cut]
    g = replay(tail, cut, graph.outputs, env)
    middles, coefficients = jacobian_rows(g, centres)
    return [
        _spread(middle, rows, radii)
        for middle, rows in zip(middles, coefficients, strict=True)
    ]


def _spread(middle: Array, rows: tuple[Array, ...], radii: list[Array]) -> Interval:
    """`middle -+ sum |rows| radius`: the exact range of an affine function."""
    terms = [
        jnp.abs(row).reshape(row.shape[0], -1) @ radius.ravel()
        for row, radius in zip(rows, radii, strict=True)
    ]
    spread = sum(terms, jnp.zeros(())).reshape(middle.shape)
    return Interval(middle - spread, middle + spread)


def is_zero(c: Any) -> bool:
    """Is it the scalar 0, known while tracing?"""
    return not isinstance(c, jax.core.Tracer) and np.ndim(c) == 0 and float(c) == 0.0


def _is_float(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.floating)


def _interval(value: Any) -> Interval:
    """A constant is the interval of one point."""
    return value if isinstance(value, Interval) else Interval(value, value)


# --------------------------------------------------------------------------- families


def nondecreasing(*primitives: Any) -> None:
    """Register primitives that are nondecreasing in every bounded operand."""

    def rule(equation: Equation, *values: Any) -> Any:
        lower = equation.bind(*(_end(v, 0) for v in values))
        upper = equation.bind(*(_end(v, 1) for v in values))
        ends = [Interval(*pair) for pair in zip(lower, upper, strict=True)]
        return ends if equation.primitive.multiple_results else ends[0]

    rules.update(dict.fromkeys(primitives, rule))


def nonincreasing(*primitives: Any) -> None:
    """Register primitives of one operand that are nonincreasing."""

    def rule(equation: Equation, x: Interval) -> Interval:
        return Interval(equation.bind(x.upper)[0], equation.bind(x.lower)[0])

    rules.update(dict.fromkeys(primitives, rule))


def indexed(*primitives: Any, data: int = 1) -> None:
    """Register data movement whose `data` leading operands may be intervals."""

    def rule(equation: Equation, *values: Any) -> Any:
        if any(isinstance(v, Interval) for v in values[data:]):
            raise unsupported(
                equation, list(values), "interval", "its indices depend on the input"
            )
        lower = equation.bind(*(_end(v, 0) for v in values))[0]
        upper = equation.bind(*(_end(v, 1) for v in values))[0]
        return Interval(lower, upper)

    rules.update(dict.fromkeys(primitives, rule))


def even(*primitives: Any) -> None:
    """Register primitives of one operand, even and nondecreasing in |x|."""

    def rule(equation: Equation, x: Interval) -> Interval:
        return _even(lambda v: equation.bind(v)[0], x)

    rules.update(dict.fromkeys(primitives, rule))


def dips(least_at: float, least: float, *primitives: Any) -> None:
    """Register functions that fall up to `least_at` and rise from there on.

    least: a number not above the minimum.
    """

    def rule(equation: Equation, x: Interval) -> Interval:
        ends = [equation.bind(v)[0] for v in x]
        inside = (x.lower < least_at) & (x.upper > least_at)
        lower = jnp.where(inside, least, jnp.minimum(*ends))
        return Interval(lower.astype(ends[0].dtype), jnp.maximum(*ends))

    rules.update(dict.fromkeys(primitives, rule))


def _end(value: Any, which: int) -> Any:
    return value[which] if isinstance(value, Interval) else value


def _even(f: Callable[[Array], Array], x: Interval) -> Interval:
    a, b = f(x.lower), f(x.upper)
    crosses = (x.lower < 0) & (x.upper > 0)
    lower = jnp.where(crosses, f(jnp.zeros_like(a)), jnp.minimum(a, b))
    return Interval(lower, jnp.maximum(a, b))


nondecreasing(
    p.add_p,
    p.min_p,
    p.clamp_p,
    p.exp_p,
    p.exp2_p,
    p.expm1_p,
    p.tanh_p,
    p.logistic_p,
    p.erf_p,
    p.sign_p,
    p.floor_p,
    p.ceil_p,
    p.round_p,
    p.cbrt_p,
    p.atan_p,
    p.sinh_p,
    p.asinh_p,
    p.reduce_max_p,
    p.reduce_min_p,
    p.reduce_sum_p,
    p.reduce_window_sum_p,
    p.reduce_window_max_p,
    p.reduce_window_min_p,
    p.cumsum_p,
    p.cummax_p,
    p.cummin_p,
    p.cumlogsumexp_p,
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
    p.copy_p,
    p.stop_gradient_p,
    p.reduce_precision_p,
    composite.hard_tanh,
    composite.softplus,
    composite.logsumexp,
)
nonincreasing(p.neg_p, p.not_p, p.erfc_p)
indexed(p.gather_p, p.dynamic_slice_p)
indexed(p.dynamic_update_slice_p, data=2)
even(p.abs_p, p.square_p, p.cosh_p)
# minima from 50 digits, rounded down: x/(1+e^-x), x*Phi(x), and gelu's tanh form
dips(-1.2784645427610738, -0.27846455, composite.silu)
dips(-0.7517915246935645, -0.16997122, composite.gelu_erf)
dips(-0.7524614220710162, -0.17004078, composite.gelu_tanh)

# nonlinear functions of one tensor, in front of which layers are recorded
ACTIVATIONS = {
    p.max_p,
    p.min_p,
    p.clamp_p,
    p.tanh_p,
    p.logistic_p,
    p.erf_p,
    p.exp_p,
    p.abs_p,
    p.square_p,
    p.integer_pow_p,
    p.reduce_max_p,
    p.reduce_window_max_p,
    p.sin_p,
    p.cos_p,
    *(pattern.composite for pattern in composite.ELEMENTWISE),
    composite.softmax,
    composite.log_softmax,
    composite.logsumexp,
}


# ------------------------------------------------------------------ single primitives


def register(*primitives: Any) -> Callable:
    """Register one rule for some primitives."""

    def keep(rule: Callable) -> Callable:
        rules.update(dict.fromkeys(primitives, rule))
        return rule

    return keep


@register(p.max_p)
def _max(equation: Equation, a: Any, b: Any) -> Interval:
    x, other = (a, b) if isinstance(a, Interval) else (b, a)
    if not isinstance(other, Interval) and is_zero(other):
        # the same values; autodiff of a maximum divides the gradient among equals
        return Interval(*map(jax.nn.relu, x))
    ends = zip(_interval(a), _interval(b), strict=True)
    return Interval(*(equation.bind(*pair)[0] for pair in ends))


@register(p.sub_p)
def _sub(equation: Equation, a: Any, b: Any) -> Interval:
    a, b = _interval(a), _interval(b)
    lower, upper = equation.bind(a.lower, b.upper), equation.bind(a.upper, b.lower)
    return Interval(lower[0], upper[0])


@register(p.mul_p)
def _mul(equation: Equation, a: Any, b: Any) -> Interval:
    if equation.inputs[0] is equation.inputs[1]:
        return _even(lambda v: v * v, a)  # x * x, not two independent factors
    if isinstance(a, Interval) and isinstance(b, Interval):
        return _corners(_product, a, b)
    x, w = (a, b) if isinstance(a, Interval) else (b, a)
    ends = [equation.bind(v, w)[0] for v in x]
    return Interval(jnp.minimum(*ends), jnp.maximum(*ends))


def _product(a: Array, b: Array) -> Array:
    """`a * b` with 0 * inf = 0, the product of 0 and any real; NaN stays NaN."""
    product = a * b
    zero = ((a == 0) & jnp.isinf(b)) | ((b == 0) & jnp.isinf(a))
    return jnp.where(zero, jnp.zeros_like(product), product)


def _corners(f: Callable[[Array, Array], Array], a: Interval, b: Interval) -> Interval:
    """The range of a function that is monotone in each of its two arguments."""
    corners = [f(v, w) for v in a for w in b]
    return Interval(reduce(jnp.minimum, corners), reduce(jnp.maximum, corners))


@register(p.div_p)
def _div(equation: Equation, a: Any, b: Any) -> Interval:
    if not isinstance(b, Interval):
        ends = [equation.bind(v, b)[0] for v in a]
        return Interval(jnp.minimum(*ends), jnp.maximum(*ends))
    return _corners(_product, _interval(a), _reciprocal(b))


def _reciprocal(x: Interval) -> Interval:
    """`1 / x`: unbounded on the sides where x may come to 0, never NaN."""
    inside = (x.lower < 0) & (x.upper > 0)
    no_lower = inside | ((x.upper == 0) & (x.lower <= 0))
    no_upper = inside | ((x.lower == 0) & (x.upper >= 0))
    ends = [jnp.where(v == 0, jnp.ones_like(v), v) for v in x]
    lower = jnp.where(no_lower | (x.upper == 0), -jnp.inf, 1 / ends[1])
    upper = jnp.where(no_upper | (x.lower == 0), jnp.inf, 1 / ends[0])
    both_zero = (x.lower == 0) & (x.upper == 0)
    return Interval(
        jnp.where(both_zero, -jnp.inf, lower), jnp.where(both_zero, jnp.inf, upper)
    )


def _affine_in_one(equation: Equation, a: Any, b: Any) -> Interval:
    """Centre through the constant W, radius through |W|."""
    centre, radius = _centre_and_radius(a if isinstance(a, Interval) else b)
    if isinstance(a, Interval):
        middle = _applied(equation, centre, b)
        spread = _applied(equation, radius, jnp.abs(b))
    else:
        middle = _applied(equation, a, centre)
        spread = _applied(equation, jnp.abs(a), radius)
    return Interval(middle - spread, middle + spread)


def _centre_and_radius(x: Interval) -> tuple[Array, Array]:
    return halved(x.lower + x.upper), halved(x.upper - x.lower)


def halved(v: Array) -> Array:
    """`v / 2`, on a CPU by a 2 hidden from the compiler: it and its gradient are kept.

    XLA:CPU repeats sums and products, and all before them, for each reader: in a
    training step for the transposed copies that kernel gradients need, whose strided
    reads make it many times as slow. A division it keeps, in less memory. Halving is
    exact: the values are the same.
    """
    two = 2
    if jnp.issubdtype(v.dtype, jnp.floating) and jax.default_backend() == "cpu":
        two = jax.lax.optimization_barrier(jnp.full((), 2, v.dtype))
    return v / two


def _applied(equation: Equation, a: Array, b: Array) -> Array:
    """The equation's one result; a convolution's input gradient has the fast form."""
    if equation.primitive is p.conv_general_dilated_p:
        return convolve(equation.params, a, b)
    return equation.bind(a, b)[0]


@register(p.conv_general_dilated_p)
def _convolution(equation: Equation, a: Any, b: Any) -> Interval:
    if not (isinstance(a, Interval) and isinstance(b, Interval)):
        return _affine_in_one(equation, a, b)
    # Rump 1999, "Fast and parallel interval arithmetic": at most 1.5 x too wide
    centre_a, radius_a = (a.lower + a.upper) / 2, (a.upper - a.lower) / 2
    centre_b, radius_b = (b.lower + b.upper) / 2, (b.upper - b.lower) / 2
    middle = equation.bind(centre_a, centre_b)[0]
    spread = (
        equation.bind(jnp.abs(centre_a) + radius_a, radius_b)[0]
        + equation.bind(radius_a, jnp.abs(centre_b))[0]
    )
    return Interval(middle - spread, middle + spread)


@register(p.dot_general_p)
def _dot(equation: Equation, a: Any, b: Any) -> Interval:
    if not (isinstance(a, Interval) and isinstance(b, Interval)):
        return _affine_in_one(equation, a, b)
    (contract_a, contract_b), (batch_a, batch_b) = equation.params["dimension_numbers"]
    a = Interval(*(_batch_free_contracted(v, batch_a, contract_a) for v in a))
    b = Interval(*(_batch_free_contracted(v, batch_b, contract_b) for v in b))
    left = Interval(*(v[:, :, None] for v in a))
    right = Interval(*(v[:, None] for v in b))
    terms = _corners(lambda v, w: _product(*jnp.broadcast_arrays(v, w)), left, right)
    shape = equation.outputs[0].aval.shape
    return Interval(*(jnp.sum(v, axis=-1).reshape(shape) for v in terms))


def _batch_free_contracted(x: Array, batch: Any, contract: Any) -> Array:
    """Axes of a dot_general operand in the order [batch, free, contracted], merged."""
    free = [i for i in range(x.ndim) if i not in (*batch, *contract)]
    sizes = [
        int(np.prod([x.shape[i] for i in axes])) for axes in (batch, free, contract)
    ]
    return jnp.transpose(x, (*batch, *free, *contract)).reshape(sizes)


@register(p.log_p, p.log1p_p, p.sqrt_p)
def _from_a_pole(equation: Equation, x: Interval) -> Interval:
    """Nondecreasing where defined; a part of the set outside the domain is no value."""
    start = -1.0 if equation.primitive is p.log1p_p else 0.0
    lower = equation.bind(jnp.maximum(x.lower, start))[0]
    return Interval(lower, equation.bind(x.upper)[0])


@register(p.rsqrt_p)
def _rsqrt(equation: Equation, x: Interval) -> Interval:
    upper = equation.bind(jnp.maximum(x.lower, 0.0))[0]
    return Interval(equation.bind(x.upper)[0], upper)


@register(p.integer_pow_p)
def _integer_pow(equation: Equation, x: Interval) -> Interval:
    y = equation.params["y"]
    if y < 0:
        base = _reciprocal(x)
        return _power(lambda v: v**-y, base, -y)
    return _power(lambda v: equation.bind(v)[0], x, y)


def _power(f: Callable[[Array], Array], x: Interval, y: int) -> Interval:
    return _even(f, x) if y % 2 == 0 else Interval(f(x.lower), f(x.upper))


@register(p.pow_p)
def _pow(equation: Equation, a: Any, b: Any) -> Interval:
    """By corners for a base >= 0 (monotone in each argument); else no bound."""

    def f(v: Array, w: Array) -> Array:
        return equation.bind(jnp.maximum(v, 0.0), w)[0]

    a, b = _interval(a), _interval(b)
    lower, upper = _corners(f, a, b)
    known = a.lower >= 0
    return Interval(
        jnp.where(known, lower, -jnp.inf).astype(lower.dtype),
        jnp.where(known, upper, jnp.inf).astype(upper.dtype),
    )


@register(p.sin_p, p.cos_p)
def _wave(equation: Equation, x: Interval) -> Interval:
    """Endpoints, and the crests and troughs that lie between them."""
    crest = np.pi / 2 if equation.primitive is p.sin_p else 0.0
    ends = [equation.bind(v)[0] for v in x]
    top, bottom = (_has_point(x, crest + shift) for shift in (0.0, np.pi))
    wide = ~(x.upper - x.lower < 2 * np.pi)  # also where an end is infinite
    lower = jnp.where(bottom | wide, -1.0, jnp.minimum(*ends))
    upper = jnp.where(top | wide, 1.0, jnp.maximum(*ends))
    known = ~(jnp.isnan(x.lower) | jnp.isnan(x.upper))
    dtype = ends[0].dtype
    return Interval(
        jnp.where(known, lower, jnp.nan).astype(dtype),
        jnp.where(known, upper, jnp.nan).astype(dtype),
    )


def _has_point(x: Interval, offset: float) -> Array:
    """Does some offset + 2 pi k lie in the interval? Widened against rounding."""
    turns = [(v - offset) / (2 * np.pi) for v in x]
    slack = 4e-7 * (1 + jnp.maximum(jnp.abs(turns[0]), jnp.abs(turns[1])))
    return jnp.floor(turns[1] + slack) >= jnp.ceil(turns[0] - slack)


@register(p.convert_element_type_p)
def _convert(equation: Equation, x: Interval) -> Interval:
    if jnp.issubdtype(equation.params["new_dtype"], jnp.bool_):
        crosses = ~((x.lower > 0) | (x.upper < 0))
        zero = (x.lower == 0) & (x.upper == 0)
        return Interval(~crosses, ~zero)
    source, target = x.lower.dtype, equation.params["new_dtype"]
    if jnp.issubdtype(target, jnp.integer) and not _keeps_order(source, target):
        raise unsupported(
            equation, [x], "interval", f"{source} does not fit into {target}: it wraps"
        )
    ends = [equation.bind(v)[0] for v in x]
    if not jnp.issubdtype(ends[0].dtype, jnp.integer):
        return Interval(*ends)
    limits = jnp.iinfo(ends[0].dtype)  # NaN converts to some number: no bound instead
    unknown = jnp.isnan(x.lower) | jnp.isnan(x.upper)
    return Interval(
        jnp.where(unknown, limits.min, ends[0]), jnp.where(unknown, limits.max, ends[1])
    )


def _keeps_order(source: Any, target: Any) -> bool:
    """Into an integer type: from a smaller one, or saturating from a float."""
    if jnp.issubdtype(source, jnp.floating):
        return jnp.dtype(target) in (jnp.dtype("int32"), jnp.dtype("int64"))
    return np.can_cast(source, target, "safe")


@register(p.and_p, p.or_p, p.reduce_and_p, p.reduce_or_p)
def _logic(equation: Equation, *values: Any) -> Interval:
    """Nondecreasing on booleans; on the bits of integers they are not."""
    if equation.outputs[0].aval.dtype != bool:
        raise unsupported(
            equation, list(values), "interval", "bitwise operations are not monotone"
        )
    ends = [equation.bind(*(_end(v, i) for v in values))[0] for i in (0, 1)]
    return Interval(*ends)


@register(p.gt_p, p.ge_p)
def _greater(equation: Equation, a: Any, b: Any) -> Interval:
    """Three-valued: lower = surely true, upper = possibly true."""
    a, b = _interval(a), _interval(b)
    surely, possibly = equation.bind(a.lower, b.upper), equation.bind(a.upper, b.lower)
    return _unless_unknown(surely[0], possibly[0], a, b)


@register(p.lt_p, p.le_p)
def _less(equation: Equation, a: Any, b: Any) -> Interval:
    a, b = _interval(a), _interval(b)
    surely, possibly = equation.bind(a.upper, b.lower), equation.bind(a.lower, b.upper)
    return _unless_unknown(surely[0], possibly[0], a, b)


def _unless_unknown(surely: Array, possibly: Array, *operands: Interval) -> Interval:
    """A comparison with a NaN bound is undecided, though IEEE calls it false."""
    unknown = reduce(jnp.logical_or, (jnp.isnan(end) for v in operands for end in v))
    return Interval(surely & ~unknown, possibly | unknown)


@register(p.eq_p)
def _equal(_: Equation, a: Any, b: Any) -> Interval:
    return _may_equal(_interval(a), _interval(b))


@register(p.ne_p)
def _differ(equation: Equation, a: Any, b: Any) -> Interval:
    if equation.inputs[0] is equation.inputs[1]:
        nothing = jnp.zeros(equation.outputs[0].aval.shape, bool)
        return Interval(nothing, nothing)  # x != x asks for NaN: never for a real
    same = _may_equal(_interval(a), _interval(b))
    return Interval(~same.upper, ~same.lower)


def _may_equal(a: Interval, b: Interval) -> Interval:
    apart = (a.lower > b.upper) | (b.lower > a.upper)
    one_point = (a.lower == a.upper) & (b.lower == b.upper) & (a.lower == b.lower)
    return Interval(one_point, ~apart)


@register(p.is_finite_p)
def _is_finite(equation: Equation, x: Interval) -> Interval:
    surely = equation.bind(x.lower)[0] & equation.bind(x.upper)[0]
    return Interval(surely, jnp.ones_like(surely))


@register(p.select_n_p)
def _select(equation: Equation, which: Any, *cases: Any) -> Interval:
    """By the predicate where it is decided, else the hull of both cases."""
    cases = tuple(map(_interval, cases))
    if not isinstance(which, Interval):
        ends = [equation.bind(which, *(c[i] for c in cases))[0] for i in (0, 1)]
        return Interval(*ends)
    if len(cases) != 2 or which.lower.dtype != bool:
        raise unsupported(
            equation, [which, *cases], "interval", "its index depends on the input"
        )
    no, yes = cases
    lower = jnp.where(which.lower, yes.lower, jnp.minimum(yes.lower, no.lower))
    upper = jnp.where(which.lower, yes.upper, jnp.maximum(yes.upper, no.upper))
    return Interval(
        jnp.where(which.upper, lower, no.lower), jnp.where(which.upper, upper, no.upper)
    )


@register(p.argmax_p, p.argmin_p)
def _argmax(equation: Equation, x: Interval) -> Interval:
    """The least and the greatest index that can win; equal where it is decided."""
    (axis,) = equation.params["axes"]
    if equation.primitive is p.argmin_p:
        x = Interval(-x.upper, -x.lower)
    can_win = ~(x.upper < jnp.max(x.lower, axis=axis, keepdims=True))
    last = x.lower.shape[axis] - 1
    first_index = jnp.argmax(can_win, axis=axis)
    last_index = last - jnp.argmax(jnp.flip(can_win, axis), axis=axis)
    dtype = equation.params["index_dtype"]
    return Interval(first_index.astype(dtype), last_index.astype(dtype))


@register(p.sort_p)
def _sort(equation: Equation, *values: Any) -> list[Interval]:
    """Order statistics are nondecreasing; keys that carry others along are refused."""
    if len(values) != 1:
        raise unsupported(
            equation, list(values), "interval", "the order depends on the input"
        )
    along = {"axis": equation.params["dimension"], "keepdims": True}
    unknown = reduce(jnp.logical_or, (jnp.isnan(v).any(**along) for v in values[0]))
    ends = (equation.bind(v)[0] for v in values[0])  # sorts NaN to the end
    return [Interval(*(jnp.where(unknown, jnp.nan, v) for v in ends))]


# ---------------------------------------------------------------------------- composite


@register(composite.leaky_relu, composite.elu)
def _bent(equation: Equation, x: Any, slope: Any) -> Interval:
    """Monotone on each side of 0, where they are 0; any slope, any sign."""
    if isinstance(slope, Interval) or not isinstance(x, Interval):
        raise unsupported(
            equation, [x, slope], "interval", "its slope depends on the input"
        )
    ends = [equation.bind(v, slope)[0] for v in x]
    low, high = jnp.minimum(*ends), jnp.maximum(*ends)
    crosses = (x.lower < 0) & (x.upper > 0)
    return Interval(
        jnp.where(crosses, jnp.minimum(low, 0.0), low),
        jnp.where(crosses, jnp.maximum(high, 0.0), high),
    )


@register(composite.softmax)
def _softmax(equation: Equation, x: Interval) -> Interval:
    """Entry i is least at lower_i with all others at their upper ends."""
    return Interval(*map(jnp.exp, _log_softmax(equation, x)))


@register(composite.log_softmax)
def _log_softmax(equation: Equation, x: Interval) -> Interval:
    """log_softmax_i = -log(1 + sum_{j != i} e^{x_j - x_i}), monotone in each x_j."""
    axis = equation.params["axis"]

    def end(own: Array, others: Array) -> Array:
        return own - jnp.logaddexp(own, _logsumexp_of_others(others, axis))

    return Interval(end(x.lower, x.upper), end(x.upper, x.lower))


def _logsumexp_of_others(x: Array, axis: int) -> Array:
    """log sum_{j != i} e^{x_j} for every i: [K, K] work, but no cancellation."""
    x = jnp.moveaxis(x, axis, -1)
    size = x.shape[-1]
    apart = jnp.where(jnp.eye(size, dtype=bool), -jnp.inf, x[..., None, :])
    return jnp.moveaxis(jax.nn.logsumexp(apart, axis=-1), -1, axis)


# ------------------------------------------------------------------------- NaN is kept


def _keeping_nan(rule: Callable) -> Callable:
    """The rule, NaN wherever an end of its operand is.

    XLA:CPU takes a NaN that it sees at compile time for any value inside an exponential
    (exp(where(c, nan, v)) becomes exp(v)): what is unknown would seem to be known.
    """

    def kept(equation: Equation, x: Interval, *others: Any) -> Interval:
        out = rule(equation, x, *others)
        unknown = jnp.isnan(x.lower) | jnp.isnan(x.upper)
        if (axis := equation.params.get("axis")) is not None:
            same_rank = out.lower.ndim == x.lower.ndim
            unknown = jnp.any(unknown, axis, keepdims=same_rank)
        return Interval(*(jnp.where(unknown, jnp.nan, end) for end in out))

    return kept


EXPONENTIALS = (p.exp_p, p.exp2_p, p.expm1_p, p.cosh_p, p.sinh_p, p.logistic_p)
EXPONENTIALS += (composite.softmax, composite.log_softmax, composite.logsumexp)
EXPONENTIALS += (composite.softplus, composite.silu, composite.elu)
rules.update({each: _keeping_nan(rules[each]) for each in EXPONENTIALS})
