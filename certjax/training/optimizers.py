"""Optimisers as configurations name them: optax chains with gradient clipping.

Each takes two wrappers by keyword: `sharpness`, the radius of sharpness-aware
minimisation, and `accumulate`, the number of batches whose mean gradient is one update.
`averaged` adds the mean of the weights along the way to any of them.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from certjax.training.schedules import Schedule
from certjax.types import Array, PyTree


LearningRate: TypeAlias = float | Schedule


def adam(
    *,
    learning_rate: LearningRate,
    clip: float | None = None,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    sharpness: float | None = None,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """Adam after clipping the global gradient norm; the weight decay is AdamW's."""
    rate = _per_update(learning_rate, accumulate)
    chain = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay)
    return _wrapped(_clipped(clip, chain), sharpness, accumulate)


def sgd(
    *,
    learning_rate: LearningRate,
    clip: float | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = False,
    sharpness: float | None = None,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """SGD; weight decay is coupled (an L2 term of the gradient), as in PyTorch."""
    rate = _per_update(learning_rate, accumulate)
    chain = _clipped(
        clip,
        optax.add_decayed_weights(weight_decay),
        optax.sgd(rate, momentum=momentum or None, nesterov=nesterov),
    )
    return _wrapped(chain, sharpness, accumulate)


def _clipped(
    clip: float | None, *chain: optax.GradientTransformation
) -> optax.GradientTransformation:
    if clip is None:
        return optax.chain(*chain)
    if clip <= 0:
        raise ValueError(f"clip is a gradient norm and must be positive, got {clip}")
    return optax.chain(optax.clip_by_global_norm(clip), *chain)


def _per_update(rate: LearningRate, accumulate: int) -> LearningRate:
    """A schedule of steps, asked about updates."""
    if accumulate == 1 or not callable(rate):
        return rate
    return lambda count: rate(count * accumulate)


def _wrapped(
    optimizer: optax.GradientTransformation, sharpness: float | None, accumulate: int
) -> optax.GradientTransformation:
    if accumulate < 1:
        raise ValueError(f"accumulate counts batches: at least 1, got {accumulate}")
    if sharpness is not None and accumulate > 1:
        raise ValueError(
            "sharpness needs the gradient of the same batch twice, and accumulate "
            f"takes the mean over {accumulate}; choose one of the two"
        )
    if sharpness is not None:
        return sharpness_aware(optimizer, rho=sharpness)
    if accumulate > 1:
        return optax.MultiSteps(optimizer, accumulate).gradient_transformation()
    return optimizer


def sharpness_aware(
    optimizer: optax.GradientTransformation, *, rho: float = 0.05
) -> optax.GradientTransformationExtraArgs:
    """Descend along the gradient at the worst weights within rho, to first order.

    `update` needs the keyword `gradient_at(params) -> gradient`, which `train_step`
    gives; a step costs two gradients. Where that gradient is not finite, the one at the
    weights themselves is taken.

    Source: Foret et al. 2021, arXiv:2010.01412, algorithm 1.
    """
    if rho <= 0:
        raise ValueError(f"rho is a radius and must be positive, got {rho}")
    inner = optax.with_extra_args_support(optimizer)

    def update(
        gradient: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        gradient_at: Callable[[PyTree], PyTree],
        **extra: object,
    ) -> tuple[PyTree, PyTree]:
        length = rho / jnp.maximum(optax.tree.norm(gradient), 1e-12)
        worst = jax.tree.map(lambda w, g: w + length * g, params, gradient)
        there = gradient_at(worst)
        finite = jnp.isfinite(optax.tree.norm(there))
        there = jax.tree.map(lambda g, h: jnp.where(finite, g, h), there, gradient)
        return inner.update(there, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


class Averaged(NamedTuple):
    """inner: the optimiser's state.  mean: of `count` weights, taken along `steps`."""

    inner: PyTree
    mean: PyTree
    count: Array
    steps: Array


def averaged(
    optimizer: optax.GradientTransformation, *, start: int, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """The optimiser, and the mean of the weights at every `every`-th step from `start`.

    Training itself does not change; `averaged_params` reads the mean.

    Source: Izmailov et al. 2018, arXiv:1803.05407 (SWA).
    """
    if start < 0 or every < 1:
        raise ValueError(f"need start >= 0 and every >= 1, got {start} and {every}")
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Averaged:
        zero = jnp.int32(0)
        return Averaged(inner.init(params), params, zero, zero)

    def update(
        gradient: PyTree, state: Averaged, params: PyTree = None, **extra: object
    ) -> tuple[PyTree, Averaged]:
        updates, after = inner.update(gradient, state.inner, params, **extra)
        due = (state.steps >= start) & ((state.steps - start) % every == 0)
        count = state.count + due
        share = due / jnp.maximum(count, 1)
        moved = optax.apply_updates(params, updates)
        # the first share is 1: what the mean held before does not matter
        mean = jax.tree.map(lambda m, w: m + share * (w - m), state.mean, moved)
        return updates, Averaged(after, mean, count, state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """The mean of the weights where `averaged` has taken any, else `params`."""
    is_mean = lambda node: isinstance(node, Averaged)
    found = [n for n in jax.tree.leaves(opt_state, is_leaf=is_mean) if is_mean(n)]
    return found[0].mean if found and int(found[0].count) else params
