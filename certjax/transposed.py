"""The input gradient of a convolution, in the form that is fast on a CPU.

The gradient of one output belongs to every input that its kernel taps touched. An image
axis is *gathered*, each input collecting from the outputs it went to (a convolution of
the gradient with the flipped kernel), or *scattered*, the products with all taps being
computed at each output and then added where they came from. Any split of the axes into
scattered ones first and gathered ones after gives the same numbers to rounding.
"""

import functools
import itertools
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

    def reach(self) -> tuple[int, int]:
        """Padding of the convolution that gathers along this axis."""
        reach = self.dilation * (self.taps - 1)
        spread = self.stride * (self.outputs - 1) + 1
        low = reach - self.before
        return low, self.inputs + reach - spread - low


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
    count, images = g.shape[axes[1]], shape[into]
    g = jnp.moveaxis(g, axes[1], out)
    g = g.reshape(*g.shape[:out], count * images, *g.shape[out + 2 :])
    larger = (*shape[:into], count * images, *shape[into + 1 :])
    found = TRANSPOSED.bind(kernel, g, shape=larger, **params)
    return found.reshape(*shape[:into], count, *shape[into:]), into


TRANSPOSED = bilinear(
    "transposed_convolution",
    _computed,
    shape=lambda *, shape, **_: shape,
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
    taps = (*kernel.shape[:scattered], kernel.shape[rank])
    kernel = jnp.flip(kernel, range(scattered, rank))
    order = (*range(scattered, rank), rank + 1, *range(scattered), rank)
    kernel = jnp.transpose(kernel, order)
    kernel = kernel.reshape(*kernel.shape[: rank - scattered + 1], -1)
    if scattered == rank:
        parts = jnp.tensordot(g, kernel, 1, precision=precision)
        return parts.reshape(*g.shape[:-1], *taps)
    gathered = [False] * scattered + [True] * (rank - scattered)
    pairs = list(zip(axes, gathered, strict=True))
    names = "DHW"[-rank:]
    parts = jax.lax.conv_general_dilated(
        g,
        kernel.reshape((1,) * scattered + kernel.shape),
        window_strides=(1,) * rank,
        padding=[axis.reach() if yes else (0, 0) for axis, yes in pairs],
        lhs_dilation=[axis.stride if yes else 1 for axis, yes in pairs],
        rhs_dilation=[axis.dilation if yes else 1 for axis, yes in pairs],
        dimension_numbers=(f"N{names}C", f"{names}IO", f"N{names}C"),
        precision=precision,
    )
    return parts.reshape(*parts.shape[:-1], *taps)


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
        phases.setdefault(phase, []).append(_padded(part, pads))
    sizes = (
        parts.shape[0],
        *(axis.inputs for axis in axes),
        *parts.shape[1 + rank : first],
    )
    total = jnp.zeros((*sizes, parts.shape[-1]), parts.dtype)
    for phase, shifted in phases.items():
        pads = [axis.interleave(r) for axis, r in zip(axes, phase, strict=True)]
        if all(axis.places(r) for axis, r in zip(axes, phase, strict=True)):
            total += _padded(functools.reduce(jnp.add, shifted), pads)
    return total


def _padded(part: Array, pads: list[tuple[int, int, int]]) -> Array:
    """Pad the axes after the first; a negative number cuts."""
    still = [(0, 0, 0)] * (part.ndim - 1 - len(pads))
    return jax.lax.pad(part, jnp.zeros((), part.dtype), [(0, 0, 0), *pads, *still])
