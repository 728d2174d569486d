"""Networks with a known Lipschitz constant: it holds, and no attack beats it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import models, training
from certjax.attacks import pgd
from certjax.models.lipschitz import AOL, group_sort, SLL, space_to_depth
from certjax.specification import margins
from certjax.threat import Box, L1, L2, Linf


KEY = jax.random.key(0)
IMAGE = (6, 6, 2)
NETS = {
    "aol": models.aol_cnn(classes=3, width=4, depth=1, hidden=(8,), std=0.5),
    "aol_groups": models.aol_cnn(classes=3, width=6, depth=1, hidden=(6,), group=3),
    "sll": models.sll_cnn(classes=3, width=4, depth=1),
    "distance": models.linf_distance_net(classes=3, hidden=(8,)),
    "sortnet": models.sortnet(classes=3, hidden=(8,), share=0.4, std=0.5),
}


def started(net, key=KEY):
    x = jax.random.uniform(jax.random.fold_in(key, 1), IMAGE)
    variables = jax.jit(net.init)(key, x)
    noise = lambda v: v + 0.3 * jax.random.normal(KEY, v.shape)
    variables = jax.tree.map(noise, variables)
    return (lambda z: net.apply(variables, z)), x


LAYERS = {
    "aol_dense": AOL(5),
    "aol_wide": AOL(90),
    "aol_conv": AOL(3, kernel=3),
    "sll_dense": SLL(7),
    "sll_conv": SLL(3, kernel=3),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", range(3))
def test_the_jacobian_of_a_layer_has_norm_at_most_1(name, seed):
    layer, key = LAYERS[name], jax.random.key(seed)
    shape = IMAGE if "conv" in name else (24,)
    x = jax.random.normal(key, shape)
    variables = layer.init(key, x)
    variables = jax.tree.map(lambda v: v + jax.random.normal(key, v.shape), variables)
    jacobian = jax.jacobian(lambda z: layer.apply(variables, z).ravel())(x)
    norm = np.linalg.norm(np.asarray(jacobian).reshape(-1, x.size), 2)
    assert norm <= 1 + 1e-5
    assert norm > 0.3  # the bound is not empty either


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-7, 1.0, 1e18, 1e25])
@pytest.mark.parametrize("log_q", [(0, 0, 0), (-87.1,) * 3, (-99,) * 3, (80, -80, 0)])
def test_no_weights_make_a_norm_exceed_1(size, log_q):
    """Nor do they make a NaN of it: columns of zeros, what underflows or overflows."""
    x = jax.random.normal(KEY, (24,))
    weights = size * jnp.ones((24, 3)).at[:, 0].set(0.0)
    shared = {"kernel": weights, "bias": jnp.full(3, 30 * size)}
    for layer, own in (
        (AOL(3), {}),
        (SLL(3), {"log_q": jnp.float32(jnp.array(log_q))}),
    ):
        apply = lambda z, own=own, layer=layer: layer.apply({"params": shared | own}, z)
        jacobian = np.asarray(jax.jacobian(apply)(x), np.float64)
        assert np.linalg.norm(jacobian, 2) <= 1 + 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_the_constant_of_a_layer_is_computed_in_full_precision(name):
    """All products but those with x, on GPUs and TPUs too."""
    layer = LAYERS[name]
    x = jnp.zeros(IMAGE if "conv" in name else (24,))
    variables = layer.init(KEY, x)
    walked = jax.make_jaxpr(layer.apply)(variables, x)
    products = [e for e in _equations(walked.jaxpr) if "precision" in e.params]
    full = [_is_full(e.params["precision"]) for e in products]
    assert full.count(False) == (2 if "sll" in name else 1)
    assert full.count(True) == 1


def test_fully_connected_layers_of_an_sll_network_are_activated():
    """Without stages and activations its logits would be affine in the image."""
    net = models.sll_cnn(classes=3, stages=0, hidden=(8,))
    x, d = jax.random.normal(KEY, (2, 24))
    variables = net.init(KEY, x)
    f = lambda t: net.apply(variables, x + t * d)
    assert jnp.abs(f(3.0) - 2 * f(0.0) + f(-3.0)).max() > 0.1


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from _equations(inner.jaxpr)


def _is_full(precision):
    highest = jax.lax.Precision.HIGHEST
    return precision in (highest, (highest, highest))


def test_sorting_and_space_to_depth_only_move_entries():
    x = jax.random.normal(KEY, IMAGE)
    for y in (group_sort(x), space_to_depth(x)):
        np.testing.assert_array_equal(np.sort(y.ravel()), np.sort(x.ravel()))
    np.testing.assert_array_equal(
        group_sort(jnp.array([1.0, 3.0, 2.0, 0.0])), [3.0, 1.0, 2.0, 0.0]
    )
    np.testing.assert_array_equal(
        group_sort(jnp.array([1.0, 3.0, 2.0, 0.0]), 4), [3.0, 2.0, 1.0, 0.0]
    )
    with pytest.raises(ValueError, match="groups"):
        group_sort(x, 3)
    corner = space_to_depth(x)[0, 0]
    np.testing.assert_array_equal(corner, x[:2, :2].ravel())


@pytest.mark.parametrize("name", NETS)
def test_no_margin_changes_faster_than_the_constant(name):
    net = NETS[name]
    f, x = started(net)
    threat = net.lipschitz.norm(0.2)
    rows = lambda z: margins(f(z), 1)
    bound = models.lipschitz_bound(rows, model=net)(threat, x)
    zs = jax.vmap(lambda k: threat.sample(k, x))(jax.random.split(KEY, 300))
    found = jax.vmap(rows)(zs)
    assert (found >= bound.lower[None] - 1e-5).all()
    assert (found <= bound.upper[None] + 1e-5).all()
    np.testing.assert_allclose(
        bound.upper - bound.lower, 2 * 0.2 * net.lipschitz.margin, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["aol", "sll", "sortnet"])
def test_no_attack_beats_a_certificate(name):
    net = NETS[name]
    f, x = started(net)
    label = jnp.argmax(f(x))
    rows = lambda z: margins(f(z), label)
    for norm in (L2, Linf):
        for eps in (0.01, 0.05, 0.2):
            threat = norm(eps)
            proved = models.lipschitz_bound(rows, model=net)(threat, x).lower
            z = pgd(threat, steps=20)(KEY, f, x, label)
            assert (rows(z) >= proved - 1e-5).all()


def test_other_norms_are_measured_in_the_networks_own():
    f, x = started(NETS["aol"])
    width = lambda threat: jnp.max(
        -jnp.subtract(*models.lipschitz_bound(f, model=NETS["aol"])(threat, x))
    )
    np.testing.assert_allclose(width(L1(0.1)), width(L2(0.1)), rtol=1e-5)
    sides = math.sqrt(x.size) * width(L2(0.1))
    np.testing.assert_allclose(width(Linf(0.1)), sides, rtol=1e-5)
    with pytest.raises(TypeError, match="Box"):
        width(Box(x, x))


def test_a_network_without_a_constant_is_refused():
    with pytest.raises(TypeError, match="no Lipschitz constant"):
        models.lipschitz_bound(lambda x: x, model=models.mlp())


def test_neurons_by_hand():
    net = models.sortnet(classes=2, hidden=(), share=0.5)
    w = jnp.array([[0.0, 1.0], [0.0, 0.0], [0.0, -1.0]])
    variables = {"params": {"logits_centre": w, "logits_bias": jnp.array([0.0, 0.5])}}
    found = net.apply(variables, jnp.array([0.3, 0.1, 0.2]))
    # sorted distances .3 .2 .1 and 1.2 .7 .1, weights 1/2 1/4 1/8
    expected = [-(0.15 + 0.05 + 0.0125), -(0.6 + 0.175 + 0.0125 + 0.5)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    plain = models.linf_distance_net(classes=2, hidden=())
    found = plain.apply(variables, jnp.array([0.3, 0.1, 0.2]))
    np.testing.assert_allclose(found, [-0.3, -1.7], rtol=1e-5)
    with pytest.raises(ValueError, match="share"):
        models.sortnet(share=1.0)


def test_the_batch_mean_is_subtracted_in_training():
    net = NETS["distance"]
    xs = jax.random.uniform(KEY, (5, *IMAGE))
    params = jax.jit(net.init)(KEY, xs[0])["params"]
    _, found = models.clean_forward(net, params, xs)
    inputs = xs.reshape(5, -1)
    away = jnp.abs(inputs[:, :, None] - params["distance_0_centre"][None])
    np.testing.assert_allclose(found["shift_0"]["mean"], away.max(1).mean(0), rtol=1e-4)
    merged = models.population_statistics(net, params, [xs, xs])
    np.testing.assert_allclose(
        merged["shift_0"]["mean"], found["shift_0"]["mean"], rtol=1e-4
    )


# -------------------------------------------------------------------------- objective


def test_the_margin_loss_is_a_shifted_cross_entropy():
    logits, label = jnp.array([1.0, 2.0, 0.5]), jnp.int32(1)
    f = lambda x: logits + 0.0 * x[0]
    loss = lambda **k: training.lipschitz_margin(**k)(KEY, f, jnp.zeros(1), label)
    plain = loss(threat=L2(0.0), temperature=1.0)
    np.testing.assert_allclose(plain, training.cross_entropy(logits, label), rtol=1e-6)
    shifted = logits.at[1].add(-0.5 * math.sqrt(2))
    np.testing.assert_allclose(
        loss(threat=L2(0.5), temperature=0.5),
        0.5 * training.cross_entropy(shifted / 0.5, label),
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="temperature"):
        loss(threat=L2(0.5), temperature=0.0)


def test_verified_while_training_is_the_certificate():
    net = NETS["aol"]
    f, x = started(net)
    label = jnp.argmax(f(x))
    rows = lambda z: margins(f(z), label)
    margin = jnp.min(rows(x))
    for share in (0.9, 1.1):
        threat = L2(float(share * margin / net.lipschitz.margin))
        objective = training.lipschitz_margin(threat, constant=net.lipschitz.margin)
        terms = training.terms_of(objective)(KEY, f, x, label)
        proved = models.lipschitz_bound(rows, model=net)(threat, x).lower
        assert terms.metrics["verified"] == (proved > 0).all() == (share < 1)
