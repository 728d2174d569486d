"""Agreement with auto_LiRPA on fixed weights, where its numbers are at hand."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from certjax.bounds import crown
from certjax.threat import Linf


pytestmark = pytest.mark.slow
METHODS = {
    "crown": crown,
    "crownibp": lambda f: crown(f, "ibp"),
}


def load(folder, name):
    """The reference network, its weights and inputs."""
    spec = importlib.util.spec_from_file_location("weights", folder / "make_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.NETS[name]
    weights = {k: jnp.asarray(v) for k, v in module.make(name).items()}

    def f(weights, x):
        x = x[None]
        for i, (*_, stride, pad) in enumerate(config["convs"]):
            x = lax.conv_general_dilated(
                x,
                weights[f"conv{i}_w"],
                (stride, stride),
                [(pad, pad)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + weights[f"conv{i}_b"].reshape(1, 1, 1, -1))
        x = x.ravel()
        for i in range(len(config["fcs"])):
            x = jax.nn.relu(x) if i else x
            x = x @ weights[f"fc{i}_w"] + weights[f"fc{i}_b"]
        return x

    return f, weights, weights.pop("x")


@pytest.mark.parametrize(
    "case",
    ["small:crownibp:128", "small:crown:16", "medium:crown:1", "cnn7:crownibp:4"],
)
def test_equal_to_auto_lirpa(case, peers_dir):
    name, kind, count = case.split(":")
    f, weights, xs = load(peers_dir, name)
    reference = json.loads((peers_dir / "bounds_auto_lirpa.json").read_text())
    expected = reference["cases"][case]

    @jax.jit
    def bounds(weights, xs):
        method = METHODS[kind](lambda z: f(weights, z))
        return jax.vmap(lambda x: method(Linf(reference["eps"]), x))(xs)

    lower, upper = bounds(weights, xs[: int(count)])
    np.testing.assert_allclose(lower.sum(), expected["lower_sum"], rtol=1e-4)
    np.testing.assert_allclose(upper.sum(), expected["upper_sum"], rtol=1e-4)
    np.testing.assert_allclose(lower[0], expected["first_lower"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(upper[0], expected["first_upper"], rtol=1e-4, atol=1e-4)
