"""Attacks that only query: SPSA and NES by scores, HopSkipJump and Boundary by labels.

Every factory is given the number of queries that one example may cost, and stays
within it. SPSA and NES stop early; `attack.counted(..)` tells what they spent.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from certjax.attacks.geometry import size
from certjax.attacks.losses import Goal, Loss, margin_loss, reached
from certjax.attacks.minimal import Nearest
from certjax.attacks.search import (
    at_random,
    counting,
    guarded,
    judge,
    Judged,
    keep,
    radius,
    repeat,
    unit,
)
from certjax.loops import fori
from certjax.threat import L2, Linf, Threat
from certjax.types import Array, Attack, Classifier, Key, Scalar


Draw = Callable[[Key, tuple], Array]
BISECTIONS = 10
HALVINGS = 10
VERDICTS = 2  # queries of a label-only attack: of the example and of its result


def spsa(
    threat: Threat,
    *,
    queries: int = 10_000,
    samples: int = 64,
    spread: float = 0.01,
    step_size: Scalar | None = None,
    loss: Loss = margin_loss,
    goal: Goal = "untargeted",
) -> Attack:
    """Projected ascent on gradients estimated from random sign flips.

    Args:
      threat: the perturbation set.
      queries: forward passes in all.
      samples: pairs of queries, x + v and x - v, per step.
      spread: length of v in each coordinate, input units.
      step_size: in the norm of the set; None: 2.5 radii over the steps.
      loss: the score that is climbed.
      goal: "targeted": `label` is the class to reach.

    Source: Uesato et al. 2018, arXiv:1802.05666, section 3.
    """
    draw = lambda key, shape: jax.random.rademacher(key, shape, jnp.float32)
    plan = _Estimate(threat, queries, samples, spread, step_size, draw)
    return _estimated(plan, loss, goal)


def nes(
    threat: Threat,
    *,
    queries: int = 10_000,
    samples: int = 64,
    spread: float = 0.01,
    step_size: Scalar | None = None,
    loss: Loss = margin_loss,
    goal: Goal = "untargeted",
) -> Attack:
    """`spsa` with Gaussian directions: natural evolution strategies.

    Args:
      threat: the perturbation set.
      queries: forward passes in all.
      samples: pairs of queries per step.
      spread: standard deviation of the directions, input units.
      step_size: in the norm of the set; None: 2.5 radii over the steps.
      loss: the score that is climbed.
      goal: "targeted": `label` is the class to reach.

    Source: Ilyas et al. 2018, arXiv:1804.08598, section 2.
    """
    plan = _Estimate(threat, queries, samples, spread, step_size, jax.random.normal)
    return _estimated(plan, loss, goal)


class _Estimate(NamedTuple):
    threat: Threat
    queries: int
    samples: int
    spread: float
    step_size: Scalar | None
    draw: Draw

    @property
    def steps(self) -> int:
        """Each step costs a query for the iterate and two per sample."""
        steps = (self.queries - 2) // (2 * self.samples + 1)
        if steps < 1:
            raise ValueError(
                f"queries must cover one step, {2 * self.samples + 3} for "
                f"{self.samples} samples; got {self.queries}"
            )
        return steps


def _estimated(plan: _Estimate, loss: Loss, goal: Goal) -> Attack:
    threat, steps = plan.threat, plan.steps

    def counted(key: Key, f: Classifier, x: Array, label: Array) -> tuple[Array, Array]:
        at = judge(at_random(f, key), label, loss, goal)
        length = 2.5 / steps * radius(threat, x)
        length = length if plan.step_size is None else plan.step_size

        def step(i: Array, state: tuple[Array, Judged, Array]) -> tuple:
            z, best, spent = state
            keys = jax.random.split(jax.random.fold_in(key, i), plan.samples)

            def slope(key: Key) -> Array:
                v = plan.draw(key, x.shape)
                ahead, behind = at(z + plan.spread * v), at(z - plan.spread * v)
                gap = ahead.loss - behind.loss
                return jnp.where(jnp.isfinite(gap), gap, 0.0) * v

            g = jnp.sum(jax.lax.map(slope, keys), axis=0)
            z = threat.project(x, z + length * threat.ascend(unit(g)))
            return z, keep(best, at(z)), spent + 2 * plan.samples + 1

        best = at(threat.project(x, x))
        state = best.z, best, jnp.int32(1)
        _, best, spent = repeat(steps, step, state, lambda state: state[1].fooled)
        return best.z, spent

    return counting(counted)


class _Decision(NamedTuple):
    """What a label-only attack knows: is a point misclassified?"""

    norm: type
    low: Scalar
    high: Scalar
    fooled: Callable[[Array], Array]

    def clip(self, z: Array) -> Array:
        return jnp.clip(z, self.low, self.high)

    def start(self, key: Key, x: Array, tries: int) -> tuple[Array, Array]:
        """The first misclassified point of uniform noise, and whether there is one."""

        def attempt(i: Array, _: tuple[Array, Array]) -> tuple[Array, Array]:
            u = jax.random.uniform(jax.random.fold_in(key, i), x.shape, x.dtype)
            z = self.low + (self.high - self.low) * u
            return z, self.fooled(z)

        none = x, jnp.zeros((), bool)
        z, found = repeat(tries, attempt, none, lambda state: state[1])
        return jnp.where(found, z, x), found

    def to_boundary(self, x: Array, z: Array) -> Array:
        """The misclassified point nearest to x between x and a misclassified z."""

        def at(share: Array) -> Array:
            if self.norm is Linf:
                reach = share * size(Linf, z - x)
                return jnp.clip(z, x - reach, x + reach)
            return x + share * (z - x)

        def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            lower, upper = bracket
            middle = 0.5 * (lower + upper)
            hit = self.fooled(at(middle))
            return jnp.where(hit, lower, middle), jnp.where(hit, middle, upper)

        ends = jnp.zeros((), x.dtype), jnp.ones((), x.dtype)
        return at(fori(BISECTIONS, halve, ends)[1])


def _deciding(
    threat: Threat, f: Classifier, key: Key, label: Array, goal: Goal
) -> _Decision:
    g = at_random(f, key)
    fooled = lambda z: reached(g(z), label, goal)
    return _Decision(type(threat), threat.low, threat.high, fooled)


def _decision_norm(threat: Threat, name: str) -> None:
    if type(threat) not in (L2, Linf):
        raise TypeError(f"{name} minimises l2 or linf, got {threat}")


def hopskipjump(
    threat: Threat,
    *,
    queries: int = 10_000,
    samples: int = 100,
    tries: int = 50,
    goal: Goal = "untargeted",
) -> Attack:
    """HopSkipJump: boundary, gradient direction estimated from labels, geometric step.

    Args:
      threat: L2 or Linf names the norm that is minimised, and the domain.
      queries: forward passes in all.
      samples: queries per estimate of the boundary's normal.
      tries: draws of uniform noise for a misclassified start.
      goal: "targeted": `label` is the class to reach.

    Returns:
      attack(key, f, x, label) -> z in the domain; x where no start was found.

    Source: Chen et al. 2020, arXiv:1904.02144, algorithm 2.
    """
    _decision_norm(threat, "hopskipjump")
    rounds = _rounds(queries, tries, samples + HALVINGS + BISECTIONS)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        decision = _deciding(threat, f, key, label, goal)
        start, found = decision.start(jax.random.fold_in(key, 0), x, tries)

        def jump(i: Array, z: Array) -> Array:
            own = jax.random.fold_in(key, i + 1)
            distance = size(decision.norm, z - x)
            v = _normal_at(own, decision, z, 0.01 * size(L2, z - x) + 1e-6, samples)
            direction = (
                jnp.sign(v) if decision.norm is Linf else L2(1.0).ascend(unit(v))
            )
            length = distance / jnp.sqrt(i + 1.0)
            new = decision.to_boundary(x, _jumped(decision, z, direction, length))
            return jnp.where(size(decision.norm, new - x) < distance, new, z)

        z = fori(rounds, jump, decision.to_boundary(x, start))
        clean = decision.fooled(x)
        return jnp.where(found & ~clean & decision.fooled(z), z, x)

    return guarded(attack)


def _rounds(queries: int, tries: int, cost: int) -> int:
    """How many rounds the queries pay for, the start on the boundary taken off."""
    left = queries - tries - BISECTIONS - VERDICTS
    if left < cost:
        raise ValueError(
            f"queries must cover one round, {cost}; {left} are left for it"
        )
    return left // cost


def _normal_at(
    key: Key, decision: _Decision, z: Array, spread: Array, samples: int
) -> Array:
    """The boundary's normal: directions weighted by which side they end on."""

    def look(key: Key) -> tuple[Array, Array]:
        v = L2(1.0).ascend(jax.random.normal(key, z.shape, z.dtype))
        hit = decision.fooled(decision.clip(z + spread * v))
        return jnp.where(hit, 1.0, -1.0), v

    sides, directions = jax.lax.map(look, jax.random.split(key, samples))
    mean = jnp.mean(sides)
    weights = jnp.where(jnp.abs(mean) < 1.0, sides - mean, sides)
    return jnp.tensordot(weights, directions, axes=1)


def _jumped(decision: _Decision, z: Array, direction: Array, length: Array) -> Array:
    """As far along the normal as stays misclassified, halving up to ten times."""

    def shorter(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        length, _ = state
        hit = decision.fooled(decision.clip(z + length * direction))
        return jnp.where(hit, length, 0.5 * length), hit

    start = length, jnp.zeros((), bool)
    length, hit = repeat(HALVINGS, shorter, start, lambda state: state[1])
    return jnp.where(hit, decision.clip(z + length * direction), z)


def boundary(
    threat: Threat,
    *,
    queries: int = 10_000,
    tries: int = 50,
    goal: Goal = "untargeted",
) -> Attack:
    """The boundary attack: a random walk along the boundary, towards x; in l2.

    Args:
      threat: an L2 set, for its domain.
      queries: forward passes in all.
      tries: draws of uniform noise for a misclassified start.
      goal: "targeted": `label` is the class to reach.

    Returns:
      attack(key, f, x, label) -> z in the domain; x where no start was found.

    Source: Brendel et al. 2018, arXiv:1712.04248, algorithm 1.
    """
    if type(threat) is not L2:
        raise TypeError(f"boundary minimises l2, got {threat}")
    steps = _rounds(queries, tries, cost=2)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        decision = _deciding(threat, f, key, label, goal)
        start, found = decision.start(jax.random.fold_in(key, 0), x, tries)

        def walk(i: Array, state: tuple) -> tuple:
            z, around, towards, best = state
            v = jax.random.normal(jax.random.fold_in(key, i + 1), x.shape, x.dtype)
            sideways = decision.clip(_around(x, z, v, around))
            free = decision.fooled(sideways)
            new = decision.clip(sideways + towards * (x - sideways))
            closer = free & decision.fooled(new)
            best = best.closer(new, size(L2, new - x), closer)
            around = around * jnp.where(free, 1.1, 0.9)
            towards = jnp.where(free, towards * jnp.where(closer, 1.1, 0.9), towards)
            return jnp.where(closer, new, z), around, jnp.minimum(towards, 0.5), best

        clean = jnp.where(decision.fooled(x), 0.0, jnp.inf).astype(x.dtype)
        z = decision.to_boundary(x, start)
        best = Nearest(x, clean).closer(z, size(L2, z - x), found & decision.fooled(z))
        step = jnp.asarray(0.01, x.dtype)
        return fori(steps, walk, (z, step, step, best))[3].z

    return guarded(attack)


def _around(x: Array, z: Array, v: Array, share: Array) -> Array:
    """A step of relative length `share` on the sphere around x through z."""
    delta = z - x
    length = size(L2, delta)
    outwards = L2(1.0).ascend(unit(delta))
    v = v - jnp.sum(v * outwards) * outwards
    moved = delta + share * length * L2(1.0).ascend(unit(v))
    return x + length * L2(1.0).ascend(unit(moved))
