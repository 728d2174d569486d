"""The feed-forward networks of the certified-training papers, layer by layer.

Every network is a Linen module of ONE example, [H, W, C] or [D], in [0, 1]; the
normalisation is its first layer. In the tables below `C64k3s2p1` is a convolution with
64 channels, kernel 3, stride 2, padding 1 a side, `F512` a fully connected layer; a
ReLU follows each, after batch normalisation where the name ends in `_bn`.

The `_bn` networks and `mlp` accept 8x8 images; `dm_small` needs 10x10, `dm_medium`
16x16 (no padding), `lenet` 16x16.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax

from certjax.models.batchnorm import BatchNorm
from certjax.models.layers import (
    conv,
    dense,
    max_pool,
    Normalize,
    per_channel,
    PerChannel,
)
from certjax.types import Array


class Convolution(NamedTuple):
    """One convolution of a `ConvNet`; pool: size of the max pooling after the ReLU."""

    features: int
    kernel: int
    stride: int = 1
    padding: int = 0
    pool: int = 1


class ConvNet(nn.Module):
    """Convolutions, then fully connected layers, then the logits: [H, W, C] -> [K].

    Without convolutions it is a multilayer perceptron of an input of any shape.
    """

    convolutions: tuple[Convolution, ...]
    hidden: tuple[int, ...]
    classes: int = 10
    batch_norm: bool = False
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits [K] of one example."""
        x = Normalize(self.mean, self.std)(x)
        for i, layer in enumerate(self.convolutions):
            x = self._convolve(x, layer, f"conv_{i}")
            x = jax.nn.relu(self._normalize(x, f"conv_norm_{i}", train))
            if layer.pool > 1:
                x = max_pool(x, layer.pool)
        x = x.reshape(-1)
        for i, features in enumerate(self.hidden):
            x = dense(x, features, f"dense_{i}")
            x = jax.nn.relu(self._normalize(x, f"dense_norm_{i}", train))
        return dense(x, self.classes, "logits")

    def _convolve(self, x: Array, layer: Convolution, name: str) -> Array:
        return conv(
            x,
            layer.features,
            kernel=layer.kernel,
            stride=layer.stride,
            padding=layer.padding,
            name=name,
        )

    def _normalize(self, x: Array, name: str, train: bool) -> Array:
        return BatchNorm(name=name)(x, train) if self.batch_norm else x


def _build(
    convolutions: Sequence[tuple[int, ...]],
    hidden: Sequence[int],
    classes: int,
    mean: PerChannel,
    std: PerChannel,
    batch_norm: bool = False,
) -> ConvNet:
    return ConvNet(
        tuple(Convolution(*c) for c in convolutions),
        tuple(hidden),
        classes,
        batch_norm,
        per_channel(mean),
        per_channel(std),
    )


def mlp(
    *,
    classes: int = 10,
    hidden: Sequence[int] = (256, 256),
    batch_norm: bool = False,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> ConvNet:
    """A multilayer perceptron of an input of any shape."""
    return _build((), hidden, classes, mean, std, batch_norm)


def dm_small(
    *, classes: int = 10, mean: PerChannel = 0.0, std: PerChannel = 1.0
) -> ConvNet:
    """C16k4s2p0 C32k4s1p0 F100. Source: Gowal et al. 2018, arXiv:1810.12715."""
    return _build([(16, 4, 2), (32, 4, 1)], (100,), classes, mean, std)


def dm_medium(
    *, classes: int = 10, mean: PerChannel = 0.0, std: PerChannel = 1.0
) -> ConvNet:
    """C32k3s1p0 C32k4s2p0 C64k3s1p0 C64k4s2p0 F512 F512. Source: as `dm_small`."""
    convolutions = [(32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)]
    return _build(convolutions, (512, 512), classes, mean, std)


_SEVEN = [(64, 3, 1, 1), (64, 3, 1, 1), (128, 3, 2, 1), (128, 3, 1, 1), (128, 3, 1, 1)]


def dm_large(
    *, classes: int = 10, mean: PerChannel = 0.0, std: PerChannel = 1.0
) -> ConvNet:
    """C64k3s1p1 C64k3s1p1 C128k3s2p1 C128k3s1p1 C128k3s1p1 F512. As `dm_small`."""
    return _build(_SEVEN, (512,), classes, mean, std)


def cnn3(
    *,
    classes: int = 10,
    batch_norm: bool = False,
    width: int = 16,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> ConvNet:
    """C(w)k5s2p2 C(2w)k4s2p1; width 16, in the wide variant 64.

    Source: Mao et al. 2025 (CTBench), arXiv:2406.04848.
    """
    convolutions = [(width, 5, 2, 2), (2 * width, 4, 2, 1)]
    return _build(convolutions, (), classes, mean, std, batch_norm)


def cnn4(
    *,
    classes: int = 10,
    batch_norm: bool = False,
    width: int = 16,
    kernel: int = 5,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> ConvNet:
    """C(w)k5s2p2 C(2w)k4s2p1 F512; width 16 and kernel 5 in CTBench.

    kernel: of the first layer. With 2 its filters see disjoint patches of 2 x 2 pixels;
      at large eps interval bounds pay for every pixel that a filter adds up.
    Source: as `cnn3`.
    """
    convolutions = [(width, kernel, 2, (kernel - 1) // 2), (2 * width, 4, 2, 1)]
    return _build(convolutions, (512,), classes, mean, std, batch_norm)


def cnn4_bn(
    *,
    classes: int = 10,
    width: int = 16,
    kernel: int = 5,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> ConvNet:
    """`cnn4` with batch normalisation after each of its three layers."""
    return cnn4(
        classes=classes,
        batch_norm=True,
        width=width,
        kernel=kernel,
        mean=mean,
        std=std,
    )


def cnn5_bn(
    *, classes: int = 10, mean: PerChannel = 0.0, std: PerChannel = 1.0
) -> ConvNet:
    """C16k3s1p1 C16k4s2p1 C32k4s2p1 F512, batch normalisation. Source: as `cnn3`."""
    convolutions = [(16, 3, 1, 1), (16, 4, 2, 1), (32, 4, 2, 1)]
    return _build(convolutions, (512,), classes, mean, std, True)


def cnn7_bn(
    *,
    classes: int = 10,
    last_stride: int = 1,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> ConvNet:
    """`dm_large` with batch normalisation after each of its six layers.

    last_stride: stride of the fifth convolution; 2 for 64x64 images.
    Source: Shi et al. 2021, arXiv:2103.16889, section 5.
    """
    convolutions = [*_SEVEN[:-1], (128, 3, last_stride, 1)]
    return _build(convolutions, (512,), classes, mean, std, True)


def lenet(
    *, classes: int = 10, mean: PerChannel = 0.0, std: PerChannel = 1.0
) -> ConvNet:
    """C20k5 pool2 C50k5 pool2 F500: the MNIST network of the smoothing papers.

    Source: Zhai et al. 2020 (MACER), arXiv:2001.02378, appendix.
    """
    convolutions = [(20, 5, 1, 0, 2), (50, 5, 1, 0, 2)]
    return _build(convolutions, (500,), classes, mean, std)
