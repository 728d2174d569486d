"""Ensembles, fixed radii, percentiles, split noise, patches, ablation, 8-bit noise."""

import bisect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from certjax.smoothing import (
    Ablation,
    ABSTAIN,
    adaptive,
    certify,
    certify_band,
    certify_block,
    certify_radius,
    certify_soft,
    certify_split,
    denoised,
    Gaussian,
    judge,
    mean_logits,
    percentile_bounds,
    quantized,
    QuantizedGaussian,
    splitting,
    visible,
    votes,
)
from certjax.smoothing.confidence import bernstein_lower
from certjax.training import denoising, natural


KEY = jax.random.key(11)
NOISE = Gaussian(0.5)
WEIGHTS = jax.random.normal(jax.random.key(1), (3, 2))


def linear(weights, x):
    return weights @ x


def halfplane(x):
    """Class 1 where x[0] > 0."""
    return jnp.stack([-x[0], x[0]])


# ---- a denoiser before the network


def fitted(objective, params, apply, xs, labels, steps=400):
    """Parameters after full-batch Adam on the mean of an objective."""
    adam = optax.adam(3e-3)

    def loss(params, key):
        keys = jax.random.split(key, len(xs))
        f = lambda x: apply(params, x)
        return jax.vmap(lambda k, x, y: objective(k, f, x, y))(keys, xs, labels).mean()

    def step(i, carry):
        gradient = jax.grad(loss)(carry[0], jax.random.fold_in(KEY, i))
        updates, state = adam.update(gradient, carry[1])
        return optax.apply_updates(carry[0], updates), state

    start = (params, adam.init(params))
    return jax.jit(lambda s: jax.lax.fori_loop(0, steps, step, s))(start)[0]


def two_layers(key, sizes):
    keys = jax.random.split(key, len(sizes))
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=False)
    return [jax.random.normal(k, (m, n)) / math.sqrt(m) for k, m, n in pairs]


def perceptron(weights, x):
    return jnp.tanh(x @ weights[0]) @ weights[1]


def residual(weights, x):
    return x + perceptron(weights, x)


def test_a_denoiser_makes_a_network_certifiable_that_never_saw_noise():
    """Images x of rank 3 in 30 dimensions: off their plane there is only noise."""
    basis = jax.random.normal(KEY, (3, 30)) / math.sqrt(3)
    inside = jax.random.normal(jax.random.key(4), (300, 3))
    xs, labels = inside @ basis, jnp.argmax(inside, axis=1)
    noise = Gaussian(0.5)
    weights = two_layers(jax.random.key(5), (30, 40, 3))
    weights = fitted(natural(), weights, perceptron, xs, labels)
    # let it read the directions off the plane as well: harmless without noise
    off = jnp.eye(30) - jnp.linalg.pinv(basis) @ basis
    weights[0] = weights[0] + off @ two_layers(jax.random.key(7), (30, 40))[0]
    plain = jax.tree_util.Partial(perceptron, weights)
    clean = jnp.mean(jnp.argmax(jax.vmap(plain)(xs), axis=1) == labels)
    assert clean > 0.95
    start = two_layers(jax.random.key(6), (30, 64, 30))
    cleaner = fitted(denoising(noise, classifier=plain), start, residual, xs, labels)
    behind = denoised(plain, jax.tree_util.Partial(residual, cleaner))
    radii = {}
    for name, f in (("plain", plain), ("denoised", behind)):
        found = [certify(f, noise, KEY, x, n=1000) for x in xs[:20]]
        pairs = zip(found, labels, strict=False)
        radii[name] = np.mean([c.radius * (c.prediction == y) for c, y in pairs])
    assert radii["denoised"] > radii["plain"] + 0.05
    same = denoised(plain, jax.tree_util.Partial(lambda z: z))
    np.testing.assert_array_equal(same(xs[0]), plain(xs[0]))


# ---- ensembles


def test_ensemble_is_the_mean_and_a_pytree():
    members = [jax.tree_util.Partial(linear, w * WEIGHTS) for w in (1.0, 3.0)]
    x, ensemble = jnp.asarray([0.2, -0.4]), mean_logits(*members)
    np.testing.assert_allclose(ensemble(x), 2.0 * WEIGHTS @ x, rtol=1e-6)
    assert len(jax.tree.leaves(ensemble)) == 2
    assert votes(ensemble, NOISE, KEY, x, 100).sum() == 100
    with pytest.raises(ValueError, match=r"needs members, got none"):
        mean_logits()


# ---- one radius, as few samples as it needs


def fixed(distance, radius, **how):
    x = jnp.asarray([distance, 0.0])
    how = {"rounds": (200, 1000, 4000)} | how
    return certify_radius(halfplane, NOISE, KEY, x, radius, **how)


def test_clear_examples_need_one_round():
    easy, hopeless = fixed(1.5, 0.5), fixed(0.2, 1.0)
    assert (easy.prediction, easy.radius, easy.n) == (1, 0.5, 200)
    assert (hopeless.prediction, hopeless.radius, hopeless.n) == (ABSTAIN, 0.0, 200)


def test_close_examples_need_more_rounds():
    close = fixed(1.0, 0.85)
    assert (close.prediction, close.radius) == (1, 0.85)
    assert close.n > 200
    assert sum(close.budget.parts) <= 0.001


def test_rounds_continue_one_stream_of_samples():
    x, (_, estimate) = jnp.asarray([1.0, 0.0]), jax.random.split(KEY)
    expected = votes(halfplane, NOISE, estimate, x, 1000)
    for rounds in ((1000,), (130, 1000), (1, 200, 999, 1000)):
        found = fixed(1.0, 3.0, rounds=rounds, give_up=1e-12)
        if found.n == 1000:
            np.testing.assert_array_equal(found.counts, expected)


@pytest.mark.parametrize("alpha", [0.1, 0.01])
def test_wrong_fixed_radii_are_as_rare_as_promised(monkeypatch, alpha):
    """Simulated counts at a point whose true radius is just below the one asked for."""
    rng, radius, runs = np.random.default_rng(0), 0.4, 1500
    p = special.ndtr((radius - 1e-6) / 0.5)
    draw = lambda n: rng.multinomial(n, [1 - p, p])
    monkeypatch.setattr(adaptive, "votes", lambda f, noise, key, x, n, *_: draw(n))
    monkeypatch.setattr(adaptive, "count_range", lambda f, d, source, x, n, *_: draw(n))
    ask = lambda: fixed(radius - 1e-6, radius, alpha=alpha, rounds=(100, 300, 900))
    wrong = sum(ask().prediction >= 0 for _ in range(runs))
    assert wrong / runs <= alpha + 4.5 * math.sqrt(alpha / runs)


BAD_ROUNDS = {
    r"rounds must be ascending .*got \(\)": {"rounds": ()},
    r"rounds must be ascending .*got \(10, 10\)": {"rounds": (10, 10)},
    r"rounds must be an integer .*got 0": {"rounds": (0, 10)},
    r"n0 must be an integer .*got 0": {"n0": 0},
    r"alpha must lie .*got 2": {"alpha": 2},
    r"alpha must lie .*got 0": {"give_up": 0},
    r"radius must be positive .*got 0": {"radius": 0.0},
    r"radius must be positive .*got nan": {"radius": math.nan},
}


@pytest.mark.parametrize("message", BAD_ROUNDS)
def test_bad_rounds(message):
    with pytest.raises(ValueError, match=message):
        fixed(1.0, **({"radius": 0.5} | BAD_ROUNDS[message]))


# ---- percentiles


def affine(x):
    """Outputs [x0, -2 x0 + 1]: medians under symmetric noise known exactly."""
    return jnp.stack([x[0], 1.0 - 2.0 * x[0]])


@pytest.mark.parametrize("quantile", [0.5, 0.2])
def test_percentiles_enclose_the_exact_ones_over_the_ball(quantile):
    x, radius = jnp.asarray([0.3, 0.0]), 0.25
    found = percentile_bounds(affine, NOISE, KEY, x, radius, quantile=quantile)
    shift = 0.5 * special.ndtri(quantile)
    center = np.asarray([0.3 + shift, 0.4 + 2 * shift])
    reach = radius * np.asarray([1.0, 2.0])
    assert np.all(found.lower <= center - reach)
    assert np.all(found.upper >= center + reach)
    np.testing.assert_allclose(found.lower, center - reach, atol=0.3)
    np.testing.assert_allclose(found.upper, center + reach, atol=0.3)
    assert np.all((found.lower < found.value) & (found.value < found.upper))


def test_percentiles_of_too_few_samples_are_unbounded():
    found = percentile_bounds(affine, NOISE, KEY, jnp.zeros(2), 0.5, n=5)
    assert np.all(found.lower == -np.inf)
    assert np.all(found.upper == np.inf)


def test_nan_outputs_widen_the_percentiles():
    broken = lambda x: jnp.where(x[1] > 0.0, jnp.nan, affine(x))
    found = percentile_bounds(broken, NOISE, KEY, jnp.zeros(2), 0.1)
    assert abs(found.invalid - 1000) < 150
    assert np.all(found.lower == -np.inf)
    assert np.all(found.upper == np.inf)


@pytest.mark.parametrize(
    ("noise", "radius"),
    [(NOISE, -0.1), (NOISE, math.nan), (Gaussian(0.5, "linf"), 0.1)],
)
def test_bad_percentiles(noise, radius):
    with pytest.raises(ValueError, match=r"percentiles need .*got"):
        percentile_bounds(affine, noise, KEY, jnp.zeros(2), radius)


# ---- deterministic split noise


def split_at(values, levels):
    """[levels, size] noisy copies of pixel values, all positions of the cuts."""
    pixels = jnp.asarray(values, jnp.float32)
    return np.asarray(_split(pixels, jnp.arange(levels)))


@jax.jit
def _split(pixels, positions):
    source = (KEY, positions.size)
    draw = lambda i: splitting._draw_split(source, i, pixels)
    return jax.vmap(draw)(positions)


@pytest.mark.parametrize("levels", [7, 400])
def test_a_move_changes_as_few_cells_as_the_theorem_says(levels):
    """A pixel value moved by d changes its cell at min(d, levels) positions at most."""
    cells = {v: split_at(np.full(5, v), levels) for v in (0, 1, 5, 254, 255)}
    for v, w in itertools.combinations(cells, 2):
        assert np.all(np.sum(cells[v] != cells[w], axis=0) <= min(w - v, levels))
    assert all(np.all((z >= 0) & (z <= 1)) for z in cells.values())


def test_middle_of_the_cell_is_near_the_pixel():
    values = np.asarray([0, 3, 128, 250, 255])
    assert np.all(np.abs(split_at(values, 7) * 255 - values) <= 3.5)


def test_split_certificate_holds_for_every_image_within_it():
    """Exhaustively, on two pixels."""
    f = jax.tree_util.Partial(
        linear, jnp.asarray([[4.0, 0.0], [0.0, 4.0], [-1.0, 3.0]])
    )
    judge = lambda v: certify_split(f, KEY, jnp.asarray(v) / 255, levels=40)
    certified = 0
    for center in ((120, 100), (60, 75)):
        result = judge(center)
        moves = round(result.radius * 255)
        certified += moves
        near = [m for m in range(-moves, moves + 1) if m % 3 == 0 or abs(m) == moves]
        for a in near:
            b = moves - abs(a)
            for step in {(a, b), (a, -b)}:
                moved = judge(np.add(center, step))
                assert moved.prediction == result.prediction
    assert certified > 5


def test_split_radius_is_half_the_lead():
    assert splitting.lead(np.asarray([10, 4, 3]), 0) == 6
    assert splitting.lead(np.asarray([4, 10, 3]), 1) == 5  # class 0 wins a tie
    assert splitting.lead(np.asarray([5, 5]), 0) == 0


@pytest.mark.parametrize(
    "x", [[0.5, 0.5], [-1 / 255, 0.0], [256 / 255, 0.0], [math.nan, 0]]
)
def test_split_noise_is_for_8_bit_images(x):
    with pytest.raises(ValueError, match=r"multiples of 1/255 .*got .*round it"):
        certify_split(halfplane, KEY, jnp.asarray(x), levels=8)


# ---- patches

SHAPE = (4, 5, 1)
IMAGE = jax.random.uniform(jax.random.key(3), SHAPE)


def bright(shown):
    """Class 1 where the visible pixels are bright: every band votes alike on IMAGE."""
    light = jnp.sum(shown[..., :1]) - 0.4 * jnp.sum(shown)
    return jnp.stack([jnp.zeros(()), light])


@pytest.mark.parametrize("certifier", [certify_band, certify_block])
def test_patch_certificate_holds_for_black_and_white_patches(certifier):
    image = jnp.full((6, 7, 1), 0.9)
    result = certifier(bright, image, width=1)
    assert result.prediction == 1
    assert result.size >= 1
    for row, column in ((0, 0), (2, 3), (4, 5)):
        for value in (0.0, 1.0):
            window = (
                slice(row, row + result.size),
                slice(column, column + result.size),
            )
            patched = certifier(bright, image.at[window].set(value), width=1)
            assert patched.prediction == 1


@pytest.mark.parametrize("certifier", [certify_band, certify_block])
def test_patch_needs_twice_the_votes_it_touches(certifier):
    """All positions of a 5 x 7 image vote alike; m + 1 columns are touched."""
    result = certifier(bright, jnp.full((5, 7, 1), 0.9), width=2)
    lead = int(result.counts[1]) - 1  # class 0 wins ties
    columns = lambda m: min(7, m + 1)
    rows = (lambda m: min(5, m + 1)) if certifier is certify_block else lambda m: 1
    fits = [m for m in range(1, 6) if 2 * columns(m) * rows(m) <= lead]
    assert result.size == max(fits)
    assert result.counts.sum() == (7 if certifier is certify_band else 35)


def test_band_and_block_show_exactly_their_pixels():
    from certjax.smoothing import patch

    ones = jnp.ones(SHAPE)
    for i in range(5):
        band = np.asarray(patch._band(2, i, ones))[..., 0]
        assert sorted(set(np.nonzero(band)[1])) == sorted({i, (i + 1) % 5})
        assert band.sum() == 2 * 4
    block = np.asarray(patch._block(2, 5 * 3 + 4, ones))[..., 0]
    assert block.sum() == block[np.ix_([3, 0], [4, 0])].sum() == 4


@pytest.mark.parametrize("certifier", [certify_band, certify_block])
def test_with_a_threshold_a_position_votes_for_several_classes_or_none(certifier):
    """Logits of the share that is seen: [bright, dark, half as sure as bright]."""

    def f(shown):
        light, dark = jnp.sum(shown[..., :1]), jnp.sum(shown[..., 1:])
        share = light / (light + dark)
        return jnp.log(jnp.stack([share, 0.9 * share, 0.1 - 0.05 * share]))

    positions = 7 if certifier is certify_band else 35
    image = jnp.full((5, 7, 1), 0.8)  # 0.8, 0.72 and 0.06 of 1.58
    for threshold, votes_of in ((0.4, [1, 1, 0]), (0.5, [1, 0, 0]), (0.6, [0, 0, 0])):
        result = certifier(f, image, width=1, threshold=threshold)
        np.testing.assert_array_equal(result.counts, positions * np.asarray(votes_of))
        assert result.invalid == 0
        assert (result.size > 0) == (votes_of == [1, 0, 0])
    broken = certifier(lambda z: f(z) * jnp.nan, image, width=1, threshold=0.4)
    assert (broken.invalid, broken.counts.sum()) == (positions, 0)
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\), got 1"):
        certifier(f, image, width=1, threshold=1.0)


@pytest.mark.parametrize("certifier", [certify_band, certify_block])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_random_patches_never_change_a_certified_vote(certifier, threshold):
    """Random networks on random images, patches of random values of every position."""
    weights = jax.random.normal(jax.random.key(8), (3, 2 * 6 * 6)) * 1.5
    f = jax.tree_util.Partial(lambda w, z: jnp.tanh(w @ z.reshape(-1)) * 3, weights)
    how, tried = {"width": 1, "threshold": threshold}, 0
    rng = np.random.default_rng(0)
    for _ in range(12):
        image = rng.random((6, 6, 1)).astype(np.float32)
        result = certifier(f, jnp.asarray(image), **how)
        for row in range(7 - result.size) if result.size else ():
            column, patched = int(rng.integers(7 - result.size)), image.copy()
            m = result.size
            colors = rng.choice([0.0, 1.0], (m, m, 1))
            patched[row : row + m, column : column + m] = colors
            again = certifier(f, jnp.asarray(patched), **how)
            assert again.prediction == result.prediction
            tried += 1
    assert tried


@pytest.mark.parametrize("width", [0, 5])
def test_bad_width(width):
    with pytest.raises(ValueError, match=r"width.*got"):
        certify_band(bright, IMAGE, width=width)


# ---- randomized ablation


def test_ablation_shows_exactly_as_many_pixels_all_alike():
    noise = Ablation(keep=3, pixels=20)
    keys = jax.random.split(KEY, 2000)
    shown = jax.jit(jax.vmap(noise.sample, (0, None)))(keys, IMAGE)
    seen = np.asarray(jnp.sum(shown, axis=-1))  # x + (1 - x) = 1 where shown
    np.testing.assert_allclose(seen.sum((1, 2)), 3.0, rtol=1e-6)
    np.testing.assert_allclose(seen.mean(0), 3 / 20, atol=4.5 * 0.008)


@pytest.mark.parametrize(("keep", "pixels"), [(3, 20), (45, 784), (20, 20)])
def test_ablation_radius_is_the_theorem(keep, pixels):
    noise = Ablation(keep, pixels)
    for p in (0.0, 0.5, 0.51, 0.7, 0.9, 0.999, 1.0):
        hidden = [
            math.comb(pixels - r, keep) / math.comb(pixels, keep)
            for r in range(pixels + 1)
        ]
        exact = [r for r, h in enumerate(hidden) if p - (1 - h) > 0.5]
        assert noise.radius(p) == max(exact, default=0)
        edge = 1.5 - hidden[1] + noise.ties  # of the certificate of one pixel
        if keep < pixels and p == 0.5:
            assert noise.radius(edge - 1e-9) == 0 < noise.radius(edge + 1e-8)


def test_visible_tells_black_from_hidden():
    black = visible(jnp.zeros((1, 2, 1)), jnp.asarray([[True, False]]))
    np.testing.assert_array_equal(black, [[[0.0, 1.0], [0.0, 0.0]]])


def test_ablation_certifies_through_the_same_door():
    result = certify(bright, Ablation(3, 20), KEY, jnp.full(SHAPE, 0.9), n=500)
    assert (result.prediction, result.norm) == (1, "l0")
    assert result.radius == Ablation(3, 20).radius(result.p_lower) >= 1
    with pytest.raises(ValueError, match=r"of 20 pixels, got \(3, 3, 1\)"):
        votes(bright, Ablation(3, 20), KEY, jnp.ones((3, 3, 1)), 10)
    with pytest.raises(ValueError, match=r"keep must lie .*got 21"):
        Ablation(21, 20)


# ---- 8-bit noise


def test_table_holds_the_rounded_gaussian():
    noise = QuantizedGaussian(0.02)
    high, low = noise.table.astype(np.float64)
    values = np.arange(-noise.reach, noise.reach)
    np.testing.assert_allclose(
        (high * 2.0**32 + low) / 2.0**64, special.ndtr((values + 0.5) / 5.1), atol=2e-16
    )


def test_bisection_is_that_of_integers():
    table = QuantizedGaussian(0.02).table
    numbers = [int(h) << 32 | int(l) for h, l in table.T]
    rng = np.random.default_rng(0)
    drawn = [int(w) for w in rng.integers(0, 2**64, 300, dtype=np.uint64)]
    drawn += [max(0, min(2**64 - 1, w + d)) for w in numbers for d in (-1, 0, 1)]
    high, low = np.asarray([divmod(w, 2**32) for w in drawn], np.uint32).T
    count = jax.jit(lambda h, l: quantized._count_at_most(table, h, l))
    found = count(jnp.asarray(high), jnp.asarray(low))
    assert found.tolist() == [bisect.bisect_right(numbers, w) for w in drawn]


def test_samples_are_pixels_with_the_right_law():
    noise, x = QuantizedGaussian(0.25), jnp.asarray([0.0, 37 / 255, 1.0])
    keys = jax.random.split(KEY, 20_000)
    z = jax.jit(jax.vmap(noise.sample, (0, None)))(keys, x)
    z = np.asarray(z, np.float64) * 255
    np.testing.assert_allclose(z, np.round(z), atol=1e-4)
    delta = np.round(z) - np.asarray([0, 37, 255])
    np.testing.assert_allclose(delta.mean(0), 0.0, atol=2.1)
    np.testing.assert_allclose(delta.std(0), 0.25 * 255, rtol=0.025)


def test_radius_pays_for_the_distance_to_the_exact_law():
    noise, size = QuantizedGaussian(0.25), 150_528
    assert 0 < noise.distance(size) < 1e-6
    for p in (0.4, 0.5, 0.6, 0.999, 0.99993):
        exact = Gaussian(0.25).radius(p)
        assert noise.radius(p, size) <= exact
        if radius := noise.radius(p, size):  # the sampled law at the farthest z
            far = special.ndtri(p - noise.distance(size)) - radius / 0.25
            assert special.ndtr(far) - noise.distance(size) > 0.5
        assert noise.radius(p, size) >= exact - 3e-3 * (p > 0.5)
    with pytest.raises(ValueError, match=r"size=x.size, got None"):
        noise.radius(0.9)


def test_a_majority_within_the_distance_to_the_exact_law_is_none():
    noise, size, n = QuantizedGaussian(1.0), 150_528, 2**30
    wins = next(
        k
        for k in range(n // 2 + 50_000, n)
        if judge(np.array([1, 0]), np.array([k, n - k]), NOISE, 2, 1, n, 0.001).radius
    )
    found = judge(
        np.array([1, 0]), np.array([wins, n - wins]), noise, size, 1, n, 0.001
    )
    assert found.p_lower > 0.5
    assert (found.prediction, found.radius) == (ABSTAIN, 0.0)


def test_8_bit_certificate_says_what_it_guarantees():
    bit8, noise = jnp.asarray([1.0, 0.0]), QuantizedGaussian(0.25)
    result = certify(halfplane, noise, KEY, bit8, n=500)
    assert result.prediction == 1
    assert result.guarantee.startswith("floating point")
    with pytest.raises(ValueError, match=r"multiples of 1/255 .*got 0.5"):
        certify(halfplane, noise, KEY, jnp.asarray([0.5, 0.0]), n=500)


# ---- soft votes


def test_soft_votes_of_a_constant_output_are_the_bound_by_hand():
    """Outputs (0.9, 0.1): 230 / 256 after rounding, without variance."""
    constant = lambda x: jnp.log(jnp.asarray([0.9, 0.1])) + 0.0 * x[0]
    found = certify_soft(constant, NOISE, KEY, jnp.zeros(2), n=1000, alpha=0.01)
    assert (found.prediction, found.counts[230], found.invalid) == (0, 1000, 0)
    assert found.p_lower == bernstein_lower(
        1000 * 230 / 256, 1000 * (230 / 256) ** 2, 1000, 0.01
    )
    assert found.radius == NOISE.radius(found.p_lower)
    flat = lambda x: jnp.zeros(2) + 0.0 * x[0]
    assert certify_soft(flat, NOISE, KEY, jnp.zeros(2), n=1000)[:2] == (ABSTAIN, 0.0)


def test_soft_radius_is_at_most_where_the_mean_output_falls_to_a_half():
    """The outputs are Phi of x[0]: so is their mean, which is 1/2 where x[0] = 0."""
    soft = lambda x: jnp.log(jax.scipy.stats.norm.cdf(jnp.stack([-x[0], x[0]])))
    for distance in (0.2, 0.5, 1.5):
        x = jnp.asarray([distance, 0.0])
        found = certify_soft(soft, NOISE, KEY, x, n0=1000, n=20_000)
        mean = special.ndtr(distance / math.sqrt(1.25))
        assert mean - 0.03 < found.p_lower <= mean
        assert found.radius <= distance
    again = certify_soft(soft, NOISE, KEY, x, n0=1000, n=20_000, batch=64)
    np.testing.assert_array_equal(again.counts, found.counts)


def test_soft_votes_with_a_nan_are_outputs_of_zero():
    broken = lambda x: jnp.where(x[1] > 0.0, jnp.nan, jnp.asarray([0.0, 20.0]))
    found = certify_soft(broken, NOISE, KEY, jnp.zeros(2), n=2000)
    assert abs(found.invalid - 1000) < 150
    assert found.p_lower < (2000 - found.invalid) / 2000
    assert (found.prediction, found.radius) == (ABSTAIN, 0.0)
