"""Convolutions in the form whose transpose is fast.

The way back runs transposes of convolutions on very many rows. XLA:CPU runs that of a
strided one at a seventh of the speed of stride 1, and any inside a loop slower still:
hence blocks of `stride` pixels become channels where the kernel divides into them, and
the transpose is a plain convolution (`loops.loopable`).
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from certjax.loops import loopable
from certjax.types import Array
from certjax.walk import Equation, primitives


def function_of(
    equation: Equation, values: list, chosen: list[int]
) -> Callable[..., list[Array]]:
    """An equation as a function of the chosen operands, the others at their values."""

    def apply(*args: Array) -> list[Array]:
        if equation.primitive is primitives.conv_general_dilated_p and chosen == [0]:
            padding = equation.params["padding"]
            shape = args[0].shape
            return [convolution(equation.params, values[1], shape, padding)(*args)]
        full = list(values)
        for i, arg in zip(chosen, args, strict=True):
            full[i] = arg
        return equation.bind(*full)

    return apply


def convolution(
    params: dict,
    kernel: Array,
    shape: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Callable[[Array], Array]:
    """The convolution of an equation, as a function of its image, with this padding.

    Args:
      params: the equation's own.
      kernel: its second operand.
      shape: of the image; it may be another than the equation's.
      padding: before and after each image axis.
    """

    def plain(x: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            params["window_strides"],
            padding,
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=params["dimension_numbers"],
            feature_group_count=params["feature_group_count"],
            batch_group_count=params["batch_group_count"],
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )

    def blocked(x: Array) -> Array:
        return _blocked(params, kernel, padding, x)

    f = blocked if _divides(params, kernel) else plain
    # very many rows: the scattered form would hold the products of all kernel taps
    return loopable(f, jnp.zeros(shape, kernel.dtype), scatter=False)


def _divides(params: dict, kernel: Array) -> bool:
    """Is the stride above 1, and the kernel a whole number of strides?"""
    taps = [kernel.shape[axis] for axis in params["dimension_numbers"].rhs_spec[2:]]
    strides = params["window_strides"]
    dilations = (*params["lhs_dilation"], *params["rhs_dilation"])
    return (
        max(strides) > 1
        and all(k % s == 0 for k, s in zip(taps, strides, strict=True))
        and all(d == 1 for d in dilations)
        and params["feature_group_count"] == 1
        and params["batch_group_count"] == 1
    )


def _blocked(
    params: dict, kernel: Array, padding: Sequence[tuple[int, int]], x: Array
) -> Array:
    """Stride-sized blocks as channels, then a convolution of stride 1."""
    numbers, strides = params["dimension_numbers"], params["window_strides"]
    batch, channel, *space = numbers.lhs_spec
    out, into, *taps = numbers.rhs_spec
    x = jnp.transpose(x, (batch, *space, channel))
    kernel = jnp.transpose(kernel, (*taps, into, out))
    sizes = kernel.shape[: len(taps)]
    used = [
        s * ((n + low + high - k) // s) + k
        for n, (low, high), k, s in zip(
            x.shape[1:-1], padding, sizes, strides, strict=True
        )
    ]
    pads = [
        (low, n - old - low, 0)
        for n, old, (low, _) in zip(used, x.shape[1:-1], padding, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    rank = len(strides)
    names = "DHW"[-rank:]
    layout = (f"N{names}C", f"{names}IO", f"N{names}C")
    result = lax.conv_general_dilated(
        _blocks(x, strides, 1),
        _blocks(kernel, strides, 0),
        (1,) * rank,
        "VALID",
        dimension_numbers=layout,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    order = np.argsort(
        (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    )
    return jnp.transpose(result, order)


def _blocks(v: Array, strides: Sequence[int], first: int) -> Array:
    """[..., n/s, ..., (s ... s C), ...]: axes first, first + 1, ... cut into blocks."""
    rank = len(strides)
    lead, space, rest = (
        v.shape[:first],
        v.shape[first : first + rank],
        v.shape[first + rank :],
    )
    pairs = [m for n, s in zip(space, strides, strict=True) for m in (n // s, s)]
    v = v.reshape(*lead, *pairs, *rest)
    outer = [first + 2 * i for i in range(rank)]
    inner = [first + 2 * i + 1 for i in range(rank)]
    tail = list(range(first + 2 * rank, v.ndim))
    v = jnp.transpose(v, (*range(first), *outer, *inner, *tail))
    merged = int(np.prod(strides)) * rest[0]
    return v.reshape(*lead, *(v.shape[first : first + rank]), merged, *rest[1:])
