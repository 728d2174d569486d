"""Norms and projections that the attacks share; one example, any shape.

Sorting is slow on CPU under vmap, so thresholds come from bisection or Newton steps
on piecewise linear functions: elementwise passes only.
"""

import functools

import jax
import jax.numpy as jnp

from certjax.threat import L1, L2, Linf
from certjax.types import Array, Scalar


BISECTIONS = 16
NEWTON_STEPS = 15
FOLDS = 8


def largest(v: Array) -> Array:
    """[]: max |v|.

    From the two ends, for XLA:CPU reduces |v| eight times more slowly than v: at 784
    coordinates as slowly as a small convolution.
    """
    return jnp.maximum(jnp.max(v), -jnp.min(v))


def total(v: Array) -> Array:
    """[]: the sum. Long rows are folded first, by additions that run in lanes.

    Twice as fast on XLA:CPU, which reduces the rows of a batch one number at a time.
    """
    v, length = v.ravel(), v.size // FOLDS
    if length < FOLDS:
        return jnp.sum(v)
    parts = [v[i * length : (i + 1) * length] for i in range(FOLDS)]
    return jnp.sum(functools.reduce(jnp.add, parts)) + jnp.sum(v[FOLDS * length :])


def size(norm: type, delta: Array) -> Array:
    """[]: the norm of a perturbation, `norm` being the class of a threat set."""
    if norm is L2:
        longest = largest(delta)
        safe = jnp.where(longest > 0, longest, 1.0)
        return longest * jnp.sqrt(total((delta / safe) ** 2))
    return total(jnp.abs(delta)) if norm is L1 else largest(delta)


def dual_size(norm: type, g: Array) -> Array:
    """[]: the dual norm, by which a gradient measures distances to a hyperplane."""
    return size({Linf: L1, L1: Linf}.get(norm, L2), g)


def into_l1_box(threat: L1, x: Array, z: Array, eps: Scalar) -> Array:
    """The point nearest to z in the l1 ball of radius eps cut with the domain.

    The exact projection onto the intersection: soft thresholding, then the cut, with
    the threshold that spends the radius. It moves further than a projection onto the
    ball followed by the cut.

    Source: Croce & Hein 2021, arXiv:2103.01208, section 3.1.
    """
    delta = z - x
    room = jnp.where(delta > 0, threat.high - x, x - threat.low)

    def cut(threshold: Array) -> Array:
        return jnp.clip(jnp.abs(delta) - threshold, 0.0, jnp.maximum(room, 0.0))

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        lower, upper = bracket
        middle = 0.5 * (lower + upper)
        long = total(cut(middle)) > eps
        return jnp.where(long, middle, lower), jnp.where(long, upper, middle)

    most = largest(delta)
    ends = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros_like(most), most))
    # the length is linear between breakpoints: the last bracket is interpolated
    long, short = (total(cut(end)) for end in ends)
    share = (long - eps) / jnp.where(long > short, long - short, 1.0)
    threshold = ends[0] + jnp.clip(share, 0.0, 1.0) * (ends[1] - ends[0])
    return x + jnp.sign(delta) * cut(threshold)


def to_hyperplane(
    norm: type, z: Array, w: Array, b: Array, low: Scalar, high: Scalar
) -> Array:
    """The shortest step d with <w, z + d> = b and z + d in [low, high]^d.

    Where the domain does not reach the hyperplane, d goes as far towards it as it can.

    Source: Croce & Hein 2020 (FAB), arXiv:1907.02044, equations 6 to 8.
    """
    gap = total(w * z) - b
    w = w * jnp.where(gap >= 0, 1.0, -1.0)
    gap = jnp.abs(gap)
    room = jnp.maximum(jnp.where(w > 0, z - low, high - z), 0.0)
    slopes = jnp.abs(w)
    move = {Linf: _equal_moves, L2: _proportional_moves, L1: _greedy_moves}[norm]
    return -jnp.sign(w) * move(slopes, room, gap)


def _newton(slopes: Array, weights: Array, room: Array, gap: Array) -> Array:
    """min(r * weights, room) with sum(slopes * .) = gap; slopes, weights >= 0.

    The sum is concave and increasing in r: Newton's steps from 0 approach the root
    from below, passing at least one breakpoint each.
    """

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        i, _, r = state
        free = r * weights < room
        moved = total(slopes * jnp.where(free, r * weights, room))
        rate = total(jnp.where(free, slopes * weights, 0.0))
        safe = jnp.where(rate > 0, rate, 1.0)
        further = jnp.where(rate > 0, jnp.maximum(gap - moved, 0.0) / safe, 0.0)
        return i + 1, r, r + further

    def moves(state: tuple[Array, Array, Array]) -> Array:
        i, before, r = state
        return (i < NEWTON_STEPS) & (r > before * (1 + 1e-6))

    none = jnp.zeros_like(gap)
    start = step((jnp.int32(0), none, none))
    r = jax.lax.while_loop(moves, step, start)[2]
    return jnp.minimum(r * weights, room)


def _equal_moves(slopes: Array, room: Array, gap: Array) -> Array:
    return _newton(slopes, jnp.where(slopes > 0, 1.0, 0.0), room, gap)


def _proportional_moves(slopes: Array, room: Array, gap: Array) -> Array:
    steepest = jnp.max(slopes)
    return _newton(slopes, slopes / jnp.where(steepest > 0, steepest, 1.0), room, gap)


def _greedy_moves(slopes: Array, room: Array, gap: Array) -> Array:
    """Steepest coordinates first, each to its end, the last one in part."""
    order = jnp.argsort(-slopes.ravel())
    gains = (slopes * room).ravel()[order]
    before = jnp.cumsum(gains) - gains
    share = jnp.clip((gap - before) / jnp.where(gains > 0, gains, 1.0), 0.0, 1.0)
    taken = jnp.where(gains > 0, share, 0.0)
    return jnp.zeros(slopes.size).at[order].set(taken).reshape(slopes.shape) * room
