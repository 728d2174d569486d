"""Minimum-norm attacks that weigh distance against margin: Carlini & Wagner, EAD.

Each minimises `distance + c * max(margin, 0)` for a constant c found by bisection, one
search for each of `searches` constants. Results and distances as in `minimal`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from certjax.attacks.geometry import size
from certjax.attacks.losses import aimed, Goal, margin_loss, reached
from certjax.attacks.minimal import Nearest
from certjax.attacks.search import at_random, check_counts, guarded, repeat
from certjax.loops import fori
from certjax.threat import L1, L2, Linf, Threat
from certjax.types import Array, Attack, Classifier, Key


# Keeps the inverse of tanh finite at the ends of the domain. The usual 1 - 1e-6 puts
# black pixels at -7.25, where gradients vanish and from where 100 steps of 0.05 do not
# return; 0.99 moves no pixel by more than 0.005 at the start.
INSIDE = 0.99
UNBOUNDED = 1e10
CHECKS = 10  # per search, for getting nowhere


def carlini_wagner(
    threat: Threat,
    *,
    searches: int = 9,
    steps: int = 1000,
    learning_rate: float = 0.01,
    constant: float = 1e-3,
    confidence: float = 0.0,
    goal: Goal = "untargeted",
) -> Attack:
    """Carlini & Wagner's attack in tanh space with Adam, in l2 or linf.

    Each search starts at the nearest point of the searches before, and ends early for
    an example that is broken and whose loss no longer falls.

    Args:
      threat: L2 or Linf names the norm, and the domain.
      searches: values of the constant.
      steps: gradient evaluations per search.
      learning_rate: of Adam.
      constant: the first value of the constant.
      confidence: margin of misclassification that is asked for, in logits.
      goal: "targeted": `label` is the class to reach.

    Deviations from the authors' code: the tanh coordinates of x are shrunk by 0.99, not
    0.999999 (see `INSIDE`); in l2 each search starts at the nearest point so far.

    Source: Carlini & Wagner 2017, arXiv:1608.04644, sections VI.A and VI.C.
    """
    check_counts(searches=searches, steps=steps)
    kinds = {L2: _search_l2, Linf: _search_linf}
    if type(threat) not in kinds:
        raise TypeError(f"carlini_wagner minimises l2 or linf, got {threat}")
    adam = _Adam(threat, steps, learning_rate)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        f = at_random(f, key)
        at = _margin(f, label, confidence, goal)
        best = Nearest.none(x, f(x), label, goal)
        return kinds[type(threat)](adam, at, x, best, searches, constant).z

    return guarded(attack)


class _Look(NamedTuple):
    """excess: [] how far from the goal, in logits, 0 once reached.  fooled: [] bool."""

    excess: Array
    fooled: Array


def _margin(
    f: Classifier, label: Array, confidence: float, goal: Goal
) -> Callable[[Array], _Look]:
    gain = aimed(margin_loss, goal)

    def at(z: Array) -> _Look:
        logits = f(z)
        value = gain(logits, label)
        fooled = reached(logits, label, goal) & (value >= confidence)
        return _Look(jnp.maximum(confidence - value, 0.0), fooled)

    return at


class _Adam(NamedTuple):
    threat: Threat
    steps: int
    learning_rate: float

    def into(self, x: Array) -> Array:
        """The tanh-space coordinates of a point of the domain."""
        low, high = self.threat.low, self.threat.high
        return jnp.arctanh(INSIDE * (2 * (x - low) / (high - low) - 1))

    def out(self, w: Array) -> Array:
        """The point of the domain with the given tanh-space coordinates."""
        low, high = self.threat.low, self.threat.high
        return jnp.clip(low + (high - low) * 0.5 * (jnp.tanh(w) + 1), low, high)


class _Descent(NamedTuple):
    """Adam's state; `checked`: the loss at the last check.  stuck: [] bool."""

    w: Array
    mean: Array
    square: Array
    best: Nearest
    found: Array
    checked: Array
    stuck: Array


def _descend(
    adam: _Adam, norm: type, loss_at: Callable, x: Array, w: Array, best: Nearest
) -> _Descent:
    """Adam on `loss_at(z) -> (loss, _Look)` in tanh space, from w."""
    every = jnp.maximum(adam.steps // CHECKS, 1)  # the steps may be traced

    def valued(w: Array) -> tuple[Array, tuple[Array, _Look]]:
        z = adam.out(w)
        loss, look = loss_at(z)
        return loss, (z, look)

    def step(i: Array, s: _Descent) -> _Descent:
        (loss, (z, look)), g = jax.value_and_grad(valued, has_aux=True)(s.w)
        g = jnp.nan_to_num(g)
        mean, square = 0.9 * s.mean + 0.1 * g, 0.999 * s.square + 0.001 * g * g
        scale = jnp.sqrt(square / (1 - 0.999 ** (i + 1.0))) + 1e-8
        move = adam.learning_rate * mean / (1 - 0.9 ** (i + 1.0)) / scale
        check = i % every == 0
        return _Descent(
            w=s.w - move,
            mean=mean,
            square=square,
            best=s.best.closer(z, size(norm, z - x), look.fooled),
            found=s.found | look.fooled,
            checked=jnp.where(check, loss, s.checked),
            stuck=check & s.found & (loss > 0.9999 * s.checked),
        )

    nothing, no = jnp.zeros_like(w), jnp.zeros((), bool)
    start = _Descent(w, nothing, nothing, best, no, jnp.asarray(jnp.inf, x.dtype), no)
    return repeat(adam.steps, step, start, lambda s: s.stuck)


class _Constant(NamedTuple):
    """The constant and the bracket of its bisection."""

    value: Array
    lower: Array
    upper: Array

    @classmethod
    def starting(cls, value: float, x: Array) -> "_Constant":
        values = (jnp.asarray(v, x.dtype) for v in (value, 0.0, UNBOUNDED))
        return cls(*values)

    def next(self, found: Array) -> "_Constant":
        """Smaller after a success, larger (tenfold before any success) after none."""
        upper = jnp.where(found, jnp.minimum(self.upper, self.value), self.upper)
        lower = jnp.where(found, self.lower, jnp.maximum(self.lower, self.value))
        middle = 0.5 * (lower + upper)
        value = jnp.where(upper < UNBOUNDED, middle, 10 * self.value)
        return _Constant(value, lower, upper)


def _search_l2(
    adam: _Adam,
    at: Callable,
    x: Array,
    best: Nearest,
    searches: int,
    constant: float,
) -> Nearest:
    def search(_: int, state: tuple[_Constant, Nearest]) -> tuple:
        c, best = state
        start = adam.into(best.z)  # x, or the nearest point of the searches before

        def loss_at(z: Array) -> tuple[Array, _Look]:
            look = at(z)
            return jnp.sum((z - x) ** 2) + c.value * look.excess, look

        end = _descend(adam, L2, loss_at, x, start, best)
        return c.next(end.found), end.best

    return fori(searches, search, (_Constant.starting(constant, x), best))[1]


def _search_linf(
    adam: _Adam,
    at: Callable,
    x: Array,
    best: Nearest,
    searches: int,
    constant: float,
) -> Nearest:
    """Linf is replaced by what exceeds a ceiling, lowered after every success."""
    start = adam.into(x)

    def search(_: int, state: tuple[Array, Array, Array, Nearest]) -> tuple:
        c, ceiling, w, best = state

        def loss_at(z: Array) -> tuple[Array, _Look]:
            look = at(z)
            over = jnp.sum(jnp.maximum(jnp.abs(z - x) - ceiling, 0.0))
            return over + c * look.excess, look

        end = _descend(adam, Linf, loss_at, x, w, best)
        closer = end.best.distance < best.distance
        lowered = 0.9 * jnp.minimum(ceiling, end.best.distance)
        ceiling = jnp.where(closer, lowered, ceiling)
        c = jnp.where(closer, c, 2 * c)
        return c, ceiling, jnp.where(closer, end.w, start), end.best

    c = jnp.asarray(constant, x.dtype)
    width = jnp.asarray(adam.threat.high - adam.threat.low, x.dtype)
    return fori(searches, search, (c, width, start, best))[3]


def ead(  # noqa: PLR0913
    threat: Threat,
    *,
    searches: int = 9,
    steps: int = 1000,
    learning_rate: float = 0.01,
    constant: float = 1e-3,
    shrinkage: float = 0.01,
    confidence: float = 0.0,
    goal: Goal = "untargeted",
) -> Attack:
    """Elastic-net attack: FISTA on l2^2 + shrinkage * l1 + c * margin.

    Args:
      threat: L1 (the nearest point in l1 is kept) or L2 (in l2), and the domain.
      searches: values of the constant.
      steps: gradient evaluations per search.
      learning_rate: of the first step; it falls with the square root of those left.
      constant: the first value of the constant.
      shrinkage: weight of l1, the threshold of the shrinkage.
      confidence: margin of misclassification that is asked for, in logits.
      goal: "targeted": `label` is the class to reach.

    Source: Chen et al. 2018, arXiv:1709.04114, algorithm 1.
    """
    check_counts(searches=searches, steps=steps)
    if type(threat) not in (L1, L2):
        raise TypeError(f"ead minimises l1 or l2, got {threat}")
    norm = type(threat)

    def shrunk(x: Array, z: Array) -> Array:
        delta = z - x
        delta = jnp.sign(delta) * jnp.maximum(jnp.abs(delta) - shrinkage, 0.0)
        return jnp.clip(x + delta, threat.low, threat.high)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        f = at_random(f, key)
        at = _margin(f, label, confidence, goal)

        def search(_: int, state: tuple[_Constant, Nearest]) -> tuple:
            c, best = state

            def loss(y: Array) -> Array:
                return jnp.sum((y - x) ** 2) + c.value * at(y).excess

            def step(i: Array, s: tuple) -> tuple:
                z, y, best, found = s
                rate = learning_rate * jnp.sqrt(1.0 - i / steps)
                new = shrunk(x, y - rate * jnp.nan_to_num(jax.grad(loss)(y)))
                fooled = at(new).fooled
                best = best.closer(new, size(norm, new - x), fooled)
                return new, new + i / (i + 3.0) * (new - z), best, found | fooled

            start = x, x, best, jnp.zeros((), bool)
            _, _, best, found = fori(steps, step, start)
            return c.next(found), best

        best = Nearest.none(x, f(x), label, goal)
        return fori(searches, search, (_Constant.starting(constant, x), best))[1].z

    return guarded(attack)
