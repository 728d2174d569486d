"""Deterministic split noise: exact l1 certificates of 8-bit inputs, no alpha.

Every coordinate is cut into cells of `levels` pixel values; f sees the middle of its
cell. All `levels` positions of the cuts are tried, so the vote is a number, not an
estimate. Moving a coordinate by d pixel values changes its cell at d positions at most.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.smoothing.confidence import check_trials
from certjax.smoothing.noise import FLOAT
from certjax.smoothing.quantized import as_pixels, TOP
from certjax.smoothing.votes import count_range, Forward
from certjax.types import Array, Classifier, Key


class ExactCertificate(NamedTuple):
    """A certificate without randomness; ties go to the lower class.

    prediction: the class with the most votes.
    radius: l1, in [0, 1] pixels: no 8-bit image within it is predicted otherwise.
    counts: [K] int64, votes of all positions of the cuts.
    invalid: positions with a NaN logit.
    norm, guarantee: "l1", and the arithmetic of the theorem.
    """

    prediction: int
    radius: float
    counts: np.ndarray
    invalid: int
    norm: str
    guarantee: str


def certify_split(
    f: Classifier,
    key: Key,
    x: Array,
    *,
    levels: int,
    batch: int = 1000,
    **how: Any,
) -> ExactCertificate:
    """Certify the deterministically smoothed classifier at an 8-bit image.

    Args:
      f: classifier of one example.
      key: of the fixed offsets between coordinates: ONE key for the classifier, the
        same for every example and for the training.
      x: [...] multiples of 1/255 in [0, 1].
      levels: positions of the cuts = width of a cell in pixel values, 2 * 255 * lambda
        of the paper; its noise has the standard deviation lambda / sqrt(3).
      batch, **how: as `votes`.

    Raises:
      ValueError: x is no 8-bit image, or levels below 1.

    Source: Levine & Feizi 2021, "Improved, deterministic smoothing for l1 certified
    robustness", arXiv:2103.10834, theorem 2 (DSSN).
    """
    check_trials("levels", levels)
    pixels = jnp.asarray(as_pixels(x), jnp.float32)
    source = (key, levels)
    counts = count_range(f, _draw_split, source, pixels, levels, batch, Forward(**how))
    winner = int(np.argmax(counts))
    moves = lead(counts, winner) // 2
    return ExactCertificate(
        winner, moves / TOP, counts, levels - int(counts.sum()), "l1", FLOAT
    )


def lead(counts: np.ndarray, winner: int) -> int:
    """Votes that may be lost or gained in all before another class wins.

    Moving m votes from the winner to a rival changes the difference by 2 m.
    """
    others = np.delete(counts, winner)
    if not others.size:
        return int(2 * counts.sum())
    rivals = np.delete(counts + (np.arange(counts.size) < winner), winner)
    return max(0, int(counts[winner] - rivals.max()))


def _draw_split(source: tuple[Key, Array], i: Array, pixels: Array) -> Array:
    """The middles of the cells for position i of the cuts, in [0, 1]."""
    key, levels = source
    offsets = jax.random.randint(key, pixels.shape, 0, levels)
    cut = (i + offsets) % levels  # cuts lie half a pixel value above cut + m * levels
    value = pixels.astype(jnp.int32)
    above = (value - cut + levels - 1) // levels  # the first cut not below the value
    upper = jnp.minimum(2 * (above * levels + cut) + 1, 2 * TOP)
    lower = jnp.maximum(2 * ((above - 1) * levels + cut) + 1, 0)
    return (upper + lower).astype(jnp.float32) / (4.0 * TOP)
