"""Certify one given radius with as few samples as that needs.

Most examples are far from the radius, on one side or the other: a first round of few
samples decides them.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.smoothing.certify import ABSTAIN
from certjax.smoothing.confidence import (
    Budget,
    check_alpha,
    check_trials,
    proportion_lower,
    proportion_upper,
    split_alpha,
)
from certjax.smoothing.votes import count_range, Forward, votes
from certjax.types import Array, Classifier, Key


class FixedRadius(NamedTuple):
    """Whether the smoothed classifier is constant within a radius that was asked for.

    With probability at least 1 - alpha over the samples: if `prediction` is a class, it
    is predicted everywhere within `radius` of x.

    prediction: class, or -1 (not shown) with radius 0.
    radius: as asked, in `norm`, or 0.
    counts: [K] int64, votes of the samples drawn.
    invalid: samples with a NaN logit; they count against the prediction.
    n: number of samples drawn, without the n0 of the selection.
    budget: alpha and what each round may spend of it.
    norm, guarantee: as in `SmoothedCertificate`.
    """

    prediction: int
    radius: float
    counts: np.ndarray
    invalid: int
    n: int
    budget: Budget
    norm: str
    guarantee: str


def certify_radius(  # noqa: PLR0913 - as `certify`, and the rounds
    f: Classifier,
    noise: Any,
    key: Key,
    x: Array,
    radius: float,
    *,
    rounds: tuple[int, ...] = (1_000, 10_000, 125_000),
    n0: int = 100,
    alpha: float = 0.001,
    give_up: float = 1e-4,
    batch: int = 1000,
    **how: Any,
) -> FixedRadius:
    """Certify `radius` at x, or stop as soon as that is hopeless.

    Round j looks at the first rounds[j] samples, the earlier ones included, and bounds
    the probability of the selected class at alpha / (number of rounds): a union bound,
    which needs no independence between rounds, keeps the whole at alpha. Giving up
    costs no soundness; it happens wrongly with probability at most `give_up`.

    Args:
      f, noise, key, x, n0, alpha, batch, **how: as `certify`.
      radius: to certify, in the norm of the noise.
      rounds: numbers of samples, ascending.
      give_up: failure probability of abandoning, over all rounds.

    Raises:
      ValueError: radius or a number of samples that is not positive, rounds not
        ascending, alpha or give_up outside (0, 1).

    Source: Horvath et al. 2022, arXiv:2106.06946, section 5; Chen et al. 2022,
    "Input-specific robustness certification", arXiv:2112.12084.
    """
    _check(radius, rounds, n0)
    check_alpha(give_up)
    budget = split_alpha(alpha, len(rounds))
    select, estimate = jax.random.split(key)
    guess = int(np.argmax(votes(f, noise, select, x, n0, batch, **how)))
    counts, drawn = np.int64(0), 0
    for n, part in zip(rounds, budget.parts, strict=True):
        source = (estimate, noise, drawn)
        more = count_range(f, _draw_after, source, x, n - drawn, batch, Forward(**how))
        counts, drawn = counts + more, n
        won, invalid = int(counts[guess]), int(n - counts.sum())
        spent = (counts, invalid, n, budget, noise.norm, noise.guarantee)
        if noise.radius(proportion_lower(won, n, part), jnp.size(x)) >= radius:
            return FixedRadius(guess, radius, *spent)
        highest = proportion_upper(won, n, give_up / len(rounds))
        if noise.radius(highest, jnp.size(x)) < radius:
            break
    return FixedRadius(ABSTAIN, 0.0, *spent)


def _check(radius: float, rounds: tuple[int, ...], n0: int) -> None:
    check_trials("n0", n0)
    for n in rounds:
        check_trials("rounds", n)
    if not rounds or any(a >= b for a, b in pairwise(rounds)):
        raise ValueError(
            f"rounds must be ascending numbers of samples, got {rounds}; they count "
            "from the first sample on, e.g. (1000, 10000, 125000)"
        )
    if not 0 < radius < np.inf:
        raise ValueError(
            f"radius must be positive and finite (input units), got {radius}; for "
            "radius 0 use predict"
        )


def _draw_after(source: tuple[Key, Any, Array], i: Array, x: Array) -> Array:
    """Sample i of those that follow the first `drawn`."""
    key, noise, drawn = source
    return noise.sample(jax.random.fold_in(key, drawn + i), x)
