"""Random changes of one training image, on the device."""

import jax
import jax.numpy as jnp

from certjax.training.step import Augment
from certjax.types import Array, Key


def flip_and_crop(*, pad: int, flip: bool = True) -> Augment:
    """A random horizontal flip, then a random crop after padding with edge pixels.

    The certified-training papers use pad 2 for CIFAR-10 and 4 for TinyImageNet.
    """
    if pad < 0:
        raise ValueError(f"pad is a number of pixels and must be at least 0, got {pad}")

    def augment(key: Key, x: Array) -> Array:
        side, place = jax.random.split(key)
        if flip:
            x = jnp.where(jax.random.bernoulli(side), x[:, ::-1], x)
        padded = jnp.pad(x, [(pad, pad), (pad, pad), (0, 0)], mode="edge")
        row, column = jax.random.randint(place, (2,), 0, 2 * pad + 1)
        return jax.lax.dynamic_slice(padded, (row, column, 0), x.shape)

    return augment
