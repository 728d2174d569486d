"""Losses smoothed over Gaussian noise of the weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from certjax.types import Array, Key, PyTree


def gaussian_weights(
    *, std: float = 1e-2, relative: bool = True
) -> Callable[[Key, PyTree], PyTree]:
    """Weights plus Gaussian noise: one draw of the smoothed loss E L(w + noise).

    As `perturb` of `train_step` its gradient is the unbiased estimate of the smoothed
    loss's that Randomized Gradient Smoothing takes; tight relaxations, whose losses are
    jagged, then train better.

    Args:
      std: standard deviation of the noise of the kernels of convolutions and fully
        connected layers; relative to that of each kernel. Biases and normalisations
        have none.
      relative: False: std is absolute.
    Source: Balauca et al. 2025, arXiv:2403.07095; relative as CTBench has it.
    """
    if std < 0:
        raise ValueError(f"std must be at least 0, got {std}")

    def perturb(key: Key, params: PyTree) -> PyTree:
        leaves, tree = jax.tree.flatten_with_path(params)
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten(
            _noisy(own, w) if getattr(path[-1], "key", None) == "kernel" else w
            for own, (path, w) in zip(keys, leaves, strict=True)
        )

    def _noisy(key: Key, w: Array) -> Array:
        scale = jax.lax.stop_gradient(jnp.std(w)) if relative else 1.0
        return w + std * scale * jax.random.normal(key, w.shape, w.dtype)

    return perturb
