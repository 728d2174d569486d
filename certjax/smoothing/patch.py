"""Derandomized smoothing against patches: votes of bands or blocks, no alpha.

f sees one band of columns, or one block, of the image and nothing else. A patch of
m x m pixels touches few of them; a class that leads by more than twice as many votes
wins whatever is in the patch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.smoothing.confidence import check_trials
from certjax.smoothing.noise import FLOAT
from certjax.smoothing.splitting import lead
from certjax.smoothing.votes import count_range, Forward, top_class
from certjax.types import Array, Classifier, Key


class PatchCertificate(NamedTuple):
    """A certificate against every m x m patch, m up to `size`, wherever it is put.

    prediction: the class with the most votes; ties go to the lower class.
    size: largest m in pixels; 0: none.
    counts: [K] int64, votes of all positions; with a threshold a position may vote for
      several classes, or for none.
    invalid: positions with a NaN logit.
    guarantee: the arithmetic of the theorem.
    """

    prediction: int
    size: int
    counts: np.ndarray
    invalid: int
    guarantee: str


def visible(x: Array, mask: Array) -> Array:
    """[H, W, 2 C]: x and 1 - x where the [H, W] mask holds, 0 elsewhere.

    So that "not shown" is no colour. Source: Levine & Feizi 2020, arXiv:1911.09272.
    """
    shown = jnp.concatenate([x, 1.0 - x], axis=-1)
    return jnp.where(mask[..., None], shown, 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Band:
    """One of the bands of `certify_band`, each as likely: what f is trained on.

    Args:
      width: columns of a band.
    """

    width: int = field(metadata={"static": True})

    def __post_init__(self) -> None:
        """Refuse a width that means nothing."""
        check_trials("width", self.width)

    def sample(self, key: Key, x: Array) -> Array:
        """The image behind all but one band, [H, W, 2 C]."""
        columns = _sides(x, self.width)[1]
        return _band(self.width, jax.random.randint(key, (), 0, columns), x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    """One of the blocks of `certify_block`, each as likely: what f is trained on.

    Args:
      width: pixels of a side.
    """

    width: int = field(metadata={"static": True})

    def __post_init__(self) -> None:
        """Refuse a width that means nothing."""
        check_trials("width", self.width)

    def sample(self, key: Key, x: Array) -> Array:
        """The image behind all but one block, [H, W, 2 C]."""
        rows, columns = _sides(x, self.width)
        return _block(self.width, jax.random.randint(key, (), 0, rows * columns), x)


@dataclass(frozen=True)
class _Vote:
    """For the top class, or for all of at least this probability; last: is it NaN?"""

    threshold: float | None

    def __call__(self, logits: Array) -> Array:
        nan = jnp.any(jnp.isnan(logits))
        found = top_class(logits)
        if self.threshold is not None:
            found = ~nan & (jax.nn.softmax(logits) >= self.threshold)
        return jnp.append(found, nan)


def certify_band(
    f: Classifier,
    x: Array,
    *,
    width: int,
    threshold: float | None = None,
    batch: int = 1000,
    **how: Any,
) -> PatchCertificate:
    """Certify the vote of all W bands of `width` columns, which wrap around.

    A patch of m columns touches m + width - 1 of them.

    Args:
      f: classifier of `visible` images [H, W, 2 C].
      x: [H, W, C] in [0, 1].
      width: columns of a band.
      threshold: a band votes for every class of at least this softmax probability, so
        that an empty one may abstain; None: for its top class.
      batch, **how: as `votes`.

    Raises:
      ValueError: x is no image, width not in [1, W], or threshold not in (0, 1).

    Source: Levine & Feizi 2020, "(De)randomized smoothing for certifiable defense
    against patch attacks", arXiv:2002.10733.
    """
    columns = _sides(x, width)[1]
    touched = lambda m: min(columns, m + width - 1)
    rule = (_band, width, threshold)
    return _certify(f, rule, x, columns, touched, batch, how)


def certify_block(
    f: Classifier,
    x: Array,
    *,
    width: int,
    threshold: float | None = None,
    batch: int = 1000,
    **how: Any,
) -> PatchCertificate:
    """Certify the vote of all H W blocks of width x width pixels, which wrap around.

    A patch of m x m touches (m + width - 1)^2 of them. Args, Source: as `certify_band`.
    """
    rows, columns = _sides(x, width)
    touched = lambda m: min(rows, m + width - 1) * min(columns, m + width - 1)
    rule = (_block, width, threshold)
    return _certify(f, rule, x, rows * columns, touched, batch, how)


def _sides(x: Array, width: int) -> tuple[int, int]:
    check_trials("width", width)
    shape = np.shape(x)
    if len(shape) != 3 or width > min(shape[:2]):
        raise ValueError(
            f"need an image [H, W, C] and width at most H and W, got {shape} and "
            f"width={width}"
        )
    return shape[0], shape[1]


def _certify(
    f: Classifier,
    rule: tuple[Callable, int, float | None],
    x: Array,
    positions: int,
    touched: Callable[[int], int],
    batch: int,
    how: dict[str, Any],
) -> PatchCertificate:
    mask, width, threshold = rule
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(
            f"threshold must lie in (0, 1), got {threshold}; it is the probability at "
            "which a position votes for a class, in the paper 0.2 or 0.3"
        )
    vote = _Vote(threshold)
    how = Forward(**how)
    found = count_range(f, mask, width, x, positions, batch, how, vote=vote)
    counts, invalid = found[:-1], int(found[-1])
    winner = int(np.argmax(counts))
    spare = lead(counts, winner)
    sides = range(1, min(np.shape(x)[:2]) + 1)
    size = max((m for m in sides if 2 * touched(m) <= spare), default=0)
    return PatchCertificate(winner, size, counts, invalid, FLOAT)


def _near(start: Array, width: Array, side: int) -> Array:
    """[side] bool: start, ..., start + width - 1, modulo the side."""
    return (jnp.arange(side) - start) % side < width


def _band(width: Array, i: Array, x: Array) -> Array:
    columns = _near(i, width, x.shape[1])
    return visible(x, jnp.broadcast_to(columns[None], x.shape[:2]))


def _block(width: Array, i: Array, x: Array) -> Array:
    rows = _near(i // x.shape[1], width, x.shape[0])
    columns = _near(i % x.shape[1], width, x.shape[1])
    return visible(x, rows[:, None] & columns[None])
