"""Perturbation sets, one value shared by attacker and certifier, and threat models.

A set is a registered dataclass (a pytree), so `eps` may be traced: one compilation
serves every radius. All verbs act on ONE example `x` of any shape.

The attacker's points are rounded inwards: `project` and `sample` return float32
points that lie inside the set in exact arithmetic of the stored `x` and `eps` (l2
and l1: up to the rounding of the norm, which a shrink of 2e-6 covers). The
certifier's `box` contains them all. Hence certified <= robust accuracy holds to
the last bit.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from certjax.types import Array, Interval, Key, Scalar


SHRINK = 2e-6  # relative; exceeds the float32 error of a pairwise sum of 1e9 squares


def _check_ball(eps: Scalar, low: Scalar, high: Scalar, widest: float) -> None:
    """Validate Python numbers only: __post_init__ runs again with tracers inside."""
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    if numbers and not low < high:
        raise ValueError(
            f"the domain needs low < high, got low={low}, high={high}; "
            "for images in [0, 1] leave both at their defaults"
        )
    if isinstance(eps, int | float) and not 0 <= eps <= widest:
        raise ValueError(
            f"eps must lie in [0, {widest:g}] (input units), got {eps}; "
            f"for pixels on a 0..255 scale write {eps}/255"
        )


def _add_towards(x: Array, step: Array, sign: float) -> Array:
    """`x + sign * step`, rounded towards x: never further away than exact arithmetic.

    TwoSum (Knuth) gives the exact rounding error of the sum.
    """
    step = jnp.asarray(sign * step, x.dtype)
    total = x + step
    virtual = total - x
    error = (x - (total - virtual)) + (step - virtual)  # exact sum - total
    overshoots = error * sign < 0
    return jnp.where(overshoots, jnp.nextafter(total, x), total)


def _inner_product_minimum(c: Array, lower: Array, upper: Array) -> Array:
    return jnp.sum(jnp.where(c > 0, c * lower, c * upper))


def _direction(delta: Array, norm: Array) -> Array:
    """`delta / norm`, and 0 where the norm is 0 (also in the gradient)."""
    safe = jnp.where(norm > 0, norm, 1.0)
    return jnp.where(norm > 0, delta / safe, 0.0)


def _norm(v: Array) -> Array:
    """Euclidean norm of all entries, with gradient 0 instead of NaN at v = 0."""
    squares = jnp.sum(v * v)
    safe = jnp.where(squares > 0, squares, 1.0)
    return jnp.where(squares > 0, jnp.sqrt(safe), 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Ball:
    """A norm ball of radius eps around x, cut with the domain [low, high]^d.

    Args:
      eps: radius in input units, e.g. 8/255; a scalar, or an array like x that scales
        each coordinate (linf: a box, l2: an ellipsoid).
      low, high: the domain of each coordinate.
    """

    eps: Scalar
    low: Scalar = 0.0
    high: Scalar = 1.0

    def __post_init__(self) -> None:
        """Refuse Python numbers that make no sense."""
        widest = math.inf
        if isinstance(self, Linf) and all(
            isinstance(v, int | float) for v in (self.low, self.high)
        ):
            widest = self.high - self.low  # type: ignore[operator]
        _check_ball(self.eps, self.low, self.high, widest)

    def box(self, x: Array) -> Interval:
        """The smallest box around the set."""
        return Interval(
            jnp.maximum(x - self.eps, self.low), jnp.minimum(x + self.eps, self.high)
        )

    def _attackable(self, x: Array) -> Interval:
        """`box`, rounded towards x, so that its corners are inside the set."""
        eps = jnp.asarray(self.eps, x.dtype)
        return Interval(
            jnp.maximum(_add_towards(x, eps, -1.0), self.low),
            jnp.minimum(_add_towards(x, eps, 1.0), self.high),
        )

    def _scaled(self, delta: Array) -> Array:
        """`delta / eps`, so that the set is a unit ball; 0 where eps is 0."""
        eps = jnp.asarray(self.eps, delta.dtype)
        safe = jnp.where(eps > 0, eps, 1.0)
        return jnp.where(eps > 0, delta / safe, 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Linf(_Ball):
    """{z in [low, high]^d : max|z - x| <= eps}; eps in input units, e.g. 8/255."""

    def project(self, x: Array, z: Array) -> Array:
        """The point of the set nearest to z."""
        return jnp.clip(z, *self._attackable(x))

    def sample(self, key: Key, x: Array) -> Array:
        """A uniformly drawn point of the set."""
        lower, upper = self._attackable(x)
        u = jax.random.uniform(key, x.shape, x.dtype)
        return jnp.clip(lower + u * (upper - lower), lower, upper)

    def ascend(self, g: Array) -> Array:
        """The direction of linf norm 1 along which <g, .> grows fastest."""
        return jnp.sign(g)

    def minimum(self, x: Array, c: Array) -> Array:
        """Minimum of <c, z> over the set (exact)."""
        return _inner_product_minimum(c, *self.box(x))

    def contains(self, x: Array, z: Array) -> Array:
        """[] bool: is z in the set?"""
        lower, upper = self.box(x)
        return jnp.all((z >= lower) & (z <= upper))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class L2(_Ball):
    """{z in [low, high]^d : ||z - x||_2 <= eps}; eps in input units."""

    def project(self, x: Array, z: Array) -> Array:
        """A point of the set near z: scaled into the ball, then cut to the domain."""
        delta = z - x
        norm = _norm(self._scaled(delta))
        delta = delta * jnp.minimum(1.0, (1.0 - SHRINK) / jnp.maximum(norm, 1e-12))
        delta = jnp.where(jnp.asarray(self.eps) > 0, delta, 0.0)
        return jnp.clip(x + delta, *self._attackable(x))

    def sample(self, key: Key, x: Array) -> Array:
        """A point drawn uniformly from the ball, then cut to the domain."""
        direction, radius = jax.random.split(key)
        g = jax.random.normal(direction, x.shape, x.dtype)
        r = jax.random.uniform(radius, (), x.dtype) ** (1.0 / x.size)
        return self.project(x, x + self.eps * r * self.ascend(g))

    def ascend(self, g: Array) -> Array:
        """The direction of l2 norm 1 along which <g, .> grows fastest."""
        return _direction(g, _norm(g))

    def minimum(self, x: Array, c: Array) -> Array:
        """Lower bound of <c, z> over the set: the tighter of ball and box."""
        ball = jnp.sum(c * x) - _norm(self.eps * c)
        return jnp.maximum(ball, _inner_product_minimum(c, *self.box(x)))

    def contains(self, x: Array, z: Array) -> Array:
        """[] bool: is z in the set?"""
        lower, upper = self.box(x)
        inside = jnp.all((z >= lower) & (z <= upper))
        return inside & (_norm(self._scaled(z - x)) <= 1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class L1(_Ball):
    """{z in [low, high]^d : ||z - x||_1 <= eps}; eps in input units."""

    def project(self, x: Array, z: Array) -> Array:
        """A point of the set near z: onto the l1 ball, then cut to the domain.

        Source: Duchi et al. 2008, "Efficient projections onto the l1-ball", figure 1.
        """
        delta = jnp.where(jnp.asarray(self.eps) > 0, z - x, 0.0)
        magnitude = jnp.abs(self._scaled(delta)).ravel()
        falling = jnp.sort(magnitude)[::-1]
        counts = jnp.arange(1, magnitude.size + 1)
        excess = jnp.cumsum(falling) - (1.0 - SHRINK)
        last = jnp.sum(falling * counts > excess) - 1
        cut = jnp.maximum(excess[last] / (last + 1), 0.0) * self.eps
        delta = jnp.sign(delta) * jnp.maximum(jnp.abs(delta) - cut, 0.0)
        # the sum of d terms is rounded: shrink once more where it came out too long
        total = jnp.sum(jnp.abs(self._scaled(delta)))
        delta = delta * jnp.minimum(1.0, (1.0 - SHRINK) / jnp.maximum(total, 1e-12))
        return jnp.clip(x + delta, *self._attackable(x))

    def sample(self, key: Key, x: Array) -> Array:
        """A point drawn uniformly from the ball, then cut to the domain."""
        size, sign = jax.random.split(key)
        # spacings of d + 1 exponentials are uniform on the solid simplex
        e = jax.random.exponential(size, (x.size + 1,), x.dtype)
        simplex = (e[:-1] / jnp.sum(e)).reshape(x.shape)
        signs = jax.random.rademacher(sign, x.shape, x.dtype)
        return self.project(x, x + self.eps * simplex * signs)

    def ascend(self, g: Array) -> Array:
        """The direction of l1 norm 1 along which <g, .> grows fastest: one entry."""
        magnitude = jnp.abs(g).ravel()
        top = jnp.arange(g.size) == jnp.argmax(magnitude)
        return top.reshape(g.shape) * jnp.sign(g)

    def minimum(self, x: Array, c: Array) -> Array:
        """Lower bound of <c, z> over the set: the tighter of ball and box."""
        ball = jnp.sum(c * x) - jnp.max(self.eps * jnp.abs(c))
        return jnp.maximum(ball, _inner_product_minimum(c, *self.box(x)))

    def contains(self, x: Array, z: Array) -> Array:
        """[] bool: is z in the set?"""
        lower, upper = self.box(x)
        inside = jnp.all((z >= lower) & (z <= upper))
        return inside & (jnp.sum(jnp.abs(self._scaled(z - x))) <= 1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Box:
    """{z : lower <= z <= upper}, whatever x is; arrays, or trees of arrays.

    Trees make it a set of parameters too: `ibp(lambda w: net(w, x))(Box(lo, hi), w)`
    bounds a network under weight perturbation.
    """

    lower: Array
    upper: Array

    def box(self, x: Array) -> Interval:  # noqa: ARG002
        """The set itself."""
        return Interval(self.lower, self.upper)

    def project(self, x: Array, z: Array) -> Array:  # noqa: ARG002
        """The point of the set nearest to z."""
        return jax.tree.map(jnp.clip, z, self.lower, self.upper)

    def sample(self, key: Key, x: Array) -> Array:
        """A uniformly drawn point of the set."""
        leaves, tree = jax.tree.flatten(x)
        keys = tree.unflatten(jax.random.split(key, len(leaves)))

        def draw(key: Key, like: Array, lower: Array, upper: Array) -> Array:
            u = jax.random.uniform(key, like.shape, like.dtype)
            return jnp.clip(lower + u * (upper - lower), lower, upper)

        return jax.tree.map(draw, keys, x, self.lower, self.upper)

    def ascend(self, g: Array) -> Array:
        """The sign: the steepest direction of a box, coordinate by coordinate."""
        return jax.tree.map(jnp.sign, g)

    def minimum(self, x: Array, c: Array) -> Array:  # noqa: ARG002
        """Minimum of <c, z> over the set (exact)."""
        terms = jax.tree.map(_inner_product_minimum, c, self.lower, self.upper)
        return jax.tree.reduce(jnp.add, terms)

    def contains(self, x: Array, z: Array) -> Array:  # noqa: ARG002
        """[] bool: is z in the set?"""
        inside = jax.tree.map(
            lambda v, lower, upper: jnp.all((v >= lower) & (v <= upper)),
            z,
            self.lower,
            self.upper,
        )
        return jax.tree.reduce(jnp.logical_and, inside)


Threat: TypeAlias = Linf | L2 | L1 | Box


@dataclass(frozen=True)
class ThreatModel:
    """What the adversary may do, wants, knows and may spend; every report prints it.

    Args:
      threat: the perturbation set.
      goal: "untargeted" (any wrong class) or "targeted" (one named class).
      knowledge: "white-box" (gradients), "black-box" (queries only) or "transfer"
        (gradients of another model).
      steps: gradient evaluations allowed for one restart; None: not limited.
      restarts: independent starts.
      queries: forward evaluations allowed; None: not limited.
    """

    threat: Threat
    goal: Literal["untargeted", "targeted"] = "untargeted"
    knowledge: Literal["white-box", "black-box", "transfer"] = "white-box"
    steps: int | None = None
    restarts: int = 1
    queries: int | None = None

    def __post_init__(self) -> None:
        """Refuse words and budgets that mean nothing."""
        goals, kinds = (
            ("untargeted", "targeted"),
            ("white-box", "black-box", "transfer"),
        )
        if self.goal not in goals:
            raise ValueError(f"goal must be one of {goals}, got {self.goal!r}")
        if self.knowledge not in kinds:
            raise ValueError(
                f"knowledge must be one of {kinds}, got {self.knowledge!r}"
            )
        for name in ("steps", "restarts", "queries"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")

    def describe(self) -> str:
        """One line for tables and logs, e.g. "Linf eps=0.1, untargeted, ..."."""
        radius = getattr(self.threat, "eps", None)
        size = "" if radius is None else f" eps={radius}"
        budget = [
            f"{name}={getattr(self, name)}"
            for name in ("steps", "restarts", "queries")
            if getattr(self, name) is not None
        ]
        kind = type(self.threat).__name__ + size
        return ", ".join([kind, self.goal, self.knowledge, *budget])
