"""Projected gradient ascent on shares: the search behind `alpha_crown`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from certjax.loops import fori
from certjax.types import Array, PyTree


class Climb(NamedTuple):
    """How shares in [0, 1] are ascended: by Adam, on the sum of all bounds.

    steps: number of them.  size: of the first one.  decay: from one to the next.
    """

    steps: int
    size: float = 0.5
    decay: float = 0.98


def best_of(
    climb: Climb, lower: Callable[[PyTree], tuple[Array, Array]], start: PyTree
) -> Array:
    """The greatest value that each bound of `lower(shares)` takes on the way.

    Args:
      climb: the steps.
      lower: shares -> (bounds that hold for any shares in [0, 1], what is ascended:
        the bounds or nearly so); each bound depends on shares of its own, so that the
        sum ascends them all.
      start: the first shares.
    """
    schedule = optax.exponential_decay(climb.size, 1, climb.decay)
    optimizer = optax.adam(schedule)

    def objective(shares: PyTree) -> tuple[Array, Array]:
        values, ascended = lower(shares)
        return -jnp.sum(ascended), values

    def step(_: int, state: tuple) -> tuple:
        shares, memory, best = state
        (_, values), gradient = jax.value_and_grad(objective, has_aux=True)(shares)
        gradient = jax.tree.map(jnp.nan_to_num, gradient)
        update, memory = optimizer.update(gradient, memory)
        add = lambda s, u: jnp.clip(s + u, 0.0, 1.0)
        return jax.tree.map(add, shares, update), memory, _greater(values, best)

    worst, _ = jax.eval_shape(lower, start)
    state = (start, optimizer.init(start), jnp.full_like(worst, -jnp.inf))
    shares, _, best = fori(climb.steps, step, state)
    return _greater(lower(shares)[0], best)


def _greater(values: Array, best: Array) -> Array:
    return jnp.where(values > best, values, best)
