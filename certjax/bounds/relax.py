"""Two affine functions around every nonlinear equation: the relaxations of CROWN.

A rule takes an equation, the intervals of its operands and `share`, and returns a
`Relaxation`: affine functions of the bounded operands that lie below and above the
equation everywhere on the operands' box. They do so for EVERY share in [0, 1] (one
number per output entry), so that a share can be optimised and the result stays sound:
the slope of a relu's lower line, the point where a tangent touches a curve, the weights
of McCormick's planes. Rules are registered by family, as in `interval`.

What has no rule here gets two constants, the ends of its interval.

Sources: Zhang et al. 2018, arXiv:1811.00866 (CROWN); Singh et al. 2019, "An abstract
domain for certifying neural networks"; McCormick 1976 (products); Shi et al. 2020,
arXiv:2002.06622 (attention).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.bounds import composite
from certjax.bounds.interval import interval_step, is_zero
from certjax.bounds.rewrite import greater, lesser, log_of_sum
from certjax.types import Array, Interval
from certjax.walk import Equation, primitives as p


class Side(NamedTuple):
    """The affine function `linear(*operands) + offset` of the bounded operands.

    slopes: where `linear` is elementwise, the multiplier of each operand.
    homogeneous: the offset is known to be 0, and need not be summed up.
    """

    linear: Callable[..., Array]
    offset: Array
    slopes: tuple[Array, ...] | None = None
    homogeneous: bool = False


class Relaxation(NamedTuple):
    """lower(z) <= equation(z) <= upper(z) on the operands' box."""

    lower: Side
    upper: Side


Rule = Callable[[Equation, list, Array], Relaxation]
rules: dict[Any, Rule] = {}
HALF = 0.5
BENT: set[Any] = set()  # relu-like: the share is the slope of the line through the bend
SHARED: set[Any] = set()  # primitives whose rule reads its share


def relax(equation: Equation, values: list, share: Array | None) -> Relaxation:
    """The relaxation of a nonlinear equation whose operands have these intervals."""
    rule = rules.get(equation.primitive)
    if rule is None or not is_float(equation.outputs[0].aval):
        return constants(equation, values)
    return rule(equation, values, HALF if share is None else share)


def constants(equation: Equation, values: list) -> Relaxation:
    """The ends of the equation's own interval."""
    hull = _hull(equation, values)
    zero = lambda *_: jnp.zeros_like(hull.lower)
    slopes = tuple(jnp.zeros((), hull.lower.dtype) for _ in operands(values))
    return Relaxation(Side(zero, hull.lower, slopes), Side(zero, hull.upper, slopes))


def bent_interval(equation: Equation, values: list) -> Interval | None:
    """The interval whose position around 0 decides a relu-like equation's share."""
    if equation.primitive not in BENT:
        return None
    return _bent_operand(equation, values)


def _hull(equation: Equation, values: list) -> Interval:
    (hull,) = interval_step(equation, values)
    return hull


def is_float(value: Any) -> bool:
    """Does it have a floating dtype?"""
    return jnp.issubdtype(value.dtype, jnp.floating)


def operands(values: list) -> list[int]:
    """Positions of the operands that a relaxation is a function of."""
    return [
        i for i, v in enumerate(values) if isinstance(v, Interval) and is_float(v.lower)
    ]


def register(*primitives: Any, shared: bool = False) -> Callable[[Rule], Rule]:
    """Register one rule for some primitives; shared: it reads its share."""

    def keep(rule: Rule) -> Rule:
        rules.update(dict.fromkeys(primitives, rule))
        SHARED.update(primitives if shared else ())
        return rule

    return keep


def _elementwise(slopes: Sequence[Array], offset: Array) -> Side:
    """`sum_i slopes_i * operand_i + offset`."""

    def linear(*operands: Array) -> Array:
        terms = [s * v for s, v in zip(slopes, operands, strict=True)]
        return jnp.broadcast_to(sum(terms[1:], terms[0]), offset.shape)

    return Side(linear, offset, tuple(slopes))


def _lines(lower: tuple[Array, Array], upper: tuple[Array, Array]) -> Relaxation:
    """Two lines in one operand, each (slope, offset)."""
    return Relaxation(*(_elementwise([s], t) for s, t in (lower, upper)))


def _flip(relaxation: Relaxation) -> Relaxation:
    """The relaxation of -f from that of f."""

    def negate(side: Side) -> Side:
        slopes = None if side.slopes is None else tuple(-s for s in side.slopes)
        return Side(lambda *v: -side.linear(*v), -side.offset, slopes)

    return Relaxation(negate(relaxation.upper), negate(relaxation.lower))


# ----------------------------------------------------------- two half-lines and a bend


def _bent_lines(x: Interval, left: Array, right: Array, share: Array) -> Relaxation:
    """`left * x` below 0 and `right * x` above: the chord, and a line through the bend.

    Every slope between left and right is sound for the latter; share 0 gives left,
    share 1 right.
    """
    above, below = x.lower >= 0, x.upper <= 0
    decided = above | below
    width = jnp.where(decided, 1.0, x.upper - x.lower)
    chord = (right * x.upper - left * x.lower) / width
    zero = jnp.zeros_like(x.lower)
    slope = jnp.where(above, right, jnp.where(below, left, chord))
    offset = jnp.where(decided, zero, (left - chord) * x.lower)
    through = left + (right - left) * share
    bend = jnp.where(above, right, jnp.where(below, left, through))
    convex = jnp.broadcast_to(jnp.asarray(left <= right), slope.shape)
    if isinstance(left, int | float) and isinstance(right, int | float):
        pair = _lines((bend, zero), (slope, offset))
        pair = pair._replace(lower=pair.lower._replace(homogeneous=True))
        return pair if left <= right else Relaxation(pair.upper, pair.lower)
    return _lines(
        (jnp.where(convex, bend, slope), jnp.where(convex, zero, offset)),
        (jnp.where(convex, slope, bend), jnp.where(convex, offset, zero)),
    )


def _bent_operand(equation: Equation, values: list) -> Interval:
    """The operand, moved so that the bend is at 0."""
    if equation.primitive in (greater, lesser):
        return values[2]
    if equation.primitive in (p.max_p, p.min_p):
        x, c = values if isinstance(values[0], Interval) else values[::-1]
        return Interval(*jnp.broadcast_arrays(x.lower - c, x.upper - c))
    return values[0]


@register(p.max_p, p.min_p, shared=True)
def _against_constant(equation: Equation, values: list, share: Array) -> Relaxation:
    """`c + relu(x - c)` and `c - relu(c - x)`."""
    left, right = (0.0, 1.0) if equation.primitive is p.max_p else (1.0, 0.0)
    c = values[1] if isinstance(values[0], Interval) else values[0]
    pair = _bent_lines(_bent_operand(equation, values), left, right, share)
    if is_zero(c):
        return pair

    def moved(line: Side) -> Side:
        slope = line.slopes[0] if line.slopes else jnp.zeros(())
        shift = jnp.where(slope == 1.0, 0.0, (1.0 - slope) * c)  # c may be infinite
        return _elementwise([slope], line.offset + shift)

    return Relaxation(*map(moved, pair))


@register(greater, lesser, shared=True)
def _of_two(equation: Equation, values: list, share: Array) -> Relaxation:
    """`b + relu(a - b)` and `b - relu(b - a)`, in b and the difference a - b."""
    left, right = (0.0, 1.0) if equation.primitive is greater else (1.0, 0.0)
    pair = _bent_lines(values[2], left, right, share)
    has_a, has_b = (isinstance(v, Interval) for v in values[:2])

    def side(line: Side) -> Side:
        def linear(*operands: Array) -> Array:
            return line.linear(operands[-1]) + (operands[has_a] if has_b else 0.0)

        constant = 0.0 if has_b else values[1]
        return Side(linear, line.offset + constant)

    return Relaxation(*map(side, pair))


@register(p.abs_p, shared=True)
def _abs(_: Equation, values: list, share: Array) -> Relaxation:
    return _bent_lines(values[0], -1.0, 1.0, share)


@register(composite.leaky_relu, shared=True)
def _leaky_relu(equation: Equation, values: list, share: Array) -> Relaxation:
    x, left = values
    if isinstance(left, Interval):
        return constants(equation, values)  # says that it has no rule
    left = float(left) if not isinstance(left, jax.core.Tracer) else left
    return _bent_lines(x, left, 1.0, share)


BENT.update({p.max_p, p.min_p, greater, lesser, p.abs_p, composite.leaky_relu})


# -------------------------------------------------------------------- smooth functions

NARROW = 1e-4  # relative width under which a chord's slope would be mostly rounding


def _slope_of(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


def _wide(x: Interval) -> Array:
    size = jnp.maximum(jnp.abs(x.lower), jnp.abs(x.upper))
    return x.upper - x.lower > NARROW * size


def _chord(f: Callable, a: Array, b: Array, wide: Array, otherwise: Array) -> Array:
    width = jnp.where(wide, b - a, 1.0)
    return jnp.where(wide, (f(b) - f(a)) / width, otherwise)


def _convex_lines(f: Callable[[Array], Array], x: Interval, share: Array) -> Relaxation:
    """The chord above; below, the tangent at `lower + share * width`."""
    slope_of = _slope_of(f)
    touch = jnp.clip(x.lower + share * (x.upper - x.lower), x.lower, x.upper)
    tangent = slope_of(touch)
    middle = (x.lower + x.upper) / 2
    chord = _chord(f, x.lower, x.upper, _wide(x), slope_of(middle))
    # whatever the slope: the highest line it needs is decided at an end (convexity)
    above = jnp.maximum(f(x.lower) - chord * x.lower, f(x.upper) - chord * x.upper)
    return _lines((tangent, f(touch) - tangent * touch), (chord, above))


def _where_valid(
    rule: Callable[[Interval], Relaxation], x: Interval, valid: Array, hull: Interval
) -> Relaxation:
    """`rule` on valid operands; elsewhere the constants of `hull`.

    The rule never sees an invalid operand, so that no NaN reaches a gradient.
    """
    valid = valid & jnp.isfinite(hull.lower) & jnp.isfinite(hull.upper)
    inside = Interval(*(jnp.where(valid, v, jnp.ones_like(v)) for v in x))
    hull = jax.lax.stop_gradient(hull)  # its derivative is infinite at a pole
    sides = []
    for side, end in zip(rule(inside), hull, strict=True):
        slope, offset = side.slopes[0], side.offset
        known = valid & jnp.isfinite(slope) & jnp.isfinite(offset)
        sides.append((jnp.where(known, slope, 0.0), jnp.where(known, offset, end)))
    return _lines(*sides)


def convex(
    *primitives: Any, low: float = -np.inf, high: float = np.inf, sign: int = 1
) -> None:
    """Register functions of one operand that are convex on (low, high).

    sign: -1 for concave functions.
    """

    def rule(equation: Equation, values: list, share: Array) -> Relaxation:
        (x,) = values
        f = lambda v: sign * equation.bind(v)[0]
        valid = (x.lower > low) & (x.upper < high)

        def lines(inside: Interval) -> Relaxation:
            pair = _convex_lines(f, inside, share)
            return pair if sign > 0 else _flip(pair)

        return _where_valid(lines, x, valid, _hull(equation, values))

    register(*primitives, shared=True)(rule)


BIG = 80.0  # e^80 is far from float32's end
convex(p.exp_p, p.exp2_p, p.expm1_p, p.cosh_p, low=-BIG, high=BIG)
convex(p.square_p, composite.softplus, low=-1e15, high=1e15)
convex(p.rsqrt_p, low=0.0)
convex(p.log_p, p.sqrt_p, low=0.0, sign=-1)
convex(p.log1p_p, low=-1.0, sign=-1)


@register(p.integer_pow_p, shared=True)
def _integer_pow(equation: Equation, values: list, share: Array) -> Relaxation:
    (x,), y = values, equation.params["y"]
    f = lambda v: equation.bind(v)[0]
    if y > 0 and y % 2 == 1:
        return _where_valid(
            lambda inside: curved_lines(f, inside, (0.0,)),
            x,
            jnp.maximum(-x.lower, x.upper) < 1e35 ** (1 / y),
            _hull(equation, values),
        )
    if y >= 0:
        valid = jnp.maximum(-x.lower, x.upper) < 1e35 ** (1 / max(y, 1))
        rule = lambda inside: _convex_lines(f, inside, share)
        return _where_valid(rule, x, valid, _hull(equation, values))
    return _negative_power(equation, values, share)


def _negative_power(equation: Equation, values: list, share: Array) -> Relaxation:
    """Convex on the positive side; on the negative one by symmetry."""
    (x,), odd = values, equation.params["y"] % 2 == 1
    negative = x.upper < 0
    mirrored = Interval(
        jnp.where(negative, -x.upper, x.lower), jnp.where(negative, -x.lower, x.upper)
    )
    f = lambda v: equation.bind(v)[0]
    turned = jnp.where(negative, 1.0 - share, share)  # the same point of the curve

    def lines(inside: Interval) -> Relaxation:
        lower, upper = _convex_lines(f, inside, turned)
        sign = jnp.where(negative, -1.0, 1.0).astype(x.lower.dtype)
        if not odd:
            return _lines(*((sign * s.slopes[0], s.offset) for s in (lower, upper)))
        low = jnp.where(negative, -upper.offset, lower.offset)
        high = jnp.where(negative, -lower.offset, upper.offset)
        falling = jnp.where(negative, upper.slopes[0], lower.slopes[0])
        rising = jnp.where(negative, lower.slopes[0], upper.slopes[0])
        return _lines((falling, low), (rising, high))

    hull = _hull(equation, values)
    return _where_valid(lines, mirrored, mirrored.lower > 0, hull)


@register(p.pow_p, shared=True)
def _pow(equation: Equation, values: list, share: Array) -> Relaxation:
    """`x^c` for x > 0, and `c^x` for c > 0; both bounded: constants."""
    base, exponent = values
    if isinstance(base, Interval) and isinstance(exponent, Interval):
        return constants(equation, values)
    x = base if isinstance(base, Interval) else exponent
    if isinstance(exponent, Interval):
        f = lambda v: equation.bind(base, v)[0]
        valid, concave = base > 0, jnp.zeros((), bool)
    else:
        f = lambda v: equation.bind(v, exponent)[0]
        valid, concave = x.lower > 0, (exponent > 0) & (exponent < 1)
    sign = jnp.where(concave, -1.0, 1.0).astype(x.lower.dtype)

    def lines(inside: Interval) -> Relaxation:
        lower, upper = _convex_lines(lambda v: sign * f(v), inside, share)
        pick = lambda a, b: jnp.where(concave, -b, a)
        return _lines(
            (pick(lower.slopes[0], upper.slopes[0]), pick(lower.offset, upper.offset)),
            (pick(upper.slopes[0], lower.slopes[0]), pick(upper.offset, lower.offset)),
        )

    valid = jnp.broadcast_to(valid, x.lower.shape)
    return _where_valid(lines, x, valid, _hull(equation, values))


@register(log_of_sum, shared=True)
def _log_of_sum(_: Equation, values: list, share: Array) -> Relaxation:
    """`mean + log(sum)`: concave in the witness's second entry."""
    total = Interval(values[1].lower[1], values[1].upper[1])
    ends = [jnp.log(jnp.maximum(v, 1e-30)) for v in total]
    pair = _where_valid(
        lambda inside: _flip(_convex_lines(lambda v: -jnp.log(v), inside, share)),
        total,
        (total.lower > 0) & jnp.isfinite(total.upper),
        Interval(*ends),
    )

    def side(line: Side) -> Side:
        def linear(_: Array, witness: Array) -> Array:
            return witness[0] + line.linear(witness[1])

        return Side(linear, line.offset)

    return Relaxation(*map(side, pair))


# ---------------------------------------------- functions that bend one way, then back

GRID = 16  # cells of an interval among which the touching points are sought
BISECTIONS = 16


def curved_lines(
    f: Callable[[Array], Array], x: Interval, inflections: Sequence[Any]
) -> Relaxation:
    """Lines for any function of one operand, given the points where its bend changes.

    The slope is that of the tightest line at the middle of the interval, found on a
    grid; it need not be exact, because the offset is then the exact extreme of
    f(x) - slope * x over the interval: its ends, the inflections, and the one
    stationary point that each piece between them may hold.
    """
    search = partial(_extreme_by_pieces, f, _slope_of(f), x, inflections)
    return _supported(f, x, search)


def _supported(f: Callable, x: Interval, extreme: Callable) -> Relaxation:
    sides = []
    for sign in (-1, 1):
        slope = _supporting_slope(f, x, sign)
        sides.append((slope, sign * extreme(slope, sign)))
    return _lines(*sides)


def _supporting_slope(f: Callable, x: Interval, sign: int) -> Array:
    """Slope of the line over `sign * f` that is lowest at the middle."""
    over = lambda t: sign * f(x.lower[None] + t * (x.upper - x.lower)[None])
    half, h = GRID // 2, 1 / GRID
    column = lambda t: jnp.asarray(t, x.lower.dtype).reshape(-1, *[1] * x.lower.ndim)
    left, right = _touching(
        over, column(np.arange(half) * h), column(np.arange(half + 1, GRID + 1) * h)
    )
    fine = column(np.linspace(-h, h, 9))
    left, right = _touching(
        over,
        jnp.clip(left[None] + fine, 0.0, 0.5 - h / 8),
        jnp.clip(right[None] + fine, 0.5 + h / 8, 1.0),
    )
    a, b = (x.lower + t * (x.upper - x.lower) for t in (left, right))
    middle = (x.lower + x.upper) / 2
    tangent = _slope_of(f)(middle)
    chord = _chord(f, a, b, _wide(x), tangent)
    higher = sign * (f(a) + chord * (middle - a) - f(middle)) > 0
    return jnp.where(higher, chord, tangent)


def _touching(over: Callable, lefts: Array, rights: Array) -> tuple[Array, Array]:
    """The pair of positions, among [T, ...] each, whose chord is highest at 1/2."""
    s, t = (jax.lax.stop_gradient(v) for v in (lefts, rights))
    low, high = (jax.lax.stop_gradient(over(v)) for v in (s, t))
    s, t = (jnp.broadcast_to(v, low.shape) for v in (s, t))
    before, after = 0.5 - s[:, None], t[None] - 0.5
    heights = (low[:, None] * after + high[None] * before) / (before + after)
    best = jnp.argmax(heights.reshape(-1, *low.shape[1:]), axis=0)
    pick = lambda v, i: jnp.take_along_axis(v, i[None], axis=0)[0]
    return pick(s, best // t.shape[0]), pick(t, best % t.shape[0])


def _extreme_by_pieces(
    f: Callable,
    slope_of: Callable,
    x: Interval,
    inflections: Sequence[Any],
    slope: Array,
    sign: int,
) -> Array:
    """max over the interval of `sign * (f - slope * x)`."""
    g = lambda v: sign * (f(v) - slope * v)
    rise = lambda v: sign * (slope_of(v) - slope)
    best = jnp.maximum(g(x.lower), g(x.upper))
    knots = [x.lower, *(jnp.clip(k, x.lower, x.upper) for k in inflections), x.upper]
    for knot in knots[1:-1]:
        best = jnp.maximum(best, jnp.where(_inside(knot, x), g(knot), best))
    for left, right in pairwise(knots):
        best = jnp.maximum(best, _stationary(g, rise, left, right, best))
    return best


def _inside(v: Array, x: Interval) -> Array:
    return (v > x.lower) & (v < x.upper)


def _stationary(
    g: Callable, rise: Callable, left: Array, right: Array, otherwise: Array
) -> Array:
    """The maximum of g inside [left, right], where it rises and then falls once."""
    fixed = jax.lax.stop_gradient
    a, b = fixed(left), fixed(right)
    held = lambda v: fixed(rise(v))
    holds = (held(a) > 0) & (held(b) < 0)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        up = held(middle) > 0
        return jnp.where(up, middle, low), jnp.where(up, high, middle)

    a, b = fixed(jax.lax.fori_loop(0, BISECTIONS, halve, (a, b)))
    # g is concave here: its tangent at a bounds it on what is left of the bracket
    slack = jnp.maximum(held(a), 0.0) * (b - a)
    return jnp.where(holds, g(a) + slack, otherwise)


def curved(*primitives: Any, inflections: Sequence[float], limit: float = 1e15) -> None:
    """Register functions of one operand with these inflections, for |x| < limit."""

    def rule(equation: Equation, values: list, _: Array) -> Relaxation:
        x, *rest = values
        f = lambda v: equation.bind(v, *rest)[0]
        valid = (x.lower > -limit) & (x.upper < limit)
        lines = lambda inside: curved_lines(f, inside, inflections)
        return _where_valid(lines, x, valid, _hull(equation, values))

    register(*primitives)(rule)


curved(p.tanh_p, p.logistic_p, p.erf_p, p.atan_p, p.asinh_p, inflections=(0.0,))
curved(p.sinh_p, inflections=(0.0,), limit=BIG)
curved(composite.elu, inflections=(0.0,), limit=1e9)
# gelu = x Phi(x): phi(x) (2 - x^2) = 0; the others to 10 digits from f'' = 0
curved(composite.gelu_erf, inflections=(-np.sqrt(2), np.sqrt(2)), limit=1e9)
curved(composite.gelu_tanh, inflections=(-1.418504009, 1.418504009), limit=1e9)
curved(composite.silu, inflections=(-2.3993572805, 2.3993572805), limit=1e9)


@register(p.sin_p, p.cos_p)
def _wave(equation: Equation, values: list, _: Array) -> Relaxation:
    """Stationary points of `wave - slope * x` in closed form."""
    (x,) = values
    shift = 0.0 if equation.primitive is p.sin_p else np.pi / 2
    f = lambda v: equation.bind(v)[0]

    def lines(inside: Interval) -> Relaxation:
        return _supported(f, inside, partial(_wave_extreme, f, shift, inside))

    valid = (x.upper - x.lower < 2 * np.pi) & (jnp.abs(x.lower) < 1e4)
    return _where_valid(lines, x, valid, _hull(equation, values))


def _wave_extreme(
    f: Callable, shift: float, x: Interval, slope: Array, sign: int
) -> Array:
    g = lambda v: sign * (f(v) - slope * v)
    best = jnp.maximum(g(x.lower), g(x.upper))
    held = jax.lax.stop_gradient(slope)
    root = sign * jnp.arccos(jnp.clip(held, -1.0, 1.0)) - shift
    turn = 2 * np.pi
    first = jnp.ceil((jax.lax.stop_gradient(x.lower) - root) / turn)
    for k in (-1, 0, 1, 2):
        point = root + (first + k) * turn
        best = jnp.where(_inside(point, x), jnp.maximum(best, g(point)), best)
    return best


# -------------------------------------------------------------- products, choices, max


def _split(values: list) -> tuple[list[Array], list[Array]]:
    return [v.lower for v in values], [v.upper for v in values]


@register(p.mul_p, shared=True)
def _mul(_: Equation, values: list, share: Array) -> Relaxation:
    """McCormick's planes, mixed: each share of the two is sound."""
    a, b = values
    mix = lambda v, w: (1 - share) * v + share * w
    low = -mix(a.lower * b.lower, a.upper * b.upper)
    high = -mix(a.upper * b.lower, a.lower * b.upper)
    return Relaxation(
        _elementwise([mix(b.lower, b.upper), mix(a.lower, a.upper)], low),
        _elementwise([mix(b.lower, b.upper), mix(a.upper, a.lower)], high),
    )


@register(p.dot_general_p, p.conv_general_dilated_p)
def _bilinear(equation: Equation, values: list, _: Array) -> Relaxation:
    """The mean of McCormick's two planes, summed over the contraction."""
    a, b = values
    bind = lambda v, w: equation.bind(v, w)[0]
    centre_a, centre_b = ((v.lower + v.upper) / 2 for v in (a, b))

    def linear(v: Array, w: Array) -> Array:
        return bind(v, centre_b) + bind(centre_a, w)

    low = -(bind(a.lower, b.lower) + bind(a.upper, b.upper)) / 2
    high = -(bind(a.upper, b.lower) + bind(a.lower, b.upper)) / 2
    return Relaxation(Side(linear, low), Side(linear, high))


@register(p.select_n_p)
def _select(equation: Equation, values: list, _: Array) -> Relaxation:
    """The chosen case where the choice is decided, else the hull of both."""
    which, *cases = values
    hull = _hull(equation, values)
    weights = [~which.upper, which.lower]  # surely the first, surely the second
    undecided = which.upper & ~which.lower
    if len(cases) != 2:
        return constants(equation, values)

    def side(end: Array) -> Side:
        constant = sum(
            jnp.where(w, v, 0.0)
            for w, v in zip(weights, cases, strict=True)
            if not isinstance(v, Interval)
        )
        chosen = [
            w for w, v in zip(weights, cases, strict=True) if isinstance(v, Interval)
        ]

        def linear(*operands: Array) -> Array:
            terms = [
                jnp.where(w, v, 0.0) for w, v in zip(chosen, operands, strict=True)
            ]
            return sum(terms, jnp.zeros_like(end))

        return Side(linear, jnp.where(undecided, end, constant).astype(end.dtype))

    return Relaxation(side(hull.lower), side(hull.upper))


@register(p.reduce_max_p, p.reduce_min_p)
def _reduce_max(equation: Equation, values: list, _: Array) -> Relaxation:
    """Below: the entry with the greatest lower end. Above: see `_above_maximum`."""
    (x,), axes = values, equation.params["axes"]
    least = equation.primitive is p.reduce_min_p
    if least:
        x = Interval(-x.upper, -x.lower)
    floor = jnp.max(x.lower, axis=axes, keepdims=True)
    top = (x.lower == floor).astype(x.lower.dtype)
    weights = top / jnp.sum(top, axis=axes, keepdims=True)
    slopes, offset = _above_maximum(x, floor, axes)
    below = Side(lambda v: jnp.sum(weights * v, axis=axes), jnp.zeros_like(offset))
    above = Side(lambda v: jnp.sum(slopes * v, axis=axes), offset)
    if not least:
        return Relaxation(below, above)
    return Relaxation(above._replace(offset=-offset), below)


def _above_maximum(x: Interval, floor: Array, axes: tuple) -> tuple[Array, Array]:
    """`max_j x_j <= floor + sum_j chord of relu(x_j - floor)`, or the constant max u.

    floor: the greatest lower end. The former where it is lower at the centre; it is
    exact where one entry dominates.
    """
    excess = jnp.maximum(x.upper - floor, 0.0)
    width = x.upper - x.lower
    slopes = jnp.where(excess > 0, excess / jnp.where(width > 0, width, 1.0), 0.0)
    tilted = jnp.sum(excess, axis=axes, keepdims=True) / 2
    use = tilted <= jnp.max(excess, axis=axes, keepdims=True)
    slopes = jnp.where(use, slopes, 0.0)
    start = jnp.squeeze(floor, axes) - jnp.sum(slopes * x.lower, axis=axes)
    return slopes, jnp.where(jnp.squeeze(use, axes), start, jnp.max(x.upper, axis=axes))
