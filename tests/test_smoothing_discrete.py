"""Replaced pixel values: the law that is sampled, and exact radii against l0."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax.smoothing import Band, Block, certify, Discrete, patch


KEY = jax.random.key(7)
X = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 5, 1)) / 255, jnp.float32)


def probabilities(noise: Discrete) -> tuple[float, float]:
    """That a value stays, and that it becomes one certain other one."""
    other = noise.coin / 2**24 / noise.levels
    return 1 - (noise.levels - 1) * other, other


def least_by_counting(noise, p, r):
    """The adversary's choice over all (stay, become the other one) of r values."""
    stay, other = probabilities(noise)
    rest = max(0.0, 1 - stay - other)
    cells = []
    for i, j in itertools.product(range(r + 1), repeat=2):
        if i + j <= r:
            ways = math.comb(r, i) * math.comb(r - i, j)
            same = ways * rest ** (r - i - j)
            here, there = same * stay**i * other**j, same * other**i * stay**j
            cells.append((i - j, here, there))
    found = 0.0
    for _, here, there in sorted(cells, reverse=True):
        share = min(1.0, p / here) if here > 0 else 0.0
        found, p = found + share * there, p - share * here
    return found


@pytest.mark.parametrize(("keep", "levels"), [(0.8, 2), (0.6, 4), (0.2, 256)])
def test_the_radius_is_that_of_the_likelihood_ratio(keep, levels):
    noise = Discrete(keep, levels)
    for p in (0.3, 0.5, 0.501, 0.6, 0.8, 0.95, 0.999, 0.99999):
        radius = noise.radius(p, 40)
        assert radius == 0 or least_by_counting(noise, p, int(radius)) > 0.5
        if p > 0.5 and radius < 40:
            assert not least_by_counting(noise, p, int(radius) + 1) > 0.5 + 1e-9


@pytest.mark.parametrize("keep", [0.6, 0.75, 0.9])
def test_no_image_within_the_radius_is_predicted_otherwise(keep):
    """All 64 black and white images of six pixels, their votes exact, random nets."""
    noise = Discrete(keep, 2)
    stay, other = probabilities(noise)
    images = np.asarray(list(itertools.product((0, 1), repeat=6)))
    changed = (images[:, None] != images[None]).sum(-1)
    seen = stay ** (6 - changed) * other**changed  # [x, what is seen of it]
    np.testing.assert_allclose(seen.sum(1), 1.0)
    certified = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        votes = rng.random(64) < 0.5 + 0.5 * (rng.random(6) < 0.5) @ images.T / 3
        p = seen @ votes
        for x in range(64):
            for share, wins in ((p[x], p > 0.5), (1 - p[x], p < 0.5)):
                radius = noise.radius(float(share), 6)
                certified += radius > 0
                assert wins[changed[x] <= radius].all() or radius == 0
    assert certified > 100


@pytest.mark.parametrize(("keep", "levels"), [(0.8, 2), (0.6, 4), (0.2, 256)])
def test_the_sampled_law_is_that_of_the_theorem(keep, levels):
    noise = Discrete(keep, levels)
    stay, other = probabilities(noise)
    assert stay == pytest.approx(keep, abs=2**-23)
    draws = jax.jit(jax.vmap(noise.sample, (0, None)))(jax.random.split(KEY, 5000), X)
    shades = np.asarray(jnp.round(draws * (levels - 1)), int)
    np.testing.assert_allclose(shades / (levels - 1), draws, atol=1e-6)
    assert 0 <= shades.min() <= shades.max() < levels
    own = np.asarray(jnp.round(X * (levels - 1)), int)
    same = (shades == own).mean(0)
    np.testing.assert_allclose(same, stay, atol=4.5 * math.sqrt(0.25 / 5000))
    counts = np.bincount(shades[shades != own], minlength=levels)
    expected = other * 5000 * (own.size - np.bincount(own.ravel(), minlength=levels))
    assert np.abs(counts - expected).max() < 6 * math.sqrt(expected.max())


def test_radius_at_the_ends():
    noise = Discrete(0.8, 2)
    assert noise.radius(1.0) == math.inf
    assert noise.radius(1.0, 12) == 12
    assert noise.radius(math.nan) == noise.radius(0.5) == 0
    assert noise.radius(1 - 1e-15, 12) == 12  # never more than there are


def test_it_certifies_through_the_same_door():
    dark = lambda z: jnp.stack([0.5 - z[0, 0, 0], z[0, 0, 0] - 0.5])
    result = certify(dark, Discrete(0.9, 2), KEY, jnp.zeros((2, 2, 1)), n=2000)
    assert (result.prediction, result.norm) == (0, "l0")
    assert result.radius == 0  # one pixel decides, yet the prediction stands
    assert result.guarantee.startswith("floating point")


@pytest.mark.parametrize(
    ("keep", "levels", "words"),
    [(1.0, 2, "keep must lie"), (0.5, 2, "keep must lie"), (0.8, 3, "power of two")],
)
def test_numbers_that_mean_nothing(keep, levels, words):
    with pytest.raises(ValueError, match=rf"{words}.*got"):
        Discrete(keep, levels)


@pytest.mark.parametrize(
    ("noise", "show"), [(Band, patch._band), (Block, patch._block)]
)
def test_training_sees_each_position_of_the_certificate_alike(noise, show):
    positions = 5 if noise is Band else 20
    every = np.stack([show(2, i, X) for i in range(positions)])
    seen = jax.vmap(noise(2).sample, (0, None))(jax.random.split(KEY, 4000), X)
    which = (np.asarray(seen)[:, None] == every[None]).all((2, 3, 4))
    assert (which.sum(1) == 1).all()
    share = 1 / positions
    spread = 4.5 * math.sqrt(share * (1 - share) / 4000)
    np.testing.assert_allclose(which.mean(0), share, atol=spread)


@pytest.mark.parametrize("noise", [Band, Block])
def test_a_band_is_no_wider_than_the_image(noise):
    with pytest.raises(ValueError, match="width at most H and W"):
        noise(5).sample(KEY, X)
    with pytest.raises(ValueError, match=r"width must be an integer .*got 0"):
        noise(0)
