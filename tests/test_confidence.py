"""Statistics of smoothing against exact arithmetic: no bound on the wrong side."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from scipy import special, stats

from certjax.smoothing.confidence import (
    bernstein_lower,
    binomial_test,
    order_statistics,
    proportion_interval,
    proportion_lower,
    proportion_upper,
    round_down,
    round_up,
    split_alpha,
)


ALPHAS = (0.05, 0.01, 0.001, 1e-6)
TIGHT = 1e-9  # a bound is exact up to this relative error


def nudged(p: float) -> float:
    return min(1.0, p * (1 + TIGHT) + 1e-15)


def exact_tail(successes: int, trials: int, p: float) -> Fraction:
    """P(Binomial(trials, p) >= successes), exactly, for the float p."""
    a, b = Fraction(p).as_integer_ratio()
    total = sum(
        math.comb(trials, i) * a**i * (b - a) ** (trials - i)
        for i in range(successes, trials + 1)
    )
    return Fraction(total, b**trials)


def precise_tail(successes: int, trials: int, p: float):
    """The same in 45 digits, summing from `successes` upwards; p below the mean."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(45):
        q = mpmath.mpf(p)
        log = mpmath.loggamma(trials + 1) - mpmath.loggamma(successes + 1)
        log -= mpmath.loggamma(trials - successes + 1)
        log += successes * mpmath.log(q) + (trials - successes) * mpmath.log1p(-q)
        term = total = mpmath.exp(log)
        odds = q / (1 - q)
        for i in range(successes, trials):
            term *= odds * (trials - i) / (i + 1)
            total += term
            if term < total * mpmath.mpf(10) ** -30:
                break
        return total


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("trials", [10, 100])
def test_lower_bound_is_exact_for_all_counts(trials, alpha):
    """The bound is the p at which so many successes have probability alpha."""
    counts = np.arange(trials + 1)
    lower = proportion_lower(counts, trials, alpha)
    assert lower[0] == 0.0
    for k, p in zip(counts[1:].tolist(), lower[1:].tolist(), strict=True):
        assert exact_tail(k, trials, p) <= Fraction(alpha)
        assert exact_tail(k, trials, nudged(p)) > Fraction(alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("trials", [10**4, 10**5, 10**6, 2**30])
def test_lower_bound_never_exceeds_the_exact_one(trials, alpha):
    shares = np.random.default_rng(trials).uniform(0, 1, 1)
    chosen = {1, 2, 100, trials - 100, trials - 1, trials, trials // 2}
    chosen |= set() if trials > 10**6 else {int(s * trials) for s in shares}
    for k in chosen if trials <= 10**6 else chosen - {trials // 2}:
        p = proportion_lower(k, trials, alpha)
        assert precise_tail(k, trials, p) <= alpha
        assert precise_tail(k, trials, nudged(p)) > alpha


@pytest.mark.parametrize("trials", [10, 100, 10**4, 10**5])
def test_no_radius_exceeds_the_exact_one(trials):
    """Over all counts: quantiles of the beta distribution by scipy, in float64."""
    step = 1 if trials <= 10**4 else 37  # all of them: the slow test below
    counts = np.unique(np.r_[1 : trials + 1 : step, trials - 50 : trials + 1])
    counts = counts[counts > 0]
    for alpha in ALPHAS:
        lower = proportion_lower(counts, trials, alpha)
        exact = stats.beta.ppf(alpha, counts, trials - counts + 1)
        assert np.all(lower <= exact)
        assert np.all(lower >= exact * (1 - TIGHT) - 1e-12)
        assert np.all(np.diff(lower) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_radius_exceeds_the_exact_one_over_a_million_counts(alpha):
    trials = 10**6
    counts = np.arange(1, trials + 1)
    lower = proportion_lower(counts, trials, alpha)
    assert np.all(lower <= stats.beta.ppf(alpha, counts, trials - counts + 1))
    # P(Binomial >= k) at the bound, by another route than the inverse
    assert np.all(special.betainc(counts, trials - counts + 1.0, lower) <= alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_upper_bound_mirrors_the_lower_one(alpha):
    for trials in (10, 100, 10**4):
        counts = np.arange(trials + 1)
        upper = proportion_upper(counts, trials, alpha)
        mirrored = 1.0 - proportion_lower(counts[::-1], trials, alpha)
        exact = stats.beta.isf(alpha, counts[:-1] + 1, trials - counts[:-1])
        assert upper[-1] == 1.0
        assert np.all(upper[:-1] >= exact)
        np.testing.assert_allclose(upper, mirrored, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("alpha", [1e-9, 1e-30])
def test_bounds_at_alphas_that_few_ask_for(alpha):
    for trials in (10, 100):
        for k in {1, 2, trials // 2, trials - 1, trials}:
            p = proportion_lower(k, trials, alpha)
            assert p == 0 or exact_tail(k, trials, p) <= Fraction(alpha)


def test_all_votes_have_the_closed_form():
    """N successes of N: alpha^(1/N); the largest radius of the published logs."""
    for trials in (10, 10**5, 10**6, 2**30):
        exact = math.exp(math.log(0.001) / trials)
        assert exact * (1 - 1e-11) <= proportion_lower(trials, trials, 0.001) <= exact
    largest = special.ndtri(proportion_lower(10**5, 10**5, 0.01))
    assert round(largest, 4) == 3.9105


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("p", [0.02, 0.5, 0.9, 0.999])
def test_exact_coverage(p, alpha):
    """P(bound > p), summed over the distribution of the count, is at most alpha."""
    for trials in (10, 100, 1000):
        counts = np.arange(trials + 1)
        mass = stats.binom.pmf(counts, trials, p)
        assert mass[proportion_lower(counts, trials, alpha) > p].sum() <= alpha
        assert mass[proportion_upper(counts, trials, alpha) < p].sum() <= alpha
        low, high = proportion_interval(counts, trials, alpha)
        assert mass[(low > p) | (high < p)].sum() <= alpha


@pytest.mark.parametrize("alpha", ALPHAS)
def test_simulated_coverage(alpha):
    """100,000 simulated bounds miss p at most alpha of the time (4.5 sd)."""
    runs, trials = 100_000, 1000
    rng = np.random.default_rng(0)
    table = proportion_lower(np.arange(trials + 1), trials, alpha)
    for p in (0.5, 0.99):
        wrong = np.mean(table[rng.binomial(trials, p, runs)] > p)
        assert wrong <= alpha + 4.5 * math.sqrt(alpha / runs)


@pytest.mark.parametrize("alpha", [*ALPHAS, 0.3, 1 / 3])
@pytest.mark.parametrize("tests", [1, 2, 3, 7, 10, 1000])
def test_budget_adds_up(alpha, tests):
    budget = split_alpha(alpha, tests)
    spent = sum(map(Fraction, budget.parts))
    assert len(budget.parts) == tests
    assert Fraction(alpha) * (1 - Fraction(1, 10**12)) <= spent <= Fraction(alpha)
    assert budget.describe().count("+") == tests - 1


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.12345, 0.9996, 1.0, 2.9999999999, 3.7])
def test_printed_radius_is_at_most_the_stored_one(value):
    for digits in (0, 1, 3, 8):
        down, up = Decimal(round_down(value, digits)), Decimal(round_up(value, digits))
        assert down <= Decimal(value) <= up
        assert up - down <= Decimal(1).scaleb(-digits)


def test_printing_of_what_is_no_number():
    assert round_down(math.nan) == "nan"
    assert round_up(math.inf) == "inf"


@pytest.mark.parametrize("total", [1, 7, 100, 1000])
def test_binomial_test_agrees_with_scipy(total):
    for first in range(0, total + 1, max(1, total // 10)):
        p_value = binomial_test(first, total - first)
        exact = stats.binomtest(first, total, 0.5).pvalue
        assert p_value == pytest.approx(exact, rel=1e-8)
        assert p_value >= exact * (1 - 1e-11)
        assert p_value == binomial_test(total - first, first)


def test_binomial_test_of_nothing_decides_nothing():
    assert binomial_test(0, 0) == 1.0


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_bernstein_covers_the_mean(alpha):
    """Soft votes: at most a share alpha of the bounds exceeds the mean."""
    rng = np.random.default_rng(1)
    for a, b in ((1.0, 1.0), (8.0, 2.0), (0.05, 0.05)):
        values = rng.beta(a, b, (1000, 200))
        sums, squares = values.sum(1), (values**2).sum(1)
        bounds = [
            bernstein_lower(s, q, 200, alpha)
            for s, q in zip(sums, squares, strict=True)
        ]
        assert np.mean(np.asarray(bounds) > a / (a + b)) <= alpha


def test_bernstein_by_hand():
    """100 values of 1: no variance, 1 - 7 log(2 / alpha) / (3 * 99)."""
    by_hand = 1 - 7 * math.log(2 / 0.01) / (3 * 99)
    assert by_hand - 1e-6 < bernstein_lower(100.0, 100.0, 100, 0.01) <= by_hand


@pytest.mark.parametrize(("below", "above"), [(0.5, 0.5), (0.2, 0.9), (0.01, 0.4)])
@pytest.mark.parametrize("trials", [5, 100, 1000])
def test_order_statistics_are_the_closest_sound_ranks(trials, below, above):
    """Failure probabilities of the ranks, and of the next ones inside."""
    alpha = 0.01
    lower, upper = order_statistics(trials, below, above, alpha)
    too_high = stats.binom.cdf(lower, trials, below)  # P(samples[lower] > quantile)
    too_low = stats.binom.sf(upper, trials, above)  # P(samples[upper] < quantile)
    assert too_high <= alpha / 2 < stats.binom.cdf(lower + 1, trials, below)
    assert too_low <= alpha / 2 < stats.binom.sf(upper - 1, trials, above)


def test_order_statistics_cover_simulated_quantiles():
    lower, upper = order_statistics(200, 0.3, 0.7, 0.05)
    samples = np.sort(np.random.default_rng(2).uniform(size=(20_000, 200)), axis=1)
    wrong = (samples[:, lower] > 0.3) | (samples[:, upper] < 0.7)
    assert np.mean(wrong) <= 0.05 + 4.5 * math.sqrt(0.05 / 20_000)


BAD = {
    "alpha": [
        lambda: proportion_lower(1, 10, 0.0),
        lambda: proportion_lower(1, 10, 1.0),
        lambda: proportion_upper(1, 10, math.nan),
        lambda: split_alpha(-0.1, 2),
        lambda: proportion_lower(90, 100, 1e-300),  # scipy's quantile is too large
    ],
    "trials": [
        lambda: proportion_lower(1, 0, 0.01),
        lambda: proportion_lower(1, 2**31, 0.01),
        lambda: proportion_lower(1, math.nan, 0.01),
        lambda: proportion_lower(1, math.inf, 0.01),
        lambda: bernstein_lower(1.0, 1.0, 1, 0.01),
    ],
    "successes": [
        lambda: proportion_lower(-1, 10, 0.01),
        lambda: proportion_lower(11, 10, 0.01),
        lambda: proportion_lower(1.5, 10, 0.01),
        lambda: proportion_upper(math.nan, 10, 0.01),
    ],
    "squares": [
        lambda: bernstein_lower(3.0, 4.0, 10, 0.01),
        lambda: bernstein_lower(math.nan, 1.0, 10, 0.01),
    ],
    "below": [
        lambda: order_statistics(10, 0.0, 0.5, 0.01),
        lambda: order_statistics(10, 0.6, 0.5, 0.01),
    ],
    "tests": [lambda: split_alpha(0.1, 0)],
}


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name, calls in BAD.items() for call in calls]
)
def test_bad_input_names_what_is_wrong(name, call):
    with pytest.raises(ValueError, match=rf"{name}.*(?s:.)*got"):
        call()
