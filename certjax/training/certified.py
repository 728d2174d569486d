"""Objectives of certified training: bounds, attacks, and everything between the two.

Each is a function of one example that returns `Terms`; `kappa` is the weight of the
natural cross-entropy in every one of them. An attack is built from the threat by
`attack(threat)`; the certified-training papers take a few steps of `ascent`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import jax.numpy as jnp

from certjax import bounds
from certjax.specification import margins
from certjax.threat import Box, L1, L2, Linf, Threat
from certjax.training.losses import robust_cross_entropy
from certjax.training.objectives import (
    adversary,
    AttackBuilder,
    Itemized,
    mixed_with_natural,
    Terms,
)
from certjax.training.segments import Layered, shrunk_ibp
from certjax.types import Array, Attack, Classifier, Interval, Key, Objective, Scalar


Region: TypeAlias = Callable[[Key, Classifier, Array, Array], Box]
"""`region(key, f, x, label) -> Box`: the box that is bounded, inside the threat set."""

RegionBuilder: TypeAlias = Callable[[Threat], Region]


# ---------------------------------------------------------------------- linear bounds


def crown_ibp(threat: Threat, *, beta: Scalar = 1.0, kappa: Scalar = 0.0) -> Objective:
    """Margins bounded by beta * CROWN-IBP + (1 - beta) * IBP, then the worst case.

    Costs one backward pass of linear bounds for each of the K - 1 margins;
    `crown_ibp_fused` costs one in all.

    Args:
      threat: the perturbation set.
      beta: share of the linear bound; in the paper 1 at the start of the ramp of eps,
        and down to its last value along with it.
      kappa: weight of the natural term.
    Source: Zhang et al. 2020, arXiv:1906.06316, equation 12.
    """

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:  # noqa: ARG001
        linear, margin, layers = bounds.margins_with_layers(f, label)(threat, x)
        lower = beta * linear + (1 - beta) * margin.lower
        robust = robust_cross_entropy(lower)
        verified = jnp.all(linear > 0)
        metrics = {"robust": robust, "verified": verified}
        loss = mixed_with_natural(kappa, f, x, label, robust)
        return Terms(loss, metrics, layers, threat.box(x))

    return objective


def crown_ibp_fused(
    threat: Threat, *, beta: Scalar = 1.0, kappa: Scalar = 0.0
) -> Objective:
    """CROWN-IBP with loss fusion: the cross-entropy itself bounded by one linear row.

    No margin is bounded linearly, so "verified" is what IBP proves: less than
    CROWN-IBP will prove of the trained network.

    Args:
      threat: the perturbation set.
      beta: share of the fused bound, as in `crown_ibp`; the rest is the loss of IBP.
      kappa: weight of the natural term.
    Source: Xu et al. 2020, arXiv:2002.12920, section 3.3.
    """

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:  # noqa: ARG001
        fused, margin, layers = bounds.fused_with_layers(f, label)(threat, x)
        robust = beta * fused + (1 - beta) * robust_cross_entropy(margin.lower)
        verified = jnp.all(margin.lower > 0)
        metrics = {"robust": robust, "fused": fused, "verified": verified}
        loss = mixed_with_natural(kappa, f, x, label, robust)
        return Terms(loss, metrics, layers, threat.box(x))

    return objective


# ------------------------------------------------------------------------ small boxes


def whole_set(threat: Threat) -> Region:
    """The box around the whole threat set."""

    def region(key: Key, f: Classifier, x: Array, label: Array) -> Box:  # noqa: ARG001
        return Box(*threat.box(x))

    return region


def small_box(threat: Threat, *, attack: AttackBuilder, ratio: Scalar = 0.4) -> Region:
    """A box of `ratio` times the set's size, as near to an adversarial point as fits.

    Args:
      threat: the perturbation set; its bounding box contains the small one.
      attack: builds the attack from the threat.
      ratio: in [0, 1]; 0: the adversarial point alone, 1: the whole set.
    Source: Mueller et al. 2023 (SABR), arXiv:2210.04871, section 3.
    """
    search = attack(threat)

    def region(key: Key, f: Classifier, x: Array, label: Array) -> Box:
        lower, upper = threat.box(x)
        radius = 0.5 * ratio * (upper - lower)
        z = adversary(search, key, f, x, label)
        centre = jnp.clip(z, lower + radius, upper - radius)
        return Box(centre - radius, centre + radius)

    return region


def layered(f: Classifier, shrink: float | None) -> Layered:
    """Interval bounds of f with those of its layers, shrunk at activations if asked."""
    return bounds.ibp_with_layers(f) if shrink is None else shrunk_ibp(f, shrink=shrink)


def sabr(
    threat: Threat,
    *,
    attack: AttackBuilder,
    ratio: Scalar = 0.4,
    shrink: float | None = None,
    kappa: Scalar = 0.0,
) -> Objective:
    """Interval bounds over a small box around an adversarial point.

    "verified_small" is about the small box, not about the threat set: no certificate.

    Args:
      threat: the perturbation set.
      attack: builds the attack from the threat.
      ratio: size of the small box (lambda of the paper); at 1 this is `ibp`.
      shrink: factor on the upper ends of undecided activations; None: exact boxes. The
        published runs on CIFAR-10 2/255 take 0.8.
      kappa: weight of the natural term.
    Source: Mueller et al. 2023, arXiv:2210.04871.
    """
    region = small_box(threat, attack=attack, ratio=ratio)

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        box = region(key, f, x, label)
        centre = 0.5 * (box.lower + box.upper)
        margin, layers = layered(lambda z: margins(f(z), label), shrink)(box, centre)
        robust = robust_cross_entropy(margin.lower)
        metrics = {"robust": robust, "verified_small": jnp.all(margin.lower > 0)}
        loss = mixed_with_natural(kappa, f, x, label, robust)
        return Terms(loss, metrics, layers, Interval(box.lower, box.upper))

    return objective


# ------------------------------------------------------- between attack and interval


Combination: TypeAlias = Callable[[Array, Array], Array]
"""`combine(lower bounds of the margins, adversarial margins) -> []`."""


def _expressive(
    combine: Combination,
    threat: Threat,
    *,
    attack: AttackBuilder,
    attack_scale: float,
    kappa: Scalar,
) -> Objective:
    search: Attack = attack(_scaled(threat, attack_scale))

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        rows = lambda z: margins(f(z), label)
        margin, layers = bounds.ibp_with_layers(rows)(threat, x)
        attacked = rows(adversary(search, key, f, x, label))
        robust = combine(margin.lower, attacked)
        metrics = {
            "robust": robust_cross_entropy(margin.lower),
            "adversarial": robust_cross_entropy(attacked),
            "verified": jnp.all(margin.lower > 0),
            "robust_accuracy": jnp.all(attacked > 0),
        }
        loss = mixed_with_natural(kappa, f, x, label, robust)
        return Terms(loss, metrics, layers, threat.box(x))

    return objective


def _scaled(threat: Threat, factor: float) -> Threat:
    """The same set with `factor` times the radius."""
    if factor == 1.0:
        return threat
    if not isinstance(threat, Linf | L2 | L1):
        raise TypeError("a Box has no radius to scale; leave attack_scale at 1")
    return replace(threat, eps=factor * threat.eps)


def mtl_ibp(
    threat: Threat,
    *,
    attack: AttackBuilder,
    alpha: Scalar,
    attack_scale: float = 1.0,
    kappa: Scalar = 0.0,
) -> Objective:
    """alpha * CE of the worst case of IBP + (1 - alpha) * CE of an adversarial point.

    Args:
      threat: the perturbation set.
      attack: builds the attack from the threat.
      alpha: in [0, 1]; 0: adversarial training, 1: `ibp`.
      attack_scale: radius of the attack, in radii of the threat.
      kappa: weight of the natural term.
    Source: De Palma et al. 2024, arXiv:2305.13991, equation 7.
    """

    def combine(lower: Array, attacked: Array) -> Array:
        robust, adversarial = map(robust_cross_entropy, (lower, attacked))
        return alpha * robust + (1 - alpha) * adversarial

    return _expressive(
        combine, threat, attack=attack, attack_scale=attack_scale, kappa=kappa
    )


def cc_ibp(
    threat: Threat,
    *,
    attack: AttackBuilder,
    alpha: Scalar,
    attack_scale: float = 1.0,
    kappa: Scalar = 0.0,
) -> Objective:
    """CE of the margins alpha * IBP's lower bound + (1 - alpha) * those attacked.

    Arguments as in `mtl_ibp`. Source: De Palma et al. 2024, arXiv:2305.13991, eq. 6.
    """

    def combine(lower: Array, attacked: Array) -> Array:
        return robust_cross_entropy(alpha * lower + (1 - alpha) * attacked)

    return _expressive(
        combine, threat, attack=attack, attack_scale=attack_scale, kappa=kappa
    )


def exp_ibp(
    threat: Threat,
    *,
    attack: AttackBuilder,
    alpha: Scalar,
    attack_scale: float = 1.0,
    kappa: Scalar = 0.0,
) -> Objective:
    """CE of IBP's worst case ^ alpha * CE of an adversarial point ^ (1 - alpha).

    Arguments as in `mtl_ibp`. Source: De Palma et al. 2024, arXiv:2305.13991, eq. 8.
    """

    def combine(lower: Array, attacked: Array) -> Array:
        robust, adversarial = (
            jnp.log(jnp.maximum(robust_cross_entropy(m), LEAST_LOSS))
            for m in (lower, attacked)
        )
        return jnp.exp(alpha * robust + (1 - alpha) * adversarial)

    return _expressive(
        combine, threat, attack=attack, attack_scale=attack_scale, kappa=kappa
    )


LEAST_LOSS = 1e-12  # a fractional power has no derivative at 0
