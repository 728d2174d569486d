"""Residual networks for 32x32 images, as the randomized-smoothing papers use them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from certjax.models.batchnorm import BatchNorm
from certjax.models.layers import dense, Normalize, per_channel, PerChannel, same_conv
from certjax.types import Array


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 convolution where shapes differ."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[H, W, C] -> [H / stride, W / stride, features]."""
        y = same_conv(x, self.features, 3, "conv_0", self.stride)
        y = jax.nn.relu(BatchNorm(name="norm_0")(y, train))
        y = same_conv(y, self.features, 3, "joined_conv")
        y = BatchNorm(name="norm_1")(y, train)
        if x.shape != y.shape:
            x = same_conv(x, self.features, 1, "joined_shortcut", self.stride)
            x = BatchNorm(name="norm_shortcut")(x, train)
        return jax.nn.relu(x + y)


class ResNet(nn.Module):
    """Three stages of `blocks` residual blocks with 16, 32, 64 channels: -> [K]."""

    blocks: int
    classes: int = 10
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits [K] of one example [H, W, C]."""
        x = Normalize(self.mean, self.std)(x)
        x = same_conv(x, 16, 3, "conv_0")
        x = jax.nn.relu(BatchNorm(name="norm_0")(x, train))
        for stage, features in enumerate((16, 32, 64)):
            for i in range(self.blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                x = Block(features, stride, name=f"block_{stage}_{i}")(x, train)
        return dense(jnp.mean(x, (0, 1)), self.classes, "logits")


def resnet(
    *,
    depth: int,
    classes: int = 10,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> ResNet:
    """The residual network of depth 6 n + 2 (20, 32, 44, 56, 110).

    Source: He et al. 2016, arXiv:1512.03385, section 4.2; with 1x1 shortcuts as in
    Cohen et al. 2019, arXiv:1902.02918.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6 n + 2 (20, 32, ..., 110), got {depth}")
    return ResNet((depth - 2) // 6, classes, per_channel(mean), per_channel(std))


def resnet20(
    *, classes: int = 10, mean: PerChannel = 0.0, std: PerChannel = 1.0
) -> ResNet:
    """`resnet` of depth 20 (0.27 M parameters)."""
    return resnet(depth=20, classes=classes, mean=mean, std=std)


def resnet110(
    *, classes: int = 10, mean: PerChannel = 0.0, std: PerChannel = 1.0
) -> ResNet:
    """`resnet` of depth 110 (1.7 M parameters), the smoothing papers' CIFAR network."""
    return resnet(depth=110, classes=classes, mean=mean, std=std)
