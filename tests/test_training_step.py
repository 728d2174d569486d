"""The training step and evaluation: reference step, divergence, exact continuation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from certjax import models, training
from certjax.threat import Linf
from certjax.training.step import remembering


KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
XS = RNG.integers(0, 256, (12, 4, 4, 1), np.uint8)
LABELS = RNG.integers(0, 3, 12).astype(np.int32)
NET = models.mlp(hidden=(8,), classes=3, batch_norm=True, mean=0.5, std=0.3)
EPS = training.smoothed_ramp(start=1, end=5, final=0.05)
RECIPE = training.scheduled(
    training.ibp,
    Linf(0.05),
    eps=EPS,
    kappa=training.tied(EPS, at=0.05, first=1.0, final=0.5),
)
PENALTY = training.shi(eps=EPS, final=0.05, std=0.3)
OPTIMIZER = training.adam(learning_rate=0.01, clip=1.0)


@pytest.fixture(scope="module")
def step():
    return training.train_step(NET, RECIPE, OPTIMIZER, regularizer=PENALTY, l1=1e-4)


@pytest.fixture(scope="module")
def start():
    return training.initial_state(jax.jit(NET.init)(KEY, XS[0] / 255.0), OPTIMIZER)


@pytest.fixture(scope="module")
def trained(step, start):
    states, metrics = [start], []
    for _ in range(8):
        state, found = step(states[-1], XS, LABELS)
        states.append(state)
        metrics.append(found)
    return states, metrics


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda u, v: bool(jnp.array_equal(u, v)), a, b))


def test_a_natural_step_is_the_hand_written_one():
    net = models.mlp(hidden=(8,), classes=3, mean=0.5, std=0.3)
    optimizer = training.sgd(learning_rate=0.1, momentum=0.0)
    recipe = training.unchanging(training.natural())
    state = training.initial_state(jax.jit(net.init)(KEY, XS[0] / 255.0), optimizer)
    after, metrics = training.train_step(net, recipe, optimizer)(state, XS, LABELS)

    @jax.jit
    @jax.value_and_grad
    def loss(p):
        x = (jnp.asarray(XS, jnp.float32).reshape(12, -1) / 255 - 0.5) / 0.3
        hidden = jax.nn.relu(x @ p["dense_0"]["kernel"] + p["dense_0"]["bias"][None])
        logits = hidden @ p["logits"]["kernel"] + p["logits"]["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    expected, gradient = loss(state.params)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params, moved
    )
    assert after.step == 1


def test_training_lowers_the_loss_and_reports_its_parts(trained):
    _, metrics = trained
    assert metrics[-1]["accuracy"] >= metrics[0]["accuracy"]
    assert all(m["finite"] for m in metrics)
    assert all(m["verified"] <= m["accuracy"] for m in metrics)
    eps = [m["eps"] for m in metrics]
    np.testing.assert_allclose(eps, [EPS(i) for i in range(8)], rtol=1e-6)
    first, last = metrics[0], metrics[-1]
    warm = first["natural"] + first["regularizer"] + first["l1"]
    np.testing.assert_allclose(first["loss"], warm, rtol=1e-5)
    full = 0.5 * last["natural"] + 0.5 * last["robust"] + last["l1"]
    np.testing.assert_allclose(last["loss"], full, rtol=1e-5)
    assert last["regularizer"] == 0


def test_a_restored_state_continues_bit_for_bit(step, trained):
    states, _ = trained
    leaves, tree = jax.tree.flatten(states[4])
    restored = tree.unflatten([jnp.asarray(np.array(leaf)) for leaf in leaves])
    for _ in range(4):
        restored, _ = step(restored, XS, LABELS)
    assert equal(restored, states[8])


def test_a_diverging_step_leaves_the_state_alone(step, start):
    broken = start._replace(
        params=jax.tree.map(lambda p: p.at[0].set(jnp.inf), start.params)
    )
    after, metrics = step(broken, XS, LABELS)
    assert not metrics["finite"]
    assert equal(after, broken)


def test_running_statistics_are_those_of_the_clean_batches(start, trained):
    states, _ = trained
    clean = models.clean_forward(NET, start.params, XS / np.float32(255))[1]
    expected = models.running_average(start.statistics, clean)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        states[1].statistics,
        expected,
    )


def test_the_attack_stream_depends_on_seed_and_step_only():
    def seen(key, f, x, label):
        return jax.random.uniform(key) + 0.0 * f(x)[0]

    recipe = training.unchanging(seen)
    optimizer = training.sgd(learning_rate=0.0)
    state = training.initial_state(jax.jit(NET.init)(KEY, XS[0] / 255.0), optimizer)
    losses = {}
    for seed in (0, 1):
        step = training.train_step(NET, recipe, optimizer, seed=seed)
        one, first = step(state, XS, LABELS)
        _, second = step(one, XS, LABELS)
        _, again = step(state, XS, LABELS)
        assert first["loss"] == again["loss"]
        losses[seed] = {float(first["loss"]), float(second["loss"])}
    assert len(losses[0] | losses[1]) == 4


def test_the_clean_logits_are_remembered_for_the_clean_example_only():
    x, known = jnp.ones(2), jnp.array([7.0])
    f = remembering(lambda z: z[:1], x, known)
    assert f(x) is known
    assert f(x + 0.0) == 1


def test_images_of_unknown_scale_are_refused():
    with pytest.raises(TypeError, match="int32"):
        training.images(jnp.ones(3, jnp.int32))
    assert training.images(jnp.array([255], jnp.uint8)) == 1


# ------------------------------------------------------------------------ optimisers


@pytest.mark.parametrize("make", [training.adam, training.sgd])
def test_optimizers_clip_and_refuse_a_bad_clip(make):
    with pytest.raises(ValueError, match="clip"):
        make(learning_rate=0.1, clip=0.0)
    optimizer = training.sgd(learning_rate=1.0, clip=1.0, momentum=0.0)
    big = {"w": jnp.array([30.0, 40.0])}
    updates, _ = optimizer.update(big, optimizer.init(big), big)
    np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-6)


# ---------------------------------------------------------------------- augmentation


def test_a_crop_is_a_window_of_the_edge_padded_image():
    image = jnp.arange(48.0).reshape(4, 4, 3)
    padded = np.pad(image, [(1, 1), (1, 1), (0, 0)], mode="edge")
    windows = [padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    augment = training.flip_and_crop(pad=1)
    keys = jax.random.split(KEY, 64)
    found = np.asarray(jax.jit(jax.vmap(augment, in_axes=(0, None)))(keys, image))
    mirrored = np.pad(image[:, ::-1], [(1, 1), (1, 1), (0, 0)], mode="edge")
    windows += [mirrored[i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    hits = {next(i for i, w in enumerate(windows) if (w == f).all()) for f in found}
    assert len(hits) > 12
    still = training.flip_and_crop(pad=0, flip=False)(KEY, image)
    assert (still == image).all()
    with pytest.raises(ValueError, match="at least 0"):
        training.flip_and_crop(pad=-1)


# ------------------------------------------------------------------------ evaluation


def test_evaluation_does_not_depend_on_the_batch_size(trained):
    state = trained[0][-1]
    results = [
        training.evaluator(NET, batch=size)(
            state.params, state.statistics, XS, LABELS, Linf(0.01)
        )
        for size in (5, 12)
    ]
    assert results[0] == results[1]
    assert results[0].certified <= results[0].natural
    assert results[0].examples == 12


def test_certified_accuracy_falls_with_eps_and_nan_is_never_certified(trained):
    state = trained[0][-1]
    evaluate = training.evaluator(NET, batch=12)
    at = lambda eps, xs: evaluate(state.params, state.statistics, xs, LABELS, Linf(eps))
    shares = [at(eps, XS).certified for eps in (0.0, 0.01, 0.1, 1.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == at(0.0, XS).natural
    images = XS / np.float32(255)
    images[:] = np.nan
    assert at(0.0, images).certified == 0


def test_evaluation_without_a_threat_certifies_nothing(trained):
    state = trained[0][-1]
    evaluate = training.evaluator(NET, batch=12)
    assert np.isnan(evaluate(state.params, state.statistics, XS, LABELS).certified)
    with pytest.raises(ValueError, match="as many labels"):
        evaluate(state.params, state.statistics, XS, LABELS[:3])
