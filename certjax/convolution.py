"""Convolutions, and above all their input gradient, in the form that is fast on a CPU.

For the input gradient XLA:CPU (jax 0.10 to 0.12 at least, jax-ml/jax#12868) reverses
the kernel, slowly in a loop body, and fills the image with zeros for a stride. It also
makes little of few input channels.

The gradient of one output belongs to every input that its kernel taps touched. An image
axis is *gathered*, each input collecting from the outputs it went to (a convolution of
the gradient with the flipped kernel, whose channels are the inputs of one stride), or
*scattered*, the products with all taps being computed at each output and then added
where they came from. Any split of the axes into scattered ones first and gathered ones
after gives the same numbers to rounding.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.types import Array
from certjax.walk import bilinear, primitives


CONVOLUTION = primitives.conv_general_dilated_p


class _Axis(NamedTuple):
    """One image axis: sizes of input and output, and which tap touches what.

    Tap t of output i came from input `stride * i + dilation * t - before`. Taps of the
    same remainder, or phase, are added before they are spread `stride` apart.
    """

    inputs: int
    outputs: int
    taps: int
    stride: int
    dilation: int
    before: int

    def _offset(self, tap: int) -> tuple[int, int]:
        return divmod(self.dilation * tap - self.before, self.stride)

    def places(self, phase: int) -> int:
        """How many inputs have this phase."""
        return -((phase - self.inputs) // self.stride)

    def phase(self, tap: int) -> int:
        return self._offset(tap)[1]

    def shift(self, tap: int) -> tuple[int, int, int]:
        """Padding that moves a tap's products to their places among the phase's."""
        low, phase = self._offset(tap)
        return low, self.places(phase) - self.outputs - low, 0

    def interleave(self, phase: int) -> tuple[int, int, int]:
        """Padding that spreads the places of a phase over the inputs."""
        used = (self.places(phase) - 1) * self.stride + 1
        return phase, self.inputs - phase - used, self.stride - 1

    @property
    def blocks(self) -> int:
        """How many blocks of `stride` taps the kernel has, the last one filled up."""
        return -((self.dilation * (1 - self.taps) - 1) // self.stride)

    def in_blocks(self) -> tuple[int, int, int]:
        """Padding of the kernel to a whole number of blocks, where the stride is not 1.

        A stride of 1 keeps the taps, and the convolution their dilation.
        """
        if self.stride == 1:
            return 0, 0, 0
        reach = self.dilation * (self.taps - 1) + 1
        return 0, self.blocks * self.stride - reach, self.dilation - 1

    def reach(self) -> tuple[int, int]:
        """Padding of the convolution that gathers the blocks that hold the inputs."""
        reach, first = self.blocks - 1, self.before // self.stride
        last = (self.before + self.inputs - 1) // self.stride
        low = reach - first
        return low, last - first + 1 + reach - self.outputs - low

    def within_blocks(self) -> tuple[int, int, int]:
        """Padding, or rather cutting, of the gathered blocks to the inputs."""
        low = -(self.before % self.stride)
        gathered = self.outputs + sum(self.reach()) - self.blocks + 1
        return low, self.inputs - gathered * self.stride - low, 0


def convolve(
    params: dict[str, Any], image: Array, kernel: Array, *, scatter: bool = True
) -> Array:
    """The convolution of an equation, itself and its input gradient in the fast form.

    Value and derivatives of any order are those of `conv_general_dilated` to rounding;
    it is that where there are groups, input dilation or another result dtype.

    Args:
      params: of the equation.
      image: its first operand.
      kernel: its second one.
      scatter: on the CPU, allow the form that is fastest for strides or few input
        channels, but holds the products of a kernel column, or for fewer than 4
        channels of all kernel taps, at once. Without, only where all products are at
        most twice the size of the result.
    """
    plain = (
        params["feature_group_count"] == 1
        and params["batch_group_count"] == 1
        and all(d == 1 for d in params["lhs_dilation"])
        and params["preferred_element_type"] in (None, kernel.dtype)
    )
    if not plain:
        return CONVOLUTION.bind(image, kernel, **params)
    return CONVOLVED.bind(image, kernel, scatter=scatter, **params)


def _convolved(image: Array, kernel: Array, *, scatter: bool, **params: Any) -> Array:
    del scatter
    if _is_narrow(params, image.shape, kernel.shape):
        return _by_taps(image, kernel, **params)
    return CONVOLUTION.bind(image, kernel, **params)


def _is_narrow(
    params: dict[str, Any], image: tuple[int, ...], kernel: tuple[int, ...]
) -> bool:
    """Few input channels and taps on a CPU, where they leave its vector lanes idle.

    Measured on two cores: 1.4 to 2 times as fast for 1 channel, 1.1 to 1.5 times for 3.
    """
    numbers = params["dimension_numbers"]
    (out, into, *space), sizes = numbers.rhs_spec, numbers.lhs_spec[2:]
    fits = all(
        image[size] + sum(pads) > dilation * (kernel[axis] - 1)
        for size, pads, axis, dilation in zip(
            sizes, params["padding"], space, params["rhs_dilation"], strict=True
        )
    )
    few = kernel[into] < 4 and math.prod(kernel) <= 27 * kernel[out]
    return few and fits and jax.default_backend() == "cpu"


def _by_taps(image: Array, kernel: Array, **params: Any) -> Array:
    """The convolution as a matrix product with the inputs of all taps side by side."""
    numbers, strides = params["dimension_numbers"], params["window_strides"]
    out, into, *space = numbers.rhs_spec
    kernel = jnp.transpose(kernel, (*space, into, out))
    image = jnp.transpose(image, _channels_last(numbers.lhs_spec))
    image = _padded(image, [(*pads, 0) for pads in params["padding"]], 1)
    taps, dilations = kernel.shape[:-2], params["rhs_dilation"]

    def seen(tap: tuple[int, ...]) -> Array:
        along = zip(tap, taps, image.shape[1:-1], strides, dilations, strict=True)
        cut = [slice(d * t, n - d * (k - 1 - t), s) for t, k, n, s, d in along]
        return image[(slice(None), *cut)]

    columns = [seen(tap) for tap in itertools.product(*map(range, taps))]
    flat = kernel.reshape(-1, kernel.shape[-1])
    joined = jnp.concatenate(columns, axis=-1)
    result = jnp.matmul(joined, flat, precision=params["precision"])
    return jnp.transpose(result, np.argsort(_channels_last(numbers.out_spec)))


def _towards_image(
    g: Array, image: Any, kernel: Array, *, scatter: bool, **params: Any
) -> Array:
    shape = image.aval.shape
    scattered = _scattered_axes(params, shape, kernel, g, scatter)
    return input_gradient(params, shape, kernel, g, scattered=scattered)


def _scattered_axes(
    params: dict[str, Any],
    shape: tuple[int, ...],
    kernel: Array,
    g: Array,
    scatter: bool,
) -> int:
    """How many image axes to scatter over: all, the rows, or none.

    Measured on two cores, against none. All: 2 to 4 times as fast for 1 to 3 input
    channels. Rows: 1.2 to 1.5 times for strides that do not divide the kernel; for
    stride 1, 1.3 to 2.4 times where there are 1.2 times as many rows of inputs as of
    outputs, or up to 20 channels and any more rows; but 0.8 times for 1.08 times the
    rows and 128 channels.
    """
    numbers = params["dimension_numbers"]
    (out, into, *taps), strides = numbers.rhs_spec, params["window_strides"]
    channels, outputs = kernel.shape[into], kernel.shape[out]
    if jax.default_backend() != "cpu":
        return 0
    light = scatter or kernel.size / outputs <= 2 * outputs  # products per output of g
    if channels < 4:
        return (len(shape) - 2) if light else 0
    if max(strides) > 1:
        pairs = zip(taps, strides, strict=True)
        return int(light and any(kernel.shape[axis] % s for axis, s in pairs))
    taller = shape[numbers.lhs_spec[2]] / max(g.shape[numbers.out_spec[2]], 1)
    return int(taller >= 1.2 or (taller > 1.0 and channels <= 20))


def _towards_weights(
    g: Array, image: Array, kernel: Any, *, scatter: bool, **params: Any
) -> Array:
    del scatter
    apply = lambda w: CONVOLUTION.bind(image, w, **params)
    return jax.linear_transpose(apply, kernel.aval)(g)[0]


def _convolved_shape(image: Any, kernel: Any, **params: Any) -> tuple[int, ...]:
    return jax.eval_shape(functools.partial(_convolved, **params), image, kernel).shape


def _convolved_batch(
    values: tuple[Array, Array], axes: tuple[int | None, int | None], **params: Any
) -> tuple[Array, int]:
    """Under vmap: one bigger batch of images where they share the kernel."""
    image, kernel = values
    if axes[1] is not None:
        return jax.vmap(functools.partial(_convolved, **params), axes)(*values), 0
    numbers = params["dimension_numbers"]
    into, out = numbers.lhs_spec[0], numbers.out_spec[0]
    image, sizes = _merged(image, axes[0], into)
    return _separated(CONVOLVED.bind(image, kernel, **params), sizes, out), out


def _merged(v: Array, axis: int, into: int) -> tuple[Array, tuple[int, ...]]:
    """The batch of vmap, at `axis`, made part of axis `into`; the sizes of both."""
    v = jnp.moveaxis(v, axis, into)
    sizes = v.shape[into : into + 2]
    return v.reshape(*v.shape[:into], math.prod(sizes), *v.shape[into + 2 :]), sizes


def _separated(v: Array, sizes: tuple[int, ...], axis: int) -> Array:
    """The inverse of `_merged`, the batch in front of the axis it was merged into."""
    return v.reshape(*v.shape[:axis], *sizes, *v.shape[axis + 1 :])


CONVOLVED = bilinear(
    "convolution",
    _convolved,
    shape=_convolved_shape,
    transposes=(_towards_image, _towards_weights),
    batched=_convolved_batch,
)


def input_gradient(
    params: dict[str, Any],
    shape: tuple[int, ...],
    kernel: Array,
    g: Array,
    *,
    scattered: int,
) -> Array:
    """The transpose of an ungrouped convolution without input dilation, at g.

    Linear in the kernel and in g. Its derivatives are a convolution and a convolution's
    kernel gradient, for a whole batch at once, and not those of a sum over kernel taps:
    a training step with linear bounds takes a sixth of the time.

    Args:
      params: of the equation (`conv_general_dilated`).
      shape: of its image.
      kernel: its kernel.
      g: an array like its result.
      scattered: how many image axes, from the first, to scatter over.

    Returns:
      An array of that shape.
    """
    return TRANSPOSED.bind(kernel, g, shape=shape, scattered=scattered, **params)


def _computed(
    kernel: Array, g: Array, *, shape: tuple[int, ...], scattered: int, **params: Any
) -> Array:
    numbers = params["dimension_numbers"]
    out, into, *space = numbers.rhs_spec
    kernel = jnp.transpose(kernel, (*space, into, out))
    g = jnp.transpose(g, _channels_last(numbers.out_spec))
    image = [shape[axis] for axis in _channels_last(numbers.lhs_spec)]
    axes = [
        _Axis(*sizes, before)
        for *sizes, (before, _) in zip(
            image[1:-1],
            g.shape[1:-1],
            kernel.shape[:-2],
            params["window_strides"],
            params["rhs_dilation"],
            params["padding"],
            strict=True,
        )
    ]
    parts = _products(axes, kernel, g, scattered, params["precision"])
    total = _added(axes[:scattered], parts)
    return jnp.transpose(total, np.argsort(_channels_last(numbers.lhs_spec)))


def _towards_kernel(
    x: Array, kernel: Any, g: Array, *, shape: tuple, scattered: int, **params: Any
) -> Array:
    """<x, the transpose at g> = <convolution of x, g>, as a function of the kernel."""
    del shape, scattered
    convolve = lambda w: CONVOLUTION.bind(x, w, **params)
    return jax.linear_transpose(convolve, kernel.aval)(g)[0]


def _towards_g(
    x: Array, kernel: Array, g: Any, *, shape: tuple, scattered: int, **params: Any
) -> Array:
    del g, shape, scattered
    return CONVOLUTION.bind(x, kernel, **params)


def _batched(
    values: tuple[Array, Array],
    axes: tuple[int | None, int | None],
    *,
    shape: tuple[int, ...],
    **params: Any,
) -> tuple[Array, int]:
    """Under vmap: one bigger batch of images where they share the kernel."""
    kernel, g = values
    if axes[0] is not None:
        apply = functools.partial(_computed, shape=shape, **params)
        return jax.vmap(apply, axes)(kernel, g), 0
    numbers = params["dimension_numbers"]
    into, out = numbers.lhs_spec[0], numbers.out_spec[0]
    g, sizes = _merged(g, axes[1], out)
    larger = (*shape[:into], math.prod(sizes), *shape[into + 1 :])
    found = TRANSPOSED.bind(kernel, g, shape=larger, **params)
    return _separated(found, sizes, into), into


TRANSPOSED = bilinear(
    "transposed_convolution",
    _computed,
    shape=lambda _kernel, _g, *, shape, **_: shape,
    transposes=(_towards_kernel, _towards_g),
    batched=_batched,
)


def _channels_last(spec: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of an array of this layout in the order [N, ..., C]."""
    first, channel, *image = spec
    return (first, *image, channel)


def _products(
    axes: list[_Axis], kernel: Array, g: Array, scattered: int, precision: Any
) -> Array:
    """[N, outputs or inputs, ..., taps, ..., C]: summed over taps along gathered axes.

    kernel is [taps, ..., C, out], g [N, outputs, ..., out]; only the scattered axes
    keep their taps.
    """
    rank = len(axes)
    if scattered == rank:
        flat = jnp.moveaxis(kernel, -1, 0)
        parts = jnp.tensordot(g, flat.reshape(len(flat), -1), 1, precision=precision)
        return parts.reshape(*g.shape[:-1], *flat.shape[1:])
    gathered = axes[scattered:]
    kernel = _blocked(gathered, kernel, scattered)
    names = "DHW"[-rank:]
    parts = jax.lax.conv_general_dilated(
        g,
        kernel.reshape(*kernel.shape[: rank + 1], -1),
        window_strides=(1,) * rank,
        padding=[(0, 0)] * scattered + [axis.reach() for axis in gathered],
        rhs_dilation=[1] * scattered
        + [axis.dilation if axis.stride == 1 else 1 for axis in gathered],
        dimension_numbers=(f"N{names}C", f"{names}IO", f"N{names}C"),
        precision=precision,
    )
    parts = parts.reshape(*parts.shape[:-1], *kernel.shape[rank + 1 :])
    return _interleaved(gathered, parts, scattered)


def _blocked(gathered: list[_Axis], kernel: Array, scattered: int) -> Array:
    """[1, ..., blocks, ..., out, strides, ..., taps, ..., C] of [taps, ..., C, out]."""
    count = len(gathered)
    pads = [axis.in_blocks() for axis in gathered]
    kernel = _padded(kernel, pads, scattered)
    taps, (channels, outputs) = kernel.shape[:scattered], kernel.shape[-2:]
    pairs = [
        size
        for axis, padded in zip(gathered, kernel.shape[scattered:], strict=False)
        for size in (padded // axis.stride, axis.stride)
    ]
    kernel = kernel.reshape(*taps, *pairs, channels, outputs)
    blocks = range(scattered, scattered + 2 * count, 2)
    strides = range(scattered + 1, scattered + 2 * count, 2)
    kernel = jnp.flip(kernel, blocks)
    last = kernel.ndim - 1
    order = (*blocks, last, *strides, *range(scattered), last - 1)
    kernel = jnp.transpose(kernel, order)
    return kernel.reshape((1,) * scattered + kernel.shape)


def _interleaved(gathered: list[_Axis], parts: Array, scattered: int) -> Array:
    """[N, outputs, ..., inputs, ..., taps, ..., C], the strides put in their blocks.

    parts is [N, outputs, ..., blocks, ..., strides, ..., taps, ..., C].
    """
    count, first = len(gathered), 1 + scattered
    pairs = [first + i + j for i in range(count) for j in (0, count)]
    rest = range(first + 2 * count, parts.ndim)
    parts = jnp.transpose(parts, (*range(first), *pairs, *rest))
    sizes = [
        parts.shape[first + 2 * i] * axis.stride for i, axis in enumerate(gathered)
    ]
    tail = parts.shape[first + 2 * count :]
    parts = parts.reshape(*parts.shape[:first], *sizes, *tail)
    return _padded(parts, [axis.within_blocks() for axis in gathered], first)


def _added(axes: list[_Axis], parts: Array) -> Array:
    """[N, inputs, ..., C]: the products of each tap added where they came from."""
    if not axes:
        return parts
    rank = len(axes)
    first = parts.ndim - 1 - rank  # the taps are the last axes but the channels
    phases: dict[tuple[int, ...], list[Array]] = {}
    for tap in itertools.product(*(range(axis.taps) for axis in axes)):
        phase = tuple(axis.phase(t) for axis, t in zip(axes, tap, strict=True))
        pads = [axis.shift(t) for axis, t in zip(axes, tap, strict=True)]
        part = parts[(slice(None),) * first + tap]
        phases.setdefault(phase, []).append(_padded(part, pads, 1))
    sizes = (
        parts.shape[0],
        *(axis.inputs for axis in axes),
        *parts.shape[1 + rank : first],
    )
    total = jnp.zeros((*sizes, parts.shape[-1]), parts.dtype)
    for phase, shifted in phases.items():
        pads = [axis.interleave(r) for axis, r in zip(axes, phase, strict=True)]
        if all(axis.places(r) for axis, r in zip(axes, phase, strict=True)):
            total += _padded(functools.reduce(jnp.add, shifted), pads, 1)
    return total


def _padded(part: Array, pads: list[tuple[int, int, int]], first: int) -> Array:
    """Pad the axes from the given one on; a negative number cuts."""
    still = [(0, 0, 0)] * (part.ndim - first - len(pads))
    config = [(0, 0, 0)] * first + [*pads, *still]
    return jax.lax.pad(part, jnp.zeros((), part.dtype), config)
