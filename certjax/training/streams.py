"""Random streams, derived from (seed, name) and then from the step; never stored."""

import zlib

import jax

from certjax.types import Key


def stream(seed: int, name: str) -> Key:
    """An independent key for one purpose; adding a stream never moves another."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
