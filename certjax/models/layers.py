"""The layers the papers share: explicit padding, PyTorch's default initialisation.

Every function acts on ONE example, [H, W, C] or [D]; `jax.vmap` turns a convolution
into one batched NHWC convolution.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from certjax.types import Array


PerChannel: TypeAlias = float | Sequence[float]
"""One number for all channels, or one per channel."""


def per_channel(value: PerChannel) -> tuple[float, ...]:
    """A hashable copy, whatever sequence a configuration hands over."""
    if isinstance(value, int | float):
        return (float(value),)
    return tuple(float(v) for v in value)


def uniform_fan_in(fan_in: int) -> Callable[..., Array]:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default, for weights and biases."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: Array, shape: Sequence[int], dtype: type = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Normalize(nn.Module):
    """`(x - mean) / std` per channel: the first layer, so eps stays in pixel units."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., C]."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, x.shape[-1]):
                raise ValueError(
                    f"{name} needs 1 or {x.shape[-1]} numbers for an input of shape "
                    f"{x.shape}, got {len(values)}"
                )
        ones = (1,) * (x.ndim - 1)
        mean = jnp.asarray(self.mean, x.dtype).reshape(*ones, -1)
        std = jnp.asarray(self.std, x.dtype).reshape(*ones, -1)
        return (x - mean) / std


def dense(x: Array, features: int, name: str) -> Array:
    """A fully connected layer of the enclosing module: [D] -> [features]."""
    init = uniform_fan_in(x.shape[-1])
    return nn.Dense(features, kernel_init=init, bias_init=init, name=name)(x)


def conv(
    x: Array,
    features: int,
    *,
    kernel: int,
    name: str,
    stride: int = 1,
    padding: int = 0,
    use_bias: bool = True,
) -> Array:
    """A square convolution of the enclosing module: [H, W, C] -> [H', W', features].

    Raises:
      ValueError: the image is not [H, W, C] or smaller than the kernel.
    """
    if x.ndim != 3 or min(x.shape[:2]) + 2 * padding < kernel:
        raise ValueError(
            f"{name}: a {kernel}x{kernel} convolution with padding {padding} needs an "
            f"image [H, W, C] of at least {kernel - 2 * padding} pixels a side, got "
            f"shape {x.shape}; for 8x8 images take cnn4_bn or mlp, for a batch jax.vmap"
        )
    init = uniform_fan_in(kernel * kernel * x.shape[-1])
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        use_bias=use_bias,
        kernel_init=init,
        bias_init=init,
        name=name,
    )(x)


def same_conv(
    x: Array, features: int, kernel: int, name: str, stride: int = 1
) -> Array:
    """Without bias and padded by half an odd kernel: [H / stride, W / stride, C]."""
    return conv(
        x,
        features,
        kernel=kernel,
        stride=stride,
        padding=kernel // 2,
        use_bias=False,
        name=name,
    )


def max_pool(x: Array, size: int) -> Array:
    """The maximum of each size x size square, [H, W, C] -> [H / size, W / size, C].

    What is left over at the right and at the bottom is dropped. As a reduction of a
    reshaped array its gradient takes a third of the time of a window reduction's on a
    CPU, and linear bounds have a rule for it.
    """
    rows, columns, channels = (x.shape[0] // size, x.shape[1] // size, x.shape[2])
    whole = x[: rows * size, : columns * size]
    return jnp.max(whole.reshape(rows, size, columns, size, channels), axis=(1, 3))
