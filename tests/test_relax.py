"""Every relaxation lies on the right side of its function, whatever the interval."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from certjax.bounds.problem import is_nonlinear
from certjax.bounds.relax import relax
from certjax.bounds.rewrite import prepare
from certjax.types import Interval


def intervals():
    """Pairs l <= u: degenerate, tiny, narrow, wide, huge, one-sided, through 0."""
    centres = [0.0, 1e-6, 0.01, 0.5, 1.0, 2.5, 4.0, 9.0, 60.0]
    radii = [0.0, 1e-7, 1e-4, 0.05, 0.6, 1.0, 3.0, 12.0, 70.0]
    pairs = [(s * c - r, s * c + r) for c in centres for r in radii for s in (-1, 1)]
    pairs += [(0.0, r) for r in radii] + [(-r, 0.0) for r in radii]
    pairs += [(-1e4, 1e4), (-1e4, 1.0), (-1.0, 1e4), (1e3, 1e3 + 0.01), (-3e8, 2e8)]
    low, high = np.float32(np.array(pairs)).T
    return Interval(jnp.asarray(low), jnp.asarray(high))


X = intervals()
SHARES = [0.0, 0.3, 1.0]
SLACK = 1e-6  # of the magnitudes that a line adds up in float32
ELEMENTWISE = {
    "relu": jax.nn.relu,
    "max with 1": lambda x: jnp.maximum(x, 1.0),
    "min with 2": lambda x: jnp.minimum(2.0, x),
    "leaky_relu": jax.nn.leaky_relu,
    "leaky_relu, steep": lambda x: jax.nn.leaky_relu(x, 3.0),
    "leaky_relu, falling": lambda x: jax.nn.leaky_relu(x, -0.4),
    "abs": jnp.abs,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "cosh": jnp.cosh,
    "sinh": jnp.sinh,
    "square": jnp.square,
    "cube": lambda x: x**3,
    "fourth power": lambda x: x**4,
    "reciprocal": lambda x: x**-1,
    "power -2": lambda x: x**-2,
    "power 2.5": lambda x: x**2.5,
    "power 0.5": lambda x: x**0.5,
    "power of two": lambda x: jnp.power(2.0, x),
    "log": jnp.log,
    "log1p": jnp.log1p,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "cbrt": jnp.cbrt,
    "tanh": jnp.tanh,
    "logistic": jax.nn.sigmoid,
    "erf": lax.erf,
    "atan": jnp.arctan,
    "asinh": jnp.arcsinh,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "gelu, erf": partial(jax.nn.gelu, approximate=False),
    "gelu, tanh": partial(jax.nn.gelu, approximate=True),
    "elu": jax.nn.elu,
    "elu, steep": lambda x: jax.nn.elu(x, 1.7),
    "elu, falling": lambda x: jax.nn.elu(x, -0.5),
    "sin": jnp.sin,
    "cos": jnp.cos,
    "floor": jnp.floor,
}


def only_equation(f, x):
    """The one nonlinear equation of f, and the values of its operands."""
    graph, _ = prepare(f, x.lower)
    (equation,) = [
        e for e in graph.equations if any(a in graph.depends for a in e.inputs)
    ]
    values = [x if a in graph.depends else a.value for a in equation.inputs]
    assert is_nonlinear(equation, values)
    return equation, values


def points(x, count=257):
    """[count, ...] float64 points of the interval, denser at the ends."""
    t = (1 - np.cos(np.linspace(0, np.pi, count))) / 2
    low, high = (np.asarray(v, np.float64) for v in x)
    t = t.reshape(-1, *[1] * low.ndim)
    return np.clip(low + t * (high - low), low, high)


def lines_at(f, x, shares):
    """[S, side, (slope, offset), ...] and the gradient of their finite sum."""
    equation, values = only_equation(f, x)

    def lines(x, share):
        replaced = [x if isinstance(v, Interval) else v for v in values]
        zero = jnp.zeros_like(x.lower)
        sides = relax(equation, replaced, share)
        return jnp.stack(
            [jnp.stack([s.slopes[0] + zero, s.offset + zero]) for s in sides]
        )

    def total(x, shares):
        found = jax.vmap(lines, (None, 0))(x, shares)
        return jnp.sum(jnp.where(jnp.isfinite(found), found, 0.0)), found

    return jax.jit(jax.grad(total, has_aux=True))(x, shares)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_lines_enclose_the_function(name):
    f, z = ELEMENTWISE[name], points(X)
    with jax.enable_x64(True):
        truth = np.asarray(f(jnp.asarray(z)), np.float64)
    defined = np.isfinite(truth) & (np.abs(truth) < np.finfo(np.float32).max)
    gradient, found = lines_at(f, X, jnp.array(SHARES))
    for value in (*gradient, found[:, :, :, defined.all(0)]):
        assert not jnp.isnan(value).any()
    far = np.maximum(np.abs(X.lower), np.abs(X.upper))
    for sides in np.asarray(found, np.float64):
        for (slope, offset), sign in zip(sides, (1, -1), strict=True):
            line = np.where(slope == 0, 0.0, slope * z) + offset
            scale = 1e-6 + (0.2 + np.abs(slope)) * far + np.abs(offset) + np.abs(truth)
            over = np.where(defined, sign * (line - truth) - SLACK * scale, -1.0)
            worst = np.unravel_index(np.argmax(over), over.shape)
            assert over[worst] <= 0, (
                f"interval [{X.lower[worst[1]]}, {X.upper[worst[1]]}], "
                f"at {z[worst]}: line {line[worst]}, value {truth[worst]}"
            )
