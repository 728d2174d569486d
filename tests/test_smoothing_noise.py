"""Noise: the generator against scipy's quantiles, the radii against closed forms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from certjax.smoothing import Gaussian, generator, Laplace, Table, Uniform


KEY = jax.random.key(0)
PROBABILITIES = (0.5001, 0.6, 0.75, 0.9, 0.99, 0.999, 0.99993, 1 - 1e-9)


def words(magnitudes):
    return jnp.asarray(np.asarray(magnitudes, np.int64).astype(np.uint32))


def test_normal_pair_is_the_transform_of_its_words():
    """The 5,000 longest radii, 20,000 others, angles everywhere, in float64."""
    radius = np.unique(
        np.r_[0:5000, np.geomspace(5000, 2**32 - 1, 20_000).astype(np.int64)]
    )
    angle = np.random.default_rng(0).integers(0, 2**32, radius.size)
    angle[:4] = np.arange(4) << 30  # the axes
    length = np.sqrt(-2 * np.log((radius + 0.5) * 2.0**-32))
    turn = np.pi / 2 * ((angle & 0x3FFFFFFF) + 0.5) * 2.0**-30
    signs = 1 - 2 * (angle >> 31), 1 - 2 * ((angle >> 30) & 1)
    exact = signs[0] * length * np.cos(turn), signs[1] * length * np.sin(turn)
    found = jax.jit(generator.normal_pair)(words(radius), words(angle))
    for z, expected in zip(found, exact, strict=True):
        # float32 has 24 of the 32 bits of a tail near 1: the radius is coarse near 0
        slack = np.minimum(2e-6 + 1e-7 / np.maximum(length, 1e-9), 5e-4)
        assert np.all(np.abs(np.asarray(z, np.float64) - expected) <= slack)
    assert 6.76 < length.max() < 6.77


@pytest.mark.parametrize("shape", [(200_000,), (400, 501), (3,), (1,)])
def test_normals_are_normal_and_independent(shape):
    z = np.asarray(generator.standard_normal(KEY, shape), np.float64).ravel()
    assert z.shape == (math.prod(shape),)
    if z.size < 1000:
        return
    assert stats.kstest(z, "norm").pvalue > 1e-3
    tail = np.mean(np.abs(z) > 3.0)  # 0.0027
    assert abs(tail - 2 * special.ndtr(-3)) < 4.5 * math.sqrt(0.0027 / z.size)
    # the two of a pair, and neighbours; also their squares
    half = (z.size + 1) // 2
    for a, b in ((z[:half][: z.size - half], z[half:]), (z[:-1], z[1:])):
        for power in (1, 2):
            assert abs(np.corrcoef(a**power, b**power)[0, 1]) < 4.5 / math.sqrt(a.size)


@pytest.mark.parametrize("size", [1, 3, 784])
def test_every_word_is_used_once(size):
    drawn = generator.bits(KEY, (size,))
    assert drawn.dtype == jnp.uint32
    assert len(set(drawn.tolist())) == size


def test_threefry_known_answers():
    """Random123's kat_vectors for threefry2x32, 20 rounds."""
    from jax.extend.random import threefry_2x32

    for key, counter, expected in (
        ([0, 0], [0, 0], [0x6B200159, 0x99BA4EFE]),
        ([0xFFFFFFFF] * 2, [0xFFFFFFFF] * 2, [0x1CB996FC, 0xBB002BE7]),
        (
            [0x13198A2E, 0x03707344],
            [0x243F6A88, 0x85A308D3],
            [0xC4923A9C, 0x483DF7A0],
        ),
    ):
        first, second = jnp.asarray(key, jnp.uint32)
        drawn = threefry_2x32((first, second), jnp.asarray(counter, jnp.uint32))
        assert np.asarray(drawn).tolist() == expected


def test_keys_typed_and_raw_draw_alike_and_rbg_is_refused():
    raw = jax.random.PRNGKey(3)
    typed = jax.random.wrap_key_data(raw, impl="threefry2x32")
    np.testing.assert_array_equal(
        generator.bits(raw, (5,)), generator.bits(typed, (5,))
    )
    with pytest.raises(ValueError, match=r"threefry2x32 key .* got .*write"):
        generator.bits(jax.random.key(0, impl="rbg"), (5,))


@pytest.mark.parametrize("noise", [Gaussian(0.7), Laplace(0.7), Uniform(0.7)])
def test_samples_have_the_moments_of_the_distribution(noise):
    """Mean x, standard deviation sigma, kurtosis; coordinates uncorrelated."""
    x = jnp.asarray([0.2, -1.0, 3.0])
    keys = jax.random.split(KEY, 40_000)
    z = jax.jit(jax.vmap(noise.sample, (0, None)))(keys, x)
    delta = np.asarray(z, np.float64) - np.asarray(x)
    kurtosis = {Gaussian: 3.0, Laplace: 6.0, Uniform: 1.8}[type(noise)]
    np.testing.assert_allclose(delta.mean(0), 0.0, atol=0.016)
    np.testing.assert_allclose(delta.std(0), 0.7, rtol=0.02)
    np.testing.assert_allclose(stats.kurtosis(delta, fisher=False), kurtosis, rtol=0.12)
    np.testing.assert_allclose(np.corrcoef(delta.T), np.eye(3), atol=0.025)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("sigma", [0.12, 1.0])
def test_radii_are_the_closed_forms_never_more(p, sigma):
    """Cohen et al. 2019, theorem 1; Yang et al. 2020, table 1."""
    half = math.sqrt(3.0) * sigma
    scale = sigma / math.sqrt(2.0)
    exact = {
        Gaussian(sigma): sigma * special.ndtri(p),
        Gaussian(sigma, norm="l1"): sigma * special.ndtri(p),
        Gaussian(sigma, norm="linf"): sigma * special.ndtri(p) / 28.0,
        Laplace(sigma): -scale * math.log(2.0 * (1.0 - p)),
        Uniform(sigma): 2.0 * half * (p - 0.5),
        Uniform(sigma, norm="linf"): 2.0 * half * (1.0 - (1.5 - p) ** (1.0 / 784)),
    }
    for noise, radius in exact.items():
        found = noise.radius(p, 784)
        assert found <= radius + 1e-16
        assert found >= radius * (1 - 1e-8) - 1e-8


NOISES = (
    Gaussian(0.5),
    Gaussian(0.5, norm="linf"),
    Laplace(0.5),
    Uniform(0.5),
    Uniform(0.5, norm="linf"),
    Table(lambda _, x: x, (0.6, 0.8, 0.99), (0.1, 0.3, 0.9), "l1"),
)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: f"{type(n).__name__}-{n.norm}")
def test_no_majority_no_radius(noise):
    for p in (0.0, 0.3, 0.5, math.nan, -1.0):
        assert noise.radius(p, 784) == 0.0
    with pytest.raises(ValueError, match=r"p_lower .* got 1.0001"):
        noise.radius(1.0001, 784)
    radii = [noise.radius(p, 784) for p in np.linspace(0, 1 - 1e-9, 301)]
    assert np.all(np.diff(radii) >= 0)


def halfspace_probability(noise, direction, distance, size):
    """P of a halfspace whose border lies at `distance` along `direction`; sampled."""
    keys = jax.random.split(KEY, 100_000)
    x = jnp.zeros(size)
    z = jax.jit(jax.vmap(noise.sample, (0, None)))(keys, x)
    return float(np.mean(np.asarray(z) @ direction < distance))


@pytest.mark.parametrize("noise", [Gaussian(0.5), Laplace(0.5), Uniform(0.5)])
def test_radius_is_attained_by_the_worst_classifier(noise):
    """At an axis-aligned halfspace, p is the distribution function and r the distance.

    The closed forms cannot be larger for any classifier: this one has no margin left.
    """
    distance = 0.4
    axis = np.asarray([1.0, 0.0])
    p = halfspace_probability(noise, axis, distance, 2)
    assert noise.radius(p, 2) == pytest.approx(distance, abs=0.01)


@pytest.mark.parametrize("noise", [Gaussian(1.0, norm="linf"), Uniform(1.0, "linf")])
def test_linf_radius_needs_the_dimension(noise):
    with pytest.raises(ValueError, match=r"number of coordinates, got size=None"):
        noise.radius(0.9)


@pytest.mark.parametrize("kind", [tuple, list, np.asarray])
def test_table_is_the_step_function_below(kind):
    same = lambda _, x: x
    table = Table(same, kind((0.6, 0.8, 0.99)), kind((0.1, 0.3, 0.9)), "l1")
    assert hash(table) == hash(Table(same, (0.6, 0.8, 0.99), (0.1, 0.3, 0.9), "l1"))
    steps = {0.59: 0.0, 0.6: 0.1, 0.79: 0.1, 0.8: 0.3, 0.98: 0.3, 0.99: 0.9, 1.0: 0.9}
    for p, radius in steps.items():
        assert table.radius(p) == radius


@pytest.mark.parametrize(
    ("probabilities", "radii"),
    [
        ((), ()),
        ((0.6, 0.8), (0.1,)),
        ((0.8, 0.6), (0.1, 0.3)),
        ((0.6, 0.8), (0.3, 0.1)),
        ((0.4, 0.8), (0.1, 0.3)),
        ((0.6, 1.1), (0.1, 0.3)),
        ((0.6, 0.8), (0.1, math.inf)),
        ((0.6, math.nan), (0.1, 0.3)),
        ((0.6,), (math.nan,)),
        ((0.6,), (-0.1,)),
    ],
)
def test_bad_table(probabilities, radii):
    with pytest.raises(ValueError, match=r"a table needs .*got"):
        Table(lambda _, x: x, probabilities, radii, "l2")


@pytest.mark.parametrize("kind", [Gaussian, Laplace, Uniform])
@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_bad_sigma(kind, sigma):
    with pytest.raises(ValueError, match=r"sigma must be positive.*got"):
        kind(sigma)


@pytest.mark.parametrize("kind", [Gaussian, Uniform])
def test_unknown_norm(kind):
    with pytest.raises(ValueError, match=r"certifies l1.*got norm='l3'"):
        kind(1.0, norm="l3")


def test_sigma_may_be_traced():
    """One compilation for all sigma; the draw scales with it."""

    def draw(sigma):
        noise = dataclasses.replace(Gaussian(1.0), sigma=sigma)
        return noise.sample(KEY, jnp.zeros(3))

    compiled = jax.jit(draw)
    np.testing.assert_allclose(2.0 * compiled(0.25), compiled(0.5), rtol=1e-6)
    assert compiled._cache_size() == 1
