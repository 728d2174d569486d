"""Attacks: factories that return `attack(key, f, x, label) -> z` for one example."""

from certjax.attacks.apgd import apgd, apgd_targeted
from certjax.attacks.fab import fab, fab_minimum
from certjax.attacks.gradient import bim, fgsm, mi_fgsm, ni_fgsm, pgd
from certjax.attacks.losses import (
    cross_entropy,
    cross_entropy_towards,
    difference_towards,
    dlr,
    dlr_towards,
    margin_loss,
)
from certjax.attacks.search import Expectation
from certjax.attacks.square import square


__all__ = [
    "Expectation",
    "apgd",
    "apgd_targeted",
    "bim",
    "cross_entropy",
    "cross_entropy_towards",
    "difference_towards",
    "dlr",
    "dlr_towards",
    "fab",
    "fab_minimum",
    "fgsm",
    "margin_loss",
    "mi_fgsm",
    "ni_fgsm",
    "pgd",
    "square",
]
