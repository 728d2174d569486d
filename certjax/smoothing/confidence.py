"""Statistics of randomized smoothing: exact, one-sided, float64, on the host.

No jax here: the probabilistic claim of a certificate can be audited from this file
alone. Every lower bound is rounded down and every upper bound up by more than the
error of scipy's incomplete beta functions (measured against 45-digit arithmetic in
tests/test_confidence.py), so no number exceeds the exact one.
"""

import math
from decimal import Decimal, ROUND_CEILING, ROUND_FLOOR
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy import special, stats


SLACK = 4e-12  # relative; scipy's inverse beta is within 1.2e-12 of the exact value
TINY = 2.0**-52
ROUNDING = 1e-9  # relative; more than the error of scipy's binomial tails
LEAST_ALPHA = 1e-30  # below it scipy's quantiles are less exact than SLACK
MOST_TRIALS = 2**30  # sample numbers are int32 on the device, with room for padding


def check_alpha(alpha: float) -> None:
    """Refuse a failure probability outside (0, 1), NaN included."""
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha must lie in (0, 1), got {alpha}; it is the probability of a wrong "
            "certificate, e.g. 0.001"
        )
    if alpha < LEAST_ALPHA:
        raise ValueError(
            f"alpha must be at least {LEAST_ALPHA:g}, got {alpha}; below it the "
            "float64 quantiles are not exact enough"
        )


def check_trials(name: str, trials: int) -> None:
    """Refuse a number of samples that is not an integer in [1, 2^30]."""
    if not (1 <= trials <= MOST_TRIALS and trials == int(trials)):
        raise ValueError(
            f"{name} must be an integer in [1, 2^30], got {trials}; "
            "Cohen et al. use n0=100 and n=100000"
        )


def _check_counts(successes: np.ndarray, trials: int) -> None:
    check_trials("trials", trials)
    whole = np.asarray(successes == np.floor(successes))  # False for NaN
    if not np.all(whole & (successes >= 0) & (successes <= trials)):
        raise ValueError(
            f"successes must be integers in [0, trials={trials}], got {successes}; "
            "pass the votes of one class and the number of samples"
        )


def proportion_lower(successes: int, trials: int, alpha: float) -> float:
    """Clopper-Pearson lower bound of a proportion at level 1 - alpha.

    For every p: P(bound(Binomial(trials, p)) > p) <= alpha. Never above the exact
    bound, the alpha-quantile of Beta(successes, trials - successes + 1).

    Args:
      successes: an integer in [0, trials], or an array of them.
      trials: a positive integer.
      alpha: failure probability in (0, 1), all of it spent on this side.

    Returns:
      A float (an array for an array); 0 for no success.

    Raises:
      ValueError: counts or alpha out of range.

    Source: Clopper & Pearson 1934; Cohen et al. 2019, arXiv:1902.02918, section 3.2.2.
    """
    check_alpha(alpha)
    k = np.asarray(successes, np.float64)
    _check_counts(k, trials)
    exact = special.betaincinv(np.maximum(k, 1.0), trials - k + 1.0, alpha)
    lower = np.where(k > 0, np.maximum(exact * (1.0 - SLACK) - TINY, 0.0), 0.0)
    return lower if lower.ndim else float(lower)


def proportion_upper(successes: int, trials: int, alpha: float) -> float:
    """Clopper-Pearson upper bound at level 1 - alpha; never below the exact one."""
    check_alpha(alpha)
    k = np.asarray(successes, np.float64)
    _check_counts(k, trials)
    exact = special.betainccinv(k + 1.0, np.maximum(trials - k, 1.0), alpha)
    upper = np.where(k < trials, np.minimum(exact * (1.0 + SLACK) + TINY, 1.0), 1.0)
    return upper if upper.ndim else float(upper)


def proportion_interval(
    successes: int, trials: int, alpha: float
) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval: alpha / 2 on either side."""
    check_alpha(alpha)
    return (
        proportion_lower(successes, trials, alpha / 2),
        proportion_upper(successes, trials, alpha / 2),
    )


class Budget(NamedTuple):
    """A failure probability, split over the tests that share it (Bonferroni).

    alpha: the whole budget.
    parts: what each test may spend; their exact sum is at most alpha.
    """

    alpha: float
    parts: tuple[float, ...]

    def describe(self) -> str:
        """The split in one line, e.g. "0.001 = 0.0005 + 0.0005"."""
        return f"{self.alpha:g} = " + " + ".join(f"{part:g}" for part in self.parts)


def split_alpha(alpha: float, tests: int) -> Budget:
    """An even Bonferroni split whose parts add up to alpha or a hair less.

    Raises:
      ValueError: alpha outside (0, 1), or tests < 1.
    """
    check_alpha(alpha)
    if tests < 1:
        raise ValueError(f"tests must be at least 1, got {tests}")
    part = alpha / tests
    while tests * Fraction(part) > Fraction(float(alpha)):
        part = math.nextafter(part, 0.0)
    return Budget(alpha, (part,) * tests)


def binomial_test(first: int, second: int) -> float:
    """Two-sided p-value of `first` wins against `second` under a fair coin.

    Never below the exact one.

    Source: the abstention test of PREDICT, Cohen et al. 2019, section 3.2.1.
    """
    most, total = max(first, second), first + second
    if total == 0:
        return 1.0
    # P(X >= most), X ~ Binomial(total, 1/2), doubled by symmetry
    tail = special.betainc(most, total - most + 1, 0.5) if most else 1.0
    return float(min(1.0, 2.0 * tail * (1.0 + ROUNDING)))


def bernstein_lower(total: float, squares: float, trials: int, alpha: float) -> float:
    """Empirical Bernstein lower bound of the mean of values in [0, 1].

    For soft votes (softmax outputs): certifies the class of the mean probability.

    Args:
      total: sum of the values.
      squares: sum of their squares.
      trials: number of independent values, at least 2.
      alpha: failure probability of this one side.

    Returns:
      mean - sqrt(2 V log(2 / alpha) / n) - 7 log(2 / alpha) / (3 (n - 1)), at least 0.

    Source: Maurer & Pontil 2009, arXiv:0907.3740, theorem 4; MACER's soft certificate.
    """
    check_alpha(alpha)
    check_trials("trials", trials)
    if trials < 2 or not 0 <= squares <= total <= trials:
        raise ValueError(
            "need 0 <= squares <= total <= trials and trials >= 2, got "
            f"squares={squares}, total={total}, trials={trials}; the values lie in "
            "[0, 1]: sum them in float64"
        )
    mean = total / trials
    variance = max(squares - trials * mean * mean, 0.0) / (trials - 1) + 1e-12
    log = math.log(2.0 / alpha)
    slack = math.sqrt(2.0 * variance * log / trials) + 7.0 * log / (3.0 * (trials - 1))
    return max(0.0, mean - slack)


def order_statistics(
    trials: int, below: float, above: float, alpha: float
) -> tuple[int, int]:
    """Ranks whose sorted samples enclose two quantiles, jointly at level 1 - alpha.

    With n independent samples sorted ascending, `samples[lower]` is at most the
    `below`-quantile and `samples[upper]` at least the `above`-quantile, each with
    failure probability alpha / 2.

    Args:
      trials: n.
      below: lower quantile in (0, 1).
      above: upper quantile in (0, 1), at least `below`.
      alpha: joint failure probability.

    Returns:
      (lower, upper), 0-based; lower = -1 or upper = n where no sample is far enough
      out (the bound is then infinite).

    Source: Chiang et al. 2020, "Detection as regression: certified object detection
    with median smoothing", arXiv:2007.03730, section 4.
    """
    check_alpha(alpha)
    check_trials("trials", trials)
    if not 0 < below <= above < 1:
        raise ValueError(
            f"need 0 < below <= above < 1, got below={below}, above={above}; "
            "a radius of many sigma leaves no quantile to estimate: take it smaller"
        )
    lower = _rank_below(trials, below, alpha / 2)
    return lower, trials - 1 - _rank_below(trials, 1.0 - above, alpha / 2)


def _rank_below(trials: int, quantile: float, alpha: float) -> int:
    """The largest k with P(samples[k] > quantile) <= alpha, or -1.

    samples[k] lies above the quantile iff at most k samples fall below it.
    """
    k = int(stats.binom.ppf(alpha, trials, quantile))
    while k >= 0 and stats.binom.cdf(k, trials, quantile) * (1 + ROUNDING) > alpha:
        k -= 1
    return k


def round_down(value: float, digits: int = 3) -> str:
    """`value` with `digits` decimals, never above it: for radii in tables."""
    return _rounded(value, digits, ROUND_FLOOR)


def round_up(value: float, digits: int = 3) -> str:
    """`value` with `digits` decimals, never below it: for failure probabilities."""
    return _rounded(value, digits, ROUND_CEILING)


def _rounded(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return str(value)
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=rounding))
