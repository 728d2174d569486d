"""What may be added to a training step: averaging, sharpness, noise, other policies."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from certjax import models, training
from certjax.threat import Linf
from certjax.training.diagnostics import of_layers
from certjax.types import Interval


KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
XS = RNG.random((12, 4, 4, 1), np.float32)
LABELS = RNG.integers(0, 3, 12).astype(np.int32)
NET = models.mlp(hidden=(8,), classes=3, batch_norm=True)
IBP = training.unchanging(training.ibp(Linf(0.05)))


def started(optimizer):
    return training.initial_state(jax.jit(NET.init)(KEY, XS[0]), optimizer)


def stepped(optimizer, steps=1, recipe=IBP, **options):
    step = training.train_step(NET, recipe, optimizer, **options)
    states, metrics = [started(optimizer)], {}
    for _ in range(steps):
        state, metrics = step(states[-1], XS, LABELS)
        states.append(state)
    return states, metrics


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def difference(a, b):
    return optax.tree.norm(jax.tree.map(jnp.subtract, a, b))


SGD = partial(training.sgd, learning_rate=0.1, momentum=0.0)


# ------------------------------------------------------------------------- optimisers


def test_averaged_weights_are_the_mean_of_every_nth_from_a_step_on():
    plain, _ = stepped(SGD(), 6)
    states, _ = stepped(training.averaged(SGD(), start=1, every=2), 6)
    close(states[-1].params, plain[-1].params)
    taken = [plain[i].params for i in (2, 4, 6)]
    mean = jax.tree.map(lambda *w: sum(w) / 3, *taken)
    found = training.averaged_params(states[-1].opt_state, states[-1].params)
    close(found, mean)
    early = states[1]
    assert training.averaged_params(early.opt_state, early.params) is early.params
    assert training.averaged_params(plain[-1].opt_state, 7) == 7
    with pytest.raises(ValueError, match="every"):
        training.averaged(SGD(), start=0, every=0)


def test_sharpness_descends_along_the_gradient_at_the_worst_weights():
    """On a quadratic the gradient at w + rho g / |g| is known."""
    optimizer = training.sharpness_aware(optax.sgd(1.0), rho=0.5)
    w = jnp.array([3.0, 4.0])
    update, _ = optimizer.update(w, optimizer.init(w), w, gradient_at=lambda v: v)
    np.testing.assert_allclose(-update, w + 0.5 * w / 5.0, rtol=1e-6)
    with pytest.raises(ValueError, match="rho"):
        training.sharpness_aware(optax.sgd(1.0), rho=0.0)


def test_a_small_sharpness_is_nearly_the_plain_step_and_a_large_one_is_not():
    plain, _ = stepped(SGD())
    near, _ = stepped(SGD(sharpness=1e-4))
    far, _ = stepped(SGD(sharpness=0.5))
    moved = difference(plain[0].params, plain[1].params)
    assert difference(plain[1].params, near[1].params) < 0.01 * moved
    assert difference(plain[1].params, far[1].params) > 0.01 * moved


def test_accumulation_updates_once_with_the_mean_gradient_and_its_own_rate():
    rates = training.piecewise(value=0.1, boundaries=[2], factor=0.5)
    states, _ = stepped(SGD(learning_rate=rates, accumulate=2), 4)
    close(states[1].params, states[0].params)
    plain, _ = stepped(SGD(), 1)
    close(states[2].params, plain[1].params)  # the same batch twice
    first = difference(states[2].params, states[0].params)
    second = difference(states[4].params, states[2].params)
    assert second < 0.75 * first  # from step 2 on the rate is half
    with pytest.raises(ValueError, match="at least 1"):
        SGD(accumulate=0)
    with pytest.raises(ValueError, match="choose one"):
        training.adam(learning_rate=0.1, accumulate=2, sharpness=0.1)


def test_a_gradient_that_is_not_finite_nearby_is_not_taken():
    """The loss is defined at the weight, but not within rho of it."""
    sharp = training.sgd(learning_rate=0.1, momentum=0.0, sharpness=0.5)
    plain = training.sgd(learning_rate=0.1, momentum=0.0)
    slope = jax.grad(lambda w: -jnp.sqrt(w))
    w, found = jnp.float32(0.01), []
    for optimizer, more in ((sharp, {"gradient_at": slope}), (plain, {})):
        state = optimizer.init(w)
        found.append(optimizer.update(slope(w), state, w, **more)[0])
    assert found[0] == found[1]


# --------------------------------------------------------------------- noisy weights


def test_noise_of_the_weights_has_the_size_asked_for_and_mean_zero():
    params = {"kernel": jnp.linspace(-1.0, 1.0, 40).reshape(8, 5), "bias": jnp.ones(5)}
    perturb = training.gaussian_weights(std=0.1)
    keys = jax.random.split(KEY, 500)
    noisy = jax.vmap(perturb, in_axes=(0, None))(keys, params)
    kernel = params["kernel"]
    spread = jnp.std(noisy["kernel"] - kernel[None], axis=0)
    np.testing.assert_allclose(spread.mean(), 0.1 * jnp.std(kernel), rtol=0.05)
    np.testing.assert_allclose(noisy["kernel"].mean(0), kernel, atol=0.02)
    absolute = training.gaussian_weights(std=0.1, relative=False)
    noisy = jax.vmap(absolute, in_axes=(0, None))(keys, params)
    assert jnp.std(noisy["kernel"] - kernel[None]) == pytest.approx(0.1, rel=0.05)
    assert (noisy["bias"] == 1).all()
    with pytest.raises(ValueError, match="std"):
        training.gaussian_weights(std=-1.0)


def test_noisy_weights_change_the_loss_and_not_the_weights_themselves():
    still, plain = stepped(SGD(learning_rate=0.0), 1)
    perturb = training.gaussian_weights(std=0.3)
    moved, noisy = stepped(SGD(learning_rate=0.0), 1, perturb=perturb)
    assert noisy["loss"] != plain["loss"]
    close(moved[1].params, still[1].params)
    _, none = stepped(SGD(), perturb=training.gaussian_weights(std=0.0))
    np.testing.assert_allclose(none["loss"], plain["loss"], rtol=1e-6)


def test_noise_of_the_weights_leaves_the_l1_penalty_alone():
    perturb = training.gaussian_weights(std=0.3)
    _, plain = stepped(SGD(), 1, l1=1e-3)
    _, noisy = stepped(SGD(), 1, l1=1e-3, perturb=perturb)
    assert noisy["loss"] != plain["loss"]
    assert noisy["l1"] == plain["l1"]


# --------------------------------------------------------------------------- policies


def test_batch_statistics_may_be_those_of_adversarial_points():
    half = lambda key, f, x, label: 0.5 * x
    still = lambda key, f, x, label: x
    clean, a = stepped(SGD(), recipe=training.unchanging(training.natural()))
    same, b = stepped(
        SGD(), recipe=training.unchanging(training.natural()), statistics_at=still
    )
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    close(same[1].params, clean[1].params, rtol=1e-4, atol=1e-5)
    other, _ = stepped(SGD(), statistics_at=half)
    found = models.clean_forward(NET, other[0].params, 0.5 * XS)[1]
    expected = models.running_average(other[0].statistics, found)
    close(other[1].statistics, expected)


# ------------------------------------------------------------------------ diagnostics


def test_dead_and_undecided_units_and_the_growth_of_bounds():
    lower = jnp.array([[-2.0, -2.0, 0.5, -1.0], [-2.0, -1.0, -1.0, -1.0]])
    upper = jnp.array([[-1.0, 1.0, 1.0, -0.5], [-1.0, 1.0, 1.0, 1.0]])
    region = Interval(jnp.zeros((2, 3)), jnp.full((2, 3), 0.5))
    terms = training.Terms(jnp.zeros(2), {}, (Interval(lower, upper),), region)
    found = of_layers(terms)
    assert found["dead"] == 1 / 4
    assert found["undecided"] == 4 / 8
    np.testing.assert_allclose(found["growth_0"], jnp.mean(upper - lower) / 0.5)
    assert of_layers(training.Terms(jnp.zeros(2), {})) == {}


def test_the_health_of_large_batches_is_that_of_their_first_32_examples():
    centre = jax.random.normal(jax.random.key(0), (40, 5))
    layer, region = Interval(centre - 1, centre + 2), Interval(centre, centre + 1)
    whole = training.Terms(jnp.zeros(40), {}, (layer,), region)
    first = jax.tree.map(lambda array: array[:32], whole)
    jax.tree.map(np.testing.assert_array_equal, of_layers(whole), of_layers(first))


def test_a_step_reports_the_health_of_its_bounds():
    _, metrics = stepped(SGD())
    assert 0 <= metrics["dead"] <= 1
    assert metrics["growth_0"] > 0
