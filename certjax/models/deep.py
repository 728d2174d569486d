"""Deep networks of the smoothing papers: ResNet-50, wide ResNets, DenseNet-40."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from certjax.models.batchnorm import BatchNorm
from certjax.models.layers import dense, Normalize, per_channel, PerChannel, same_conv
from certjax.types import Array


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the channels, and a shortcut."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[H, W, C] -> [H / stride, W / stride, 4 features]."""
        y = same_conv(x, self.features, 1, "conv_0")
        y = jax.nn.relu(BatchNorm(name="norm_0")(y, train))
        y = same_conv(y, self.features, 3, "conv_1", self.stride)
        y = jax.nn.relu(BatchNorm(name="norm_1")(y, train))
        y = same_conv(y, 4 * self.features, 1, "joined_conv")
        y = BatchNorm(name="norm_2")(y, train)
        if x.shape != y.shape:
            x = same_conv(x, 4 * self.features, 1, "joined_shortcut", self.stride)
            x = BatchNorm(name="norm_shortcut")(x, train)
        return jax.nn.relu(x + y)


class BottleneckResNet(nn.Module):
    """Four stages of bottlenecks behind a 7x7 convolution and a pool: -> [K]."""

    blocks: tuple[int, ...]
    classes: int = 1000
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits [K] of one example [H, W, C]."""
        x = same_conv(Normalize(self.mean, self.std)(x), 64, 7, "conv_0", 2)
        x = jax.nn.relu(BatchNorm(name="norm_0")(x, train))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.blocks):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                block = Bottleneck(64 * 2**stage, stride, name=f"block_{stage}_{i}")
                x = block(x, train)
        return dense(jnp.mean(x, (0, 1)), self.classes, "logits")


class WideBlock(nn.Module):
    """Norm, ReLU, 3x3, twice, and a shortcut from behind the first ReLU."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[H, W, C] -> [H / stride, W / stride, features]."""
        y = jax.nn.relu(BatchNorm(name="norm_0")(x, train))
        if x.shape[-1] != self.features:
            x = same_conv(y, self.features, 1, "joined_shortcut", self.stride)
        y = same_conv(y, self.features, 3, "conv_0", self.stride)
        y = jax.nn.relu(BatchNorm(name="norm_1")(y, train))
        return x + same_conv(y, self.features, 3, "joined_conv")


class WideResNet(nn.Module):
    """Three stages of `blocks` wide blocks of 16, 32, 64 times `width` channels."""

    blocks: int
    width: int
    classes: int = 10
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits [K] of one example [H, W, C]."""
        x = same_conv(Normalize(self.mean, self.std)(x), 16, 3, "conv_0")
        for stage, features in enumerate((16, 32, 64)):
            for i in range(self.blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                block = WideBlock(
                    features * self.width, stride, name=f"block_{stage}_{i}"
                )
                x = block(x, train)
        x = jax.nn.relu(BatchNorm(name="norm")(x, train))
        return dense(jnp.mean(x, (0, 1)), self.classes, "logits")


class DenseNet(nn.Module):
    """Three blocks of `layers` layers that see all before them: -> [K]."""

    layers: int
    growth: int
    classes: int = 10
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits [K] of one example [H, W, C]."""
        x = same_conv(Normalize(self.mean, self.std)(x), 16, 3, "conv_0")
        for block in range(3):
            if block > 0:
                y = jax.nn.relu(BatchNorm(name=f"norm_{block}")(x, train))
                y = same_conv(y, x.shape[-1], 1, f"conv_{block}")
                x = _halved(y)
            for i in range(self.layers):
                y = jax.nn.relu(BatchNorm(name=f"norm_{block}_{i}")(x, train))
                y = same_conv(y, self.growth, 3, f"conv_{block}_{i}")
                x = jnp.concatenate([x, y], axis=-1)
        x = jax.nn.relu(BatchNorm(name="norm")(x, train))
        return dense(jnp.mean(x, (0, 1)), self.classes, "logits")


def _halved(x: Array) -> Array:
    """The mean of each 2x2 square."""
    rows, columns, channels = x.shape[0] // 2, x.shape[1] // 2, x.shape[2]
    whole = x[: 2 * rows, : 2 * columns]
    return jnp.mean(whole.reshape(rows, 2, columns, 2, channels), axis=(1, 3))


def resnet50(
    *, classes: int = 1000, mean: PerChannel = 0.0, std: PerChannel = 1.0
) -> BottleneckResNet:
    """ResNet-50 for 224x224 images (25.6 M parameters), the papers' ImageNet network.

    Source: He et al. 2016, arXiv:1512.03385; the stride in the 3x3 convolution, as in
    torchvision.
    """
    return BottleneckResNet((3, 4, 6, 3), classes, per_channel(mean), per_channel(std))


def wide_resnet(
    *,
    depth: int = 40,
    width: int = 2,
    classes: int = 10,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> WideResNet:
    """WRN-depth-width, depth 6 n + 4; 40-2 in the l1 papers, 28-10 in others.

    Source: Zagoruyko & Komodakis 2016, arXiv:1605.07146; no dropout.
    """
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ValueError(
            f"depth must be 6 n + 4 (16, 28, 40) and width at least 1, got {depth} and "
            f"{width}"
        )
    blocks = (depth - 4) // 6
    return WideResNet(blocks, width, classes, per_channel(mean), per_channel(std))


def densenet40(
    *, classes: int = 10, mean: PerChannel = 0.0, std: PerChannel = 1.0
) -> DenseNet:
    """DenseNet of depth 40 and growth 12 (1.0 M parameters), without bottlenecks.

    Source: Huang et al. 2017, arXiv:1608.06993, table 2; no dropout.
    """
    return DenseNet(12, 12, classes, per_channel(mean), per_channel(std))
