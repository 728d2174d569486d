"""From stored images to the pixels that the threat sets speak about."""

import jax.numpy as jnp

from certjax.types import Array


def images(xs: Array) -> Array:
    """Pixels in [0, 1] as float32: uint8 is divided by 255, floats are kept.

    Raises:
      TypeError: any other dtype, whose scale is unknown.
    """
    if xs.dtype == jnp.uint8:
        return xs.astype(jnp.float32) / 255.0
    if not jnp.issubdtype(xs.dtype, jnp.floating):
        raise TypeError(
            f"images are uint8 (0..255) or float (0..1), got {xs.dtype}; "
            "convert them with .astype('uint8')"
        )
    return xs
