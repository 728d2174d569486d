"""Bounds that hold for the floating point program itself: `ibp(f, sound=True)`.

Each rule returns an interval that contains the exact result AND every result that a
float program may return for operands inside their intervals: any order of summation,
fused multiply-adds or not, subnormals kept or flushed, sums and products of constants
reassociated as XLA does. The rule's own rounding is included. float_soundness.md
states the model, its assumptions and the proofs; names here follow it:

    u      unit roundoff (2^-24 in float32)         tiny   smallest normal number
    gamma  (1 + u)^n - 1, relative error of a sum of n products in any order

A NaN bound says: the program may return NaN here, or nothing is known.

Source: Higham 2002, "Accuracy and stability of numerical algorithms", chapters 2 to 4;
Rump 1999, "Fast and parallel interval arithmetic".
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from certjax.bounds import composite, interval
from certjax.bounds.affine import affine_tail, jacobian_rows, mixing_steps, replay
from certjax.bounds.errors import unsupported
from certjax.threat import Box, Threat
from certjax.types import Array, Interval, PyTree
from certjax.walk import (
    environment,
    Equation,
    Graph,
    Node,
    primitives as p,
    split_p,
    stack_p,
    tile_p,
    trace,
)


rules: dict[Any, Callable[..., Any]] = {}


class Thin(Interval):
    """Encloses a constant that the program computes: no perturbation, only rounding."""


class Format(NamedTuple):
    """Of a floating point type: unit roundoff, smallest normal, largest number."""

    unit: float
    tiny: float
    largest: float


def sound_ibp(f: Callable[[PyTree], PyTree]) -> Callable[[Threat, PyTree], Interval]:
    """`ibp(f, sound=True)`: encloses what a float evaluation of `f` can return.

    For every representable point z of the set, any float program for f in the model of
    float_soundness.md returns a value in [lower, upper]. Where the program may
    return NaN the bounds are NaN; where it may overflow they are infinite.

    Raises:
      UnsupportedPrimitive: f uses an operation whose rounding is not modelled.
    """

    def bound(threat: Threat, x: PyTree) -> Interval:
        graph, tree = graph_of(f, x)
        env = environment(graph, step_once, *domain(threat, x))
        outputs = outputs_of(graph, env)
        lower, upper = (jax.tree.unflatten(tree, e) for e in zip(*outputs, strict=True))
        return Interval(lower, upper)

    return bound


def graph_of(f: Callable, x: PyTree) -> tuple[Graph, Any]:
    """The traced function, its activations fused, and the tree of its output."""
    graph, tree = trace(f, x)
    return composite.fuse_activations(graph), tree


def sound_step(equation: Equation, values: list) -> list:
    """One equation, as a float program may compute it."""
    bounded = [v for v in values if isinstance(v, Interval)]
    if not bounded and _rounds_nothing(equation):
        return equation.bind(*values)
    thin = all(isinstance(v, Thin) for v in bounded)
    if not bounded:
        values = [_point(v) for v in values]
    table = rules if _has_floats(equation) else interval.rules
    rule = table.get(equation.primitive)
    if rule is None:
        raise unsupported(equation, values, "rounding", "its rounding is not modelled")
    out = rule(equation, *values)
    outs = out if equation.primitive.multiple_results else [out]
    return [Thin(*v) for v in outs] if thin else outs


def step_once(equation: Equation, values: list) -> list:
    """`sound_step`, and what the program computes from constants (scales) only once."""
    outs = sound_step(equation, values)
    return [Thin(*unfused(*v)) if isinstance(v, Thin) else v for v in outs]


def _has_floats(equation: Equation) -> bool:
    atoms = (*equation.inputs, *equation.outputs)
    return any(is_float(atom.aval.dtype) for atom in atoms)


def _rounds_nothing(equation: Equation) -> bool:
    """Is it exact on constants?"""
    if equation.primitive is p.convert_element_type_p:
        (x,) = equation.inputs
        target = equation.outputs[0].aval.dtype
        return not is_float(target) or _widens(x.aval.dtype, target)
    primitive = equation.primitive
    exact = primitive in EXACT or primitive in COMPARISONS or primitive is p.scatter_p
    return exact or not equation.inputs or not _has_floats(equation)


def domain(threat: Threat, x: PyTree) -> list[Interval]:
    """The box of the set, leaf by leaf."""
    box = enlarged(threat, x).box(jax.lax.optimization_barrier(x))
    ends = zip(jax.tree.leaves(box.lower), jax.tree.leaves(box.upper), strict=True)
    return [_normal(Interval(*end)) for end in ends]


def enlarged(threat: Threat, x: PyTree) -> Threat:
    """The set, its radius one float larger: the user's number may not be a float."""
    if isinstance(threat, Box):
        return threat
    eps = jnp.asarray(threat.eps, x.dtype) * (1 + 2 * format_of(x.dtype).unit)
    return dataclasses.replace(threat, eps=eps)


# ------------------------------------------------------------------------- arithmetic


def is_float(dtype: Any) -> bool:
    """A floating point type?"""
    return jnp.issubdtype(dtype, jnp.floating)


def format_of(dtype: Any) -> Format:
    """The constants of a floating point type."""
    info = jnp.finfo(dtype)
    return Format(float(info.eps) / 2, float(info.tiny), float(info.max))


def growth(terms: float, unit: float, factors: float = 0.0) -> tuple[float, float]:
    """`(1 + u)^n - 1` and `(1 - u)^-n - 1`, rounded up; factors: see factor_error."""
    up = terms * math.log1p(unit) + 2 * math.log1p(factors)
    down = -terms * math.log1p(-unit) - 2 * math.log1p(-factors)
    if down > 80:
        return math.inf, math.inf
    return math.expm1(up) * (1 + 8 * unit), math.expm1(down) * (1 + 8 * unit)


def factor_error(equation: Equation) -> float:
    """Relative error of each factor of a product before it is multiplied.

    Accelerators round float32 factors to bfloat16 (TPU) or TensorFloat-32 (GPU) unless
    the precision is HIGHEST; a TPU then still works with six bfloat16 passes.
    """
    if jax.default_backend() == "cpu" or equation.outputs[0].aval.dtype != jnp.float32:
        return 0.0
    precision = equation.params.get("precision")
    both = precision if isinstance(precision, tuple) else (precision,)
    if all(v == lax.Precision.HIGHEST for v in both):
        return 2.0**-21
    return 2.0**-7


def magnitude(x: Interval) -> Array:
    """The greatest magnitude in an interval."""
    return jnp.maximum(jnp.abs(x.lower), jnp.abs(x.upper))


def _has_zero(x: Interval) -> Array:
    return (x.lower <= 0) & (x.upper >= 0)


def _has_infinity(x: Interval) -> Array:
    return jnp.isinf(x.lower) | jnp.isinf(x.upper)


def _where(condition: Array, x: Interval, lower: Any, upper: Any) -> Interval:
    return Interval(
        jnp.where(condition, lower, x.lower).astype(x.lower.dtype),
        jnp.where(condition, upper, x.upper).astype(x.upper.dtype),
    )


def _nan_where(condition: Array, x: Interval) -> Interval:
    return _where(condition, x, jnp.nan, jnp.nan)


def _outward(x: Interval, ulps: Any = 0.0, slack: Any = 0.0) -> Interval:
    """Both ends moved outwards by `ulps` u |end| + slack, and more for doing so.

    slack may be a pair: for the lower end, for the upper end.

    An end that came out infinite on the wrong side, or beyond a quarter of the largest
    number, may be finite, or infinite, in another order of evaluation.
    """
    unit, tiny, largest = format_of(x.lower.dtype)
    lower, upper = jnp.minimum(x.lower, largest), jnp.maximum(x.upper, -largest)

    below, above = slack if isinstance(slack, tuple) else (slack, slack)

    def width(v: Array, slack: Any) -> Array:
        return (ulps + 3) * unit * jnp.abs(v) + (slack + 8 * tiny)

    lower, upper = lower - width(lower, below), upper + width(upper, above)
    lower = jnp.where(lower < -largest / 4, -jnp.inf, lower)
    upper = jnp.where(upper > largest / 4, jnp.inf, upper)
    ends = Interval(lower.astype(x.lower.dtype), upper.astype(x.upper.dtype))
    return _nan_where(jnp.isnan(lower) | jnp.isnan(upper), ends)


def _nonnegative(x: Interval, where: Any = True) -> Interval:
    """What is known to be >= 0 stays so: the absolute slack must not change signs."""
    return x._replace(lower=jnp.where(where & (x.lower < 0), 0.0, x.lower))


def _subnormal(v: Array) -> Array:
    """By its bits: a processor that flushes subnormals compares them as zeros."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[v.dtype.itemsize]
    tiny = jnp.finfo(v.dtype).tiny
    bits, least = (
        lax.bitcast_convert_type(jnp.asarray(w, v.dtype), unsigned)
        for w in (jnp.abs(v), tiny)
    )
    return (bits > 0) & (bits < least)


def _normal(x: Interval) -> Interval:
    """Subnormal ends moved outwards to 0 or the smallest normal number."""
    if not is_float(x.lower.dtype):
        return x
    tiny = jnp.finfo(x.lower.dtype).tiny
    below = jnp.where(jnp.signbit(x.lower), -tiny, 0.0)
    above = jnp.where(jnp.signbit(x.upper), 0.0, tiny)
    return Interval(
        jnp.where(_subnormal(x.lower), below, x.lower).astype(x.lower.dtype),
        jnp.where(_subnormal(x.upper), above, x.upper).astype(x.upper.dtype),
    )


def _point(value: Any) -> Any:
    """A float constant as an interval; integers and booleans are exact and stay."""
    if isinstance(value, Interval) or not is_float(jnp.result_type(value)):
        return value
    return _enclosed(value)


def _enclosed(value: Any) -> Interval:
    """Any constant as an interval."""
    if isinstance(value, Interval):
        return value
    value = jnp.asarray(value)
    return Thin(*_normal(Interval(value, value)))


def ball(x: Interval) -> tuple[Array, Array]:
    """A centre and a radius with [lower, upper] inside centre -+ radius."""
    unit, tiny, _ = format_of(x.lower.dtype)
    centre = 0.5 * x.lower + 0.5 * x.upper
    radius = jnp.maximum(x.upper - centre, centre - x.lower)
    return centre, radius * (1 + 4 * unit) + 8 * tiny


# ----------------------------------------------------------- sums and linear functions


def _linear(
    apply: Callable[[Array], Array],
    dominate: Callable[[Array], Array],
    x: Interval,
    terms: int,
    factors: float = 0.0,
) -> Interval:
    """Encloses sums of `terms` products w z, in one centre and one radius pass.

    The program and the centre pass are each within gamma sum |w||z| of the exact sums:
    a radius enlarged by 2 gamma (|centre| + radius) covers both.

    Args:
      apply: v -> sum w v, as the program writes it.
      dominate: v -> sum max(|w|, _flushed) v.
      x: the operand.
      terms: products per sum.
      factors: see factor_error.
    """
    centre, radius = ball(x)
    middle = apply(centre)
    gamma, _ = growth(terms, format_of(middle.dtype).unit, factors)
    reach = radius + 2 * gamma * (jnp.abs(centre) + radius)
    reach = reach * (1 + 8 * format_of(x.lower.dtype).unit)
    return _around(middle, dominate(reach), terms, factors)


def _around(middle: Array, spread: Array, terms: int, factors: float) -> Interval:
    """`middle -+ spread`, the spread itself a float sum of nonnegative products.

    spread contains 2 gamma sum |w||z|: where that is too close to the largest number,
    a partial sum may overflow, and infinities of both signs make NaN.
    """
    unit, tiny, largest = format_of(middle.dtype)
    gamma, inverse = growth(terms, unit, factors)
    underflow = 16 * terms * (1 + gamma) * (1 + inverse) * tiny
    spread = spread * ((1 + inverse) * (1 + 8 * unit)) + underflow
    fits = spread <= min(2 * gamma, 1.0) * largest / 16
    ball = Interval(middle - spread, middle + spread)
    return _nan_where(~fits, _outward(ball))


def _flushed(w: Array, terms: int) -> Array:
    """|w|, at least so large that an error of u |w| z covers a w flushed to zero."""
    unit, tiny, _ = format_of(w.dtype)
    return jnp.maximum(jnp.abs(w), 4 * tiny / min(growth(terms, unit)[0], 1.0))


def register(*primitives: Any) -> Callable:
    """Register one rule for some primitives."""

    def keep(rule: Callable) -> Callable:
        rules.update(dict.fromkeys(primitives, rule))
        return rule

    return keep


def products(equation: Equation) -> int:
    """How many products one entry of a dot product or a convolution adds up."""
    lhs, rhs = (atom.aval for atom in equation.inputs)
    if equation.primitive is p.dot_general_p:
        axes = equation.params["dimension_numbers"][0][0]
        return max(1, math.prod(lhs.shape[i] for i in axes))
    features = equation.params["dimension_numbers"].rhs_spec[0]
    return max(1, math.prod(rhs.shape) // max(1, rhs.shape[features]))


@register(p.dot_general_p, p.conv_general_dilated_p)
def _bilinear(equation: Equation, a: Any, b: Any) -> Interval:
    if isinstance(a, Interval) and isinstance(b, Interval):
        return _both_bounded(equation, a, b)
    terms, factors = products(equation), factor_error(equation)

    def apply(v: Array) -> Array:
        return equation.bind(*((v, b) if isinstance(a, Interval) else (a, v)))[0]

    def dominate(v: Array) -> Array:
        if isinstance(a, Interval):
            return equation.bind(v, _flushed(b, terms))[0]
        return equation.bind(_flushed(a, terms), v)[0]

    return _linear(apply, dominate, a if isinstance(a, Interval) else b, terms, factors)


def _both_bounded(equation: Equation, a: Interval, b: Interval) -> Interval:
    """By corners where both are perturbed (attention), else by centre and radius."""
    terms, factors = products(equation), factor_error(equation)
    unit = format_of(equation.outputs[0].aval.dtype).unit
    gamma, _ = growth(terms, unit, factors)
    thin = isinstance(a, Thin) or isinstance(b, Thin)
    one_format = len({v.aval.dtype for v in (*equation.inputs, *equation.outputs)}) == 1
    if equation.primitive is p.dot_general_p and one_format and not thin:
        base = interval.rules[equation.primitive](equation, a, b)
        # one more rounding for the corner products of the bound itself
        error = 2 * gamma + 4 * unit
        spread = error * equation.bind(magnitude(a), magnitude(b))[0]
        lower = _around(base.lower, spread, terms + 4, factors).lower
        upper = _around(base.upper, spread, terms + 4, factors).upper
        return Interval(lower, upper)
    (centre_a, radius_a), (centre_b, radius_b) = ball(a), ball(b)
    size_a, size_b = jnp.abs(centre_a) + radius_a, jnp.abs(centre_b) + radius_b
    reach = (radius_b + 2 * gamma * size_b) * (1 + 8 * unit)
    spread = (
        equation.bind(size_a * (1 + 4 * unit), reach)[0]
        + equation.bind(radius_a, size_b * (1 + 4 * unit))[0]
    )
    middle = equation.bind(centre_a, centre_b)[0]
    return _around(middle, spread, terms + 4, factors)


def _summands(equation: Equation) -> int:
    """How many entries one entry of the result adds up."""
    shape = equation.inputs[0].aval.shape
    if equation.primitive is p.cumsum_p:
        return max(1, shape[equation.params["axis"]])
    if equation.primitive is p.reduce_window_sum_p:
        return max(1, math.prod(equation.params["window_dimensions"]))
    return max(1, math.prod(shape[i] for i in equation.params["axes"]))


@register(p.reduce_sum_p, p.cumsum_p, p.reduce_window_sum_p)
def _sum(equation: Equation, x: Interval) -> Interval:
    def total(v: Array) -> Array:
        return equation.bind(v)[0]

    negative = jnp.where(x.lower >= 0, 0.0, -1.0).astype(x.lower.dtype)
    out = _linear(total, total, x, _summands(equation))
    return _nonnegative(out, total(negative) == 0)


# ---------------------------------------------------------------------- four operations


@register(p.add_p, p.sub_p)
def _add(equation: Equation, a: Any, b: Any) -> Interval:
    """XLA may add c and d of (x + c) + d first: charge u (|a| + |b|), not u |a+b|."""
    a, b = _enclosed(a), _enclosed(b)
    unit, _, largest = format_of(a.lower.dtype)
    base = interval.rules[equation.primitive](equation, a, b)
    other = Interval(-b.upper, -b.lower) if equation.primitive is p.sub_p else b

    def charge(v: Array, w: Array) -> Array:
        sizes = [jnp.minimum(jnp.abs(end), largest / 4) for end in (v, w)]
        return 6 * unit * (sizes[0] + sizes[1])

    cancels = ((a.upper == jnp.inf) & (other.lower == -jnp.inf)) | (
        (a.lower == -jnp.inf) & (other.upper == jnp.inf)
    )
    charges = (charge(a.lower, other.lower), charge(a.upper, other.upper))
    return _nan_where(cancels, _outward(base, 0, charges))


CHAIN = 2.0**42  # three constants below it have a product that does not overflow


@register(p.mul_p)
def _mul(equation: Equation, a: Any, b: Any) -> Interval:
    """XLA multiplies the constants of (x * c) * d first, and may overflow or flush."""
    square = equation.inputs[0] is equation.inputs[1]
    constants = [v for v in (a, b) if _is_constant(v)]
    a, b = _enclosed(a), _enclosed(b)
    base = interval.rules[p.mul_p](equation, a, b)
    _, tiny, largest = format_of(base.lower.dtype)
    sizes = [jnp.minimum(magnitude(v), largest / 4) for v in (a, b)]
    out = _outward(base, 8, tiny * (sizes[0] + sizes[1]))
    same_sign = ((a.lower >= 0) & (b.lower >= 0)) | ((a.upper <= 0) & (b.upper <= 0))
    out = _nonnegative(out, square | same_sign)
    unknown = (_has_zero(a) & _has_infinity(b)) | (_has_zero(b) & _has_infinity(a))
    for constant in map(_enclosed, constants):
        out = _with_zero(out, _least(constant) < 1 / CHAIN)
        unknown |= magnitude(constant) > CHAIN
    return _nan_where(unknown & (not square), out)


def _is_constant(value: Any) -> bool:
    """Does the value not depend on the perturbed input?"""
    return isinstance(value, Thin) or not isinstance(value, Interval)


def _least(x: Interval) -> Array:
    """The least magnitude in an interval."""
    return jnp.where(_has_zero(x), 0.0, jnp.minimum(jnp.abs(x.lower), jnp.abs(x.upper)))


def _with_zero(x: Interval, where: Array) -> Interval:
    """The hull of x and 0: what is flushed to zero on the way stays inside."""
    lower, upper = jnp.minimum(x.lower, 0.0), jnp.maximum(x.upper, 0.0)
    return _where(where, x, lower, upper)


QUOTIENT = 2.0**63  # two numbers below it have a product that does not overflow


@register(p.div_p)
def _div(equation: Equation, a: Any, b: Any) -> Interval:
    """XLA divides by reciprocals and makes (a c) / b of a / (b / c)."""
    limit = CHAIN if _is_constant(b) else QUOTIENT
    a, b = _enclosed(a), _enclosed(b)
    base = interval.rules[p.div_p](equation, a, b)
    tiny = format_of(base.lower.dtype).tiny
    out = _outward(base, 24, 2 * tiny * jnp.minimum(magnitude(a), QUOTIENT))
    same_sign = ((a.lower >= 0) & (b.lower > 0)) | ((a.upper <= 0) & (b.upper < 0))
    out = _nonnegative(out, same_sign)
    out = _with_zero(out, (_least(a) < 1 / QUOTIENT) | (magnitude(b) > limit))
    vanishes = _has_zero(b)  # -0 too: the quotient may be infinite with either sign
    out = _where(vanishes | (_least(b) < 1 / limit), out, -jnp.inf, jnp.inf)
    too_large = (magnitude(a) > QUOTIENT) | (magnitude(b) > limit)
    nan = jnp.isnan(magnitude(a)) | jnp.isnan(magnitude(b))
    return _nan_where(nan | (vanishes & _has_zero(a)) | too_large, out)


# --------------------------------------------------------------------- exact operations

# comparisons and the movement of data: nothing is rounded, the interval rule is enough
EXACT = {
    p.max_p,
    p.min_p,
    p.clamp_p,
    p.neg_p,
    p.abs_p,
    p.sign_p,
    p.floor_p,
    p.ceil_p,
    p.round_p,
    p.and_p,
    p.or_p,
    p.not_p,
    p.eq_p,
    p.ne_p,
    p.select_n_p,
    p.is_finite_p,
    p.reduce_max_p,
    p.reduce_min_p,
    p.reduce_and_p,
    p.reduce_or_p,
    p.reduce_window_max_p,
    p.reduce_window_min_p,
    p.cummax_p,
    p.cummin_p,
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
    p.gather_p,
    p.dynamic_slice_p,
    p.dynamic_update_slice_p,
    p.stop_gradient_p,
    p.reduce_precision_p,
    composite.hard_tanh,
}


@register(*EXACT)
def _exact(equation: Equation, *values: Any) -> Any:
    return interval.rules[equation.primitive](equation, *map(_point, values))


@register(p.reshape_p)
def _reshape(equation: Equation, x: Any) -> Interval:
    """Where a layer is flattened, its rule is kept apart from what reads it."""
    flattens = len(equation.params["new_sizes"]) == 1 < jnp.ndim(x.lower)
    return _exact(equation, Interval(*unfused(*x)) if flattens else x)


def unfused(a: Array, b: Array) -> tuple[Array, Array]:
    """The same pair, not fused with what reads it: they change places twice.

    XLA:CPU does not vectorise a long rule that it fuses into a flat array, and repeats
    it for every row that it is broadcast to: ten times the time. It does not fuse
    through a loop; a barrier is gone before it fuses.
    """
    return lax.fori_loop(0, 2, lambda _, pair: pair[::-1], (a, b))


COMPARISONS = (p.gt_p, p.ge_p, p.lt_p, p.le_p, p.argmax_p, p.argmin_p, p.sort_p)


@register(p.gt_p, p.ge_p, p.lt_p, p.le_p)
def _compare(equation: Equation, a: Any, b: Any) -> Interval:
    """Undecided on NaN, which may stand for any value."""
    a, b = _enclosed(a), _enclosed(b)
    out = interval.rules[equation.primitive](equation, a, b)
    unknown = jnp.isnan(a.lower) | jnp.isnan(b.lower)
    return _where(unknown, out, lower=False, upper=True)


@register(p.argmax_p, p.argmin_p)
def _argmax(equation: Equation, x: Interval) -> Interval:
    out = interval.rules[equation.primitive](equation, x)
    (axis,) = equation.params["axes"]
    unknown = jnp.any(jnp.isnan(x.lower), axis=axis)
    return _where(unknown, out, 0, x.lower.shape[axis] - 1)


@register(p.sort_p)
def _sort(equation: Equation, *values: Any) -> list[Interval]:
    (out,) = interval.rules[p.sort_p](equation, *map(_point, values))
    axis = equation.params["dimension"]
    unknown = jnp.any(jnp.isnan(values[0].lower), axis=axis, keepdims=True)
    return [_nan_where(unknown, out)]


@register(p.convert_element_type_p)
def _convert(equation: Equation, x: Any) -> Interval:
    """XLA may leave out a conversion to fewer bits: the unrounded value is inside."""
    x = _enclosed(x)
    source, target = x.lower.dtype, np.dtype(equation.params["new_dtype"])
    out = interval.rules[equation.primitive](equation, x)
    if is_float(target):
        return out if _widens(source, target) else _outward(out, 2)
    if not jnp.issubdtype(target, jnp.integer):
        return out
    info = jnp.iinfo(target)
    unknown = ~((x.lower > float(info.min)) & (x.upper < float(info.max)))
    return _where(unknown, out, info.min, info.max)


def _widens(source: Any, target: Any) -> bool:
    """Has every value of the source type its own float in the target type?"""
    digits = jnp.finfo(target).nmant + 1
    if source == jnp.bool_:
        return True
    if jnp.issubdtype(source, jnp.integer):
        return jnp.iinfo(source).bits <= digits
    wide = jnp.finfo(target).maxexp >= jnp.finfo(source).maxexp
    return wide and digits > jnp.finfo(source).nmant


# --------------------------------------------------------------- elementary functions


def accurate(
    ulps: float, *primitives: Any, nonnegative: bool = False, absolute: float = 0.0
) -> None:
    """Register functions computed with errors up to `ulps` u |f(x)| + absolute u.

    An error relative to |f| is largest, in absolute terms, where |f| is, but
    v - ulps u |v| is nondecreasing in v: only the ends of the range are widened.
    """

    def rule(equation: Equation, *values: Any) -> Interval:
        out = _evaluate(equation, values)
        unit = format_of(out.lower.dtype).unit
        out = _outward(out, 2 * ulps, 2 * absolute * unit)
        return _nonnegative(out) if nonnegative else out

    rules.update(dict.fromkeys(primitives, rule))


def growing(*primitives: Any, ulps: float = 8.0, nonnegative: bool = False) -> None:
    """Register exponentials: errors up to (ulps + |x|) u |f(x)|.

    XLA may make exp(a + b) of exp(a) exp(b), with a rounding error of u |a + b| in the
    exponent; beyond |x| = 128 the values are infinite or zero.
    """

    def rule(equation: Equation, x: Interval) -> Interval:
        size = jnp.minimum(magnitude(x), 128.0)
        out = _outward(_evaluate(equation, (x,)), 2 * (ulps + size))
        return _nonnegative(out) if nonnegative else out

    rules.update(dict.fromkeys(primitives, rule))


def _evaluate(equation: Equation, values: Any) -> Interval:
    """The interval rule, NaN where a value leaves the domain of the function."""
    out = interval.rules[equation.primitive](equation, *values)
    outside = OUTSIDE.get(equation.primitive)
    return out if outside is None else _nan_where(outside(values[0]), out)


OUTSIDE: dict[Any, Callable[[Interval], Array]] = {
    p.log_p: lambda x: ~(x.lower >= 0),
    p.sqrt_p: lambda x: ~(x.lower >= 0),
    p.log1p_p: lambda x: ~(x.lower >= -1),
    p.sin_p: _has_infinity,
    p.cos_p: _has_infinity,
}

# measured on XLA:CPU by tests/test_rounding_accuracy.py, here with a margin
accurate(1, p.sqrt_p, nonnegative=True)
accurate(2, p.square_p, nonnegative=True)
accurate(4, composite.leaky_relu)
accurate(6, p.log_p, p.cbrt_p)
accurate(8, p.sin_p, p.cos_p, absolute=8.0)
accurate(8, p.logistic_p, nonnegative=True)
accurate(12, p.expm1_p, p.tanh_p, p.erf_p, p.log1p_p, p.atan_p, p.asinh_p)
accurate(12, composite.elu)
accurate(12, composite.softplus, nonnegative=True)
growing(p.exp_p, p.exp2_p, p.cosh_p, nonnegative=True)
growing(p.sinh_p)


@register(p.erfc_p)
def _erfc(equation: Equation, x: Interval) -> Interval:
    """Its logarithm falls like -x^2: the rounding of x^2 is amplified 2 x^2 times."""
    steep = jnp.minimum(jnp.square(magnitude(x)), 128.0)
    return _nonnegative(_outward(_evaluate(equation, (x,)), 2 * (16 + 2 * steep)))


@register(composite.silu, composite.gelu_erf, composite.gelu_tanh)
def _gated(equation: Equation, x: Interval) -> Interval:
    """`x` times a gate in [0, 1]: errors up to 8 u |x|."""
    out = interval.rules[equation.primitive](equation, x)
    unit, _, largest = format_of(out.lower.dtype)
    size = jnp.minimum(magnitude(x), largest / 4)
    return _nan_where(_has_infinity(x), _outward(out, 8, 16 * unit * size))


@register(p.rsqrt_p)
def _rsqrt(equation: Equation, x: Interval) -> Interval:
    """Unbounded where x may be 0, or -0, whose inverse root is -inf."""
    out = _nonnegative(_outward(interval.rules[p.rsqrt_p](equation, x), 12))
    out = _where(x.lower == 0, out, -jnp.inf, jnp.inf)
    return _nan_where(~(x.lower >= 0), out)


@register(p.integer_pow_p)
def _integer_pow(equation: Equation, x: Interval) -> Interval:
    y = equation.params["y"]
    out = _outward(interval.rules[p.integer_pow_p](equation, x), 4 * abs(y) + 8)
    out = _nonnegative(out, (y % 2 == 0) | (x.lower >= 0))
    if y >= 0:
        return out
    # x^|y| may be flushed to 0 or overflow first
    largest = format_of(out.lower.dtype).largest
    overflows = (magnitude(out) > largest / 64) | _has_zero(x)
    return _where(overflows & ~jnp.isnan(out.lower), out, -jnp.inf, jnp.inf)


@register(p.pow_p)
def _pow(equation: Equation, a: Any, b: Any) -> Interval:
    """exp(b log a): an error of u in the exponent's relative size."""
    a, b = _enclosed(a), _enclosed(b)
    out = interval.rules[p.pow_p](equation, a, b)
    _, tiny, largest = format_of(out.lower.dtype)
    extreme = jnp.maximum(magnitude(out), 1 / jnp.maximum(_least(out), tiny))
    ulps = 2 * (16 + 4 * jnp.minimum(jnp.log(extreme), 128.0))
    out = _nonnegative(_outward(out, ulps))
    overflows = magnitude(out) > largest / 64
    out = _where(overflows, out, 0.0, jnp.inf)
    unknown = ~(a.lower >= 0) | ((a.lower == 0) & ~(b.lower > 0)) | _has_infinity(b)
    return _nan_where(unknown | _has_infinity(a) | jnp.isnan(b.lower), out)


# --------------------------------------------------------- softmax and its logarithm


def _exponent_errors(x: Interval, axis: int) -> tuple[Array, Array, float]:
    """Errors in log sum exp(x - max), computed in any order.

    Each exponent x - max is rounded (u |x - max|), each exponential has the error of
    `growing`, and the sum has gamma.

    Returns:
      The largest distance of two finite ends along the axis, the error, and u.
    """
    unit, _, _ = format_of(x.lower.dtype)
    lower = jnp.where(jnp.isinf(x.lower), jnp.inf, x.lower)
    upper = jnp.where(jnp.isinf(x.upper), -jnp.inf, x.upper)
    highest = jnp.max(upper, axis, keepdims=True)
    distance = jnp.maximum(highest - jnp.min(lower, axis, keepdims=True), 0.0)
    distance = jnp.where(jnp.isinf(distance), 0.0, distance)
    terms = x.lower.shape[axis]
    gamma, _ = growth(terms + 1, unit)
    relative = (16 + 4 * jnp.minimum(distance, 128.0)) * unit + 2 * gamma
    error = jnp.where(relative < 0.5, 2 * relative, jnp.inf)
    return distance, error + 32 * (1 + math.log(terms)) * unit, unit


@register(composite.logsumexp)
def _logsumexp(equation: Equation, x: Interval) -> Interval:
    axis = equation.params["axis"]
    _, error, unit = _exponent_errors(x, axis)
    sizes = jnp.where(_has_infinity(x), 0.0, magnitude(x))
    size = jnp.max(sizes, axis, keepdims=True)
    out = interval.rules[composite.logsumexp](equation, x)
    slack = jnp.squeeze(2 * error + 16 * unit * size, axis)
    return _outward(out, 8, slack)


@register(composite.log_softmax)
def _log_softmax(equation: Equation, x: Interval) -> Interval:
    out, slack, _ = _log_softmax_and_slack(equation, x)
    return _outward(out, 16, slack)


def _log_softmax_and_slack(
    equation: Equation, x: Interval
) -> tuple[Interval, Array, Array]:
    """Ends, their absolute error beside the relative one, and the distance of ends."""
    axis = equation.params["axis"]
    distance, error, unit = _exponent_errors(x, axis)
    highest = jnp.max(x.upper, axis, keepdims=True)
    shifted = Interval(x.lower - highest, x.upper - highest)
    out = interval.rules[composite.log_softmax](equation, shifted)
    # the program subtracts the greatest entry: NaN if that may be infinite
    greatest = jnp.max(x.lower, axis, keepdims=True)
    unknown = ~(jnp.isfinite(highest) & jnp.isfinite(greatest))
    return _nan_where(unknown, out), 2 * error + 24 * unit * distance, distance


@register(composite.softmax)
def _softmax(equation: Equation, x: Interval) -> Interval:
    out, slack, distance = _log_softmax_and_slack(equation, x)
    unit = format_of(out.lower.dtype).unit
    capped = jnp.minimum(distance, 128.0)
    log = _outward(out, 16, slack + (64 + 8 * capped) * unit)
    return _nonnegative(_outward(Interval(*map(jnp.exp, log)), 2 * (8 + 128)))


# ------------------------------------------------------------- the affine end, folded


def outputs_of(graph: Graph, env: dict) -> list[Interval]:
    """Bounds of the outputs, the affine tail folded where that tightens them."""
    values = [
        _enclosed(env[a] if isinstance(a, Node) else a.value) for a in graph.outputs
    ]
    enclosed = frozenset(node for node, v in env.items() if isinstance(v, Interval))
    graph = graph._replace(depends=enclosed)
    tail, cut = affine_tail(graph)
    between = [node for equation in tail for node in equation.outputs]
    formats = {atom.aval.dtype for atom in (*cut, *between, *graph.outputs)}
    one_format = len(formats) == 1 and is_float(*formats)
    if mixing_steps(tail, enclosed) < 2 or not one_format:
        return values
    return _folded(tail, cut, graph, env)


def _folded(tail: list[Equation], cut: list, graph: Graph, env: dict) -> list[Interval]:
    """The exact range of the affine end, and all roundings on the way added to it.

    A float evaluation of g(z) differs from g(z) by at most gamma of the number of
    roundings on a path, times |g|(|z|): g with every coefficient and every constant
    replaced by its magnitude. The same holds for the centre and for the rows.
    """
    balls = [ball(env[node]) for node in cut]
    g = replay(tail, cut, graph.outputs, env)
    middles, coefficients = jacobian_rows(g, [centre for centre, _ in balls])
    sizes = [jnp.abs(centre) + radius for centre, radius in balls]
    largest = _absolute(tail, cut, graph, env)(*sizes)
    depth = sum(map(roundings, tail))
    back = sum(o.aval.size + 2 * len(e.inputs) for e in tail for o in e.outputs)
    radii = [radius for _, radius in balls]
    return [
        _folded_output(middle, rows, radii, size, depth, back)
        for middle, rows, size in zip(middles, coefficients, largest, strict=True)
    ]


def _folded_output(
    middle: Array,
    rows: tuple[Array, ...],
    radii: list[Array],
    size: Array,
    depth: int,
    back: int,
) -> Interval:
    """One output; size: |g|(|z|), depth: roundings forwards, back: backwards."""
    unit, _, largest = format_of(middle.dtype)
    (forward, inverse), (backward, _) = growth(depth, unit), growth(back, unit)
    terms = sum(radius.size for radius in radii) + len(radii)
    reach = sum(
        jnp.abs(row).reshape(row.shape[0], -1) @ radius.ravel()
        for row, radius in zip(rows, radii, strict=True)
    ).reshape(middle.shape)
    rounding = (2 * forward + backward) * (1 + inverse) * size
    out = _around(middle, reach + rounding * (1 + 8 * unit), terms + 4, 0.0)
    return _nan_where(~(size < largest / 16), out)


def roundings(equation: Equation) -> int:
    """Roundings that one entry of the equation's result goes through, at most."""
    primitive = equation.primitive
    if primitive in (p.dot_general_p, p.conv_general_dilated_p):
        return products(equation)
    if primitive in (p.reduce_sum_p, p.cumsum_p, p.reduce_window_sum_p):
        return _summands(equation)
    return 2


def _absolute(
    tail: list[Equation], cut: list, graph: Graph, env: dict
) -> Callable[..., list[Array]]:
    """|g|: the affine tail with magnitudes for all coefficients and constants."""

    def g(*values: Array) -> list[Array]:
        local = dict(zip(cut, values, strict=True))

        def value(atom: Any, primitive: Any = None) -> Any:
            known = isinstance(atom, Node)
            if known and atom in local:
                return local[atom]
            return coefficient_size(env[atom] if known else atom.value, primitive)

        for equation in tail:
            operands = [value(atom, equation.primitive) for atom in equation.inputs]
            local.update(
                zip(equation.outputs, absolute_step(equation, operands), strict=True)
            )
        return [jnp.asarray(value(atom)) for atom in graph.outputs]

    return g


def coefficient_size(value: Any, primitive: Any) -> Any:
    """Magnitude of a constant, so large that a relative error covers its flush to zero.

    And what chains of factors may lose (see `_mul`, `_div`); NaN: anything.

    Args:
      value: a constant, or an interval that encloses one.
      primitive: of the equation that reads it.
    """
    if not isinstance(value, Interval) and not is_float(jnp.result_type(value)):
        return value
    x = _enclosed(value)
    size, unit = _flushed(magnitude(x), 1), format_of(x.lower.dtype).unit
    if primitive not in (p.mul_p, p.div_p):
        return size
    small, large = _least(x) < 1 / CHAIN, magnitude(x) > CHAIN
    if primitive is p.mul_p:
        return jnp.where(large, jnp.nan, jnp.where(small, size / unit, size))
    return jnp.where(small | large, jnp.nan, size)


def absolute_step(equation: Equation, sizes: list) -> list[Array]:
    """An affine equation with magnitudes for its coefficients and constants."""
    if equation.primitive is p.sub_p:
        outs = [sizes[0] + sizes[1]]
    elif equation.primitive is p.neg_p:
        outs = [sizes[0]]
    elif equation.primitive is p.div_p:
        outs = [sizes[0] * _flushed(1 / sizes[1], 1)]
    else:
        outs = equation.bind(*sizes)
    # an absolute error of some `tiny` per rounding, as a relative one
    unit, tiny, _ = format_of(outs[0].dtype)
    return [v + 16 * roundings(equation) * tiny / unit for v in outs]
