"""Where the lower line of a relu starts from: functions of the interval alone.

Each gives a share in [0, 1] per entry: the slope of the line through the bend, 0 the
slope on the left of it, 1 the slope on the right. On a decided side it has no effect.
"""

import jax.numpy as jnp

from certjax.types import Array, Interval


def adaptive(x: Interval) -> Array:
    """0 or 1, whichever encloses the smaller area.

    Source: Zhang et al. 2018, arXiv:1811.00866, section 3.3.
    """
    return (x.upper > -x.lower).astype(x.lower.dtype)


def zero(x: Interval) -> Array:
    """Always 0: for a relu, the constant 0."""
    return jnp.zeros_like(x.lower)


def one(x: Interval) -> Array:
    """Always 1: for a relu, the line y = x."""
    return jnp.ones_like(x.lower)


def parallel(x: Interval) -> Array:
    """The upper line's slope, `u / (u - l)`.

    Source: Weng et al. 2018, arXiv:1804.09699 (Fast-Lin).
    """
    crossing = (x.lower < 0) & (x.upper > 0)
    width = jnp.where(crossing, x.upper - x.lower, 1.0)
    decided = (x.lower >= 0).astype(x.lower.dtype)
    return jnp.where(crossing, x.upper / width, decided)
