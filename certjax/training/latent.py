"""TAPS and STAPS: intervals through the first part of a network, attacks in the second.

`taps(box=small_box(...))` is STAPS.
"""

from functools import partial

import jax
import jax.numpy as jnp

from certjax.attacks.losses import Loss
from certjax.specification import margins
from certjax.threat import Box, Threat
from certjax.training.certified import layered, RegionBuilder, whole_set
from certjax.training.losses import robust_cross_entropy
from certjax.training.objectives import (
    adversary,
    AttackBuilder,
    Itemized,
    mixed_with_natural,
    Terms,
)
from certjax.training.segments import split
from certjax.types import Array, Classifier, Interval, Key, Objective, Scalar


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def connect(lower: Array, upper: Array, z: Array, share: float = 0.5) -> Array:
    """z, a point of the box, whose gradient goes to the ends of the box near it.

    An entry at an end hands its gradient to that end; the weight falls linearly to 0
    over `share` of the width of the box. z itself receives none.

    Args:
      lower, upper: the box.
      z: a point of it, found by an attack.
      share: of the width, in (0, 1].
    Source: Mao et al. 2023 (TAPS), arXiv:2305.04574, section 3.3 (the rectified linear
      gradient link).
    """
    del lower, upper, share
    return z


def _connect(lower: Array, upper: Array, z: Array, share: float) -> tuple:  # noqa: ARG001
    return z, (lower, upper, z)


def _disconnect(share: float, residuals: tuple, g: Array) -> tuple[Array, Array, Array]:
    lower, upper, z = residuals
    reach = share * (upper - lower)
    safe = jnp.where(reach > 0, reach, 1.0)
    # differences of neighbours are exact; a box may be a few ulps wide
    near_lower = jnp.maximum(reach - (z - lower), 0.0) / safe
    near_upper = jnp.maximum(reach - (upper - z), 0.0) / safe
    # a box of width 0 is one point, which is half of either end
    near_lower, near_upper = (
        jnp.where(reach > 0, w, 0.5) for w in (near_lower, near_upper)
    )
    return g * near_lower, g * near_upper, jnp.zeros_like(z)


connect.defvjp(_connect, _disconnect)


def taps(  # noqa: PLR0913
    threat: Threat,
    *,
    attack: AttackBuilder,
    behind: int = 1,
    gradient_scale: Scalar = 4.0,
    share: float = 0.5,
    box: RegionBuilder = whole_set,
    shrink: float | None = None,
    active: Scalar = 1.0,
    kappa: Scalar = 0.0,
) -> Objective:
    """Intervals up to a layer, then one attack on each margin inside the latent box.

    The loss is the product of the cross-entropy at the attacked margins, which is below
    the worst case, and that of IBP, which is above it.

    Args:
      threat: the perturbation set.
      attack: builds the attack in the latent box, which is a `Box`. It must maximise
        the loss it is given and nothing else, as `ascent` does; `pgd` prefers points
        that are misclassified, and the "label" here is the other class.
      behind: activations in the second part of the network.
      gradient_scale: factor on the gradient through the attacked margins.
      share: see `connect`.
      box: the input box; `partial(small_box, ...)` makes it STAPS.
      shrink: as in `sabr`.
      active: the loss of IBP alone below 1; tie it to the ramp of eps, along which the
        papers train with IBP.
      kappa: weight of the natural term.

    The metric "verified" is about the whole set; "verified_small" stands for it where a
    small box or shrinking makes it no certificate.
    Source: Mao et al. 2023, arXiv:2305.04574.
    """
    region = box(threat)
    proves = box is whole_set and shrink is None
    verified = "verified" if proves else "verified_small"

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        outer, inner = jax.random.split(key)
        set_ = region(outer, f, x, label)
        first, second = split(f, x, behind=behind)
        centre = 0.5 * (set_.lower + set_.upper)
        latent, layers = layered(first, shrink)(set_, centre)
        margin, more = _rest(second, latent, label, shrink if behind else None)
        attacked = _attacked_margins(attack, inner, second, latent, label, share)
        robust, found = map(robust_cross_entropy, (margin.lower, attacked))
        product = _with_gradient(found, gradient_scale) * robust
        metrics = {
            "robust": robust,
            "latent_adversarial": found,
            verified: jnp.all(margin.lower > 0),
        }
        loss = jnp.where(jnp.asarray(active) >= 1, product, robust)
        loss = mixed_with_natural(kappa, f, x, label, loss)
        return Terms(loss, metrics, layers + more, Interval(set_.lower, set_.upper))

    return objective


def _rest(
    second: Classifier, latent: Interval, label: Array, shrink: float | None
) -> tuple[Interval, tuple[Interval, ...]]:
    """Margins of the second part over the latent box, by interval arithmetic."""
    centre = 0.5 * (latent.lower + latent.upper)
    return layered(lambda v: margins(second(v), label), shrink)(Box(*latent), centre)


def _attacked_margins(
    attack: AttackBuilder,
    key: Key,
    second: Classifier,
    latent: Interval,
    label: Array,
    share: float,
) -> Array:
    """[K-1] margins, each at the point an attack on it alone finds in the box."""
    held = Box(*jax.lax.stop_gradient(latent))
    centre = 0.5 * (held.lower + held.upper)
    search = attack(held, loss=_towards(label))
    classes = jax.eval_shape(second, centre).shape[0]
    others = jnp.arange(classes - 1)
    others = others + (others >= label)

    def one(key: Key, other: Array) -> Array:
        z = adversary(search, key, second, centre, other)
        logits = second(connect(*latent, z, share))
        return logits[label] - logits[other]

    return jax.vmap(one)(jax.random.split(key, classes - 1), others)


def _towards(label: Array) -> Loss:
    """`loss(logits, other)`: how far another class is ahead of the label."""
    return lambda logits, other: logits[other] - logits[label]


def _with_gradient(value: Array, factor: Scalar) -> Array:
    """The same value with a gradient of `factor` times the length."""
    held = jax.lax.stop_gradient(value)
    return held + factor * (value - held)
