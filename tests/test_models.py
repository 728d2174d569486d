"""Networks: their layers, their initialisation, and what batch norm is frozen at."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from certjax import models


KEY = jax.random.key(0)
XS = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1))
NET = models.cnn4_bn(classes=4, mean=0.3, std=0.4)


@pytest.fixture(scope="module")
def params():
    return jax.jit(NET.init)(KEY, XS[0])["params"]


PARAMETERS = {  # name: (input, parameters as in the papers' code)
    "dm_small": ((28, 28, 1), 329_606),
    "dm_medium": ((28, 28, 1), 893_418),
    "dm_large": ((28, 28, 1), 13_257_290),
    "cnn4_bn": ((28, 28, 1), 818_218),
    "cnn7_bn": ((28, 28, 1), 13_259_338),
    "lenet": ((28, 28, 1), 431_080),
    "ablated_cnn": ((28, 28, 1), 3_320_922),
    "resnet20": ((32, 32, 3), 272_474),
    "resnet110": ((32, 32, 3), 1_730_714),
    "resnet50": ((224, 224, 3), 25_557_032),
    "wide_resnet": ((32, 32, 3), 2_243_546),
    "densenet40": ((32, 32, 3), 1_019_722),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    shape, expected = PARAMETERS[name]
    net = getattr(models, name)()
    made = jax.eval_shape(net.init, KEY, jnp.zeros(shape))
    assert sum(v.size for v in jax.tree.leaves(made["params"])) == expected


@pytest.mark.parametrize(
    "name", ["mlp", "cnn3", "cnn4", "cnn4_bn", "cnn5_bn", "cnn7_bn"]
)
def test_small_images_are_accepted(name):
    net = getattr(models, name)(classes=7)
    variables = jax.eval_shape(net.init, KEY, XS[0])
    assert jax.eval_shape(net.apply, variables, XS[0]).shape == (7,)


def test_too_small_image_names_the_layer_and_a_way_out():
    with pytest.raises(ValueError, match=r"conv_1: a 4x4 .* got shape .*cnn4_bn"):
        models.dm_small().init(KEY, XS[0])


def test_an_image_is_shown_whole_to_a_network_of_ablated_images():
    net = models.Ablated(models.mlp(hidden=(5,)))
    variables = net.init(KEY, XS[0])
    shown = jnp.concatenate([XS[0], 1 - XS[0]], axis=-1)
    np.testing.assert_array_equal(
        net.apply(variables, XS[0]), net.apply(variables, shown)
    )
    with pytest.raises(ValueError, match=r"image of 1 channels.*got \(8, 8, 3\)"):
        net.apply(variables, jnp.zeros((8, 8, 3)))


def test_normalization_is_the_first_layer():
    plain, shifted = models.mlp(hidden=(5,)), models.mlp(hidden=(5,), mean=0.3, std=0.4)
    variables = plain.init(KEY, XS[0])
    here = shifted.apply(variables, XS[0])
    np.testing.assert_allclose(here, plain.apply(variables, (XS[0] - 0.3) / 0.4), 1e-5)


def test_normalization_needs_one_number_per_channel():
    with pytest.raises(ValueError, match=r"mean needs 1 or 1 numbers .* got 3"):
        models.mlp(mean=[0.1, 0.2, 0.3]).init(KEY, XS[0])
    two = models.Normalize((0.0, 1.0), (1.0, 2.0)).apply({}, jnp.ones((3, 3, 2)))
    np.testing.assert_array_equal(two[0, 0], [1.0, 0.0])


def test_default_initialisation_is_uniform_within_fan_in(params):
    fan_in = {"conv_0": 25, "conv_1": 16 * 16, "dense_0": 128, "logits": 512}
    for name, n in fan_in.items():
        for leaf in params[name].values():
            assert (jnp.abs(leaf) <= 1 / math.sqrt(n)).all()


def test_depth_of_a_residual_network():
    with pytest.raises(ValueError, match="6 n"):
        models.resnet(depth=21)
    with pytest.raises(ValueError, match=r"6 n \+ 4 .*got 41 and 2"):
        models.wide_resnet(depth=41)


# ------------------------------------------------------------------ initialisation


def test_ibp_initialisation_redraws_all_but_the_last_layer(params):
    made = jax.jit(lambda key, x: models.ibp_initialize(NET, key, x))(KEY, XS[0])
    made = made["params"]
    for name, layer in made.items():
        if name == "logits" or "kernel" not in layer:
            assert jax.tree.all(jax.tree.map(jnp.array_equal, layer, params[name]))
        else:
            fan_in = math.prod(layer["kernel"].shape[:-1])
            spread = float(jnp.std(layer["kernel"])) * fan_in / math.sqrt(2 * math.pi)
            assert 0.85 < spread < 1.15
            assert (layer["bias"] == params[name]["bias"]).all()


def test_ibp_initialisation_halves_the_branches_of_a_sum():
    class Sum(nn.Module):
        @nn.compact
        def __call__(self, x):
            branch = nn.Dense(64, name="joined_branch")(x)
            return nn.Dense(3, name="logits")(branch + nn.Dense(64, name="plain")(x))

    made = models.ibp_initialize(Sum(), KEY, jnp.zeros(64))["params"]
    ratio = jnp.std(made["joined_branch"]["kernel"]) / jnp.std(made["plain"]["kernel"])
    assert 0.45 < ratio < 0.55


def test_ibp_initialisation_keeps_the_width_of_bounds():
    net = models.mlp(hidden=(400, 400, 400), classes=4)
    made = jax.jit(lambda key, x: models.ibp_initialize(net, key, x))
    params = made(KEY, jnp.zeros(300))["params"]
    width = jnp.ones(300)
    for name in ("dense_0", "dense_1", "dense_2"):
        width = jnp.abs(params[name]["kernel"]).T @ width
        # half-normal mean sqrt(2 / pi) * std * fan_in = 2; a ReLU halves it on average
        assert 1.8 < float(jnp.mean(width)) < 2.2
        width = width / 2


# ----------------------------------------------------------------------- batch norm


def test_frozen_at_its_own_batch_the_network_repeats_the_clean_pass(params):
    @jax.jit
    def both(params):
        logits, statistics = models.clean_forward(NET, params, XS)
        return logits, jax.vmap(models.classifier(NET, params, statistics))(XS)

    np.testing.assert_allclose(*both(params), atol=1e-5)


def test_statistics_are_mean_and_variance_of_the_batch():
    net = models.mlp(hidden=(5,), batch_norm=True)
    params = net.init(KEY, XS[0])["params"]
    _, found = models.clean_forward(net, params, XS)
    layer = params["dense_0"]
    values = np.asarray(XS.reshape(6, -1) @ layer["kernel"]) + np.asarray(layer["bias"])
    batch = found["dense_norm_0"]
    np.testing.assert_allclose(batch["mean"], values.mean(0), atol=1e-6)
    np.testing.assert_allclose(batch["var"], values.var(0), rtol=1e-4)
    running = models.running_average(found, found, momentum=1.0)["dense_norm_0"]
    np.testing.assert_allclose(running["var"], values.var(0, ddof=1), rtol=1e-4)
    assert batch["count"] == 6


def test_running_average_moves_by_the_momentum():
    old = {"norm": {"mean": jnp.ones(2), "var": jnp.ones(2), "count": jnp.ones(())}}
    new = {"norm": {"mean": jnp.zeros(2), "var": jnp.zeros(2), "count": jnp.float32(9)}}
    moved = models.running_average(old, new)["norm"]
    np.testing.assert_allclose(moved["mean"], [0.9, 0.9])
    np.testing.assert_allclose(moved["var"], [0.9, 0.9])


def test_the_gradient_flows_through_the_statistics(params):
    """A bias in front of batch norm cannot matter, unless the statistics are frozen."""

    def through(params):
        return jnp.sum(models.clean_forward(NET, params, XS)[0][:, 0])

    def frozen(params):
        f = models.classifier(NET, params, statistics)
        return jnp.sum(jax.vmap(f)(XS)[:, 0])

    statistics = jax.jit(lambda p: models.clean_forward(NET, p, XS)[1])(params)
    free, held = jax.jit(jax.grad(through))(params), jax.jit(jax.grad(frozen))(params)
    assert jnp.max(jnp.abs(free["dense_0"]["bias"])) < 1e-5
    assert jnp.max(jnp.abs(held["dense_0"]["bias"])) > 1e-3


def test_networks_without_batch_norm_have_no_statistics():
    net = models.mlp(hidden=(5,))
    params = net.init(KEY, XS[0])["params"]
    logits, statistics = models.clean_forward(net, params, XS)
    assert statistics == {}
    f = models.classifier(net, params, statistics)
    np.testing.assert_allclose(jax.vmap(f)(XS), logits, atol=1e-6)


def test_modules_without_a_train_keyword_are_accepted():
    net = nn.Dense(3)
    params = net.init(KEY, XS[0, 0, :, 0])["params"]
    logits, statistics = models.clean_forward(net, params, XS[:, 0, :, 0])
    assert logits.shape == (6, 3)
    assert statistics == {}


def test_population_statistics_weigh_batches_by_size():
    net = models.mlp(hidden=(5,), batch_norm=True)
    params = net.init(KEY, XS[0])["params"]
    both = models.population_statistics(net, params, [XS[:2], XS[2:]])["dense_norm_0"]
    whole = models.population_statistics(net, params, [XS])["dense_norm_0"]
    np.testing.assert_allclose(both["mean"], whole["mean"], atol=1e-6)
    parts = [
        models.population_statistics(net, params, [part])["dense_norm_0"]["var"]
        for part in (XS[:2], XS[2:])
    ]
    np.testing.assert_allclose(
        both["var"], (2 * parts[0] + 4 * parts[1]) / 6, rtol=1e-5
    )
    with pytest.raises(ValueError, match="at least one batch"):
        models.population_statistics(net, params, [])


def test_population_statistics_of_a_model_with_arrays_are_refused():
    class Net(nn.Module):
        shift: jax.Array

        @nn.compact
        def __call__(self, x, train=False):
            return models.mlp(hidden=(5,), batch_norm=True)(x - self.shift, train=train)

    net = Net(jnp.float32(0.5))
    params = net.init(KEY, XS[0])["params"]
    with pytest.raises(TypeError, match="attributes must be hashable"):
        models.population_statistics(net, params, [XS])


def test_population_statistics_of_other_weights_compile_nothing_more():
    traced = []

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            traced.append(1)
            return models.mlp(hidden=(5,), batch_norm=True)(x, train=train)

    net = Net()
    params = net.init(KEY, XS[0])["params"]
    first = models.population_statistics(net, params, [XS, XS])
    before = len(traced)
    double = jax.tree.map(lambda v: 2 * v, params)
    second = models.population_statistics(net, double, [XS])
    assert len(traced) == before
    assert not np.array_equal(*(jax.tree.leaves(v)[1] for v in (first, second)))


# --------------------------------------------------------------------------- foreign


def test_from_nnx_is_the_module_as_a_pure_function():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)
            self.out = nnx.Linear(128, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(jax.nn.relu(self.norm(self.conv(x))).reshape(-1))

    module = Net(nnx.Rngs(0))
    module.eval()
    apply, variables = models.from_nnx(module)
    expected = jnp.stack([module(x) for x in XS])
    found = jax.vmap(apply, in_axes=(None, 0))(variables, XS)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    gradient = jax.grad(lambda v: apply(v, XS[0])[0])(variables)
    assert jnp.any(gradient["out"]["kernel"][...] != 0)
