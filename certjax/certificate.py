"""Result records and the numbers that papers print from them.

"Proved" is a comparison that NaN cannot pass. Statistics run on the host in float64.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.stats

from certjax.types import Array


class Certificate(NamedTuple):
    """A certificate of one example, or of [N] examples after vmap.

    prediction: [] int32, the class of the clean input.
    verified: [] bool, the prediction is the label and provably stays so.
    margin: [] float, lower bound of min_k z_label - z_k over the set, in logits.
    """

    prediction: Array
    verified: Array
    margin: Array


def certificate(logits: Array, label: Array, margin_lower: Array) -> Certificate:
    """Judge one example.

    Args:
      logits: [K] at the clean input.
      label: [] int.
      margin_lower: [R], sound lower bounds of every margin row over the threat set.

    Returns:
      A `Certificate`. Neither a NaN logit nor a NaN or infinite bound is ever verified.
    """
    prediction = jnp.argmax(logits).astype(jnp.int32)
    margin = jnp.min(margin_lower)
    finite = jnp.all(jnp.isfinite(logits)) & jnp.all(jnp.isfinite(margin_lower))
    verified = finite & (prediction == label) & jnp.all(margin_lower > 0)
    return Certificate(prediction, verified, margin)


def certified_accuracy(certificates: Certificate) -> float:
    """Share of verified examples in [0, 1]; `nan` for no example."""
    verified = np.asarray(certificates.verified, bool)
    return float(np.mean(verified)) if verified.size else float("nan")


def _checked_radii(radius: Array, correct: Array | None) -> np.ndarray:
    """Float64 radii with 0 for what is wrong, abstained or NaN."""
    radius = np.asarray(radius, np.float64)
    if radius.ndim != 1:
        raise ValueError(f"radii must have shape [N], got {radius.shape}")
    correct = np.ones(radius.shape, bool) if correct is None else np.asarray(correct)
    if correct.shape != radius.shape:
        raise ValueError(
            f"radii and correct must be alike, got {radius.shape} and {correct.shape}"
        )
    return np.where(correct.astype(bool) & (radius > 0), radius, 0.0)


def radius_curve(radius: Array, correct: Array | None = None, *, grid: Array) -> Array:
    """Certified accuracy at each radius of a grid.

    The share of examples that are correct with radius >= r; at r = 0 the share with a
    positive radius (an abstention carries radius 0 and is never counted).

    Args:
      radius: [N] certified radii.
      correct: [N] bool; None: all correct.
      grid: [G] radii.

    Returns:
      [G] float64 in [0, 1].
    """
    radius = _checked_radii(radius, correct)
    grid = np.asarray(grid, np.float64)
    certified = (radius[None] >= grid[:, None]) & (radius[None] > 0)
    return certified.mean(axis=1) if radius.size else np.full(grid.shape, np.nan)


def average_certified_radius(radius: Array, correct: Array | None = None) -> float:
    """ACR: the mean radius, a wrong or abstained example counting 0.

    Source: Zhai et al. 2020 (MACER), arXiv:2001.02378, section 5.
    """
    radius = _checked_radii(radius, correct)
    return float(radius.mean()) if radius.size else float("nan")


def envelope(curves: Array) -> Array:
    """Pointwise best of several radius curves: [M, G] -> [G].

    An oracle choice (the best model is picked separately for each radius): label it so.
    """
    return np.max(np.asarray(curves, np.float64), axis=0)


def accuracy_interval(
    successes: int, trials: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Clopper-Pearson interval of an accuracy that was measured on a subset."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"need 0 <= successes <= trials, got {successes} of {trials}")
    result = scipy.stats.binomtest(successes, trials)
    interval = result.proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)
