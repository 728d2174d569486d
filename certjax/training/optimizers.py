"""Optimisers as configurations name them: optax chains with gradient clipping."""

from typing import TypeAlias

import optax

from certjax.training.schedules import Schedule


LearningRate: TypeAlias = float | Schedule


def adam(
    *,
    learning_rate: LearningRate,
    clip: float | None = None,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """Adam after clipping the global gradient norm; the weight decay is AdamW's."""
    return _clipped(
        clip, optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)
    )


def sgd(
    *,
    learning_rate: LearningRate,
    clip: float | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """SGD; weight decay is coupled (an L2 term of the gradient), as in PyTorch."""
    return _clipped(
        clip,
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov),
    )


def _clipped(
    clip: float | None, *chain: optax.GradientTransformation
) -> optax.GradientTransformation:
    if clip is None:
        return optax.chain(*chain)
    if clip <= 0:
        raise ValueError(f"clip is a gradient norm and must be positive, got {clip}")
    return optax.chain(optax.clip_by_global_norm(clip), *chain)
