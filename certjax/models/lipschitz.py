"""Networks whose Lipschitz constant is known by construction, and their certificates.

In l2: layers rescaled until their norm is at most 1 (AOL) or residual layers that are
1-Lipschitz for any weights (SLL), with activations that sort. In linf: neurons that are
distances. A margin then cannot shrink faster than a known factor times the distance, so
that one forward pass certifies, whatever the radius.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from certjax.models.batchnorm import EXAMPLES
from certjax.models.layers import Normalize, per_channel, PerChannel, uniform_fan_in
from certjax.threat import L1, L2, Linf, Threat
from certjax.types import Array, Classifier, Interval


class Lipschitz(NamedTuple):
    """Margins change by at most `margin` times the distance, in the norm of a set.

    norm: the class of the threat set whose norm is meant, `L2` or `Linf`.
    """

    norm: type
    margin: float


def lipschitz_bound(
    f: Classifier, *, model: Any
) -> Callable[[Threat, Array], Interval]:
    """Sound bounds of the margins of a network with a known Lipschitz constant.

    For every z in the set, lower <= f(z) <= upper in exact arithmetic.

    Args:
      f: margins of `model`, i.e. differences of two of its logits, of one example.
      model: a network with a `lipschitz` constant, e.g. `aol_cnn`.

    Raises:
      TypeError: the network has none, or the set is an explicit box.
    """
    known = getattr(model, "lipschitz", None)
    if not isinstance(known, Lipschitz):
        raise TypeError(
            f"{type(model).__name__} has no Lipschitz constant by construction; take "
            "a network such as aol_cnn, or another certifier, e.g. crown"
        )

    def bound(threat: Threat, x: Array) -> Interval:
        values = f(x)
        change = known.margin * _reach(threat, known.norm, x.size)
        return Interval(values - change, values + change)

    return bound


def _reach(threat: Threat, norm: type, size: int) -> Array:
    """The largest distance from x in the given norm that the set allows."""
    if not isinstance(threat, Linf | L2 | L1):
        raise TypeError("an explicit Box has no radius around x; use Linf, L2 or L1")
    factor = math.sqrt(size) if isinstance(threat, Linf) and norm is L2 else 1.0
    return factor * jnp.max(jnp.asarray(threat.eps))


# ------------------------------------------------------------------------- activations


def group_sort(x: Array, size: int = 2) -> Array:
    """Sort the last axis in groups of `size`: an isometry almost everywhere; [..., C].

    Groups of two are MaxMin. Source: Anil et al. 2019, arXiv:1811.05381.
    """
    if x.shape[-1] % size:
        raise ValueError(f"{x.shape[-1]} channels do not divide into groups of {size}")
    groups = x.reshape(*x.shape[:-1], -1, size)
    if size == 2:
        a, b = groups[..., 0], groups[..., 1]
        return jnp.stack([jnp.maximum(a, b), jnp.minimum(a, b)], -1).reshape(x.shape)
    return jnp.sort(groups, axis=-1, descending=True).reshape(x.shape)


def space_to_depth(x: Array, size: int = 2) -> Array:
    """Blocks of pixels become channels: an isometry; [H, W, C] -> [H/s, W/s, s s C]."""
    height, width, channels = x.shape
    x = x.reshape(height // size, size, width // size, size, channels)
    return x.transpose(0, 2, 1, 3, 4).reshape(height // size, width // size, -1)


# ------------------------------------------------------------------------------ layers


def _gram(kernel: Array) -> Array:
    """[out, out]: sums over offsets of the absolute overlaps of a kernel's outputs.

    The row sums bound those of |W W^T|, W the whole linear map, whatever its padding
    and its strides, which only leave rows and columns out. In full precision: what GPUs
    and TPUs take by default would make the norm of a layer exceed 1.
    """
    if kernel.ndim == 2:
        return jnp.abs(jnp.matmul(kernel.T, kernel, precision=EXACT))
    height, width, _, _ = kernel.shape
    overlaps = jax.lax.conv_general_dilated(
        kernel.transpose(3, 0, 1, 2),
        kernel,
        (1, 1),
        [(height - 1, height - 1), (width - 1, width - 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=EXACT,
    )
    return jnp.sum(jnp.abs(overlaps), axis=(1, 2))


def _same(x: Array, kernel: Array) -> Array:
    """The linear map of a kernel: x @ W, or a convolution of stride 1, zero padded."""
    if kernel.ndim == 2:
        return x @ kernel
    return jax.lax.conv_general_dilated(
        x[None],
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]


def _transposed(kernel: Array) -> Array:
    """The kernel of the transposed map; odd sizes only."""
    if kernel.ndim == 2:
        return kernel.T
    return kernel[::-1, ::-1].swapaxes(2, 3)


class AOL(nn.Module):
    """A linear layer of norm at most 1: its outputs rescaled.

    kernel: size of a convolution (odd), or None for a fully connected layer.
    Source: Prach & Lampert 2022, arXiv:2208.03160, theorem 1, for the transposed map.
    """

    features: int
    kernel: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[D] -> [features], or [H, W, C] -> [H, W, features]."""
        weights = _weights(self, x, self.features, self.kernel)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        sums = jnp.sum(_gram(weights), axis=1)
        scale = jax.lax.rsqrt(jnp.maximum(sums, TINY))
        y = _same(x, weights)
        return y * _along(scale, y) + _along(bias, y)


class SLL(nn.Module):
    """`x - 2 W T^-1 relu(W^T x + b)`, 1-Lipschitz for any W, as T bounds W^T W.

    features: columns of W.  kernel: as of `AOL`.
    Source: Araujo et al. 2023, arXiv:2303.03169, theorem 3 and equation 10.
    """

    features: int
    kernel: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Keeps the shape of [D] or [H, W, C]."""
        weights = _weights(self, x, self.features, self.kernel)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        log_q = self.param("log_q", nn.initializers.zeros, (self.features,))
        # q_j / q_i, of which neither must underflow; above exp(80) all are alike
        ratios = jnp.exp(jnp.minimum(log_q[None] - log_q[:, None], 80.0))
        bounds = jnp.sum(_gram(weights) * ratios, axis=1)
        y = _same(x, weights)
        y = jax.nn.relu(y + _along(bias, y)) / _along(jnp.maximum(bounds, TINY), y)
        return x - 2.0 * _same(y, _transposed(weights))


TINY = 1e-12
EXACT = jax.lax.Precision.HIGHEST


def _weights(module: nn.Module, x: Array, features: int, kernel: int | None) -> Array:
    space = () if kernel is None else (kernel, kernel)
    if kernel is not None and kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, got {kernel}: its centre is a pixel")
    shape = (*space, x.shape[-1], features)
    init = uniform_fan_in(math.prod(shape[:-1]))
    return module.param("kernel", init, shape)


def _along(v: Array, like: Array) -> Array:
    """A vector of channels, broadcast over space."""
    return v.reshape((1,) * (like.ndim - 1) + v.shape)


# ---------------------------------------------------------------------------- networks


class LipschitzNet(nn.Module):
    """Stages of equal layers with space-to-depth between; logits 1-Lipschitz in l2.

    (After the normalisation, whose constant 1 / std is part of `lipschitz`.)
    """

    layer: Callable[..., nn.Module]
    width: int
    depth: int
    stages: int
    hidden: tuple[int, ...]
    sorted: bool
    group: int = 2
    classes: int = 10
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def lipschitz(self) -> Lipschitz:
        """Two logits of a 1-Lipschitz map change apart by at most sqrt(2)."""
        return Lipschitz(L2, math.sqrt(2) / min(self.std))

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Logits [K] of one example, [H, W, C] or, without stages, of any shape."""
        x = Normalize(self.mean, self.std)(x)
        for stage in range(self.stages):
            if x.shape[-1] < self.width:  # zeros as further channels: an isometry
                x = jnp.pad(x, [(0, 0), (0, 0), (0, self.width - x.shape[-1])])
            for i in range(self.depth):
                name = f"conv_{stage}_{i}"
                x = self._activated(self.layer(self.width, kernel=3, name=name)(x))
            x = space_to_depth(x) if not (x.shape[0] % 2 or x.shape[1] % 2) else x
        x = x.reshape(-1)
        for i, features in enumerate(self.hidden):
            x = group_sort(AOL(features, name=f"dense_{i}")(x), self.group)
        return AOL(self.classes, name="logits")(x)

    def _activated(self, x: Array) -> Array:
        return group_sort(x, self.group) if self.sorted else x


def aol_cnn(  # noqa: PLR0913 - keyword-only numbers
    *,
    classes: int = 10,
    width: int = 32,
    depth: int = 2,
    stages: int = 2,
    hidden: Sequence[int] = (256,),
    group: int = 2,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> LipschitzNet:
    """AOL convolutions with sorting activations; 1-Lipschitz in l2.

    Args:
      classes: K.
      width: channels of every convolution, a multiple of `group`.
      depth: convolutions of a stage.
      stages: each is followed by `space_to_depth`.
      hidden: fully connected layers, multiples of `group`.
      group: of `group_sort`; 2 is MaxMin.
      mean, std: of the normalisation.
    Source: Prach & Lampert 2022, arXiv:2208.03160.
    """
    numbers = (width, depth, stages, tuple(hidden))
    norms = (per_channel(mean), per_channel(std))
    return LipschitzNet(AOL, *numbers, True, group, classes, *norms)


def sll_cnn(
    *,
    classes: int = 10,
    width: int = 32,
    depth: int = 2,
    stages: int = 2,
    hidden: Sequence[int] = (),
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> LipschitzNet:
    """SLL convolutions, whose own relu is their activation; 1-Lipschitz in l2.

    Arguments as of `aol_cnn`; `width` counts the columns of W as well as the channels.
    Source: Araujo et al. 2023, arXiv:2303.03169.
    """
    numbers = (width, depth, stages, tuple(hidden))
    norms = (per_channel(mean), per_channel(std))
    return LipschitzNet(_SLLBlock, *numbers, False, 2, classes, *norms)


class _SLLBlock(nn.Module):
    """`SLL` in the place of a layer that names its outputs."""

    features: int
    kernel: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return SLL(self.features, self.kernel, name="sll")(x)


class DistanceNet(nn.Module):
    """Neurons that are sorted sums of distances; logits 1-Lipschitz in linf.

    A neuron is `sum_i decay_i |x - w|_(i) + b`, |x - w|_(1) the largest entry,
    decay_i = (1 - share) share^(i - 1), which sum to at most 1; with share = 0 it is
    the linf distance alone. Its batch mean is subtracted, a constant once trained.
    """

    hidden: tuple[int, ...]
    share: float = 0.0
    classes: int = 10
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def lipschitz(self) -> Lipschitz:
        """Two logits move towards each other by at most twice the linf distance."""
        return Lipschitz(Linf, 2.0 / min(self.std))

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits [K] of one example of any shape: the negated last distances."""
        x = Normalize(self.mean, self.std)(x).reshape(-1)
        for i, features in enumerate(self.hidden):
            x = self._distances(x, features, f"distance_{i}")
            x = MeanShift(name=f"shift_{i}")(x, train)
        return -self._distances(x, self.classes, "logits")

    def _distances(self, x: Array, features: int, name: str) -> Array:
        shape = (x.shape[0], features)
        centre = self.param(f"{name}_centre", nn.initializers.normal(1.0), shape)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (features,))
        away = jnp.abs(x[:, None] - centre)
        if self.share == 0:
            return jnp.max(away, axis=0) + bias
        decay = (1.0 - self.share) * self.share ** jnp.arange(x.shape[0])
        return jnp.matmul(decay, jnp.sort(away, axis=0, descending=True)) + bias


class MeanShift(nn.Module):
    """`x - mean` of the batch in training, of the running average otherwise."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[C] -> [C]."""
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape)
        var = self.variable("batch_stats", "var", jnp.ones, x.shape)
        count = self.variable("batch_stats", "count", jnp.ones, ())
        if train:
            mean.value = jax.lax.pmean(x, EXAMPLES)
            var.value = jnp.ones(x.shape)  # not used; kept for the averages' sake
            count.value = jnp.float32(jax.lax.psum(1, EXAMPLES))
        return x - mean.value


def linf_distance_net(
    *,
    classes: int = 10,
    hidden: Sequence[int] = (256, 256),
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> DistanceNet:
    """Neurons that are linf distances. Source: Zhang et al. 2021, arXiv:2102.05363."""
    norms = (per_channel(mean), per_channel(std))
    return DistanceNet(tuple(hidden), 0.0, classes, *norms)


def sortnet(
    *,
    classes: int = 10,
    hidden: Sequence[int] = (256, 256),
    share: float = 0.3,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> DistanceNet:
    """Neurons that are sorted sums of distances; share in [0, 1).

    The paper takes the expectation over a dropout of rate `share` in front of a
    maximum, which is this sum; here it is computed exactly.

    Source: Zhang et al. 2022 (SortNet), arXiv:2210.01787.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got {share}")
    norms = (per_channel(mean), per_channel(std))
    return DistanceNet(tuple(hidden), share, classes, *norms)
