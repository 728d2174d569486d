"""Functions made fit for loops keep their values and derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from certjax.loops import fori, loopable


X = jax.random.normal(jax.random.key(0), (9, 8, 2))
K = jax.random.normal(jax.random.key(1), (3, 2, 2, 4))


def convolution(stride=(1, 1), padding="SAME", dilation=(1, 1), groups=1):
    def f(x):
        y = lax.conv_general_dilated(
            x[None],
            K[:, :, : 2 // groups],
            stride,
            padding,
            rhs_dilation=dilation,
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.tanh(y[0])

    return f


@jax.custom_vjp
def doubled_gradient(a, b):
    return a * b


doubled_gradient.defvjp(
    lambda a, b: (a * b, (a, b)), lambda saved, g: (2 * g * saved[1], 2 * g * saved[0])
)

KT = K.transpose(3, 2, 0, 1)
FUNCTIONS = {
    "plain": convolution(),
    "strided": convolution((2, 3), [(1, 0), (0, 2)]),
    "strided, rest unused": convolution((4, 4), "VALID"),
    "dilated": convolution(dilation=(2, 1)),
    "strided and dilated": convolution((2, 2), [(2, 1), (1, 0)], dilation=(2, 3)),
    "stride beyond the input": convolution((11, 1), [(0, 4), (0, 0)]),
    "grouped": convolution(groups=2),
    "channels first": lambda x: lax.conv(x.T[None], KT, (2, 1), "SAME"),
    "relu at 0": lambda x: jax.nn.relu(0 * convolution()(x)),
    "softplus": lambda x: jax.nn.softplus(convolution()(x)),
    "own derivative": lambda x: doubled_gradient(
        convolution()(x), x[0, 0, 0] + jnp.ones((9, 8, 4))
    ),
    "own derivative of one value": lambda x: doubled_gradient(*[convolution()(x)] * 2),
}


@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_derivatives_are_kept(name, scatter):
    f = FUNCTIONS[name]
    g = loopable(f, X, scatter=scatter)
    value, pull = jax.vjp(f, X)
    again, pull_again = jax.vjp(g, X)
    np.testing.assert_allclose(again, value, rtol=1e-6, atol=1e-6)  # to rounding
    weight = jax.random.normal(jax.random.key(2), value.shape)
    np.testing.assert_allclose(
        pull_again(weight)[0], pull(weight)[0], rtol=1e-5, atol=1e-5
    )


def test_a_loop_of_gradients_under_jit_and_vmap():
    f = convolution()
    xs = jnp.stack([X, 2 * X])

    @jax.jit
    def descend(steps, xs):
        def one(x):
            slope = jax.grad(lambda z: loopable(f, x)(z).sum())
            return fori(steps, lambda _, z: z - 0.1 * slope(z), x)

        return jax.vmap(one)(xs)

    expected = xs
    for _ in range(3):
        slope = jax.vmap(jax.grad(lambda z: f(z).sum()))
        expected = expected - 0.1 * slope(expected)
    np.testing.assert_allclose(descend(3, xs), expected, rtol=1e-4, atol=1e-5)


def test_parameters_may_be_traced_and_differentiated():
    x = X[..., :1]
    conv = nn.Conv(3, (3, 3))
    params = conv.init(jax.random.key(0), x)

    def loss(params, wrap):
        f = lambda z: conv.apply(params, z)
        return jnp.tanh((loopable(f, x) if wrap else f)(x)).sum()

    grads = [
        jax.jit(jax.grad(loss), static_argnums=1)(params, w) for w in (True, False)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *grads)
