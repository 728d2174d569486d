"""Whole networks: sound against many points and attacks, tighter than intervals."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from certjax.attacks import pgd
from certjax.bounds import alpha_crown, crown, ibp
from certjax.threat import Linf


pytestmark = pytest.mark.slow
SAMPLES, STEPS = 10_000, 200


def weights(*shapes):
    keys = jax.random.split(jax.random.key(1), len(shapes))
    scale = lambda shape: jnp.sqrt(2.0 / jnp.prod(jnp.array(shape[:-1])))
    return [
        scale(s) * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)
    ]


def mlp(activation):
    ws = weights((64, 40), (40, 40), (40, 5))

    def f(x):
        h = x.ravel()
        for w in ws[:-1]:
            h = activation(h @ w)
        return h @ ws[-1]

    return f


def conv(x, w, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x[None], w, (stride, stride), "SAME", dimension_numbers=numbers
    )[0]


def residual():
    stem, a, b, c, last = weights(
        (3, 3, 1, 6), (3, 3, 6, 6), (3, 3, 6, 6), (3, 3, 6, 8), (128, 5)
    )

    def f(x):
        h = jax.nn.relu(conv(x, stem))
        h = jax.nn.relu(h + conv(jax.nn.relu(conv(h, a)), b))
        return jax.nn.relu(conv(h, c, 2)).ravel() @ last

    return f


def pooling():
    a, b, last = weights((3, 3, 1, 6), (3, 3, 6, 8), (32, 5))

    def pool(h):
        sides = (2, 2, 1)
        return lax.reduce_window(h, -jnp.inf, lax.max, sides, sides, "VALID")

    return lambda x: pool(conv(pool(conv(x, a)), b)).ravel() @ last


def attention():
    embed, query, key, value, out, last = weights(
        (8, 12), (12, 12), (12, 12), (12, 12), (12, 12), (96, 5)
    )

    def f(x):
        h = x.reshape(8, 8) @ embed
        h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 0.1)
        heads = [(h @ w).reshape(8, 2, 6) for w in (query, key, value)]
        scores = jnp.einsum("ihd,jhd->hij", *heads[:2]) / jnp.sqrt(6.0)
        mixed = jnp.einsum("hij,jhd->ihd", jax.nn.softmax(scores), heads[2])
        h = h + mixed.reshape(8, 12) @ out
        return jax.nn.gelu(h).ravel() @ last

    return f


NETWORKS = {
    "tanh": (mlp(jnp.tanh), 0.05),
    "sigmoid": (mlp(jax.nn.sigmoid), 0.05),
    "gelu": (mlp(jax.nn.gelu), 0.05),
    "residual": (residual(), 0.02),
    "max pooling": (pooling(), 0.02),
    "attention": (attention(), 0.005),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_sound_and_tighter_than_intervals(name):
    f, eps = NETWORKS[name]
    threat = Linf(eps)
    x = jax.random.uniform(jax.random.key(2), (8, 8, 1), minval=0.1, maxval=0.9)
    methods = {"ibp": ibp(f), "crown": crown(f), "alpha": alpha_crown(f, steps=5)}
    found = {name: jax.jit(bound)(threat, x) for name, bound in methods.items()}
    points = [*_samples(f, threat, x), *_attacked(f, threat, x)]
    for bounds in found.values():
        slack = 1e-4 * (1.0 + jnp.max(jnp.abs(bounds.upper - bounds.lower)))
        for values in points:
            assert jnp.all(values >= bounds.lower[None] - slack)
            assert jnp.all(values <= bounds.upper[None] + slack)
    width = lambda name: float(jnp.mean(found[name].upper - found[name].lower))
    assert width("alpha") <= width("crown") < width("ibp")


def _samples(f, threat, x):
    """[SAMPLES, classes] outputs of random points; half of them corners."""
    keys = jax.random.split(jax.random.key(3), SAMPLES // 2)
    inside = jax.jit(jax.vmap(lambda k: f(threat.sample(k, x))))(keys)
    signs = lambda k: jnp.clip(
        x + threat.eps * jax.random.rademacher(k, x.shape, x.dtype), 0.0, 1.0
    )
    return inside, jax.jit(jax.vmap(lambda k: f(signs(k))))(keys)


def _attacked(f, threat, x):
    """[classes] outputs where each class is driven down, and where it is driven up."""

    def driven(k, sign):
        loss = lambda logits, label: sign * logits[label]
        attack = pgd(threat, steps=STEPS, loss=loss)
        return f(attack(jax.random.key(4), f, x, k))

    each = jax.jit(jax.vmap(driven, (0, None)))
    return [each(jnp.arange(5), sign) for sign in (-1.0, 1.0)]
