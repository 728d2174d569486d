"""Every attack on inputs and networks that break careless code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import attacks
from certjax.threat import L1, L2, Linf


KEY = jax.random.key(0)
SHAPE, CLASSES = (4, 4, 1), 5
ONE = functools.partial(attacks.square, queries=1)
WITHIN = {
    "fgsm": (attacks.fgsm, Linf(0.1)),
    "pgd": (functools.partial(attacks.pgd, steps=3), L2(0.3)),
    "apgd-linf": (functools.partial(attacks.apgd, steps=8), Linf(0.1)),
    "apgd-l2": (functools.partial(attacks.apgd, steps=8, loss=attacks.dlr), L2(0.3)),
    "apgd-l1": (functools.partial(attacks.apgd, steps=8), L1(1.0)),
    "apgd-t": (functools.partial(attacks.apgd_targeted, steps=4, targets=2), Linf(0.1)),
    "fab-linf": (functools.partial(attacks.fab, steps=4), Linf(0.1)),
    "fab-t-l2": (functools.partial(attacks.fab_targeted, steps=4, targets=2), L2(0.3)),
    "fab-l1": (functools.partial(attacks.fab, steps=4, rank=0), L1(1.0)),
    "square-linf": (functools.partial(attacks.square, queries=20), Linf(0.1)),
    "square-l2": (functools.partial(attacks.square, queries=20), L2(0.3)),
    "square-l1": (functools.partial(attacks.square, queries=20), L1(1.0)),
    "spsa": (functools.partial(attacks.spsa, queries=100, samples=8), Linf(0.1)),
    "nes": (functools.partial(attacks.nes, queries=100, samples=8), L2(0.3)),
    "mi-l1": (functools.partial(attacks.mi_fgsm, steps=3), L1(1.0)),
    "restarts": (lambda threat: attacks.restarts(attacks.bim(threat), 2), Linf(0.1)),
    "strongest": (lambda t: attacks.strongest(attacks.fgsm(t), ONE(t)), Linf(0.1)),
    "in turn": (lambda t: attacks.until_broken(attacks.fgsm(t), ONE(t)), L2(0.3)),
}
SHORT = {"searches": 2, "steps": 5}
NEAREST = {
    "fab": (functools.partial(attacks.fab_minimum, steps=4), L2(0.3)),
    "deepfool": (functools.partial(attacks.deepfool, steps=4), Linf(0.1)),
    "ddn": (functools.partial(attacks.ddn, steps=5), L2(0.3)),
    "fmn-linf": (functools.partial(attacks.fmn, steps=5), Linf(0.3)),
    "fmn-l1": (functools.partial(attacks.fmn, steps=5), L1(0.3)),
    "fmn-l0": (functools.partial(attacks.fmn, steps=5, sparse=True), L2(0.3)),
    "cw": (functools.partial(attacks.carlini_wagner, **SHORT), L2(0.3)),
    "cw-linf": (functools.partial(attacks.carlini_wagner, **SHORT), Linf(0.3)),
    "ead": (functools.partial(attacks.ead, **SHORT), L1(0.3)),
    "hopskipjump": (functools.partial(attacks.hopskipjump, queries=200), L2(0.3)),
    "boundary": (functools.partial(attacks.boundary, queries=100), L2(0.3)),
    "minimal": (lambda t: attacks.minimal(attacks.fgsm, t, bisections=3), L2(0.3)),
    "corruption": (functools.partial(attacks.corruption, severities=2), L2(0.3)),
    "patch": (functools.partial(attacks.patch, side=2, steps=3), L2(0.3)),
    "rotation": (
        functools.partial(attacks.rotation_translation, angles=3, shifts=3),
        L2(0.3),
    ),
}
IMAGE = jax.random.uniform(jax.random.key(1), SHAPE)
WEIGHT = jax.random.normal(jax.random.key(2), (16, CLASSES))
CASES = {
    "usual": (WEIGHT, IMAGE),
    "saturated": (1e4 * WEIGHT, IMAGE),
    "black": (WEIGHT, jnp.zeros(SHAPE)),
    "white": (WEIGHT, jnp.ones(SHAPE)),
    "flat": (jnp.zeros_like(WEIGHT), IMAGE),
    "nan": (jnp.full_like(WEIGHT, jnp.nan), IMAGE),
}


def classifier(weight, sighted=True):
    """Where it is not sighted, its logits are NaN for all inputs but IMAGE."""

    def f(x):
        known = jnp.logical_or(sighted, jnp.all(x == IMAGE))
        return jnp.where(known, jnp.tanh(x.ravel() - 0.5) @ weight, jnp.nan)

    return f


@functools.cache
def compiled(name):
    """One program per attack serves every case."""
    make, threat = (WITHIN | NEAREST)[name]

    @jax.jit
    def run(weight, x, label, sighted):
        return make(threat)(KEY, classifier(weight, sighted), x, label)

    return run


@pytest.mark.parametrize("name", [*WITHIN, *NEAREST])
def test_finite_and_inside_whatever_the_network(name):
    for weight, x in CASES.values():
        label = jnp.argmax(classifier(weight)(x))
        z = compiled(name)(weight, x, label, True)
        assert np.isfinite(z).all()
        if name in WITHIN:
            assert WITHIN[name][1].contains(x, z)
        else:
            assert ((z >= 0) & (z <= 1)).all()


@pytest.mark.parametrize("name", [*WITHIN, *NEAREST])
def test_a_point_without_numbers_is_no_success(name):
    label = jnp.argmax(classifier(WEIGHT)(IMAGE))
    z = compiled(name)(WEIGHT, IMAGE, label, False)
    assert (z == IMAGE).all()


@pytest.mark.parametrize("name", [*WITHIN, *NEAREST])
def test_a_misclassified_input_stays_misclassified(name):
    label = jnp.argmin(classifier(WEIGHT)(IMAGE))
    z = compiled(name)(WEIGHT, IMAGE, label, True)
    assert jnp.argmax(classifier(WEIGHT)(z)) != label


@pytest.mark.parametrize("name", [*WITHIN, *NEAREST])
def test_one_class_leaves_nothing_to_attack(name):
    make, threat = (WITHIN | NEAREST)[name]
    z = make(threat)(KEY, lambda x: jnp.sum(x)[None], IMAGE, jnp.int32(0))
    assert (z == IMAGE).all()


@pytest.mark.parametrize("name", [*WITHIN, *NEAREST])
def test_integers_are_refused(name):
    make, threat = (WITHIN | NEAREST)[name]
    with pytest.raises(TypeError, match="255"):
        make(threat)(KEY, classifier(WEIGHT), jnp.zeros(SHAPE, jnp.uint8), jnp.int32(0))


@pytest.mark.parametrize("shape", [(7,), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)], ids=["linf", "l2"])
def test_square_searches_any_shape(shape, threat):
    weight = jax.random.normal(KEY, (int(np.prod(shape)), 1000))
    f = lambda x: x.ravel() @ weight
    x = jnp.full(shape, 0.5)
    attack = attacks.square(threat, queries=10)
    z = jax.jit(lambda x: attack(KEY, f, x, jnp.argmax(f(x))))(x)
    assert np.isfinite(z).all()
    assert threat.contains(x, z)


EVERY = [*WITHIN, *NEAREST]
IMAGES_ONLY = ("patch", "rotation", "corruption")
QUICK = ("pgd", "apgd-linf", "fab-t-l2", "square-linf", "deepfool", "ddn", "cw")
ON_VECTORS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in EVERY
    if name not in IMAGES_ONLY
]


def small(shape, classes):
    weight = jax.random.normal(KEY, (int(np.prod(shape)), classes))
    return lambda x: jnp.tanh(x.ravel() - 0.5) @ weight


def holds(name, shape, classes):
    make, threat = (WITHIN | NEAREST)[name]
    f, x = small(shape, classes), jnp.full(shape, 0.4)
    label = jnp.argmax(f(x))
    z = jax.jit(lambda x, y: make(threat)(KEY, f, x, y))(x, label)
    assert np.isfinite(z).all()
    assert z.shape == shape
    inside = threat.contains(x, z) if name in WITHIN else ((z >= 0) & (z <= 1)).all()
    assert inside


@pytest.mark.parametrize("name", ON_VECTORS)
def test_a_flat_vector_and_a_thousand_classes(name):
    holds(name, (3,), 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EVERY if n != "patch"])
def test_an_image_of_one_pixel(name):
    holds(name, (1, 1, 1), 5)


@pytest.mark.parametrize("name", IMAGES_ONLY)
def test_attacks_on_images_refuse_vectors(name):
    with pytest.raises(ValueError, match="image"):
        holds(name, (3,), 5)
