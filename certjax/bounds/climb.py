"""Projected gradient ascent on shares: the search behind `alpha_crown`."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from certjax.loops import fori
from certjax.types import Array, PyTree
from certjax.walk import held


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

    Its derivative is that of the bound at the last shares, held fixed; which are the
    best ones where the search has settled.

    Args:
      climb: the steps.
      lower: shares -> (bounds that hold for any shares in [0, 1], what is ascended:
        the bounds or nearly so); each bound depends on shares of its own, so that the
        sum ascends them all.
      start: the first shares.
    """
    schedule = optax.exponential_decay(climb.size, 1, climb.decay)
    optimizer = optax.adam(schedule)
    start = jax.lax.stop_gradient(start)
    search, (worst, _) = held(lower, start)

    def objective(shares: PyTree) -> tuple[Array, Array]:
        values, ascended = search(shares)
        return -jnp.sum(ascended), values

    finite = partial(jnp.nan_to_num, posinf=0.0, neginf=0.0)

    def step(_: int, state: tuple) -> tuple:
        shares, memory, best = state
        (_, values), gradient = jax.value_and_grad(objective, has_aux=True)(shares)
        gradient = jax.tree.map(finite, gradient)
        update, memory = optimizer.update(gradient, memory)
        add = lambda s, u: jnp.clip(s + u, 0.0, 1.0)
        return jax.tree.map(add, shares, update), memory, _greater(values, best)

    state = (start, optimizer.init(start), jnp.full_like(worst, -jnp.inf))
    shares, _, best = fori(climb.steps, step, state)
    last = lower(shares)[0]
    return _moving_with(last, _greater(last, best))


@jax.custom_jvp
def _moving_with(moving: Array, value: Array) -> Array:
    """`value`, to the last bit, with the derivative of `moving`."""
    del moving
    return value


@_moving_with.defjvp
def _moved(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return primals[1], tangents[0]


def _greater(values: Array, best: Array) -> Array:
    return jnp.where(values > best, values, best)
