"""Pixel values replaced at random: certificates against l0, exact to the last bit.

Everything is an integer: which values f sees, how likely they are (multiples of 2^-32,
drawn as such), and the radius, in rational arithmetic.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar

import jax
import jax.numpy as jnp

from certjax.smoothing import generator
from certjax.smoothing.noise import FLOAT, more_than_half
from certjax.types import Array, Key


COIN = 24  # bits of a word that decide whether a value is replaced; eight say by what
HALF = Fraction(1, 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Discrete:
    """Each value stays with probability `keep`, else it is one of the others.

    f sees values rounded to `levels` shades; rounding is part of the base classifier
    and changes no more coordinates than were changed. `keep` is rounded to 2^-24. What
    remains assumed: threefry's words are independent and uniform, and the forward pass
    gives equal logits for equal inputs. l0 counts coordinates, not pixels: each channel
    is one.

    Args:
      keep: probability that a coordinate is seen as it is.
      levels: shades, a power of two; 2 makes the image black and white.

    Source: Lee et al. 2019, "Tight certificates of adversarial robustness for randomly
    smoothed classifiers", arXiv:1906.04948, section 4; ImageNet: keep 0.2, 256 levels.
    """

    keep: float = field(metadata={"static": True})
    levels: int = field(default=256, metadata={"static": True})

    norm: ClassVar[str] = "l0"
    guarantee: ClassVar[str] = FLOAT

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.levels not in {2**bits for bits in range(1, 9)}:
            raise ValueError(
                f"levels must be a power of two from 2 to 256, got {self.levels}"
            )
        if not 1 / self.levels < self.keep < 1 or not 0 < self.coin < 2**COIN:
            raise ValueError(
                f"keep must lie in (1/{self.levels}, 1), got {self.keep}; it is the "
                "probability that a value stays, e.g. 0.8"
            )

    @property
    def coin(self) -> int:
        """Of the 2^24 tosses those that replace a value by any, its own included."""
        return round((1 - self.keep) * self.levels / (self.levels - 1) * 2**COIN)

    def sample(self, key: Key, x: Array) -> Array:
        """X in shades, some of them replaced; in [0, 1]."""
        top = self.levels - 1
        words = generator.bits(key, x.shape)
        value = (words & top).astype(jnp.float32)
        replaced = words >> (32 - COIN) < self.coin
        return jnp.where(replaced, value, jnp.clip(jnp.round(x * top), 0, top)) / top

    def radius(self, p_lower: float, size: int | None = None) -> float:
        """The largest number of coordinates that may change, at most `size`.

        All that tells the copies of x and z apart is how many of the r coordinates in
        which they differ look like x, less how many look like z (Neyman-Pearson).
        """
        if not more_than_half(p_lower):
            return 0.0
        if p_lower == 1.0:
            return math.inf if size is None else float(size)
        probability, r = Fraction(p_lower), 0
        while r != size and self._least(probability, r + 1) > HALF:
            r += 1
        return float(r)

    def _least(self, p: Fraction, r: int) -> Fraction:
        """The least probability at distance r of what has probability p at x."""
        other = self.coin * (256 // self.levels)  # words for one certain other value
        here = _differences(other, 2**32 - (self.levels - 1) * other, r)
        taken, found, whole = Fraction(0), Fraction(0), 2 ** (32 * r)
        for mass, there in zip(reversed(here), here, strict=True):  # likeliest first
            if mass and taken < p:
                share = min(Fraction(1), (p - taken) * whole / mass)
                taken += share * Fraction(mass, whole)
                found += share * Fraction(there, whole)
        return found


@lru_cache(maxsize=4096)
def _differences(other: int, stay: int, r: int) -> tuple[int, ...]:
    """2^(32 r) P(m), m = -r, ..., r: of r values m more stay than become the other."""
    if r == 0:
        return (1,)
    rest = 2**32 - other - stay
    less = (0, 0, *_differences(other, stay, r - 1), 0, 0)
    return tuple(
        stay * less[i] + rest * less[i + 1] + other * less[i + 2]
        for i in range(2 * r + 1)
    )
