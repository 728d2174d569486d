"""Every split into scattered and gathered image axes is the same transpose."""

import jax
import numpy as np
import pytest
from jax import lax

from certjax.transposed import input_gradient


CASES = {
    "plain": ((9, 8), (3, 2), (1, 1), [(0, 0), (0, 0)], (1, 1)),
    "strided": ((9, 8), (3, 2), (2, 3), [(1, 0), (0, 2)], (1, 1)),
    "dilated": ((9, 8), (3, 2), (2, 1), [(2, 1), (1, 0)], (2, 3)),
    "rest unused": ((9, 8), (3, 2), (4, 4), [(0, 0), (0, 0)], (1, 1)),
    "more padding than kernel": ((5, 5), (2, 2), (1, 1), [(3, 2), (0, 3)], (1, 1)),
    "one axis": ((9,), (4,), (2,), [(1, 1)], (1,)),
    "three axes": ((5, 4, 6), (2, 3, 2), (1, 2, 1), [(1, 1)] * 3, (1, 1, 1)),
}
LAYOUTS = {1: ["NWC", "NCW"], 2: ["NHWC", "NCHW"], 3: ["NDHWC", "NCDHW"]}


@pytest.mark.parametrize("first", [True, False], ids=["channels last", "first"])
@pytest.mark.parametrize("name", CASES)
def test_the_split_does_not_matter(name, first):
    image, taps, stride, padding, dilation = CASES[name]
    rank = len(image)
    layout = LAYOUTS[rank][0 if first else 1]
    kernel_layout = "DHW"[-rank:] + "IO" if first else "OI" + "DHW"[-rank:]
    numbers = lax.conv_dimension_numbers(
        *(tuple(range(rank + 2)),) * 2, (layout, kernel_layout, layout)
    )
    sizes = dict(zip("DHW"[-rank:], image, strict=True)) | {"N": 2, "C": 3}
    kernel_sizes = dict(zip("DHW"[-rank:], taps, strict=True)) | {"I": 3, "O": 4}
    x = jax.random.normal(jax.random.key(0), [sizes[c] for c in layout])
    kernel = jax.random.normal(
        jax.random.key(1), [kernel_sizes[c] for c in kernel_layout]
    )
    params = {
        "dimension_numbers": numbers,
        "window_strides": stride,
        "padding": padding,
        "rhs_dilation": dilation,
        "precision": None,
    }

    def convolve(x):
        return lax.conv_general_dilated(
            x,
            kernel,
            stride,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=numbers,
        )

    value, pull = jax.vjp(convolve, x)
    g = jax.random.normal(jax.random.key(2), value.shape)
    for scattered in range(rank + 1):
        found = input_gradient(params, x.shape, kernel, g, scattered=scattered)
        np.testing.assert_allclose(found, pull(g)[0], rtol=1e-5, atol=1e-5)
