"""A checkpoint is restored bit for bit, or not at all."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import checkpoint
from experiments.runs import RunError


def tree(value: float = 0.0) -> dict:
    """A state such as a training has: parameters, optimiser state, a step."""
    params = {"w": value + jnp.arange(12.0).reshape(3, 4), "b": jnp.zeros(4)}
    optimizer = optax.adamw(1e-3, weight_decay=0.1).init(params)
    return {"params": params, "optimizer": optimizer, "step": jnp.int32(7)}


def like():
    return jax.tree.map(jnp.zeros_like, tree())


def same(a, b):
    return checkpoint.digest(a) == checkpoint.digest(b)


@pytest.fixture
def saved(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tree(step), seconds=step / 2)
    return tmp_path


def biggest(folder):
    files = (f for f in folder.rglob("*") if f.is_file())
    return max(files, key=lambda f: f.stat().st_size)


def test_restores_bit_for_bit_and_keeps_two(saved):
    found = checkpoint.restore(saved, like())
    assert found.step == 3
    assert found.note == {"seconds": 1.5}
    assert same(found.tree, tree(3))
    assert jax.tree.structure(found.tree) == jax.tree.structure(tree())
    assert sorted(p.name for p in saved.iterdir()) == ["2", "3"]


def test_restores_into_shapes_alone(saved):
    shapes = jax.eval_shape(tree)
    assert same(checkpoint.restore(saved, shapes).tree, tree(3))


def test_nothing_to_restore(tmp_path):
    assert checkpoint.restore(tmp_path / "none", like()) is None
    assert checkpoint.restore(tmp_path, like()) is None


def flip(folder):
    file = biggest(folder / "state")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def cut(folder):
    file = biggest(folder / "state")
    file.write_bytes(file.read_bytes()[:10])


def forget_state(folder):
    shutil.rmtree(folder / "state")


def forget_digest(folder):
    shutil.rmtree(folder / "about")


def other_digest(folder):
    file = biggest(folder / "about")
    file.write_text(file.read_text().replace('"sha256": "', '"sha256": "0'))


DAMAGE = [flip, cut, forget_state, forget_digest, other_digest]


# orbax leaves coroutines behind when it fails to read
orbax_fails = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)


@orbax_fails
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_said_and_the_step_before_is_used(saved, damage, caplog):
    damage(saved / "3")
    with caplog.at_level(logging.WARNING, logger="experiments.checkpoint"):
        found = checkpoint.restore(saved, like())
    assert "step 3, is damaged" in caplog.text
    assert (found.step, same(found.tree, tree(2))) == (2, True)
    checkpoint.save(saved, 3, tree(3))  # the place is free again
    assert checkpoint.restore(saved, like()).step == 3


@orbax_fails
def test_all_damaged_is_nothing(saved):
    for step in (2, 3):
        cut(saved / str(step))
    assert checkpoint.restore(saved, like()) is None


def test_empty_and_unfinished_steps_are_ignored(saved):
    (saved / "9").mkdir()
    shutil.copytree(saved / "3", saved / "8.orbax-checkpoint-tmp")
    assert checkpoint.restore(saved, like()).step == 3
    assert {p.name for p in saved.iterdir()} == {"2", "3"}


def test_another_shape_is_not_restored(saved):
    other = like() | {"step": jnp.zeros((2,), jnp.int32)}
    with pytest.raises(RunError, match=r"another network.*fresh=true"):
        checkpoint.restore(saved, other)
    assert checkpoint.restore(saved, like()).step == 3


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        checkpoint.save(tmp_path / "file", 1, tree())


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.float32([1, 2]), "b": np.float32([4])},
        {"a": np.float64([1, 2]), "b": np.float32([3])},
        {"a": np.float32([[1, 2]]), "b": np.float32([3])},
        {"a": np.float32([1, 2]), "c": np.float32([3])},
        {"a": np.float32([1, 2, 3])},
    ],
)
def test_the_digest_sees_names_shapes_types_and_values(other):
    one = {"a": np.float32([1, 2]), "b": np.float32([3])}
    assert checkpoint.digest(other) != checkpoint.digest(one)
    assert checkpoint.digest({k: jnp.asarray(v) for k, v in one.items()}) == (
        checkpoint.digest(one)
    )
