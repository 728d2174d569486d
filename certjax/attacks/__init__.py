"""Attacks: factories that return `attack(key, f, x, label) -> z` for one example."""

from certjax.attacks.gradient import bim, fgsm, mi_fgsm, ni_fgsm, pgd
from certjax.attacks.losses import (
    cross_entropy,
    cross_entropy_towards,
    difference_towards,
    dlr,
    dlr_towards,
    margin_loss,
)


__all__ = [
    "bim",
    "cross_entropy",
    "cross_entropy_towards",
    "difference_towards",
    "dlr",
    "dlr_towards",
    "fgsm",
    "margin_loss",
    "mi_fgsm",
    "ni_fgsm",
    "pgd",
]
