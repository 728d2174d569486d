"""Attacks: factories that return `attack(key, f, x, label) -> z` for one example."""

from certjax.attacks.apgd import apgd, apgd_towards
from certjax.attacks.autoattack import autoattack, autoattack_stages
from certjax.attacks.blackbox import (
    boundary,
    hopskipjump,
    nes,
    spsa,
)
from certjax.attacks.carlini import (
    carlini_wagner,
    ead,
)
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
from certjax.attacks.corrupt import corruption
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
from certjax.attacks.minimal import (
    ddn,
    deepfool,
    distances,
    fmn,
    lengths,
    robust_accuracy_curve,
)
from certjax.attacks.search import Expectation
from certjax.attacks.square import square
from certjax.attacks.transfer import (
    diverse,
    noisy,
    patch,
    rotation_translation,
    smoothed,
    straight_through,
    transfer,
    universal,
)


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
    "boundary",
    "carlini_wagner",
    "cascade",
    "corruption",
    "cross_entropy",
    "cross_entropy_towards",
    "ddn",
    "deepfool",
    "difference_towards",
    "distances",
    "diverse",
    "dlr",
    "dlr_towards",
    "ead",
    "fab",
    "fab_minimum",
    "fab_targeted",
    "fgsm",
    "fmn",
    "hopskipjump",
    "lengths",
    "log_odds",
    "margin_loss",
    "mi_fgsm",
    "minimal",
    "nes",
    "ni_fgsm",
    "noisy",
    "patch",
    "pgd",
    "restarts",
    "robust_accuracy_curve",
    "rotation_translation",
    "smoothed",
    "spsa",
    "square",
    "straight_through",
    "strongest",
    "targeted_sweep",
    "transfer",
    "universal",
    "until_broken",
]
