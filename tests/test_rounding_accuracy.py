"""The accuracy that `bounds.rounding` assumes of XLA, checked on this machine.

A dense sweep of float32 arguments against float64: the error of every elementary
function stays below what its rule charges, with a margin.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special

from certjax.bounds import ibp
from certjax.threat import Box


UNIT = 2.0**-24
TINY = float(np.finfo(np.float32).tiny)
SAMPLES = 2**20


def _gelu_tanh(x):
    return x * special.expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))


FUNCTIONS = {
    "exp": (jnp.exp, np.exp),
    "exp2": (jnp.exp2, np.exp2),
    "expm1": (jnp.expm1, np.expm1),
    "tanh": (jnp.tanh, np.tanh),
    "logistic": (jax.nn.sigmoid, special.expit),
    "erf": (lax.erf, special.erf),
    "erfc": (lax.erfc, special.erfc),
    "log": (jnp.log, np.log),
    "log1p": (jnp.log1p, np.log1p),
    "sqrt": (jnp.sqrt, np.sqrt),
    "rsqrt": (lax.rsqrt, lambda x: 1 / np.sqrt(x)),
    "cbrt": (jnp.cbrt, np.cbrt),
    "atan": (jnp.arctan, np.arctan),
    "sinh": (jnp.sinh, np.sinh),
    "cosh": (jnp.cosh, np.cosh),
    "asinh": (jnp.arcsinh, np.arcsinh),
    "sin": (jnp.sin, np.sin),
    "cos": (jnp.cos, np.cos),
    "silu": (jax.nn.silu, lambda x: x * special.expit(x)),
    "gelu erf": (
        partial(jax.nn.gelu, approximate=False),
        lambda x: x * special.erfc(-x / np.sqrt(2)) / 2,
    ),
    "gelu tanh": (partial(jax.nn.gelu, approximate=True), _gelu_tanh),
    "softplus": (jax.nn.softplus, lambda x: np.logaddexp(x, 0)),
    "elu": (jax.nn.elu, lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0)))),
    "leaky_relu": (
        jax.nn.leaky_relu,
        lambda x: np.where(x > 0, x, np.float64(np.float32(0.01)) * x),
    ),
    "power 2.5": (lambda x: x**2.5, lambda x: x**2.5),
    "power -0.25": (lambda x: x ** jnp.float32(-0.25), lambda x: x**-0.25),
    "two to the x": (lambda x: jnp.power(2.0, x), np.exp2),
    "cube": (lambda x: x**3, lambda x: x**3),
    "power -3": (lambda x: x**-3, lambda x: 1 / (x * x * x)),
}  # fmt: skip


def arguments(samples):
    """Random bit patterns, and dense pieces where the functions bend."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, samples, dtype=np.uint64).astype(np.uint32)
    pieces = [rng.uniform(-w, w, samples).astype(np.float32) for w in (1.5, 10, 110)]
    x = np.concatenate([bits.view(np.float32), *pieces])
    return x[np.isfinite(x) & ((np.abs(x) >= TINY) | (x == 0))]


def check(name, samples):
    """The enclosure of one point allows more than twice the error that XLA makes.

    Half its width is twice the error of the model and three roundings: one error for
    the program's value, one for the bound's own.
    """
    f, reference = FUNCTIONS[name]
    x = arguments(samples)
    lower, upper = jax.jit(lambda v: ibp(f, sound=True)(Box(v, v), v))(x)
    lower, upper = (np.asarray(v, np.float64) for v in (lower, upper))
    with np.errstate(all="ignore"):
        exact = reference(x.astype(np.float64))
    value = np.asarray(jax.jit(f)(x), np.float64)
    judged = np.isfinite(exact) & np.isfinite(lower) & np.isfinite(upper)
    assert judged.mean() > 0.3
    assert np.isfinite(value[judged]).all()
    error = np.abs(value[judged] - exact[judged])
    charge = (upper[judged] - lower[judged]) / 2
    share = np.maximum(error - 4 * TINY, 0) / charge
    worst = np.argmax(share)
    assert share[worst] <= 0.4, f"{share[worst]:.2f} at x = {x[judged][worst]!r}"


@pytest.mark.parametrize("name", ["exp", "tanh", "erf", "logistic"])
def test_xla_is_as_accurate_as_the_model_assumes(name):
    check(name, SAMPLES // 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_xla_is_as_accurate_as_the_model_assumes_everywhere(name):
    check(name, SAMPLES)
