"""AutoAttack: a fixed cascade of attacks, with the budgets of the reference.

Source: Croce & Hein 2020, arXiv:2003.01690, section 6; for l1, arXiv:2103.01208.
"""

from typing import Literal

from certjax.attacks.apgd import apgd, apgd_towards
from certjax.attacks.cascade import Stage
from certjax.attacks.combine import restarts, targeted_sweep, until_broken
from certjax.attacks.fab import fab
from certjax.attacks.losses import (
    cross_entropy,
    difference_towards,
    dlr,
    dlr_towards,
    Loss,
    margin_loss,
)
from certjax.attacks.square import square
from certjax.threat import Box, L1, Threat
from certjax.types import Array, Attack


Version = Literal["standard", "plus", "rand"]


def autoattack(threat: Threat, *, version: Version = "standard") -> Attack:
    """AutoAttack as one attack on one example.

    `cascade(autoattack_stages(threat))` is the same with broken examples dropped from
    the batch and a record of which attack broke which example.

    Args:
      threat: Linf, L2 or L1.
      version: "standard": APGD-CE, APGD-T, FAB-T, Square; "plus": APGD-CE and APGD-DLR
        with five restarts, FAB, Square, APGD-T, FAB-T; "rand": APGD-CE and APGD-DLR,
        for a randomised classifier (an `Expectation` of 20 draws).
    """

    def whole(stage: Stage) -> Attack:
        if stage.ranks:
            return targeted_sweep(lambda i: stage.attack(threat, i), stage.rounds)
        once = stage.attack(threat, 0)
        return once if stage.rounds == 1 else restarts(once, stage.rounds)

    return until_broken(*[whole(stage) for stage in autoattack_stages(threat, version)])


def autoattack_stages(
    threat: Threat, version: Version = "standard"
) -> tuple[Stage, ...]:
    """The stages of a version of AutoAttack, for `cascade`."""
    if isinstance(threat, Box):
        raise TypeError("AutoAttack is defined for Linf, L2 and L1, got Box")
    sparse = isinstance(threat, L1)
    versions = {
        "standard": (
            Stage("apgd-ce", _apgd_ce, 5 if sparse else 1),
            Stage("apgd-t", _apgd_t, 5 if sparse else 9, ranks=True),
            Stage("fab-t", _fab_t, 9, ranks=True),
            Stage("square", _square),
        ),
        "plus": (
            Stage("apgd-ce", _apgd_ce, 5),
            Stage("apgd-dlr", _apgd_dlr, 5),
            Stage("fab", _fab),
            Stage("square", _square),
            Stage("apgd-t", _apgd_t, 9, ranks=True),
            Stage("fab-t", _fab_t, 9, ranks=True),
        ),
        "rand": (Stage("apgd-ce", _apgd_mean_ce), Stage("apgd-dlr", _apgd_dlr)),
    }
    if version not in versions:
        raise ValueError(f"version must be one of {[*versions]}, got {version!r}")
    return versions[version]


# The stages are module-level functions, so that the cascade compiles each of them once.


def _apgd_ce(threat: Threat, i: Array | int) -> Attack:  # noqa: ARG001
    return apgd(threat, early_exit=True)


def _apgd_mean_ce(threat: Threat, i: Array | int) -> Attack:  # noqa: ARG001
    return apgd(threat, loss=cross_entropy, early_exit=True)


def _apgd_dlr(threat: Threat, i: Array | int) -> Attack:  # noqa: ARG001
    return apgd(threat, loss=_dlr_or_margin, early_exit=True)


def _apgd_t(threat: Threat, i: Array | int) -> Attack:
    return apgd_towards(threat, i, loss_towards=_dlr_or_difference, early_exit=True)


def _fab(threat: Threat, i: Array | int) -> Attack:  # noqa: ARG001
    return fab(threat, restarts=5, early_exit=True)


def _fab_t(threat: Threat, i: Array | int) -> Attack:
    return fab(threat, rank=i, early_exit=True)


def _square(threat: Threat, i: Array | int) -> Attack:  # noqa: ARG001
    return square(threat)


def _dlr_or_margin(logits: Array, label: Array) -> Array:
    """DLR where it is defined."""
    return (dlr if logits.shape[0] >= 3 else margin_loss)(logits, label)


def _dlr_or_difference(target: Array) -> Loss:
    """Targeted DLR where it is defined."""

    def loss(logits: Array, label: Array) -> Array:
        towards = dlr_towards if logits.shape[0] >= 4 else difference_towards
        return towards(target)(logits, label)

    return loss
