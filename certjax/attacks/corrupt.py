"""Common corruptions at the worst strength: noise, blur, light. No gradients."""

import jax
import jax.numpy as jnp

from certjax.attacks.losses import log_odds, Loss
from certjax.attacks.search import (
    at_random,
    better,
    check_counts,
    choose,
    guarded,
    judge,
    Judged,
)
from certjax.loops import fori
from certjax.threat import Threat
from certjax.types import Array, Attack, Classifier, Key, Scalar


def corruption(
    threat: Threat,
    *,
    severities: int = 10,
    strength: float = 1.0,
    loss: Loss = log_odds,
) -> Attack:
    """The mildest of six common corruptions that is misclassified.

    Where none is, the corruption of highest loss, or x itself.

    Args:
      threat: for its domain only: a corrupted image is not a near one.
      severities: grid points of each corruption's strength, tried in rising order.
      strength: of the last one; 1 is about the fifth, worst level of the benchmark.
      loss: what is worst.

    Source: Hendrycks & Dietterich 2019, arXiv:1903.12261, section 4.1.
    """
    check_counts(severities=severities)
    if not strength > 0:
        raise ValueError(f"strength must be positive, got {strength}")
    low, width = threat.low, threat.high - threat.low

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        if x.ndim != 3:
            raise ValueError(f"corruption needs an image [H, W, C], got {x.shape}")
        at = judge(at_random(f, key), label, loss, "untargeted")

        def attempt(i: Array, best: Judged) -> Judged:
            severity = strength * (i // len(KINDS) + 1) / severities
            arguments = jax.random.fold_in(key, i), (x - low) / width, severity
            z = jax.lax.switch(i % len(KINDS), KINDS, *arguments)
            new = at(jnp.clip(low + width * z, low, threat.high))
            return choose(~best.fooled & better(new, best), new, best)

        return fori(len(KINDS) * severities, attempt, at(x)).z

    return guarded(attack)


# The kinds: (key, an image in [0, 1], severity) -> the image, before the cut to [0, 1].


def _noise(key: Key, x: Array, severity: Scalar) -> Array:
    return x + 0.38 * severity * jax.random.normal(key, x.shape, x.dtype)


def _salt_and_pepper(key: Key, x: Array, severity: Scalar) -> Array:
    where, which = jax.random.split(key)
    extreme = jax.random.bernoulli(which, 0.5, x.shape).astype(x.dtype)
    hit = jax.random.uniform(where, x.shape) < 0.27 * severity
    return jnp.where(hit, extreme, x)


def _brighter(key: Key, x: Array, severity: Scalar) -> Array:  # noqa: ARG001
    return x + 0.5 * severity


def _darker(key: Key, x: Array, severity: Scalar) -> Array:  # noqa: ARG001
    return x - 0.5 * severity


def _contrast(key: Key, x: Array, severity: Scalar) -> Array:  # noqa: ARG001
    mean = jnp.mean(x)
    return mean + (1 - jnp.minimum(0.95 * severity, 1.0)) * (x - mean)


def _blur(key: Key, x: Array, severity: Scalar) -> Array:  # noqa: ARG001
    """Gaussian, up to a tenth of the shorter side; renormalised at the edges."""
    sigma = 0.1 * min(x.shape[:2]) * severity

    def weights(length: int) -> Array:
        place = jnp.arange(length, dtype=x.dtype)
        apart = (place[:, None] - place[None]) / sigma
        return jax.nn.softmax(-0.5 * apart**2, axis=1)

    return jnp.einsum("ij,kl,jlc->ikc", weights(x.shape[0]), weights(x.shape[1]), x)


KINDS = (_noise, _salt_and_pepper, _brighter, _darker, _contrast, _blur)
