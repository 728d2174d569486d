"""Objectives, schedules and the training step; everything for one example."""

from certjax.training.adversaries import arow as arow, edac as edac, mart as mart
from certjax.training.ascent import ascent as ascent
from certjax.training.augmentation import flip_and_crop as flip_and_crop
from certjax.training.certified import (
    cc_ibp as cc_ibp,
    crown_ibp as crown_ibp,
    crown_ibp_fused as crown_ibp_fused,
    exp_ibp as exp_ibp,
    mtl_ibp as mtl_ibp,
    sabr as sabr,
    small_box as small_box,
    whole_set as whole_set,
)
from certjax.training.evaluation import (
    Evaluation as Evaluation,
    evaluator as evaluator,
)
from certjax.training.latent import connect as connect, taps as taps
from certjax.training.losses import (
    cross_entropy as cross_entropy,
    divergence as divergence,
    robust_cross_entropy as robust_cross_entropy,
)
from certjax.training.margin import lipschitz_margin as lipschitz_margin
from certjax.training.objectives import (
    adversarial as adversarial,
    ibp as ibp,
    Itemized as Itemized,
    natural as natural,
    Terms as Terms,
    terms_of as terms_of,
    trades as trades,
)
from certjax.training.optimizers import (
    adam as adam,
    averaged as averaged,
    averaged_params as averaged_params,
    sgd as sgd,
    sharpness_aware as sharpness_aware,
)
from certjax.training.pixels import images as images
from certjax.training.recipes import (
    Recipe as Recipe,
    relative_step as relative_step,
    scheduled as scheduled,
    unchanging as unchanging,
)
from certjax.training.regularizers import kernel_l1 as kernel_l1, shi as shi
from certjax.training.schedules import (
    constant as constant,
    cosine as cosine,
    linear_ramp as linear_ramp,
    piecewise as piecewise,
    Schedule as Schedule,
    smoothed_ramp as smoothed_ramp,
    tied as tied,
)
from certjax.training.smoothed import (
    catrs as catrs,
    consistency as consistency,
    denoising as denoising,
    gaussian_augmentation as gaussian_augmentation,
    macer as macer,
    noise_augmentation as noise_augmentation,
    noisy_copy as noisy_copy,
    noisy_ddn as noisy_ddn,
    noisy_pgd as noisy_pgd,
    smooth_adversarial as smooth_adversarial,
    smoothmix as smoothmix,
    stability as stability,
)
from certjax.training.step import (
    initial_state as initial_state,
    train_step as train_step,
    TrainState as TrainState,
)
from certjax.training.streams import stream as stream
from certjax.training.weights import gaussian_weights as gaussian_weights
