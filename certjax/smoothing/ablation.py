"""Randomized ablation: f sees a few random pixels; certificates against l0."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import numpy as np

from certjax.smoothing.noise import more_than_half, REAL
from certjax.smoothing.patch import visible
from certjax.types import Array, Key


ROUNDING = 1e-9  # relative; covers float64 in the product over pixels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ablation:
    """Keep `keep` of the H W pixels, chosen uniformly; f sees `visible` [H, W, 2 C].

    r changed pixels are seen with probability 1 - C(d - r, k) / C(d, k) of d = H W,
    k = keep; the top class survives while its probability exceeds 1/2 by more. The
    pixels are those with the smallest of 32-bit words; `ties` bounds how far the law is
    from uniform because words may be equal, and is added to what is seen.

    Args:
      keep: number of pixels that f sees.
      pixels: H W of the images.

    Source: Levine & Feizi 2020, "Robustness certificates for sparse adversarial
    attacks by randomized ablation", arXiv:1911.09272, theorem 1.
    """

    keep: int = field(metadata={"static": True})
    pixels: int = field(metadata={"static": True})

    norm: ClassVar[str] = "l0"
    guarantee: ClassVar[str] = REAL

    def __post_init__(self) -> None:
        """Refuse numbers of pixels that mean nothing."""
        if not 1 <= self.keep <= self.pixels:
            raise ValueError(
                f"keep must lie in [1, pixels={self.pixels}], got {self.keep}; the "
                "paper keeps 45 of the 784 pixels of MNIST"
            )

    @property
    def ties(self) -> float:
        """Probability that a pixel kept and one hidden draw equal words, at most."""
        return self.keep * (self.pixels - self.keep) * 2.0**-32

    def check(self, x: Array) -> None:
        """Refuse an x of another shape."""
        shape = np.shape(x)
        if len(shape) != 3 or shape[0] * shape[1] != self.pixels:
            raise ValueError(
                f"need an image [H, W, C] of {self.pixels} pixels, got {shape}; "
                "write Ablation(keep, pixels=H * W)"
            )

    def sample(self, key: Key, x: Array) -> Array:
        """The image with all but `keep` pixels hidden, [H, W, 2 C]."""
        self.check(x)
        kept = jax.random.permutation(key, self.pixels) < self.keep
        return visible(x, kept.reshape(x.shape[:2]))

    def radius(self, p_lower: float, size: int | None = None) -> float:  # noqa: ARG002
        """The largest number of pixels that may change."""
        if not more_than_half(p_lower):
            return 0.0
        radius, hidden = 0, 1.0  # probability that f sees none of the changed pixels
        while radius < self.pixels:
            hidden *= (self.pixels - self.keep - radius) / (self.pixels - radius)
            if not p_lower - self.ties - 1.0 + hidden * (1.0 - ROUNDING) > 0.5:
                break
            radius += 1
        return float(radius)
