"""Penalties that need the whole batch or the parameters, added to the mean loss."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from certjax.training.objectives import Terms
from certjax.training.schedules import Schedule
from certjax.types import Array, Interval, PyTree, Scalar


Regularizer: TypeAlias = Callable[[Terms, Scalar], Array]
"""`regularizer(terms of [N] examples, step) -> []`."""


def shi(
    *,
    eps: Schedule,
    final: float,
    weight: float = 0.5,
    std: float | Sequence[float] = 1.0,
    tolerance: float = 0.5,
) -> Regularizer:
    """Bound tightness and ReLU balance, fading out as eps reaches its final value.

    weight * (1 - eps / final) * mean over layers of (tightness + balance), where
    tightness penalises bounds more than 1/tolerance times wider than the normalised
    input box, and balance penalises layers whose active and inactive neurons differ by
    more than that factor in mean or variance of their centres.

    Args:
      eps: the schedule of the radius.
      final: its last value.
      weight: 0.5 for MNIST and CIFAR-10, 0.2 for TinyImageNet in the paper.
      std: of the normalisation, one number or one per channel.
      tolerance: tau of the paper.
    Source: Shi et al. 2021, arXiv:2103.16889, section 4.3.
    """
    scale = 1.0 / jnp.asarray(std, jnp.float32).reshape(-1)

    def regularizer(terms: Terms, step: Scalar) -> Array:
        if not terms.layers or terms.region is None:
            raise ValueError(
                "the regularisers of Shi et al. need the bounds of each layer; "
                "take an objective that computes them, e.g. ibp, or no regularizer"
            )
        width = jnp.mean(_half_width(terms.region) * _as_channels(scale, terms.region))
        parts = [
            _tightness(layer, width, tolerance) + _balance(layer, tolerance)
            for layer in terms.layers
        ]
        fade = jnp.maximum(1.0 - eps(step) / final, 0.0)
        return weight * fade * sum(parts) / len(parts)

    return regularizer


def _half_width(box: Interval) -> Array:
    return 0.5 * (box.upper - box.lower)


def _as_channels(scale: Array, box: Interval) -> Array:
    return scale.reshape((1,) * (box.lower.ndim - 1) + (-1,))


def _tightness(layer: Interval, width: Array, tolerance: float) -> Array:
    """relu(tolerance - input width / layer width) / tolerance."""
    ratio = width / jnp.maximum(jnp.mean(_half_width(layer)), 1e-12)
    return jax.nn.relu(tolerance - ratio) / tolerance


def _balance(layer: Interval, tolerance: float) -> Array:
    """Imbalance of the always active and the always inactive neurons of a layer.

    A layer without both kinds is skipped; the inner `where` keeps its gradient finite.
    """
    centre = 0.5 * (layer.lower + layer.upper)
    active, inactive = layer.lower > 0, layer.upper < 0
    spread = jnp.square(centre - jnp.mean(centre))
    mean_active = jnp.mean(jnp.where(active, centre, 0.0))
    mean_inactive = -jnp.mean(jnp.where(inactive, centre, 0.0))
    spread_active = jnp.mean(jnp.where(active, spread, 0.0))
    spread_inactive = jnp.mean(jnp.where(inactive, spread, 0.0))
    quantities = (mean_active, mean_inactive, spread_active, spread_inactive)
    defined = jnp.all(jnp.stack(quantities) > 0)
    a, b, c, d = (jnp.where(defined, q, 1.0) for q in quantities)
    penalty = jax.nn.relu(tolerance - _alike(a, b)) + jax.nn.relu(
        tolerance - _alike(c, d)
    )
    return jnp.where(defined, penalty / tolerance, 0.0)


def _alike(a: Array, b: Array) -> Array:
    """min(a / b, b / a): 1 where equal."""
    return jnp.minimum(a / b, b / a)


def kernel_l1(params: PyTree) -> Array:
    """Sum of |W| over convolutions and fully connected layers; no biases, no norms."""

    def part(path: tuple, value: Array) -> Array:
        name = getattr(path[-1], "key", None)
        return jnp.sum(jnp.abs(value)) if name == "kernel" else jnp.float32(0.0)

    parts = jax.tree_util.tree_map_with_path(part, params)
    return jax.tree.reduce(jnp.add, parts, jnp.float32(0.0))
