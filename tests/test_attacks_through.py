"""Attacks on something other than the network: its mean, a stand-in, other images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import attacks
from certjax.attacks.corrupt import KINDS
from certjax.attacks.search import at_random, slope
from certjax.threat import L2, Linf


KEY = jax.random.key(0)
SIZE, CLASSES, EXAMPLES = 6, 4, 9
WEIGHT = jax.random.normal(jax.random.key(2), (SIZE, CLASSES))
XS = 0.4 + 0.2 * jax.random.uniform(jax.random.key(1), (EXAMPLES, SIZE))
IMAGE = jax.random.uniform(jax.random.key(3), (8, 10, 2))


def linear(x):
    return (x - 0.5) @ WEIGHT


LABELS = jnp.argmax(jax.vmap(linear)(XS), axis=1)


def run(attack, f=linear, labels=LABELS):
    keys = jax.random.split(KEY, EXAMPLES)
    each = jax.vmap(lambda key, x, label: attack(key, f, x, label))
    return jax.jit(each)(keys, XS, labels)


def test_straight_through_has_the_defense_values_and_the_stand_in_gradients():
    rounded = attacks.straight_through(jnp.round)
    value, g = jax.value_and_grad(lambda x: jnp.sum(rounded(x)))(XS[0])
    assert value == jnp.sum(jnp.round(XS[0]))
    assert (g == 1).all()


def test_transfer_never_asks_the_target():
    def never(x):
        raise AssertionError("the target was evaluated")

    fgsm = attacks.fgsm(Linf(0.1))
    attack = attacks.transfer(fgsm, [linear, linear])
    z = jax.jit(lambda x: attack(KEY, never, x, LABELS[0]))(XS[0])
    direct = jax.jit(lambda x: fgsm(KEY, linear, x, LABELS[0]))(XS[0])
    np.testing.assert_allclose(z, direct)


def test_attacks_through_noise_and_one_perturbation_for_all():
    noisy = attacks.noisy(linear, 0.1, 4)
    attack = attacks.pgd(L2(0.2), steps=3)
    z = jax.jit(lambda x: attack(KEY, noisy, x, LABELS[0]))(XS[0])
    assert L2(0.2).contains(XS[0], z)
    delta = jax.jit(
        functools.partial(attacks.universal(Linf(0.1), steps=5), KEY, linear)
    )(XS, LABELS)
    assert jnp.max(jnp.abs(delta)) <= jnp.float32(0.1)
    accuracy = lambda zs: jnp.mean(jnp.argmax(jax.vmap(linear)(zs), axis=1) == LABELS)
    assert accuracy(XS + delta[None]) <= accuracy(XS)


def test_expectation_is_over_fresh_draws():
    """The slope is the mean of the draws' slopes; another key draws anew."""
    noisy = attacks.noisy(linear, 0.3, 5)
    x, label, keys = XS[0], LABELS[0], jax.random.split(KEY, 5)
    each = lambda key: lambda z: attacks.dlr(noisy.sample(key, z), label)
    slopes = [jax.grad(each(key))(x) for key in keys]
    drawn = at_random(noisy, KEY)
    judged, g = slope(drawn, label, attacks.dlr, "untargeted")(x)
    np.testing.assert_allclose(g, np.mean(slopes, axis=0), atol=1e-5)
    losses = [each(key)(x) for key in keys]
    np.testing.assert_allclose(judged.loss, np.mean(losses), atol=1e-5)
    assert (drawn(x) == at_random(noisy, KEY)(x)).all()
    assert (drawn(x) != at_random(noisy, jax.random.key(1))(x)).any()


def test_gradients_of_a_defense_are_seen_through():
    """Rounding hides them; straight-through, the attack breaks what it broke before."""
    rounded = lambda x: jnp.round(20 * x) / 20
    defended = lambda x: linear(rounded(x))
    through = lambda x: linear(attacks.straight_through(rounded)(x))
    labels = jnp.argmax(jax.vmap(defended)(XS), axis=1)
    attack = attacks.pgd(Linf(0.1), steps=10, random_start=False)
    broken = {
        f: np.argmax(jax.vmap(defended)(run(attack, f, labels)), axis=1) != labels
        for f in (defended, through)
    }
    assert not broken[defended].any()
    assert broken[through].any()


def test_the_mean_over_fixed_noise_is_a_plain_function():
    """Its logits are the logs of the mean probabilities over the same draws."""
    g = attacks.smoothed(linear, KEY, XS[0], 0.3, 50)
    noise = 0.3 * jax.random.normal(KEY, (50, SIZE))
    mean = jnp.mean(jax.nn.softmax(jax.vmap(linear)(XS[0][None] + noise)), axis=0)
    np.testing.assert_allclose(jnp.exp(g(XS[0])), mean, atol=1e-6)
    label = jnp.argmax(mean)
    attack = attacks.ddn(L2(1.0), steps=20)
    z = jax.jit(lambda x: attack(KEY, g, x, label))(XS[0])
    assert jnp.argmax(g(z)) != label


def test_diverse_inputs_are_shrunk_images():
    white, area = jnp.ones((20, 30, 1)), 600.0
    total = lambda x: jnp.stack([jnp.sum(x), 0.0])
    draws = lambda share: attacks.diverse(total, share=share, draws=8).each(white)[:, 0]
    np.testing.assert_allclose(draws(0.0), area, rtol=1e-5)
    shrunk = draws(1.0)
    assert len(np.unique(shrunk)) > 1
    assert (shrunk < area + 1e-3).all()
    assert (shrunk > 0.85**2 * area).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_corruptions_begin_at_the_image(kind):
    np.testing.assert_allclose(kind(KEY, IMAGE, 1e-6), IMAGE, atol=1e-4)
    assert jnp.max(jnp.abs(kind(KEY, IMAGE, 1.0) - IMAGE)) > 0.1


def test_blur_and_contrast_keep_what_is_constant():
    flat = jnp.full((7, 5, 1), 0.3)
    for kind in KINDS[-2:]:
        np.testing.assert_allclose(kind(KEY, flat, 1.0), flat, atol=1e-6)


def test_the_mildest_corruption_that_breaks():
    """Only light changes the mean of a grey image; a third of it is enough here."""
    bright = lambda x: jnp.stack([0.62 - jnp.mean(x), jnp.mean(x) - 0.62])
    grey = jnp.full((8, 8, 1), 0.5)
    attack = attacks.corruption(Linf(0.1), severities=10)
    z = jax.jit(lambda x: attack(KEY, bright, x, 0))(grey)
    np.testing.assert_allclose(z, 0.65, atol=1e-6)
