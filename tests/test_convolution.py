"""Every form of the input gradient of a convolution is the same transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from certjax.convolution import convolve, input_gradient


CASES = {
    "plain": ((9, 8), (3, 2), (1, 1), [(0, 0), (0, 0)], (1, 1)),
    "strided": ((9, 8), (3, 2), (2, 3), [(1, 0), (0, 2)], (1, 1)),
    "dilated": ((9, 8), (3, 2), (2, 1), [(2, 1), (1, 0)], (2, 3)),
    "in blocks": ((9, 8), (4, 4), (2, 2), [(1, 1), (0, 3)], (1, 1)),
    "in blocks, before them": ((9, 8), (4, 2), (2, 2), [(3, 0), (2, 5)], (1, 1)),
    "cut": ((9, 8), (3, 2), (2, 3), [(-1, 2), (0, -2)], (1, 1)),
    "rest unused": ((9, 8), (3, 2), (4, 4), [(0, 0), (0, 0)], (1, 1)),
    "more padding than kernel": ((5, 5), (2, 2), (1, 1), [(3, 2), (0, 3)], (1, 1)),
    "one axis": ((9,), (4,), (2,), [(1, 1)], (1,)),
    "three axes": ((5, 4, 6), (2, 3, 2), (1, 2, 1), [(1, 1)] * 3, (1, 1, 1)),
}
LAYOUTS = {1: ["NWC", "NCW"], 2: ["NHWC", "NCHW"], 3: ["NDHWC", "NCDHW"]}


def problem(name, first):
    """A convolution of two images with a kernel, and its parameters as an equation."""
    image, taps, stride, padding, dilation = CASES[name]
    rank = len(image)
    layout = LAYOUTS[rank][0 if first else 1]
    kernel_layout = "DHW"[-rank:] + "IO" if first else "OI" + "DHW"[-rank:]
    sizes = dict(zip("DHW"[-rank:], image, strict=True)) | {"N": 2, "C": 3}
    kernel_sizes = dict(zip("DHW"[-rank:], taps, strict=True)) | {"I": 3, "O": 4}
    x = jax.random.normal(jax.random.key(0), [sizes[c] for c in layout])
    kernel = jax.random.normal(
        jax.random.key(1), [kernel_sizes[c] for c in kernel_layout]
    )

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            stride,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=(layout, kernel_layout, layout),
        )

    (equation,) = jax.make_jaxpr(convolve)(x, kernel).eqns
    return x, kernel, convolve, equation.params


@pytest.mark.parametrize("first", [True, False], ids=["channels last", "first"])
@pytest.mark.parametrize("name", CASES)
def test_the_split_does_not_matter(name, first):
    x, kernel, convolve, params = problem(name, first)
    value, pull = jax.vjp(lambda x: convolve(x, kernel), x)
    g = jax.random.normal(jax.random.key(2), value.shape)
    for scattered in range(x.ndim - 1):
        found = input_gradient(params, x.shape, kernel, g, scattered=scattered)
        np.testing.assert_allclose(found, pull(g)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [True, False], ids=["channels last", "first"])
@pytest.mark.parametrize("name", ["strided", "dilated", "one axis"])
@pytest.mark.parametrize("kernels", [False, True], ids=["one kernel", "many"])
def test_derivatives_are_those_of_autodiff(name, first, kernels):
    x, kernel, convolve, params = problem(name, first)
    shape = jax.eval_shape(convolve, x, kernel).shape
    g = jax.random.normal(jax.random.key(2), (3, *shape))
    kernel = jnp.stack([kernel, 2 * kernel, kernel**2]) if kernels else kernel
    along = (0 if kernels else None, 0)
    weight = jax.random.normal(jax.random.key(3), (3, *x.shape))

    def ours(kernel, g):
        return input_gradient(params, x.shape, kernel, g, scattered=1)

    def plain(kernel, g):
        return jax.vjp(lambda x: convolve(x, kernel), x)[1](g)[0]

    def total(apply):
        return lambda *args: jnp.sum(weight * jnp.sin(jax.vmap(apply, along)(*args)))

    tangents = (jnp.cos(kernel), jnp.cos(g))
    found, wanted = (
        jax.jit(jax.grad(total(apply), (0, 1)))(kernel, g) for apply in (ours, plain)
    )
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    along_tangents = lambda f: jax.jit(lambda *args: jax.jvp(f, args, tangents))
    found, wanted = (along_tangents(total(apply))(kernel, g) for apply in (ours, plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    # one gradient for each example: differentiated before the batch is seen
    each = [
        jax.jit(
            jax.vmap(jax.grad(lambda k, v, f=apply: jnp.sum(jnp.sin(f(k, v)))), along)
        )
        for apply in (ours, plain)
    ]
    np.testing.assert_allclose(*(f(kernel, g) for f in each), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize("batched", ["images", "kernels", "both"])
@pytest.mark.parametrize("name", CASES)
def test_a_convolution_keeps_its_derivatives(name, batched, scatter):
    x, kernel, convolution, params = problem(name, first=True)
    stack = lambda v: jnp.stack([v, 2 * v, v**2])
    x = stack(x) if batched != "kernels" else x
    kernel = stack(kernel) if batched != "images" else kernel
    along = {"images": (0, None), "kernels": (None, 0), "both": 0}[batched]

    def results(apply):
        total = lambda x, w: jnp.sum(jnp.sin(jax.vmap(apply, along)(x, w)))
        slope = jax.grad(total, (0, 1))
        tangents = (jnp.cos(x), jnp.cos(kernel))
        return [slope(x, kernel), jax.jvp(slope, (x, kernel), tangents)]

    ours = lambda x, w: convolve(params, x, w, scatter=scatter)
    found, wanted = (jax.jit(lambda f=f: results(f))() for f in (ours, convolution))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)
    jax.tree.map(close, found, wanted)


def test_the_form_does_not_survive_where_it_does_not_hold():
    x, kernel = jnp.ones((1, 5, 5, 4)), jnp.ones((2, 2, 2, 6))
    grouped = lambda x, w: lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    (equation,) = jax.make_jaxpr(grouped)(x, kernel).eqns
    again = jax.make_jaxpr(lambda x, w: convolve(equation.params, x, w))(x, kernel)
    assert [e.primitive.name for e in again.eqns] == ["conv_general_dilated"]
