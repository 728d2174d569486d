"""Rows of linear coefficients in chunks that fit into a memory budget."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from certjax.types import Array, Interval


def rows_that_fit(max_bytes: int, bytes_per_row: int) -> int:
    """How many rows a budget holds.

    Raises:
      ValueError: not even one.
    """
    if bytes_per_row > max_bytes:
        raise ValueError(
            f"one row of linear coefficients needs {bytes_per_row} bytes, got "
            f"max_bytes={max_bytes}; raise max_bytes to at least that"
        )
    return max_bytes // bytes_per_row


def in_chunks(some: Callable[[Array], Interval], size: int, fit: int) -> Interval:
    """`some(arange(size))`, at most `fit` indices at a time."""
    chunk = min(size, fit)
    if chunk == size:
        return some(jnp.arange(size))
    count = -(-size // chunk)
    chunk = -(-size // count)
    index = jnp.minimum(jnp.arange(count * chunk), size - 1).reshape(count, chunk)
    found = jax.lax.map(some, index)
    return Interval(*(v.reshape(-1, *v.shape[2:])[:size] for v in found))
