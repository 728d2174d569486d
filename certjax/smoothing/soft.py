"""Soft votes: the mean softmax output of a class instead of its share of predictions.

The probability of the class is rounded down to a multiple of 1 / LEVELS. That is part
of the base classifier, so the levels can be counted like classes: sums of the counts
are exact, whatever the batch and the devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.smoothing.certify import ABSTAIN, proved_radius
from certjax.smoothing.confidence import bernstein_lower, check_alpha, check_trials
from certjax.smoothing.votes import votes
from certjax.types import Array, Classifier, Key


LEVELS = 256


class SoftCertificate(NamedTuple):
    """As `SmoothedCertificate`, of the classifier with the largest mean softmax output.

    p_lower: empirical Bernstein lower bound of the mean output of the class.
    counts: [LEVELS + 1] int64, how many of the n outputs were k / LEVELS.
    counts0: [K] int64, votes of the n0 selection samples.
    invalid: samples of the n with a NaN or infinite logit; they count as 0.
    """

    prediction: int
    radius: float
    p_lower: float
    counts: np.ndarray
    counts0: np.ndarray
    invalid: int
    norm: str
    guarantee: str


def certify_soft(  # noqa: PLR0913, PLR0917 - as `certify`
    f: Classifier,
    noise: Any,
    key: Key,
    x: Array,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch: int = 1000,
    **how: Any,
) -> SoftCertificate:
    """Certify the mean softmax output at x.

    A softmax output is a randomised prediction, and the theorems of the noises hold for
    those too. The bound adapts to the variance of the outputs, but has no exact
    quantiles: for outputs near 0 and 1 `certify` gives larger radii.

    Args, Raises: as `certify`; n at least 2.

    Source: Zhai et al. 2020 (MACER), arXiv:2001.02378, "soft randomized smoothing";
    Salman et al. 2019, arXiv:1906.04584, lemma 2.
    """
    check_trials("n0", n0)
    check_trials("n", n)
    check_alpha(alpha)
    select, estimate = jax.random.split(key)
    counts0 = votes(f, noise, select, x, n0, batch, **how)
    guess = int(np.argmax(counts0))
    level_of = jax.tree_util.Partial(_level, f, jnp.asarray(guess))
    counts = votes(level_of, noise, estimate, x, n, batch, **how)
    p_lower = bernstein_lower(*moments(counts), n, alpha)
    radius = proved_radius(noise, p_lower, jnp.size(x))
    return SoftCertificate(
        prediction=ABSTAIN if radius is None else guess,
        radius=radius or 0.0,
        p_lower=p_lower,
        counts=counts,
        counts0=counts0,
        invalid=int(n - counts.sum()),
        norm=noise.norm,
        guarantee=noise.guarantee,
    )


def moments(counts: np.ndarray) -> tuple[float, float]:
    """Sum of the outputs, and of their squares; exact, since LEVELS is a power of 2."""
    levels = np.arange(LEVELS + 1, dtype=np.int64)
    return (
        float(counts @ levels) / LEVELS,
        float(counts @ levels**2) / LEVELS**2,
    )


def _level(f: Classifier, guess: Array, z: Array) -> Array:
    """[LEVELS + 1] one-hot logits of the rounded output; NaN where a logit is NaN."""
    logits = f(z).astype(jnp.float32)
    # asked of the logits: XLA:CPU may lose a NaN in exp, hence in softmax
    invalid = jnp.any(jnp.isnan(logits) | (logits == jnp.inf))
    level = jnp.floor(jax.nn.softmax(logits)[guess] * LEVELS)
    hot = jnp.arange(LEVELS + 1) == level
    return jnp.where(invalid, jnp.nan, hot.astype(jnp.float32))
