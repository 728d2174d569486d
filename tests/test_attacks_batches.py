"""Results do not depend on how examples are cut, nor on devices; nothing recompiles."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from certjax import attacks
from certjax.attacks import Stage
from certjax.threat import L2, Linf


SHAPE, CLASSES, EXAMPLES, LANES = (6, 6, 1), 5, 20, 8
ROOT = Path(__file__).resolve().parents[1]
STAGES = (
    Stage("apgd-ce", lambda threat, _: attacks.apgd(threat, steps=5, early_exit=True)),
    Stage(
        "apgd-t",
        lambda threat, i: attacks.apgd_towards(threat, i, steps=5, early_exit=True),
        2,
        ranks=True,
    ),
    Stage(
        "fab-t",
        lambda threat, i: attacks.fab(threat, rank=i, steps=5, early_exit=True),
        2,
        ranks=True,
    ),
    Stage("square", lambda threat, _: attacks.square(threat, queries=20)),
)


def convolutional(weights, x):
    kernel, matrix = weights
    h = jax.lax.conv_general_dilated(
        x[None], kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(h).ravel() @ matrix


def examples():
    kernel, matrix, image = jax.random.split(jax.random.key(5), 3)
    weights = (
        jax.random.normal(kernel, (3, 3, 1, 4)),
        jax.random.normal(matrix, (36, CLASSES)),
    )
    f = Partial(convolutional, weights)
    xs = np.asarray(jax.random.uniform(image, (EXAMPLES, *SHAPE)))
    return f, xs, np.argmax(jax.vmap(f)(xs), axis=1)


def attacked(first=0, last=EXAMPLES, eps=0.02):
    f, xs, labels = examples()
    run = attacks.cascade(STAGES, Linf(eps), lanes=LANES)
    chosen = slice(first, last)
    return run(jax.random.key(0), f, xs[chosen], labels[chosen], first=first)


def digest(broken):
    content = broken.z.tobytes() + broken.by.astype(np.int32).tobytes()
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def whole():
    return attacked()


def test_some_fall_at_every_kind_of_stage_and_some_survive(whole):
    assert 0 < whole.robust_accuracy < 1


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_same_bits_however_the_examples_are_cut(whole, size):
    pieces = [attacked(i, i + size) for i in range(0, EXAMPLES, size)]
    for name in ("z", "by", "round", "finite"):
        together = np.concatenate([getattr(piece, name) for piece in pieces])
        assert (together == getattr(whole, name)).all()


def test_a_subset_keeps_its_numbers(whole):
    f, xs, labels = examples()
    chosen = np.array([17, 3, 4, 11])
    run = attacks.cascade(STAGES, Linf(0.02), lanes=LANES)
    some = run(jax.random.key(0), f, xs[chosen], labels[chosen], first=chosen)
    assert (some.z == whole.z[chosen]).all()
    with pytest.raises(ValueError, match="one number"):
        run(jax.random.key(0), f, xs, labels, first=chosen)


def test_the_same_bits_on_eight_devices(whole):
    flags = os.environ.get("XLA_FLAGS", "")
    count = "--xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"XLA_FLAGS": f"{flags} {count}", "PYTHONPATH": path}
    code = (
        "import jax, test_attacks_batches as t; assert jax.device_count() == 8; "
        "print(t.digest(t.attacked()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(whole)


def test_another_radius_or_batch_compiles_nothing(whole):
    traced = []

    def counted(weights, x):
        traced.append(x.shape)
        return convolutional(weights, x)

    f, xs, labels = examples()
    f = Partial(counted, *f.args)
    for eps, start in ((0.02, 0), (0.03, 0), (0.02, 10)):
        run = attacks.cascade(STAGES, Linf(eps), lanes=LANES)
        part = slice(start, start + 10)
        run(jax.random.key(0), f, xs[part], labels[part])
        if eps == 0.02 and start == 0:
            before = len(traced)
    assert len(traced) == before


MAKERS = {
    "pgd": lambda steps: attacks.pgd(Linf(0.1), steps=steps),
    "apgd": lambda steps: attacks.apgd(Linf(0.1), steps=steps),
    "fab": lambda steps: attacks.fab(L2(0.3), steps=steps, rank=0),
    "deepfool": lambda steps: attacks.deepfool(L2(1.0), steps=steps),
    "ddn": lambda steps: attacks.ddn(L2(1.0), steps=steps),
    "fmn": lambda steps: attacks.fmn(L2(1.0), steps=steps),
    "carlini": lambda steps: attacks.carlini_wagner(L2(1.0), searches=2, steps=steps),
}


@pytest.mark.parametrize("name", MAKERS)
def test_steps_may_be_traced(name):
    """One program serves every number of steps, with the results of its own one."""
    f, xs, labels = examples()
    key = jax.random.key(1)
    shared = jax.jit(lambda steps: MAKERS[name](steps)(key, f, xs[0], labels[0]))
    for steps in (5, 9):
        own = jax.jit(lambda: MAKERS[name](steps)(key, f, xs[0], labels[0]))  # noqa: B023
        np.testing.assert_allclose(shared(steps), own(), atol=1e-5)
    assert shared._cache_size() == 1


QUERIES = 65  # what a whole number of rounds costs, of each of these
FEW = {"samples": 4, "tries": 5}
ASKING = {
    "square": (attacks.square, Linf(0.02), {}, 1),
    "spsa": (attacks.spsa, Linf(0.02), {"samples": 4}, 9),
    "nes": (attacks.nes, L2(0.05), {"samples": 4}, 9),
    "hopskipjump": (attacks.hopskipjump, L2(1.0), FEW, 5 + 2 * 10),
    "boundary": (attacks.boundary, L2(1.0), {"tries": 5}, 5),
}


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("name", ASKING)
def test_no_more_queries_than_allowed_and_few_left(name, stubborn):
    """Counted by the network; a stubborn one never answers wrongly."""
    make, threat, numbers, slack = ASKING[name]
    f, xs, labels = examples()
    asked = []

    def put(value):
        asked.append(value)
        return np.float32(0)

    def told(x):
        logits = jnp.eye(CLASSES)[labels[0]] if stubborn else f(x)
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return logits + jax.pure_callback(put, like, jnp.sum(x))

    attack = make(threat, queries=QUERIES, **numbers)
    z = jax.jit(lambda x: attack(jax.random.key(0), told, x, labels[0]))(xs[0])
    z.block_until_ready()
    known = name == "square"  # the verdict on x itself is free there
    assert len(asked) <= QUERIES + known
    if stubborn or name in ("hopskipjump", "boundary"):
        assert len(asked) >= QUERIES - slack


@pytest.mark.parametrize(
    "attack",
    [
        attacks.square(Linf(0.05), queries=30),
        attacks.spsa(Linf(0.05), queries=60, samples=4),
    ],
    ids=["square", "spsa"],
)
def test_queries_are_counted(attack):
    f, xs, labels = examples()
    run = jax.jit(lambda x, y: attack.counted(jax.random.key(0), f, x, y))
    plain = jax.jit(lambda x, y: attack(jax.random.key(0), f, x, y))
    for x, label in zip(xs[:4], labels[:4], strict=True):
        z, queries = run(x, label)
        assert (z == plain(x, label)).all()
        assert 0 <= queries <= 60
        if jnp.argmax(f(z)) == label:
            assert queries >= 30
