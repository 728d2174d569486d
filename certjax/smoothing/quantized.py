"""Gaussian noise on 8-bit images whose guarantee holds for the program itself.

Smoothing in floating point is formally unsound: x + noise leaks x through its last
bits, and float32 normals are not normal. Here the network sees rounded pixels only,
round(255 (x + noise)). Rounding is part of the base classifier, so the theorem for the
Gaussian applies as it stands; and for an 8-bit x the noise of the rounded pixels is an
integer variable, drawn by comparing 64 random bits with a table.

Source: Voracek & Hein 2023, "Sound randomized smoothing in floating-point
arithmetics", arXiv:2207.07209.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from certjax.smoothing import generator
from certjax.smoothing.noise import check_sigma, cut, FLOAT, more_than_half
from certjax.types import Array, Key


TOP = 255  # the largest pixel value
REACH = 9.0  # sigma; a normal is further out with probability 2e-19


def as_pixels(x: Array) -> np.ndarray:
    """The pixel values 0..255 of an 8-bit image in [0, 1]; int32.

    Raises:
      ValueError: a value is no multiple of 1/255 in [0, 1] (to 1e-4 pixel values).
    """
    exact = np.asarray(x, np.float64) * TOP
    pixels = np.round(exact)
    inside = (np.abs(exact - pixels) < 1e-4) & (pixels >= 0) & (pixels <= TOP)
    if not np.all(inside):
        raise ValueError(
            "x must hold multiples of 1/255 in [0, 1], got "
            f"{exact[~inside].flat[0] / TOP}; the guarantee is for 8-bit images: "
            "round it first"
        )
    return pixels.astype(np.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedGaussian:
    """Gaussian noise, rounded to pixel values, against l2.

    The probabilities of the table are float64: the law that is sampled differs from
    the exact one by at most `distance(size)` in total variation. The radius pays for it
    twice, at x and at every z: the class keeps its majority under the sampled law. What
    remains assumed: threefry's words are independent and uniform, and the forward pass
    gives equal logits for equal inputs.

    Args:
      sigma: standard deviation, in [0, 1] pixels.
    """

    sigma: float = field(metadata={"static": True})

    norm: ClassVar[str] = "l2"
    guarantee: ClassVar[str] = FLOAT

    def __post_init__(self) -> None:
        """Refuse a sigma that means nothing."""
        check_sigma(self.sigma)

    @property
    def reach(self) -> int:
        """The largest absolute value of the noise, in pixel values."""
        return math.ceil(REACH * self.sigma * TOP)

    @cached_property
    def table(self) -> np.ndarray:
        """[2, T] uint32: high and low words of 2^64 P(noise <= v), v = -reach, ..."""
        edges = (np.arange(-self.reach, self.reach) + 0.5) / (self.sigma * TOP)
        scaled = [int(p * 2.0**64) for p in special.ndtr(edges).tolist()]
        words = [divmod(min(w, 2**64 - 1), 2**32) for w in scaled]
        return np.asarray(words, np.uint32).T

    def distance(self, size: int) -> float:
        """Total variation between the sampled and the exact law of `size` pixels."""
        return size * (2 * self.reach + 1) * 2.0**-51

    def check(self, x: Array) -> None:
        """Refuse an x that is no 8-bit image."""
        as_pixels(x)

    def sample(self, key: Key, x: Array) -> Array:
        """The rounded pixels of x plus noise, in units of x; not clipped."""
        high, low = generator.bits(key, (2, *x.shape))
        below = _count_at_most(self.table, high, low)
        return (jnp.round(x * TOP) + (below - self.reach)) / TOP

    def radius(self, p_lower: float, size: int | None = None) -> float:
        """Certified l2 radius; `size` is the number of coordinates."""
        if size is None or size < 1:
            raise ValueError(
                f"the distance to the exact law needs size=x.size, got {size}"
            )
        distance = self.distance(size)
        if not more_than_half(p_lower - 2.0 * distance):
            return 0.0
        gain = special.ndtri(p_lower - distance) - special.ndtri(0.5 + distance)
        return cut(self.sigma * gain)


def _count_at_most(table: np.ndarray, high: Array, low: Array) -> Array:
    """How many of the sorted 64-bit numbers are at most (high, low): bisection."""
    highs, lows = jnp.asarray(table)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        first, last = ends  # the answer lies in first..last
        middle = (first + last) // 2
        h, l = highs[middle], lows[middle]
        counted = (first < last) & ((h < high) | ((h == high) & (l <= low)))
        return jnp.where(counted, middle + 1, first), jnp.where(counted, last, middle)

    zero = jnp.zeros(high.shape, jnp.int32)
    ends = (zero, zero + table.shape[1])
    return jax.lax.fori_loop(0, table.shape[1].bit_length(), halve, ends)[0]
