"""Attacks stay inside the threat set, are finite, and never help the defender."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import attacks
from certjax.threat import Box, L1, L2, Linf


KEY = jax.random.key(0)
SHAPE, CLASSES, EXAMPLES = (4, 4, 2), 5, 6
SETS = {
    "linf": Linf(0.1),
    "l2": L2(0.4),
    "l1": L1(1.5),
    "box": Box(jnp.zeros(SHAPE), jnp.full(SHAPE, 0.6)),
}
STEPPED = {
    "fgsm": attacks.fgsm,
    "pgd": functools.partial(attacks.pgd, steps=4),
    "mi": functools.partial(attacks.mi_fgsm, steps=4),
    "ni": functools.partial(attacks.ni_fgsm, steps=4),
}


def network(seed=0, shape=SHAPE, classes=CLASSES, scale=1.0):
    """A small convolutional classifier of one example."""
    one, two = jax.random.split(jax.random.key(seed))
    kernel = jax.random.normal(one, (3, 3, shape[-1], 8)) * scale
    weight = jax.random.normal(two, (8, classes)) * scale

    def f(x):
        h = jax.lax.conv_general_dilated(
            x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[0]
        return jnp.max(jax.nn.relu(h), axis=(0, 1)) @ weight

    return f


def run(attack, f, xs, labels, seed=0):
    """One jitted call over a batch."""
    keys = jax.random.split(jax.random.key(seed), len(xs))
    each = jax.vmap(lambda key, x, label: attack(key, f, x, label))
    return jax.jit(each)(keys, xs, labels)


def data(shape=SHAPE, classes=CLASSES, count=EXAMPLES):
    """Random inputs and the labels that the network gives them."""
    xs = 0.6 * jax.random.uniform(jax.random.key(7), (count, *shape))
    return xs, jnp.arange(count) % classes


def accuracy(f, zs, labels):
    return float(np.mean(np.argmax(jax.vmap(f)(zs), axis=1) == labels))


@pytest.mark.parametrize("make", STEPPED.values(), ids=STEPPED.keys())
@pytest.mark.parametrize("threat", SETS.values(), ids=SETS.keys())
def test_inside_and_never_above_clean(make, threat):
    f, (xs, _) = network(), data()
    labels = jnp.argmax(jax.vmap(f)(xs), axis=1)
    zs = run(make(threat), f, xs, labels)
    assert jnp.all(jnp.isfinite(zs))
    inside = jax.vmap(threat.contains)(xs, zs)
    assert jnp.all(inside)
    moved = jax.vmap(attacks.cross_entropy)(jax.vmap(f)(zs), labels)
    clean = jax.vmap(attacks.cross_entropy)(jax.vmap(f)(xs), labels)
    assert jnp.all(moved >= clean)


def test_no_gradient_flows_through_an_attack():
    xs, labels = data()

    def loss(weight):
        f = lambda x: x.ravel() @ weight
        return jnp.sum(attacks.pgd(SETS["linf"], steps=2)(KEY, f, xs[0], labels[0]))

    weight = jax.random.normal(jax.random.key(3), (xs[0].size, CLASSES))
    assert jnp.all(jax.jit(jax.grad(loss))(weight) == 0)


def test_more_restarts_are_never_weaker():
    f, (xs, labels) = network(scale=0.3), data()

    def loss(restarts):
        zs = run(attacks.pgd(SETS["linf"], steps=3, restarts=restarts), f, xs, labels)
        margin = jax.vmap(attacks.margin_loss)(jax.vmap(f)(zs), labels)
        return margin > 0

    assert jnp.all(loss(3) >= loss(1))


AIMED = (attacks.pgd, attacks.bim, attacks.mi_fgsm, attacks.ni_fgsm)


@pytest.mark.parametrize("make", AIMED)
def test_targeted_attacks_raise_the_target(make):
    f, (xs, labels) = network(), data()
    zs = run(make(Linf(0.3), steps=10, goal="targeted"), f, xs, labels)
    before = jax.vmap(lambda x, y: jax.nn.log_softmax(f(x))[y])(xs, labels)
    after = jax.vmap(lambda x, y: jax.nn.log_softmax(f(x))[y])(zs, labels)
    assert jnp.all(after >= before)
    assert jnp.mean(after) > jnp.mean(before) + 0.1


@pytest.mark.parametrize("make", [attacks.bim, attacks.mi_fgsm, attacks.ni_fgsm])
def test_a_box_is_attacked_like_the_ball_that_it_is(make):
    f, (xs, labels) = network(), data()
    ball = Linf(0.1, low=-1.0, high=2.0)  # no coordinate is cut
    box = Box(*ball.box(xs[0]))
    z, same = (
        jax.jit(make(threat), static_argnums=1)(KEY, f, xs[0], labels[0])
        for threat in (ball, box)
    )
    np.testing.assert_allclose(z, same, atol=1e-6)


def test_integers_are_refused():
    f, (xs, labels) = network(), data()
    with pytest.raises(TypeError, match="255"):
        attacks.pgd(Linf(0.1))(KEY, f, (xs[0] * 255).astype(jnp.uint8), labels[0])
