"""Objectives, schedules and penalties: the claims of the papers, in numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import training
from certjax.attacks import pgd
from certjax.specification import margins
from certjax.threat import Linf
from certjax.training.objectives import adversary
from certjax.training.regularizers import _balance
from certjax.types import Interval


KEY = jax.random.key(0)
X = jnp.linspace(0.1, 0.9, 6)
LABEL = jnp.int32(1)
THREAT = Linf(0.1)


def weights(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 8), "b": (8,), "c": (8, 3)}
    return {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in shapes.items()}


def net(w):
    """A small perceptron; smooth, so that finite differences are exact enough."""
    return lambda x: jnp.tanh(x @ w["a"] + w["b"]) @ w["c"]


def corner(threat, *, loss=None):
    """The corner of the box with the largest coordinates: a fixed 'attack'."""
    return lambda key, f, x, label: threat.box(x).upper


OBJECTIVES = {
    "natural": training.natural(),
    "adversarial": training.adversarial(THREAT, attack=corner),
    "trades": training.trades(THREAT, attack=corner),
    "ibp": training.ibp(THREAT),
    "ibp_mixed": training.ibp(THREAT, kappa=0.3),
}


def value(objective, w, x=X):
    return objective(KEY, net(w), x, LABEL)


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
        ends = jax.jit(jax.vmap(along))(jnp.array([-1e-5, 1e-5]))
        np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-5, rtol=1e-6)


def test_limit_cases_of_ibp():
    w = weights()
    natural = value(OBJECTIVES["natural"], w)
    np.testing.assert_allclose(value(training.ibp(THREAT, kappa=1.0), w), natural, 1e-6)
    np.testing.assert_allclose(value(training.ibp(Linf(0.0)), w), natural, 1e-5)


def test_the_robust_loss_bounds_every_adversarial_loss():
    w = weights()
    worst = value(OBJECTIVES["ibp"], w)
    for i in range(20):
        z = THREAT.sample(jax.random.key(i), X)
        assert training.cross_entropy(net(w)(z), LABEL) <= worst
    attack = partial(pgd, steps=5)
    assert value(training.adversarial(THREAT, attack=attack), w) <= worst


def test_terms_name_the_parts_of_the_loss():
    w = weights()
    terms = training.terms_of(OBJECTIVES["ibp_mixed"])(KEY, net(w), X, LABEL)
    natural = value(OBJECTIVES["natural"], w)
    mixed = 0.3 * natural + 0.7 * terms.metrics["robust"]
    np.testing.assert_allclose(terms.loss, mixed, rtol=1e-6)
    assert [layer.lower.shape for layer in terms.layers] == [(8,)]
    assert (terms.layers[0].lower <= X @ w["a"] + w["b"]).all()
    assert (terms.region.upper == THREAT.box(X).upper).all()


def test_a_plain_function_is_an_objective_without_terms():
    terms = training.terms_of(OBJECTIVES["natural"])(KEY, net(weights()), X, LABEL)
    assert terms.metrics == {}
    assert terms.layers == ()


def test_attacks_inside_an_objective_are_not_differentiated():
    """A while loop has no reverse derivative, so nobody asked for one."""

    def looping(threat, *, loss=None):
        def attack(key, f, x, label):
            step = lambda z: threat.project(
                x, z + 0.01 * jnp.sign(jax.grad(loss_of)(z))
            )
            loss_of = lambda z: training.cross_entropy(f(z), label)
            return jax.lax.while_loop(lambda z: jnp.sum(jnp.abs(z - x)) < 0.2, step, x)

        return attack

    w = weights()
    objective = training.adversarial(THREAT, attack=looping)
    found = jax.jit(jax.grad(lambda w: value(objective, w)))(w)
    z = adversary(looping(THREAT), KEY, net(w), X, LABEL)
    held = jax.grad(lambda w: training.cross_entropy(net(w)(z), LABEL))(w)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, held)


def test_trades_is_natural_where_nothing_moves():
    still = lambda threat, *, loss=None: lambda key, f, x, label: x
    w = weights()
    found = value(training.trades(THREAT, attack=still), w)
    np.testing.assert_allclose(found, value(OBJECTIVES["natural"], w), rtol=1e-6)


def test_divergence_is_zero_only_between_equals():
    logits = jnp.array([1.0, -2.0, 0.5])
    assert training.divergence(logits, logits + 3.0) < 1e-6
    assert training.divergence(logits, -logits) > 0.1


def test_robust_cross_entropy_by_hand():
    expected = np.log(1 + np.exp(-2.0) + np.exp(1.0))
    found = training.robust_cross_entropy(jnp.array([2.0, -1.0]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    z = jnp.array([0.3, 1.0, -1.0])
    np.testing.assert_allclose(
        training.robust_cross_entropy(margins(z, LABEL)),
        training.cross_entropy(z, LABEL),
        rtol=1e-6,
    )


# ------------------------------------------------------------------------- schedules


def smoothed_reference(step, start, end, final):
    """The formula of the published code, with integers."""
    if step <= start:
        return 0.0
    if step >= end:
        return final
    mid = start + int(0.25 * (end - start))
    t = (mid - start) ** 3
    a = final / ((end - mid) * 4 * t + (mid - start) * t)
    if step <= mid:
        return a * (step - start) ** 4
    knee = a * (mid - start) ** 4
    return knee + (final - knee) * (step - mid) / (end - mid)


def test_smoothed_ramp_is_the_published_formula():
    ramp = training.smoothed_ramp(start=100, end=2000, final=0.3)
    steps = np.arange(0, 2200, 7)
    expected = [smoothed_reference(int(s), 100, 2000, 0.3) for s in steps]
    found = jax.vmap(ramp)(jnp.asarray(steps))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-9)
    assert (np.diff(found) >= 0).all()
    assert found[0] == 0
    assert found[-1] == np.float32(0.3)


def test_a_ramp_may_be_a_jump():
    for ramp in (
        training.smoothed_ramp(start=5, end=5, final=0.3),
        training.linear_ramp(start=5, end=5, first=0.0, final=0.3),
    ):
        np.testing.assert_allclose([ramp(4), ramp(5)], [0.0, 0.3], rtol=1e-6)
    with pytest.raises(ValueError, match="start <= end"):
        training.smoothed_ramp(start=9, end=5, final=0.3)


def test_kappa_follows_eps():
    eps = training.linear_ramp(start=0, end=10, first=0.0, final=0.2)
    kappa = training.tied(eps, at=0.2, first=1.0, final=0.5)
    np.testing.assert_allclose([kappa(0), kappa(5), kappa(99)], [1.0, 0.75, 0.5])
    with pytest.raises(ValueError, match="positive"):
        training.tied(eps, at=0.0, first=1.0, final=0.5)


def test_learning_rates():
    twice = training.piecewise(value=1.0, boundaries=[10, 10], factor=0.5)
    assert float(twice(11)) == 0.25
    steps = training.piecewise(value=1.0, boundaries=[10, 20], factor=0.2)
    np.testing.assert_allclose([steps(9), steps(11), steps(21)], [1.0, 0.2, 0.04], 1e-6)
    np.testing.assert_allclose(training.cosine(value=2.0, steps=10)(5), 1.0, rtol=1e-6)
    np.testing.assert_allclose(training.constant(value=3.0)(5), 3.0)


# --------------------------------------------------------------------------- recipes


def test_the_warm_up_is_natural_training_with_bounds_for_the_regularisers():
    eps = training.linear_ramp(start=10, end=20, first=0.0, final=0.1)
    recipe = training.scheduled(training.ibp, THREAT, eps=eps)
    w = weights()
    terms = training.terms_of(recipe(5))(KEY, net(w), X, LABEL)
    np.testing.assert_allclose(terms.loss, value(OBJECTIVES["natural"], w), rtol=1e-6)
    assert (terms.layers[0].upper > terms.layers[0].lower).all()
    assert terms.metrics["eps"] == 0


def test_after_the_ramp_a_recipe_is_its_objective():
    eps = training.linear_ramp(start=0, end=20, first=0.0, final=0.1)
    kappa = training.constant(value=0.3)
    recipe = training.scheduled(training.ibp, Linf(0.5), eps=eps, kappa=kappa)
    w = weights()
    late = jax.jit(lambda step: value(recipe(step), w))(20)
    np.testing.assert_allclose(late, value(OBJECTIVES["ibp_mixed"], w), rtol=1e-5)


def test_relative_steps_scale_with_eps():
    record = lambda threat, **numbers: numbers
    build = training.relative_step(record, ratio=0.25)
    assert build(Linf(0.2), loss="ce") == {"step_size": 0.05, "loss": "ce"}


def test_streams_are_independent_and_reproducible():
    keys = [training.stream(s, n) for s, n in [(0, "a"), (0, "b"), (1, "a"), (0, "a")]]
    a, b, c, again = (jax.random.key_data(key).tolist() for key in keys)
    assert a == again
    assert len({tuple(a), tuple(b), tuple(c)}) == 3


# ---------------------------------------------------------------------- regularisers


def layer(lower, upper):
    return Interval(jnp.asarray(lower, jnp.float32), jnp.asarray(upper, jnp.float32))


def test_balance_by_hand():
    # centres 4 (active), -1 (inactive), 0: mean 1; spreads 9, 4, 1
    box = layer([[3.0, -2.0, -1.0]], [[5.0, -0.5, 1.0]])
    box = Interval(box.lower, box.upper.at[0, 1].set(0.0).at[0, 1].add(-1e-7))
    means, spreads = 1.0 / 4.0, 4.0 / 9.0
    expected = (0.5 - means) / 0.5 + (0.5 - spreads) / 0.5
    np.testing.assert_allclose(_balance(box, 0.5), expected, rtol=1e-4)


def test_a_layer_without_inactive_neurons_is_skipped_without_a_nan():
    def penalty(shift):
        return _balance(
            layer([[1.0, 2.0]], [[3.0, 4.0]])._replace(
                lower=jnp.array([[1.0, 2.0]]) + shift
            ),
            0.5,
        )

    assert penalty(0.0) == 0
    assert jax.grad(penalty)(0.0) == 0


def terms_with(width):
    box = layer([[0.0, 0.0]], [[0.2, 0.2]])
    wide = layer([[-width, -width]], [[width, width]])
    return training.Terms(jnp.zeros(1), {}, (wide,), box)


def test_tightness_compares_with_the_normalised_input_and_fades():
    eps = training.linear_ramp(start=0, end=10, first=0.0, final=0.1)
    regularizer = training.shi(eps=eps, final=0.1, weight=0.5, std=0.5)
    # input half-width 0.1 / 0.5 = 0.2; a layer of 0.8: relu(0.5 - 0.25) / 0.5 = 0.5
    np.testing.assert_allclose(regularizer(terms_with(0.8), 0), 0.25, rtol=1e-5)
    np.testing.assert_allclose(regularizer(terms_with(0.8), 5), 0.125, rtol=1e-5)
    np.testing.assert_allclose(regularizer(terms_with(0.8), 10), 0.0, atol=1e-6)
    np.testing.assert_allclose(regularizer(terms_with(0.4), 0), 0.0, atol=1e-6)


def test_the_regulariser_refuses_an_objective_without_bounds():
    regularizer = training.shi(eps=training.constant(value=0.0), final=0.1)
    with pytest.raises(ValueError, match="bounds of each layer"):
        regularizer(training.Terms(jnp.zeros(1), {}), 0)


def test_l1_counts_kernels_only():
    tree = {"conv": {"kernel": jnp.array([[-2.0]]), "bias": jnp.array([5.0])}}
    tree["norm"] = {"scale": jnp.array([7.0])}
    assert training.kernel_l1(tree) == 2
