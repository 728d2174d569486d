"""Bounds that hold for the float program: enclosure, NaN, overflow, transformations."""

import operator
from fractions import Fraction
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from certjax.bounds import ibp, UnsupportedPrimitive
from certjax.specification import margins
from certjax.threat import Box, Linf
from experiments.soundness_search import FAMILIES, search
from tests.test_interval import (
    ELEMENTWISE,
    IMAGE,
    IMAGES,
    interval_shifted,
    points,
    POSITIVE,
    STRUCTURE,
    UNSUPPORTED,
    X,
)


W = jax.random.normal(jax.random.key(1), (6, 6))


def network(x, w=W):
    h = jax.nn.relu(x.ravel()[:6] @ w)
    return jax.nn.relu(h @ w.T) @ w[:, :5] + 0.1


def sound(f, lower, upper=None):
    lower = jnp.asarray(lower, jnp.float32)
    upper = lower if upper is None else jnp.asarray(upper, jnp.float32)
    return jax.jit(lambda a, b: ibp(f, sound=True)(Box(a, b), a))(lower, upper)


# ---------------------------------------------------------------------------- enclosure


def check_enclosed(f, threat, x):
    """No slack: compiled, batched values and the exact-arithmetic bounds are inside."""
    both = jax.jit(lambda x: [ibp(f, sound=s)(threat, x) for s in (False, True)])
    plain, bounds = both(x)
    outs = np.asarray(jax.jit(jax.vmap(f))(points(threat, x, samples=64)))
    lower, upper = map(np.asarray, bounds)
    assert (outs >= lower).all()
    assert (outs <= upper).all()
    assert (plain.lower >= lower).all()
    assert (plain.upper <= upper).all()
    width = np.asarray(plain.upper, np.float64) - plain.lower
    assert (np.asarray(upper, np.float64) - lower <= 1.03 * width + 1e-4).all()


EVERY = {
    **{name: (f, *interval_shifted(0.0)) for name, f in ELEMENTWISE.items()},
    **{name: (f, *interval_shifted(2.0)) for name, f in POSITIVE.items()},
    **{name: (f, Linf(0.02), X) for name, f in STRUCTURE.items()},
    **{name: (f, Linf(0.02), IMAGE) for name, f in IMAGES.items()},
}
QUICK = (
    "exp", "tanh", "relu", "gelu erf", "fourth power", "scale down", "rsqrt",
    "power -0.5", "dense", "batched matmul", "product of matrices", "mean", "variance",
    "cumsum", "where, undecided", "softmax", "log_softmax", "logsumexp", "layer norm",
    "convert", "scan", "attention", "conv, strided", "conv with a bounded kernel",
)  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_values_are_enclosed(name):
    check_enclosed(*EVERY[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(EVERY) - set(QUICK)))
def test_values_are_enclosed_for_every_operation(name):
    check_enclosed(*EVERY[name])


@pytest.mark.parametrize("family", ["relu", "linear, one point", "bfloat16"])
def test_the_search_breaks_plain_bounds_and_not_sound_ones(family):
    row = search(family, cases=20)
    assert row.plain["outside"] > 0
    assert row.sound["outside"] == 0
    assert row.sound["false"] == 0


@pytest.mark.parametrize("method", ["crown", "alpha_crown"])
def test_the_search_does_not_break_sound_linear_bounds(method):
    row = search("relu, locally linear", cases=20, method=method)
    assert row.plain["outside"] > 0
    assert row.sound["outside"] == 0
    assert row.sound["false"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["ibp", "crown", "alpha_crown"])
def test_no_family_breaks_the_sound_bounds(family, method):
    row = search(family, cases=200, seed=1, method=method)
    assert row.sound["outside"] == 0
    assert row.sound["false"] == 0


def test_exact_rational_values_are_enclosed():
    """Every corner of a small network, in exact arithmetic."""
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=s).astype(np.float32) for s in ((4, 5), (5, 3)))
    x = rng.uniform(0.2, 0.8, 4).astype(np.float32)
    box = Box(x - np.float32(0.1), x + np.float32(0.1))
    f = lambda z: margins(jax.nn.relu(z @ first) @ second, 1)
    lower, upper = ibp(f, sound=True)(box, x)

    def matrix(v):
        return [[Fraction(float(e)) for e in row] for row in v]

    def dot(v, w):
        columns = zip(*matrix(w), strict=True)
        return [sum(map(operator.mul, v, column)) for column in columns]

    for corner in product(*zip(*matrix([box.lower, box.upper]), strict=True)):
        z = dot([max(v, 0) for v in dot(corner, first)], second)
        exact = [z[1] - z[0], z[1] - z[2]]
        for low, value, high in zip(lower.tolist(), exact, upper.tolist(), strict=True):
            assert Fraction(low) < value < Fraction(high)


# ----------------------------------------------- what XLA does beyond single operations


REWRITTEN = {
    "constants added first": (lambda x: (x + 1e8) + 1.0, -1e8, 1.0),
    "constants multiplied first": (lambda x: (x * 1e-30) * 1e-30, 1e38, 1e-22),
    "large constants multiplied first": (lambda x: (x * 1e30) * 1e30, 1e-38, 1e22),
    "reciprocal of a large constant": (lambda x: x / 1e38, 1e38, 1.0),
    "product of exponentials": (lambda x: jnp.exp(x) * jnp.exp(x), 32.5, np.exp(65.0)),
    "exponential cancelled": (lambda x: jnp.log(jnp.exp(x)), 60.3, np.float32(60.3)),
    "subnormal input": (lambda x: x * 1e10, 1e-40, 1e-30),
    "subnormal result": (lambda x: x * x, 1e-20, 1e-40),
}  # fmt: skip


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten_flushed_and_exact_values_are_enclosed(name):
    """The exact value, the compiled one and the one of single operations."""
    f, x, exact = REWRITTEN[name]
    x = jnp.float32(x)
    lower, upper = sound(f, x)
    for value in (exact, jax.jit(f)(x), f(x)):
        assert not (value < lower)
        assert not (value > upper)


def test_a_constant_that_the_program_computes_is_rounded_too():
    scale = jnp.float32(3.0)
    lower, upper = map(float, sound(lambda x: x * (1 / scale), 1.0))
    assert lower < 1 / 3 < upper
    lower, upper = sound(lambda x: x @ (jnp.eye(2) / scale), [1.0, 2.0])
    assert (lower < jnp.array([1, 2]) / 3).all()
    assert (upper > jnp.array([1, 2]) / 3).all()


# --------------------------------------------------------------------- NaN and overflow


def test_overflow_gives_an_infinite_bound():
    lower, upper = sound(jnp.exp, [-1.0, 80.0, 100.0], [1.0, 100.0, 101.0])
    assert np.isfinite(lower).all()
    assert lower[2] < 3.5e38
    np.testing.assert_array_equal(np.isinf(upper), [False, True, True])


POSSIBLY_NAN = {
    "difference of infinities": lambda x: jnp.exp(x + 99) - jnp.exp(x + 98),
    "and then clipped": lambda x: jnp.clip(jnp.exp(x + 99) - jnp.exp(x + 98), 0, 1),
    "zero times infinity": lambda x: x * jnp.exp(x + 99),
    "zero by zero": lambda x: x / x,
    "root of a negative": lambda x: jnp.sqrt(x),  # noqa: PLW0108
    "log of a negative": lambda x: jnp.log(x),  # noqa: PLW0108
    "sine of infinity": lambda x: jnp.sin(jnp.exp(x + 99)),
    "partial sums overflow": lambda x: x[None] @ jnp.array([[3e38], [3e38], [-3e38]]),
    "power of a negative": lambda x: x**1.5,
    "softmax of infinity": lambda x: jax.nn.softmax(jnp.exp(x + 99)),
}


@pytest.mark.parametrize("name", POSSIBLY_NAN)
def test_no_bound_is_claimed_where_the_program_may_return_nan(name):
    bounds = sound(POSSIBLY_NAN[name], [-1.0] * 3, [1.0] * 3)
    assert np.isnan(bounds.lower).all()
    assert np.isnan(bounds.upper).all()


def test_nan_decides_no_comparison():
    f = lambda x: jnp.where(jnp.exp(x) - jnp.exp(x + 1) > 0, 1.0, 2.0)
    assert sound(f, 100.0) == (1.0, 2.0)
    assert sound(jnp.argmax, [jnp.nan, 1.0, 0.0]) == (0, 2)


def test_masked_entries_do_not_spoil_a_softmax():
    mask = jnp.array([True, True, False])
    for f in (
        lambda x: jax.nn.softmax(jnp.where(mask, x, -jnp.inf)),
        lambda x: jax.nn.softmax(x + jnp.where(mask, 0, -jnp.inf)),
    ):
        lower, upper = sound(f, [0.0, 1.0, 2.0], [0.1, 1.1, 2.0])
        assert (upper - lower < 0.05).all()
        assert lower[2] == 0
        assert upper[2] < 1e-30


def test_division_by_zero_is_unbounded_on_both_sides():
    """1 / -0 is -inf: the sign of a zero is not known."""
    assert sound(lambda x: 1 / x, 0.0, 1.0) == (-jnp.inf, jnp.inf)
    assert sound(lax.rsqrt, 0.0, 1.0) == (-jnp.inf, jnp.inf)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_modelled_raises(name):
    with pytest.raises(UnsupportedPrimitive, match=r"test_interval\.py"):
        ibp(UNSUPPORTED[name], sound=True)(Linf(0.1), X[0])


def test_a_sum_that_bfloat16_cannot_bound_says_so():
    f = lambda x: jnp.ones((40000,), jnp.bfloat16) @ x
    x = jnp.ones((40000,), jnp.bfloat16)
    assert np.isnan(ibp(f, sound=True)(Box(x, x), x).lower)
    g = lambda x: jnp.dot(jnp.ones_like(x), x, preferred_element_type=jnp.float32)
    lower, upper = ibp(g, sound=True)(Box(x, x), x)
    assert lower <= 40000 <= upper


# ---------------------------------------------------------------------- transformations


def test_margins_stay_folded():
    f = lambda x: margins(network(x), 3)
    plain, bounds = ibp(f)(Linf(0.1), X), ibp(f, sound=True)(Linf(0.1), X)
    np.testing.assert_allclose(bounds.lower, plain.lower, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(bounds.upper, plain.upper, rtol=1e-4, atol=1e-3)


def test_jit_vmap_and_eager_agree():
    xs = jnp.stack([X, X / 2])
    bound = lambda x: ibp(network, sound=True)(Linf(0.1), x)
    batched = jax.jit(jax.vmap(bound))(xs)
    for i, x in enumerate(xs):
        for a, b in zip(batched, bound(x), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-5)


def test_the_gradient_is_that_of_the_plain_bounds():
    def loss(w, sound):
        f = lambda x: margins(network(x, w), 2)
        return jnp.sum(jnp.tanh(ibp(f, sound=sound)(Linf(0.05), X).lower))

    exact, rounded = (jax.grad(loss)(W, sound) for sound in (False, True))
    np.testing.assert_allclose(rounded, exact, rtol=2e-3, atol=1e-4)


def test_the_radius_includes_every_representable_point():
    x = jnp.float32([0.3, 0.5, 0.7])
    z = np.nextafter(np.float32(x) - np.float32(0.1), np.float32(0), dtype=np.float32)
    lower, upper = ibp(lambda v: 1.0 * v, sound=True)(Linf(0.1), x)
    assert (lower <= z).all()
    assert (upper >= np.float32(x) + np.float32(0.1)).all()
