"""Objectives of certified training: limit cases, order, gradients, cut networks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import bounds, training
from certjax.models.batchnorm import EXAMPLES
from certjax.specification import margins
from certjax.threat import Box, L2, Linf
from certjax.training.segments import shrunk_ibp, split
from certjax.types import Interval


KEY = jax.random.key(0)
X = jnp.linspace(0.1, 0.9, 6)
LABEL = jnp.int32(1)
THREAT = Linf(0.1)


def weights(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 8), "b": (8,), "c": (8, 8), "d": (8,), "e": (8, 3)}
    return {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in shapes.items()}


def net(w):
    def f(x):
        hidden = jax.nn.relu(x @ w["a"] + w["b"])
        return jax.nn.relu(hidden @ w["c"] + w["d"]) @ w["e"]

    return f


def corner(threat, *, loss=None):
    """The corner of the box with the largest coordinates: a fixed 'attack'."""
    return lambda key, f, x, label: threat.box(x).upper


def centre(threat, *, loss=None):
    """The centre of the box."""
    return lambda key, f, x, label: sum(threat.box(x)) / 2


IBP = training.ibp(THREAT)
EXPRESSIVE = {
    "mtl": training.mtl_ibp,
    "cc": training.cc_ibp,
    "exp": training.exp_ibp,
}
OBJECTIVES = {
    "crown_ibp": training.crown_ibp(THREAT, beta=0.6, kappa=0.2),
    "fused": training.crown_ibp_fused(THREAT, beta=0.6),
    "sabr": training.sabr(THREAT, attack=corner, ratio=0.4, kappa=0.2),
    "shrunk": training.sabr(THREAT, attack=corner, ratio=0.4, shrink=0.8),
    "mart": training.mart(THREAT, attack=corner),
    "arow": training.arow(THREAT, attack=corner),
} | {
    name: make(THREAT, attack=corner, alpha=0.3, kappa=0.1)
    for name, make in EXPRESSIVE.items()
}


def value(objective, w, x=X, key=KEY):
    return objective(key, net(w), x, LABEL)


def same(a, b, rtol=1e-5):
    np.testing.assert_allclose(value(a, weights()), value(b, weights()), rtol=rtol)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_agree_with_finite_differences(name):
    objective = OBJECTIVES[name]
    with jax.enable_x64(True):
        w, x = weights(jnp.float64), X.astype(jnp.float64)
        direction = jax.tree.map(
            lambda v: jnp.cos(jnp.arange(v.size)).reshape(v.shape), w
        )

        def along(t):
            moved = jax.tree.map(lambda v, d: v + t * d, w, direction)
            return value(objective, moved, x)

        slope = jax.jit(jax.grad(along))(0.0)
        ends = jax.jit(jax.vmap(along))(jnp.array([-1e-6, 1e-6]))
        np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-6, rtol=1e-5)


# ------------------------------------------------------------------------ limit cases


@pytest.mark.parametrize("make", EXPRESSIVE.values(), ids=EXPRESSIVE)
def test_expressive_losses_end_in_ibp_and_in_adversarial_training(make):
    same(make(THREAT, attack=corner, alpha=1.0), IBP)
    attacked = training.adversarial(THREAT, attack=corner)
    same(make(THREAT, attack=corner, alpha=0.0), attacked)


@pytest.mark.parametrize("make", EXPRESSIVE.values(), ids=EXPRESSIVE)
def test_expressive_losses_grow_with_alpha(make):
    found = [
        value(make(THREAT, attack=corner, alpha=a), weights())
        for a in (0.0, 0.2, 0.5, 1.0)
    ]
    assert found == sorted(found)


def test_an_expressive_loss_has_a_finite_gradient_where_the_attack_fails():
    """EXP-IBP raises a loss of 0 to a fractional power there."""
    w = weights()
    w["e"] = jnp.zeros((8, 3)).at[:, 1].set(100.0)
    objective = training.exp_ibp(THREAT, attack=corner, alpha=0.5)
    gradient = jax.grad(lambda w: value(objective, w))(w)
    assert all(jnp.isfinite(g).all() for g in gradient.values())


def test_sabr_with_the_whole_box_is_ibp_and_with_none_of_it_adversarial():
    same(training.sabr(THREAT, attack=corner, ratio=1.0), IBP)
    attacked = training.adversarial(THREAT, attack=corner)
    same(training.sabr(THREAT, attack=corner, ratio=0.0), attacked)


def test_a_small_box_lies_inside_the_set_and_holds_the_adversarial_point():
    region = training.small_box(THREAT, attack=corner, ratio=0.3)
    box = region(KEY, net(weights()), X, LABEL)
    around = THREAT.box(X)
    np.testing.assert_allclose(box.upper, around.upper, rtol=1e-6)
    widths = np.subtract(*box.box(X)[::-1]), np.subtract(*around[::-1])
    np.testing.assert_allclose(widths[0], 0.3 * widths[1], rtol=1e-4)


def test_crown_ibp_without_linear_bounds_is_ibp():
    same(training.crown_ibp(THREAT, beta=0.0), IBP)
    same(training.crown_ibp_fused(THREAT, beta=0.0), IBP)
    same(
        training.crown_ibp(THREAT, beta=0.0, kappa=0.3), training.ibp(THREAT, kappa=0.3)
    )


@pytest.mark.parametrize("make", [training.crown_ibp, training.crown_ibp_fused])
def test_linear_bounds_are_tighter_than_ibp_and_above_every_point(make):
    w, objective = weights(), make(THREAT)
    worst = value(objective, w)
    assert worst <= value(IBP, w)
    for i in range(20):
        z = THREAT.sample(jax.random.key(i), X)
        assert training.cross_entropy(net(w)(z), LABEL) <= worst


def test_the_fused_loss_keeps_finite_gradients_under_huge_bounds():
    w = jax.tree.map(lambda v: 30 * v, weights())
    objective = training.crown_ibp_fused(THREAT)
    loss, gradient = jax.value_and_grad(lambda w: value(objective, w))(w)
    assert loss > 1e3
    assert all(jnp.isfinite(g).all() for g in gradient.values())


# ------------------------------------------------------------------------------- taps


def test_taps_behind_the_last_activation_is_ibp_squared():
    """There margins are affine in the latent box: the attacks reach their minimum."""
    attack = partial(training.ascent, steps=3, step=2.0)
    taps = training.taps(THREAT, attack=attack, behind=0)
    np.testing.assert_allclose(
        value(taps, weights()), value(IBP, weights()) ** 2, rtol=1e-4
    )


@pytest.mark.parametrize("box", [training.whole_set, None])
def test_attacked_margins_are_above_the_bounds(box):
    box = box or partial(training.small_box, attack=corner, ratio=0.5)
    attack = partial(training.ascent, steps=4)
    terms = training.terms_of(training.taps(THREAT, attack=attack, box=box))
    found = terms(KEY, net(weights()), X, LABEL)
    assert found.metrics["latent_adversarial"] <= found.metrics["robust"]
    assert len(found.layers) == 2


def test_taps_is_ibp_along_the_ramp_and_staps_is_sabr():
    attack = partial(training.ascent, steps=2)
    taps = partial(training.taps, THREAT, attack=attack, active=0.5)
    same(taps(), IBP)
    box = partial(training.small_box, attack=corner, ratio=0.4)
    same(taps(box=box), training.sabr(THREAT, attack=corner, ratio=0.4))
    # both parts are shrunk, on either side of the cut
    same(
        taps(box=box, shrink=0.8),
        training.sabr(THREAT, attack=corner, ratio=0.4, shrink=0.8),
    )


def test_taps_scales_the_gradient_of_the_attacked_margins_only():
    gradient = lambda scale: jax.grad(
        lambda w: value(training.taps(THREAT, attack=centre, gradient_scale=scale), w)
    )(weights())["e"]
    zero, one, three = map(gradient, (0.0, 1.0, 3.0))
    np.testing.assert_allclose(three - zero, 3 * (one - zero), rtol=1e-3, atol=1e-3)


def test_the_connector_hands_gradients_to_the_nearer_end():
    lower, upper = jnp.array([0.0, 0.0, 0.0, 2.0]), jnp.array([1.0, 1.0, 1.0, 2.0])
    z = jnp.array([0.0, 0.75, 0.5, 2.0])
    out, pull = jax.vjp(lambda a, b, c: training.connect(a, b, c, 0.5), lower, upper, z)
    assert (out == z).all()
    to_lower, to_upper, to_z = pull(jnp.ones(4))
    np.testing.assert_allclose(to_lower, [1.0, 0.0, 0.0, 0.5])
    np.testing.assert_allclose(to_upper, [0.0, 0.5, 0.0, 0.5])
    assert (to_z == 0).all()


# ----------------------------------------------------------------------- cut networks


@pytest.mark.parametrize("behind", [0, 1])
def test_the_parts_of_a_network_compose_to_it(behind):
    f = net(weights())
    first, second = split(f, X, behind=behind)
    np.testing.assert_allclose(second(first(X)), f(X), rtol=1e-6)
    assert (first(X) >= 0).all()
    slope = jax.jacobian(lambda z: second(first(z)))(X)
    np.testing.assert_allclose(slope, jax.jacobian(f)(X), rtol=1e-4, atol=1e-5)


def test_bounds_of_the_parts_are_those_of_the_network():
    rows = lambda z: margins(net(weights())(z), LABEL)
    first, second = split(rows, X, behind=1)
    latent = bounds.ibp(first)(THREAT, X)
    found = bounds.ibp(second)(Box(*latent), latent.lower)
    expected = bounds.ibp(rows)(THREAT, X)
    np.testing.assert_allclose(found.lower, expected.lower, rtol=1e-4, atol=1e-4)


def test_a_cut_must_leave_an_activation_in_front_and_sever_nothing():
    with pytest.raises(ValueError, match="has 2"):
        split(net(weights()), X, behind=2)
    residual = lambda x: jax.nn.relu(jax.nn.relu(x) + x)
    with pytest.raises(ValueError, match="residual"):
        split(residual, X, behind=1)


def test_shrinking_moves_upper_ends_of_undecided_activations_only():
    f = lambda x: jax.nn.relu(x)[:2] - jax.nn.relu(x)[2:]
    box = Box(jnp.array([-1.0, 1.0, -2.0, -3.0]), jnp.array([1.0, 2.0, -1.0, 3.0]))
    with pytest.raises(ValueError, match="residual"):
        shrunk_ibp(f, shrink=0.5)(box, box.lower)
    g = lambda x: jnp.array([[1.0, 0.0, 0.0, -1.0]]) @ jax.nn.relu(x)
    bound, layers = shrunk_ibp(g, shrink=0.5)(box, box.lower)
    assert layers[0].upper.tolist() == [0.5, 2.0, -1.0, 1.5]
    assert (bound.lower, bound.upper) == (-1.5, 0.5)
    whole, _ = shrunk_ibp(g, shrink=1.0)(box, box.lower)
    assert whole == bounds.ibp(g)(box, box.lower)


# -------------------------------------------------------------------------- baselines


def test_mart_and_arow_are_cross_entropies_where_nothing_moves():
    f = net(weights())
    p = jax.nn.softmax(f(X))
    runner_up = jnp.max(p[jnp.array([0, 2])])
    mart = training.mart(THREAT, attack=centre)
    np.testing.assert_allclose(
        value(mart, weights()), -jnp.log(p[1]) - jnp.log(1 - runner_up), rtol=1e-4
    )
    arow = training.arow(THREAT, attack=centre, smoothing=0.0)
    np.testing.assert_allclose(value(arow, weights()), -jnp.log(p[1]), rtol=1e-5)
    with pytest.raises(ValueError, match="smoothing"):
        training.arow(THREAT, attack=centre, smoothing=1.0)


def test_arow_attacks_the_divergence():
    asked = []

    def spy(threat, *, loss):
        asked.append(loss(net(weights())(X), LABEL))
        return lambda key, f, x, label: x

    value(training.arow(THREAT, attack=spy), weights())
    np.testing.assert_allclose(asked, [0.0], atol=1e-6)  # KL(f(x) || f(x))


def test_what_taps_verifies_is_named_after_what_it_is_about():
    """Only bounds of the whole set, not shrunk, may be called certificates."""
    small = partial(training.small_box, attack=corner)
    names = {}
    for name, options in {
        "whole": {},
        "box": {"box": small},
        "shrink": {"shrink": 0.8},
    }.items():
        objective = training.terms_of(training.taps(THREAT, attack=centre, **options))
        names[name] = set(objective(KEY, net(weights()), X, LABEL).metrics)
    assert "verified" in names["whole"]
    for name in ("box", "shrink"):
        assert "verified" not in names[name]
        assert "verified_small" in names[name]


def test_edac_attacks_a_less_certain_network():
    """Its points are those of the attack on weights moved down the certainty."""
    seen = []

    def spy(threat):
        def attack(key, f, x, label):
            seen.append(f(x))
            return x

        return attack

    w, xs = weights(), jnp.stack([X, X[::-1]])

    @jax.jit
    def batch(w, step):  # weights that are not traced are constants of the network
        objective = training.edac(THREAT, attack=spy, step=step)
        one = lambda x: (value(objective, w, x), seen.pop(), seen.pop())
        return jax.vmap(one, axis_name=EXAMPLES)(xs)

    losses, moved, still = batch(w, 1e-3)
    np.testing.assert_allclose(
        losses, jax.vmap(lambda x: value(training.natural(), w, x))(xs), rtol=1e-5
    )
    np.testing.assert_allclose(still, jax.vmap(net(w))(xs), rtol=1e-5)
    assert jnp.std(moved, axis=1).mean() < jnp.std(still, axis=1).mean()
    np.testing.assert_allclose(batch(w, 0.0)[1], still, rtol=1e-5)


# ----------------------------------------------------------------------------- attack


@pytest.mark.parametrize("threat", [THREAT, L2(0.3), Box(X - 0.1, X + 0.2)])
@pytest.mark.parametrize("restarts", [1, 3])
def test_ascent_stays_inside_and_gains(threat, restarts):
    f = net(weights())
    attack = training.ascent(threat, steps=5, restarts=restarts, decay_at=3)
    z = jax.jit(lambda key: attack(key, f, X, LABEL))(KEY)
    assert threat.contains(X, z)
    assert training.cross_entropy(f(z), LABEL) > training.cross_entropy(f(X), LABEL)


def test_more_restarts_never_lose():
    f = net(weights())
    end = lambda key, n: training.cross_entropy(
        f(training.ascent(THREAT, steps=1, restarts=n)(key, f, X, LABEL)), LABEL
    )
    assert all(
        end(k, 4) >= jnp.min(jnp.stack([end(kk, 1) for kk in jax.random.split(k, 4)]))
        for k in jax.random.split(KEY, 3)
    )


def test_the_region_of_a_box_threat_cannot_be_scaled():
    box = Box(X, X)
    with pytest.raises(TypeError, match="attack_scale"):
        training.mtl_ibp(box, attack=corner, alpha=0.5, attack_scale=2.0)
    assert isinstance(Interval(*box.box(X)), Interval)
