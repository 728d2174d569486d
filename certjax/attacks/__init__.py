"""Attacks: factories that return `attack(key, f, x, label) -> z` for one example."""

from certjax.attacks.apgd import apgd, apgd_towards
from certjax.attacks.autoattack import autoattack, autoattack_stages
from certjax.attacks.cascade import Broken, cascade, Stage
from certjax.attacks.combine import (
    apgd_targeted,
    fab_targeted,
    minimal,
    restarts,
    strongest,
    targeted_sweep,
    until_broken,
)
from certjax.attacks.fab import fab, fab_minimum
from certjax.attacks.gradient import bim, fgsm, mi_fgsm, ni_fgsm, pgd
from certjax.attacks.losses import (
    cross_entropy,
    cross_entropy_towards,
    difference_towards,
    dlr,
    dlr_towards,
    log_odds,
    margin_loss,
)
from certjax.attacks.search import Expectation
from certjax.attacks.square import square


__all__ = [
    "Broken",
    "Expectation",
    "Stage",
    "apgd",
    "apgd_targeted",
    "apgd_towards",
    "autoattack",
    "autoattack_stages",
    "bim",
    "cascade",
    "cross_entropy",
    "cross_entropy_towards",
    "difference_towards",
    "dlr",
    "dlr_towards",
    "fab",
    "fab_minimum",
    "fab_targeted",
    "fgsm",
    "log_odds",
    "margin_loss",
    "mi_fgsm",
    "minimal",
    "ni_fgsm",
    "pgd",
    "restarts",
    "square",
    "strongest",
    "targeted_sweep",
    "until_broken",
]
