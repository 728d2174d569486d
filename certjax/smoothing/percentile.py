"""Median and percentile smoothing of functions with real outputs, e.g. boxes."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from certjax.smoothing.confidence import check_trials, order_statistics
from certjax.smoothing.noise import Gaussian
from certjax.types import Array, Classifier, Key


OUTWARD = 1e-9  # relative; covers float64 in the two quantiles


class PercentileBounds(NamedTuple):
    """Bounds of the smoothed outputs over an l2 ball, jointly at level 1 - alpha.

    value: [M] the empirical percentile at x.
    lower, upper: [M] enclose the percentile of f(z + noise) for every z within radius;
      infinite where n samples do not suffice.
    invalid: samples with a NaN; they count as -inf below and as +inf above.
    radius, quantile, n, alpha: as asked.
    """

    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    invalid: int
    radius: float
    quantile: float
    n: int
    alpha: float


def percentile_bounds(  # noqa: PLR0913 - keyword-only numbers
    f: Classifier,
    noise: Gaussian,
    key: Key,
    x: Array,
    radius: float,
    *,
    quantile: float = 0.5,
    n: int = 2000,
    alpha: float = 0.001,
    block: int = 64,
) -> PercentileBounds:
    """Bound each output's `quantile` over all z with ||z - x||_2 <= radius.

    All n outputs are kept: memory is n * M numbers.

    Args:
      f: function of one example, -> [M].
      noise: Gaussian, l2.
      key: of this example.
      x: [...] one example.
      radius: l2, input units, at least 0.
      quantile: 0.5 for the median.
      n: number of samples.
      alpha: joint failure probability, split evenly over the M outputs.
      block: rows of one forward pass.

    Raises:
      ValueError: a noise that is not an l2 Gaussian, a negative radius, n below 1,
        alpha or quantile outside (0, 1).

    Source: Chiang et al. 2020, arXiv:2007.03730, lemma 1 and section 4.
    """
    check_trials("n", n)
    if not (isinstance(noise, Gaussian) and noise.norm == "l2" and radius >= 0):
        raise ValueError(
            f"percentiles need an l2 Gaussian and a radius >= 0, got {noise} and "
            f"{radius}; their bounds are shifts of the Gaussian quantile"
        )
    outputs = np.asarray(_outputs(f, noise, key, jnp.asarray(x), n, block), np.float64)
    below, above = _shifted(quantile, radius / float(noise.sigma))
    ranks = order_statistics(n, below, above, alpha / outputs.shape[1])
    return PercentileBounds(
        np.quantile(outputs, quantile, axis=0),
        _ranked(outputs, ranks[0], -np.inf),
        _ranked(outputs, ranks[1], np.inf),
        int(np.sum(np.isnan(outputs).any(axis=1))),
        radius,
        quantile,
        n,
        alpha,
    )


def _shifted(quantile: float, shift: float) -> tuple[float, float]:
    """Phi(PhiInv(q) -+ shift), rounded outward."""
    center = special.ndtri(quantile)
    below = special.ndtr(center - shift) * (1 - OUTWARD)
    above = 1 - special.ndtr(-center - shift) * (1 - OUTWARD)
    return float(below), float(above)


def _ranked(outputs: np.ndarray, rank: int, missing: float) -> np.ndarray:
    """Sample number `rank` of each column, NaN and what lies beyond as `missing`."""
    ordered = np.sort(np.where(np.isnan(outputs), missing, outputs), axis=0)
    if not 0 <= rank < len(ordered):
        return np.full(ordered.shape[1], missing)
    return ordered[rank]


@partial(jax.jit, static_argnums=(0, 4, 5))
def _outputs(
    f: Classifier, noise: Any, key: Key, x: Array, n: int, block: int
) -> Array:
    """[n, M] outputs on the noisy copies."""

    def one(i: Array) -> Array:
        return f(noise.sample(jax.random.fold_in(key, i), x))

    return jax.lax.map(one, jnp.arange(n), batch_size=min(block, n))
