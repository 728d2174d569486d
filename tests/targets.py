"""A finished training run around weights that come from elsewhere."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from runners import composed

from experiments import checkpoint, judging, runs
from experiments.evaluation import Weights


LAYERS = {
    "conv1": "conv_0",
    "conv2": "conv_1",
    "fc1": "dense_0",
    "fc2": "logits",
}


def finished_run(folder: Path, params: Any, *overrides: str) -> Path:
    """The directory of a run whose network has the given parameters."""
    config = composed(*overrides, f"paths.runs={folder}")
    run = runs.choose(config, folder)
    with runs.opened(run, fresh=True):
        weights = Weights(params, {})
        checkpoint.save(run.path / judging.WEIGHTS, 1, weights, seconds=0.0)
        runs.write_json(run.path / "result.json", {})
        runs.write_text(run.path / "done", "")
    return run.path


def peers_target(folder: Path, peers: Path, mnist: Path, which: str) -> Path:
    """A run of the networks on which other libraries were measured: std or adv.

    They are `dm_small` without normalisation.
    """
    with np.load(peers / f"attack_target_{which}.npz") as file:
        params = {
            name: {
                "kernel": jnp.asarray(file[f"{theirs}_w"]),
                "bias": jnp.asarray(file[f"{theirs}_b"]),
            }
            for theirs, name in LAYERS.items()
        }
    words = ("data=mnist", "model=dm_small", "data.mean=0.0", "data.std=1.0")
    words += (f"data.dir={mnist}", f"name=peers_{which}", "test_eps=0.3")
    return finished_run(folder, params, *words)
