"""A finished training run around weights that come from elsewhere."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from runners import composed

from experiments import checkpoint, data, judging, runs
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


def digits_params(width: int = 64) -> Any:
    """A classifier of the digits without training: random features, ridge regression.

    For `model=mlp`, `model.hidden=[width]`; 97 % of the test digits.
    """
    found = data.load("digits")
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(0, 0.5, (64, width)), rng.normal(0, 0.5, width)
    xs = found.x_train.reshape(-1, 64) / 255.0
    features = np.maximum(xs @ kernel + bias, 0)
    features = np.hstack([features, np.ones((len(xs), 1))])
    wanted = 8.0 * np.eye(10)[found.y_train]
    gram = features.T @ features + 1e-2 * np.eye(width + 1)
    readout = np.linalg.solve(gram, features.T @ wanted)
    layers = {"dense_0": (kernel, bias), "logits": (readout[:-1], readout[-1])}
    return {
        name: {"kernel": jnp.float32(w), "bias": jnp.float32(b)}
        for name, (w, b) in layers.items()
    }


def digits_run(folder: Path, *overrides: str) -> Path:
    """A finished run of that classifier."""
    words = ("model=mlp", "+model.hidden=[64]", "test_eps=0.1", "curve_points=0")
    return finished_run(folder, digits_params(), *words, *overrides)


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
    words += ("objective=pgd" if which == "adv" else "objective=natural",)
    return finished_run(folder, params, *words)
