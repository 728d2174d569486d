"""Equations as functions whose transpose is fast.

The way back runs transposes of convolutions on very many rows.
"""

from collections.abc import Callable

from certjax.convolution import convolve
from certjax.types import Array
from certjax.walk import Equation, primitives


def function_of(
    equation: Equation, values: list, chosen: list[int]
) -> Callable[..., list[Array]]:
    """An equation as a function of the chosen operands, the others at their values."""

    def apply(*args: Array) -> list[Array]:
        full = list(values)
        for i, arg in zip(chosen, args, strict=True):
            full[i] = arg
        if equation.primitive is primitives.conv_general_dilated_p:
            # very many rows: the products of all kernel taps would not fit in memory
            return [convolve(equation.params, *full, scatter=False)]
        return equation.bind(*full)

    return apply
