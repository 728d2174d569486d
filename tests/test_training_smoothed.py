"""Objectives of smoothed classifiers: limits, gradients, and the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from certjax.smoothing import Ablation, Band, Block, Discrete, Gaussian
from certjax.training import cross_entropy
from certjax.training.smoothed import (
    catrs,
    consistency,
    gaussian_augmentation,
    macer,
    noise_augmentation,
    noisy_copy,
    noisy_ddn,
    noisy_pgd,
    smooth_adversarial,
    SmoothedLabel,
    smoothmix,
    stability,
)


KEY = jax.random.key(5)
NOISE = Gaussian(0.25)
SILENT = Gaussian(1e-8)
X = jnp.asarray([0.2, 0.9, 0.5, 0.4])
LABEL = jnp.asarray(1)
PARAMS = {
    "first": jax.random.normal(jax.random.key(1), (6, 4)),
    "second": jax.random.normal(jax.random.key(2), (3, 6)),
}


def net(params, x):
    return params["second"] @ jnp.tanh(params["first"] @ x)


def f(x):
    return net(PARAMS, x)


def value(objective, key=KEY, x=X, label=LABEL, g=f):
    return float(jax.jit(lambda k, x, y: objective(k, g, x, y))(key, x, label))


PGD = noisy_pgd(eps=0.3, steps=3)
SLOW = {"consistency_pgd", "smoothmix_one_step"}  # to compile
OBJECTIVES = {
    "gaussian": gaussian_augmentation(NOISE),
    "stability": stability(NOISE),
    "smoothadv_pgd": smooth_adversarial(NOISE, attack=PGD, draws=2),
    "smoothadv_ddn": smooth_adversarial(
        NOISE, attack=noisy_ddn(eps=0.3, steps=3), draws=2
    ),
    "macer": macer(NOISE, draws=4),
    "consistency": consistency(NOISE),
    "consistency_pgd": consistency(NOISE, attack=PGD),
    "smoothmix": smoothmix(NOISE, draws=2),
    "smoothmix_one_step": smoothmix(NOISE, draws=2, one_step=0.5),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in OBJECTIVES
    ],
)
def test_value_and_gradient_are_finite_and_batchable(name):
    """For a plain, a saturated and a constant network; over a batch of keys."""
    objective = OBJECTIVES[name]

    def loss(params, keys):
        one = lambda key: objective(key, lambda x: net(params, x), X, LABEL)
        return jnp.mean(jax.vmap(one)(keys))

    keys, judge = jax.random.split(KEY, 2), jax.jit(jax.value_and_grad(loss))
    for scale in (1.0, 100.0, 0.0):
        params = jax.tree.map(lambda w, s=scale: s * w, PARAMS)
        found, gradient = judge(params, keys)
        assert np.isfinite(found)
        assert found >= 0
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def mean_noisy_loss(noises):
    return np.mean([float(cross_entropy(f(X + noise), LABEL)) for noise in noises])


def drawn(key, draws):
    keys = jax.random.split(key, draws)
    return jnp.stack([NOISE.sample(k, X) - X for k in keys])


def test_gaussian_augmentation_is_the_loss_at_one_noisy_copy():
    expected = float(cross_entropy(f(NOISE.sample(KEY, X)), LABEL))
    assert value(gaussian_augmentation(NOISE)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("draws", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_without_their_extra_term_they_are_gaussian_augmentation(draws):
    first = jax.random.split(KEY)[0]
    expected = mean_noisy_loss(drawn(first, draws))
    still = noisy_pgd(eps=0.0, steps=2)
    for objective in (
        consistency(NOISE, weight=0.0, entropy=0.0, draws=draws),
        smoothmix(NOISE, weight=0.0, draws=draws),
        smooth_adversarial(NOISE, attack=still, draws=draws),
        consistency(NOISE, weight=0.0, entropy=0.0, draws=draws, attack=still),
    ):
        assert value(objective) == pytest.approx(expected, rel=1e-5)


def test_deferred_macer_is_gaussian_augmentation():
    expected = mean_noisy_loss(drawn(KEY, 1))
    assert value(macer(NOISE, weight=0.0, draws=1)) == pytest.approx(expected, rel=1e-5)


def test_without_noise_they_are_the_clean_loss():
    clean = float(cross_entropy(f(X), LABEL))
    for objective in (
        gaussian_augmentation(SILENT),
        stability(SILENT, weight=0.0),
        consistency(SILENT, weight=7.0, entropy=0.0),
        macer(SILENT, weight=0.0),
    ):
        assert value(objective) == pytest.approx(clean, rel=1e-4)


def test_stability_adds_the_cross_entropy_between_predictions():
    """Without noise it is the entropy of the clean prediction."""
    p = np.asarray(jax.nn.softmax(f(X)), np.float64)
    entropy = -np.sum(p * np.log(p))
    base = value(stability(SILENT, weight=0.0))
    found = value(stability(SILENT, weight=2.0))
    assert found - base == pytest.approx(2 * entropy, rel=1e-4)


def test_consistency_by_hand():
    noises = drawn(jax.random.split(KEY)[0], 2)
    p = np.asarray(jax.nn.softmax(jax.vmap(f)(X[None] + noises)), np.float64)
    mean = p.mean(0)
    spread = np.mean([np.sum(mean * np.log(mean / row)) for row in p])
    entropy = -np.sum(mean * np.log(mean))
    by_hand = mean_noisy_loss(noises) + 10.0 * spread + 0.5 * entropy
    assert value(consistency(NOISE)) == pytest.approx(by_hand, rel=1e-4)


def test_macer_by_hand():
    """The hinge where the example is right; where it is wrong, the first term alone."""
    noises = drawn(KEY, 4)
    logits = np.asarray(jax.vmap(f)(X[None] + noises), np.float64)
    mean = special.softmax(logits, axis=1).mean(0)
    sharp = special.softmax(2.0 * logits, axis=1).mean(0)
    top, second = np.sort(sharp)[::-1][:2]
    gap = special.ndtri(top) - special.ndtri(second)
    for label in range(3):
        right = np.argmax(sharp) == label and gap <= 8.0
        hinge = 3.0 * 0.25 / 2 * (8.0 - gap) if right else 0.0
        found = value(
            macer(NOISE, weight=3.0, draws=4, beta=2.0), label=jnp.asarray(label)
        )
        assert found == pytest.approx(-np.log(mean[label]) + hinge, rel=1e-3)


def test_macer_ignores_a_radius_that_is_large_enough():
    wide = lambda x: 1e3 * jnp.asarray([0.0, 1.0, 0.0]) + 0.0 * jnp.sum(x)
    assert value(macer(NOISE), g=wide) == pytest.approx(0.0, abs=1e-6)


def smoothed_loss(z, noises):
    mean = jnp.mean(jax.nn.softmax(jax.vmap(f)(z[None] + noises)), axis=0)
    return float(-jnp.log(mean[LABEL]))


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_noisy_pgd_stays_in_the_ball_and_raises_the_loss(eps):
    noises = drawn(KEY, 4)
    attack = noisy_pgd(eps=eps, steps=6)
    z = jax.jit(lambda x, n: attack(KEY, f, x, LABEL, n))(X, noises)
    assert np.linalg.norm(z - X) <= eps + 1e-6
    assert np.all((z >= -1e-6) & (z <= 1 + 1e-6))
    gain = smoothed_loss(z, noises) - smoothed_loss(X, noises)
    assert gain > 0 if eps else gain == 0


def test_noisy_ddn_flips_the_majority_within_eps_or_stays():
    noises = drawn(KEY, 4)
    label = jnp.argmax(jnp.sum(jax.vmap(f)(X[None] + noises), axis=0))

    def attacked(eps):
        attack = noisy_ddn(eps=eps, steps=20)
        return jax.jit(lambda x, n: attack(KEY, f, x, label, n))(X, noises)

    far, near = attacked(2.0), attacked(0.05)
    counts = np.bincount(
        np.argmax(jax.vmap(f)(far[None] + noises), axis=1), minlength=3
    )
    assert np.argmax(counts) != label
    assert np.linalg.norm(near - X) <= 0.05 + 4 / 255
    assert np.linalg.norm(near - X) <= np.linalg.norm(far - X)


def test_attacks_cost_no_gradient_through_their_steps():
    """The gradient of SmoothAdv is that of the loss at the point it found."""
    draw, start = jax.random.split(KEY)
    noises = drawn(draw, 2)
    z = PGD(start, f, X, LABEL, noises)

    def at_point(params):
        logits = jax.vmap(lambda x: net(params, x))(z[None] + noises)
        return jnp.mean(jax.vmap(cross_entropy, (0, None))(logits, LABEL))

    def objective(params):
        return OBJECTIVES["smoothadv_pgd"](KEY, lambda x: net(params, x), X, LABEL)

    expected, found = jax.grad(at_point)(PARAMS), jax.grad(objective)(PARAMS)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_smoothmix_mixes_only_what_is_classified_correctly():
    loss = lambda weight, label: value(
        smoothmix(SILENT, weight=weight, draws=1), label=jnp.asarray(label)
    )
    right = int(jnp.argmax(f(X)))
    for label in range(3):
        added = loss(5.0, label) - loss(0.0, label)
        assert added > 1e-4 if label == right else added == 0.0


@pytest.mark.parametrize(
    "confidence", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_catrs_is_finite_and_differentiable(confidence):
    objective = catrs(NOISE, steps=2, draws=2, confidence=confidence)
    label = SmoothedLabel(LABEL, jnp.asarray([0.0, 0.9, 0.1]))

    def loss(params):
        return objective(KEY, lambda x: net(params, x), X, label)

    found, gradient = jax.jit(jax.value_and_grad(loss))(PARAMS)
    assert np.isfinite(found)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def test_catrs_of_a_sure_example_takes_every_noise():
    """Weight 0 and full confidence: Gaussian augmentation with all the noises."""
    label = SmoothedLabel(LABEL, jnp.asarray([0.0, 1.0, 0.0]))
    objective = catrs(NOISE, weight=0.0, draws=3, confidence=True, steps=1)
    expected = mean_noisy_loss(drawn(jax.random.split(KEY)[0], 3))
    assert value(objective, label=label) == pytest.approx(expected, rel=1e-5)


def test_catrs_of_a_hopeless_example_takes_the_easiest_noise():
    label = SmoothedLabel(LABEL, jnp.asarray([1.0, 0.0, 0.0]))
    objective = catrs(NOISE, weight=3.0, draws=3, confidence=True, steps=1)
    noises = drawn(jax.random.split(KEY)[0], 3)
    easiest = min(float(cross_entropy(f(X + n), LABEL)) for n in noises)
    assert value(objective, label=label) == pytest.approx(easiest / 3, rel=1e-5)


def test_batch_norm_sees_the_copies_that_augmentation_trains_on():
    seen = []
    gaussian_augmentation(NOISE)(KEY, lambda z: seen.append(z) or f(z), X, LABEL)
    z = noisy_copy(None, noise=NOISE)(KEY, f, X, LABEL)
    np.testing.assert_array_equal(z, seen[0])


@pytest.mark.parametrize(
    "noise", [Ablation(5, 16), Band(2), Block(2), Discrete(0.8, 4)], ids=repr
)
def test_noise_augmentation_sees_what_the_noise_shows(noise):
    image = jnp.linspace(0, 1, 16).reshape(4, 4, 1)
    shown = noise.sample(KEY, image)
    weights = jax.random.normal(jax.random.key(3), (3, shown.size))
    f = lambda z: weights @ z.reshape(-1)  # of what is shown, not of an image
    terms = noise_augmentation(noise).terms(KEY, f, image, LABEL)
    assert terms.loss == pytest.approx(float(cross_entropy(f(shown), LABEL)), rel=1e-5)
    assert terms.metrics["noisy_accuracy"] == (jnp.argmax(f(shown)) == LABEL)
