"""Programs that `sound=True` once did not enclose; the search did not find them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax.bounds import alpha_crown, crown, ibp
from certjax.threat import Box, L2, Linf


METHODS = {
    "ibp": lambda f: ibp(f, sound=True),
    "crown": lambda f: crown(f, sound=True),
    "alpha_crown": lambda f: alpha_crown(f, steps=2, sound=True),
}


def check(f, threat, x, points=None, methods=METHODS, exact=()):
    """Values of single operations and of compiled programs are enclosed."""
    points = [x] if points is None else points
    values = [*exact]
    for z in points:
        values += [f(z), jax.jit(f)(z), jax.jit(jax.vmap(f))(z[None])[0]]
    for name in methods:
        lower, upper = jax.jit(lambda x, m=METHODS[name]: m(f)(threat, x))(x)
        for value in values:
            assert not (np.asarray(value, np.float64) < lower).any(), name
            assert not (np.asarray(value, np.float64) > upper).any(), name


def point(*numbers):
    x = jnp.array(numbers, jnp.float32)
    return x, Box(x, x)


def column(*numbers):
    return jnp.array(numbers, jnp.float32)[:, None]


# -------------------------------------------------------------------------- identities


STOPPED = {
    "at the end": lambda x: jax.lax.stop_gradient(x @ jnp.eye(2)) @ jnp.ones((2, 1)),
    "beside": lambda x: jax.lax.stop_gradient(2 * x) + x,
    "around a relu": lambda x: jax.lax.stop_gradient(jax.nn.relu(x - 0.5)) + x,
    "straight through": lambda x: x + jax.lax.stop_gradient(jnp.clip(x, 0.45, 1) - x),
}


@pytest.mark.parametrize("name", STOPPED)
def test_values_behind_stop_gradient_are_perturbed(name):
    """A derivative of zero is none of the function."""
    f, x = STOPPED[name], jnp.array([0.5, 0.5])
    points = [x, x - 0.1, x + 0.1]
    check(f, Linf(0.1), x, points)
    for method in (ibp, crown, partial(crown, intermediate="forward"), alpha_crown):
        bound = method(f)(Linf(0.1), x)
        for z in points:
            assert (bound.lower <= f(z) + 1e-6).all()
            assert (bound.upper >= f(z) - 1e-6).all()


# ------------------------------------------------- constants of a chain combined by XLA


@pytest.mark.parametrize("first", [1.0, 2.0])
def test_tiny_factors_of_a_chain_may_be_flushed(first):
    """(x c) d becomes x (c d): c d is flushed, whatever it is multiplied by later."""
    x, box = point(1e10)
    f = lambda x: ((x @ column(first) * 1e-20) * 1e-20) @ column(1e20) @ column(1.0)
    check(f, box, x, methods=("ibp", "crown"), exact=[np.array([first * 1e-10])])


def test_a_shared_node_may_be_evaluated_twice():
    """(a + c) + d becomes a + (c + d), although a + c is read elsewhere too."""
    params = np.full((4, 3), 0.1, np.float32), np.full(3, -1e8 + 4000, np.float32)

    def f(params, x):
        h = x @ params[0] + params[1] + 1e8
        return jax.nn.relu(h + 1.0) - h

    x = np.full(4, 0.5, np.float32)
    for method in METHODS.values():
        bound = jax.jit(lambda p, x, m=method: m(lambda z: f(p, z))(Linf(1e-3), x))
        lower, upper = bound(params, x)
        for value in (1.0, f(params, x), jax.jit(f)(params, x)):
            assert (lower <= value).all()
            assert (upper >= value).all()


# --------------------------------------------------------------------------- underflow


def test_flushed_coefficients_of_large_nodes():
    """1e-20 times the slope 1e-19 is flushed; times -1e20 it was -1e-19."""
    x, box = point(-1e20)
    f = lambda x: jax.nn.leaky_relu(x, 1e-19) * 1e-20
    check(f, box, x, methods=("crown",), exact=[np.array([-1e-19])])
    g = lambda x: jax.nn.leaky_relu(x, 1e-19) @ column(1e-20)
    check(g, box, x, methods=("crown",), exact=[np.array([-1e-19])])


def test_flushed_squares_in_a_norm():
    """The entries of eps c are 1e-24, and their squares no numbers at all."""
    signs = np.where(np.arange(50) % 2, 1.0, -1.0)
    w = jnp.asarray(1e-20 * signs, jnp.float32)[:, None]
    f = lambda x: ((x - 0.5) @ w) - (x @ w) * 0.5
    x = jnp.zeros(50)
    z = jnp.asarray(signs * 1e-4 / np.sqrt(50) * 0.9999, jnp.float32)
    check(f, L2(1e-4, low=-1.0), x, [x, z, -z], methods=("crown",))
