"""Recipes: `recipe(step) -> objective`, the objective with the numbers of the step."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import jax.numpy as jnp

from certjax.threat import L1, L2, Linf
from certjax.training.losses import cross_entropy
from certjax.training.objectives import AttackBuilder, Itemized, Terms, terms_of
from certjax.training.schedules import Schedule
from certjax.types import Array, Attack, Classifier, Key, Objective, Scalar


Ball: TypeAlias = Linf | L2 | L1
Recipe: TypeAlias = Callable[[Scalar], Objective]

SMALLEST_EPS = 1e-6  # bounds and regularisers need a box; used while eps is still 0


def unchanging(objective: Objective) -> Recipe:
    """The same objective at every step."""
    return lambda step: objective  # noqa: ARG005


def scheduled(
    objective: Callable[..., Objective],
    threat: Ball,
    *,
    eps: Schedule,
    **numbers: Schedule,
) -> Recipe:
    """The objective with eps and further numbers following schedules.

    While eps is 0 (the warm-up) the loss is the natural cross-entropy alone; the bounds
    are then those of eps = 1e-6, for the regularisers.

    Args:
      objective: factory, called as `objective(threat, **numbers of the step)`.
      threat: a norm ball; its own eps is replaced by the schedule's.
      eps: schedule of the radius.
      **numbers: schedules of further keyword arguments, e.g. `kappa=`.
    """

    def recipe(step: Scalar) -> Objective:
        radius = jnp.asarray(eps(step), jnp.float32)
        now = replace(threat, eps=jnp.maximum(radius, SMALLEST_EPS))
        values = {
            name: jnp.asarray(schedule(step), jnp.float32)
            for name, schedule in numbers.items()
        }
        robust = terms_of(objective(now, **values))

        @Itemized
        def this_step(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
            found = robust(key, f, x, label)
            warm = cross_entropy(f(x), label)
            return found._replace(
                loss=jnp.where(radius > 0, found.loss, warm),
                metrics=found.metrics | {"eps": radius} | values,
            )

        return this_step

    return recipe


def relative_step(attack: AttackBuilder, *, ratio: float) -> AttackBuilder:
    """An attack builder whose step is `ratio` times the eps of the threat."""

    def build(threat: Ball, **more: object) -> Attack:
        return attack(threat, step_size=ratio * threat.eps, **more)

    return build
