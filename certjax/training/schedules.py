"""Schedules: pure functions of the integer step, which may be traced."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import optax

from certjax.types import Array, Scalar


Schedule: TypeAlias = Callable[[Any], Any]
"""`schedule(step) -> value`."""


def constant(*, value: float) -> Schedule:
    """The same value at every step."""
    return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def _check_ramp(start: int, end: int) -> None:
    if not 0 <= start <= end:
        raise ValueError(f"a ramp needs 0 <= start <= end, got {start} and {end}")


def smoothed_ramp(
    *, start: int, end: int, final: float, bend: float = 0.25, power: int = 4
) -> Schedule:
    """0 up to `start`, `final` from `end` on; a power law, then a line of equal slope.

    The first `bend` of the ramp is a * (step - start)^power, the rest is linear, and
    the derivative is continuous where they meet.

    Args:
      start: step up to which the value is 0.
      end: step from which it is final; may equal start: a jump at that step.
      final: the last value.
      bend: share of the ramp that is not linear.
      power: exponent of that share.
    Source: the epsilon schedule of google-deepmind/interval-bound-propagation.
    """
    _check_ramp(start, end)
    curve = max(int(bend * (end - start)), 1)
    line = max(end - start - curve, 0)
    knee = final * curve / (power * line + curve)

    def schedule(step: Scalar) -> Array:
        elapsed = jnp.asarray(step, jnp.float32) - start
        early = knee * (elapsed / curve) ** power
        late = knee + (final - knee) * (elapsed - curve) / max(line, 1)
        ramp = jnp.where(elapsed <= curve, early, late)
        ramp = jnp.where(elapsed <= 0, 0.0, ramp)
        return jnp.where(elapsed >= end - start, final, ramp)

    return schedule


def linear_ramp(*, start: int, end: int, first: float, final: float) -> Schedule:
    """`first` up to step `start`, `final` from step `end` on, linear between."""
    _check_ramp(start, end)

    def schedule(step: Scalar) -> Array:
        elapsed = (jnp.asarray(step, jnp.float32) - start) / max(end - start, 1)
        ramp = first + (final - first) * jnp.clip(elapsed, 0.0, 1.0)
        return jnp.where(step >= end, final, ramp)

    return schedule


def tied(eps: Schedule, *, at: float, first: float, final: float) -> Schedule:
    """From `first` to `final` in proportion to how far `eps` has come to `at`.

    Source: Gowal et al. 2018, arXiv:1810.12715, section 4 (kappa falls as eps grows).
    """
    if at <= 0:
        raise ValueError(f"at is the final eps and must be positive, got {at}")
    return lambda step: first + (final - first) * jnp.clip(eps(step) / at, 0.0, 1.0)


def piecewise(*, value: float, boundaries: Sequence[int], factor: float) -> Schedule:
    """`value`, multiplied by `factor` at each of the steps in `boundaries`."""
    falls = Counter(int(step) for step in boundaries)  # two may round to one step
    return optax.piecewise_constant_schedule(
        value, {step: factor**count for step, count in falls.items()}
    )


def cosine(*, value: float, steps: int, final: float = 0.0) -> Schedule:
    """From `value` down to `final` along half a cosine, over `steps` steps."""
    return optax.cosine_decay_schedule(value, steps, alpha=final / value)
