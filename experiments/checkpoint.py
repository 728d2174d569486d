"""Checkpoints that are verified: orbax for the arrays, our own digest for the truth.

Orbax restores a flipped byte without complaint and takes an empty step directory for
the latest one. Hence each step carries a sha256 of its tree, and a step that does not
match is reported, put aside and replaced by the one before it.
"""

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from certjax.types import PyTree
from experiments.runs import RunError, writable


KEEP = 2
LOG = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A verified checkpoint: steps completed, the tree, and the note saved with it."""

    step: int
    tree: PyTree
    note: dict[str, Any]


class DamagedError(ValueError):
    """A checkpoint whose content is not what was saved."""


def layout(tree: PyTree) -> list[str]:
    """Path, shape and type of every leaf, one line each."""
    return [
        f"{jax.tree_util.keystr(path)} {tuple(leaf.shape)} {np.dtype(leaf.dtype)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def digest(tree: PyTree) -> str:
    """sha256 over path, shape, type and bytes of every leaf."""
    total = hashlib.sha256()
    for line, leaf in zip(layout(tree), jax.tree.leaves(tree), strict=True):
        total.update(f"{line}\n".encode())
        total.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return total.hexdigest()


@contextlib.contextmanager
def _manager(folder: Path) -> Iterator[Any]:
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEEP, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        yield manager


def save(folder: Path, step: int, tree: PyTree, **note: Any) -> None:
    """Save a tree after `step` completed steps; the last two are kept.

    The write is atomic: killed in the middle, it leaves the steps before it.

    Raises:
      RunError: no space, or no permission.
    """
    import orbax.checkpoint as ocp

    about = {"sha256": digest(tree), "layout": layout(tree), "note": note}
    with writable(folder), _manager(folder) as manager:
        if step in manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave(about)
        )
        manager.save(step, args=items, force=True)


def _steps(folder: Path) -> list[int]:
    """Steps on the disk, newest first; what a killed write left is removed."""
    steps = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.isdecimal() and any(entry.iterdir()):
            steps.append(int(entry.name))
        elif entry.name.isdecimal() or ".orbax-checkpoint-tmp" in entry.name:
            shutil.rmtree(entry)
    return sorted(steps, reverse=True)


def restore(folder: Path, like: PyTree) -> Restored | None:
    """The newest checkpoint that is whole, or None.

    A damaged one is reported and renamed to `<step>.damaged`.

    Args:
      folder: where `save` wrote.
      like: a tree of the same structure, shapes, types and shardings.

    Raises:
      RunError: the checkpoint is whole, but of another tree.
    """
    abstract = jax.tree.map(_abstract, like)
    for step in _steps(folder):
        try:
            return _read(folder, step, abstract)
        except RunError:
            raise
        except Exception as error:  # noqa: BLE001 - orbax raises bare Exceptions
            reason = str(error).strip().splitlines() or [type(error).__name__]
            LOG.warning(
                "checkpoint %s, step %d, is damaged (%s); the one before it is used",
                folder,
                step,
                reason[0][:200],
            )
            _put_aside(folder / str(step))
    return None


def note(folder: Path) -> dict[str, Any] | None:
    """The note of the newest checkpoint, its arrays unread; None: there is none."""
    import orbax.checkpoint as ocp

    for step in _steps(folder):
        with _manager(folder) as manager:
            about = ocp.args.Composite(about=ocp.args.JsonRestore())
            return manager.restore(step, args=about).about["note"]
    return None


def _put_aside(step: Path) -> None:
    aside = step.with_name(f"{step.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    step.rename(aside)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = getattr(leaf, "sharding", None) or here
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def _read(folder: Path, step: int, abstract: PyTree) -> Restored:
    import orbax.checkpoint as ocp

    with _manager(folder) as manager:
        about = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = manager.restore(step, args=about).about
        if about["layout"] != layout(abstract):
            raise RunError(
                f"checkpoint {folder} is of another network or optimiser than the code "
                "now builds from the same config; start again with fresh=true"
            )
        state = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state = manager.restore(step, args=state).state
    if digest(state) != about["sha256"]:
        raise DamagedError("its content does not match its sha256")
    return Restored(step, state, about["note"])
