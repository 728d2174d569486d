"""Objectives of certified training: derivatives and limit cases, gradients included."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import training
from certjax.models.batchnorm import EXAMPLES
from certjax.threat import Linf


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


def inside(threat, *, loss=None):
    """A point at a fixed place in the box, another one in each coordinate."""

    def attack(key, f, x, label):
        lower, upper = threat.box(x)
        place = 0.5 + 0.4 * jnp.cos(jnp.arange(x.size, dtype=x.dtype))
        return lower + place * (upper - lower)

    return attack


def uphill(threat, *, loss=None):
    """One step along the sign of the gradient: it depends on the weights."""

    def attack(key, f, x, label):
        slope = jax.grad(lambda z: training.cross_entropy(f(z), label))(x)
        return threat.project(x, x + 0.05 * jnp.sign(slope))

    return attack


def value(objective, w, x=X):
    """The loss of a batch of two, which EDAC needs."""
    one = lambda x: objective(KEY, net(w), x, LABEL)
    return jnp.mean(jax.vmap(one, axis_name=EXAMPLES)(jnp.stack([x, x[::-1]])))


# ------------------------------------------------------------------------ derivatives


SMALL_BOX = partial(training.small_box, attack=corner, ratio=0.4)
# the connector is the derivative at the ends of the box, and with share=1 everywhere
TAPS = {
    "taps": partial(training.taps, THREAT, gradient_scale=1.0),
    "staps": partial(training.taps, THREAT, gradient_scale=1.0, box=SMALL_BOX),
}
DIFFERENTIABLE = {
    "edac": training.edac(THREAT, attack=corner),
    "lipschitz": training.lipschitz_margin(THREAT),
    "shrunk_staps": TAPS["staps"](attack=corner, shrink=0.8, kappa=0.2),
    "crown_mixed": training.crown_ibp_fused(THREAT, beta=0.6, kappa=0.2),
}
DIFFERENTIABLE |= {f"{n}_at_an_end": make(attack=corner) for n, make in TAPS.items()}
DIFFERENTIABLE |= {
    f"{n}_inside": make(attack=inside, share=1.0) for n, make in TAPS.items()
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_agree_with_finite_differences(name):
    objective = DIFFERENTIABLE[name]
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


def test_the_weights_of_the_connector_add_up_where_it_is_a_derivative():
    """To 1 with share=1, anywhere; below it not between the reaches of both ends."""
    lower, upper = jnp.zeros(9), jnp.linspace(0.5, 2.0, 9)
    z = lower + jnp.linspace(0.0, 1.0, 9) * (upper - lower)

    def handed(share):
        _, pull = jax.vjp(lambda a, b: training.connect(a, b, z, share), lower, upper)
        return sum(pull(jnp.ones(9)))

    np.testing.assert_allclose(handed(1.0), 1.0, rtol=1e-6)
    narrow = handed(0.25)
    np.testing.assert_allclose(narrow[jnp.array([0, 8])], 1.0, rtol=1e-6)
    assert (narrow[3:6] == 0).all()


@pytest.mark.parametrize("make", [training.adversarial, training.edac])
def test_the_search_of_an_attack_is_not_differentiated(make):
    """The gradient is that of the cross-entropy at the points that were found."""
    w, found = weights(), []

    def spy(threat):
        def attack(key, f, x, label):
            found.append(uphill(threat)(key, f, x, label))
            return found[-1]

        return attack

    def points(w):
        one = lambda x: (make(THREAT, attack=spy)(KEY, net(w), x, LABEL), found.pop())
        return jax.vmap(one, axis_name=EXAMPLES)(jnp.stack([X, X[::-1]]))[1]

    zs = jax.jit(points)(w)
    at = lambda w: jnp.mean(
        jax.vmap(lambda z: training.cross_entropy(net(w)(z), LABEL))(zs)
    )
    expected = jax.grad(at)(w)
    gradient = jax.jit(jax.grad(partial(value, make(THREAT, attack=uphill))))(w)
    for name, slope in gradient.items():
        np.testing.assert_allclose(slope, expected[name], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------ limit cases


NATURAL = training.natural()
IBP = training.ibp(THREAT, kappa=0.2)
SABR = training.sabr(THREAT, attack=corner, ratio=0.4)
TAPS_AT_AN_END = TAPS["taps"](attack=corner)
ADVERSARIAL = training.adversarial(THREAT, attack=corner)
MIX = {"attack": corner, "kappa": 0.2}
EXPRESSIVE = {
    "mtl": training.mtl_ibp,
    "cc": training.cc_ibp,
    "exp": training.exp_ibp,
}
STAPS = TAPS["staps"]
LIMITS = {
    "sabr_1": (training.sabr(THREAT, ratio=1.0, **MIX), IBP),
    "sabr_0": (training.sabr(THREAT, ratio=0.0, attack=corner), ADVERSARIAL),
    "crown_0": (training.crown_ibp(THREAT, beta=0.0, kappa=0.2), IBP),
    "fused_0": (training.crown_ibp_fused(THREAT, beta=0.0, kappa=0.2), IBP),
    "edac_0": (training.edac(THREAT, attack=corner, step=0.0), ADVERSARIAL),
    "trades_0": (training.trades(THREAT, attack=corner, beta=0.0), NATURAL),
    "arow_0": (
        training.arow(THREAT, attack=corner, weight=0.0, smoothing=0.0),
        NATURAL,
    ),
    "staps_1": (
        STAPS(attack=corner, box=partial(SMALL_BOX, ratio=1.0)),
        TAPS_AT_AN_END,
    ),
    "staps_ramp": (STAPS(attack=corner, active=0.9), SABR),
}
LIMITS |= {
    f"{name}_1": (make(THREAT, alpha=1.0, **MIX), IBP)
    for name, make in EXPRESSIVE.items()
}
LIMITS |= {
    f"{name}_0": (make(THREAT, alpha=0.0, attack=corner), ADVERSARIAL)
    for name, make in EXPRESSIVE.items()
}


@cache
def limit_of(objective):
    """Value and gradient; several methods end in the same one."""
    return jax.jit(jax.value_and_grad(partial(value, objective)))(weights())


@pytest.mark.parametrize("name", LIMITS)
def test_a_method_becomes_another_one_gradient_and_all(name):
    objective, limit = LIMITS[name]
    loss, slope = jax.jit(jax.value_and_grad(partial(value, objective)))(weights())
    assert_same(loss, slope, limit_of(limit), rtol=1e-3)


def assert_same(loss, slope, expected, *, rtol):
    np.testing.assert_allclose(loss, expected[0], rtol=rtol)
    for key, found in slope.items():
        np.testing.assert_allclose(found, expected[1][key], rtol=rtol, atol=1e-3)


BALLS = {
    "adversarial": training.adversarial,
    "ibp": training.ibp,
    "crown": training.crown_ibp,
    "fused": training.crown_ibp_fused,
    "sabr": partial(training.sabr, shrink=None),
    "shrunk": partial(training.sabr, shrink=0.8),
    "mart": partial(training.mart, weight=0.0),
    "taps": partial(training.taps, gradient_scale=3.0),
    "staps": partial(training.taps, gradient_scale=3.0, box=SMALL_BOX),
} | {name: partial(make, alpha=0.3) for name, make in EXPRESSIVE.items()}


def natural(name, w, x):
    """The clean loss of a method. MART adds its boost; TAPS squares."""
    logits = net(w)(x)
    loss = training.cross_entropy(logits, LABEL)
    if name == "mart":
        others = jax.nn.softmax(logits)[jnp.array([0, 2])]
        return loss - jnp.log(1 - others.max())
    # loss * loss, with a gradient of 3 + 1 times the loss in place of 2
    held = jax.lax.stop_gradient(loss)
    squared = held**2 + 4 * held * (loss - held)
    return squared if "taps" in name else loss


@pytest.mark.parametrize("name", BALLS)
def test_without_a_radius_everything_is_natural_training(name):
    """Also at the radius of the warm-up, and with all the weight on the clean loss."""
    make = BALLS[name]
    if name not in {"ibp", "crown", "fused"}:
        make = partial(make, attack=corner)

    @jax.jit  # one program: eps and kappa are traced
    @jax.value_and_grad
    def found(w, eps, kappa):
        mixed = {} if name in {"adversarial", "mart"} else {"kappa": kappa}
        return value(make(Linf(eps), **mixed), w)

    def clean(w):
        pair = jnp.stack([X, X[::-1]])
        return jnp.mean(jax.vmap(lambda x: natural(name, w, x))(pair))

    w, expected = weights(), jax.value_and_grad(clean)(weights())
    for eps in (0.0, 1e-6):
        assert_same(*found(w, eps, 0.0), expected, rtol=1e-2)
    if name not in {"adversarial", "mart"}:
        assert_same(*found(w, 0.1, 1.0), limit_of(NATURAL), rtol=1e-4)
