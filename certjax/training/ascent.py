"""The attack inside a training objective: steps of steepest ascent, nothing else.

An attack that measures robustness keeps the best point that it visits, which costs two
forward passes more than its steps. Inside a loss the last point is as good, and its
logits are those the loss needs anyway.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from certjax.attacks.losses import log_odds, Loss
from certjax.attacks.search import check_counts, radius
from certjax.loops import fori, loopable
from certjax.threat import Threat
from certjax.types import Array, Attack, Classifier, Key


def ascent(  # noqa: PLR0913
    threat: Threat,
    *,
    steps: int = 8,
    step: float = 0.25,
    decay_at: int | None = None,
    decay: float = 0.2,
    restarts: int = 1,
    random_start: bool = True,
    loss: Loss = log_odds,
) -> Attack:
    """The last point of projected steepest ascent, from a random point of the set.

    Args:
      threat: the perturbation set.
      steps: gradient evaluations of one restart.
      step: length of a step, as a share of the radius (of a Box: of its half widths).
      decay_at: the step from which steps are `decay` times as long; None: never.
      decay: see `decay_at`.
      restarts: independent starts; of more than one the end of highest loss is taken.
      random_start: start at a random point of the set instead of x.
      loss: `loss(logits, label)`, ascended.

    Returns:
      attack(key, f, x, label) -> z, costing `steps` forward and backward passes of a
      restart, and a forward pass more for each if there are several.
    Source: Madry et al. 2018, arXiv:1706.06083; the steps of Mao et al. 2025 (CTBench),
      arXiv:2406.04848: `step=max(0.25, 2 / steps)`, `decay_at=10`.
    """
    check_counts(steps=steps, restarts=restarts)

    def lengths(i: Array) -> Array:
        return step * (1.0 if decay_at is None else jnp.where(i < decay_at, 1.0, decay))

    def climb(f: Classifier, x: Array, label: Array, key: Key) -> Array:
        slope = jax.grad(lambda z: loss(f(z), label))

        def move(i: Array, z: Array) -> Array:
            direction = threat.ascend(jnp.nan_to_num(slope(z)))
            return threat.project(x, z + lengths(i) * radius(threat, x) * direction)

        start = threat.sample(key, x) if random_start else threat.project(x, x)
        return fori(steps, move, start)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        f = loopable(f, x)
        if restarts == 1:
            return climb(f, x, label, key)
        keys = jax.random.split(key, restarts)
        ends = _in_turn(partial(climb, f, x, label), keys)
        losses = jax.vmap(lambda z: loss(f(z), label))(ends)
        return ends[jnp.argmax(losses)]

    return attack


def _in_turn(climb: Callable[[Key], Array], keys: Key) -> Array:
    """One restart after the other: the memory of one."""
    return jax.lax.map(climb, keys)
