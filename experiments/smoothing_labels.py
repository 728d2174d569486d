"""Smoothed predictions of the training images, for objectives that learn from them."""

from pathlib import Path
from typing import Any

import numpy as np

from certjax.training.smoothed import SmoothedLabel
from experiments import runs
from experiments.build import ConfigError
from experiments.judging import RECORDS
from experiments.runs import RunError
from experiments.settings import name_of, Objective


NEEDED = ("catrs",)
HOW = (
    "python -m experiments.certify run=<network trained with noise> "
    "certifier=smoothing split=train n=10000"
)


def smoothed_labels(objective: Objective, labels: np.ndarray) -> Any:
    """The labels [N], with the votes of a base model where the objective needs them.

    Raises:
      ConfigError: they are needed and not named, or named and not needed.
      RunError: they are not those of every training example.
    """
    needed = name_of(objective.loss) in NEEDED
    if needed != (objective.votes is not None):
        raise ConfigError(
            f"objective.votes must be the directory made by `{HOW}`"
            if needed
            else f"{name_of(objective.loss)} has no use for objective.votes"
        )
    if objective.votes is None:
        return labels
    return SmoothedLabel(labels, _shares(Path(objective.votes), labels))


def invented_labels(objective: Objective, labels: np.ndarray, classes: int) -> Any:
    """Labels for a try of the objective without data: all votes for the class."""
    if name_of(objective.loss) not in NEEDED:
        return labels
    return SmoothedLabel(labels, np.eye(classes, dtype=np.float32)[labels])


def _shares(folder: Path, labels: np.ndarray) -> np.ndarray:
    """[N, K] float32 shares of the votes."""
    rows = runs.read_lines(folder / RECORDS)
    found = {row["index"]: row for row in rows if row.get("split") == "train"}
    known = [found.get(i, {}).get("label", label) for i, label in enumerate(labels)]
    if len(found) != len(labels) or not np.array_equal(known, labels):
        raise RunError(
            f"{folder} holds the votes of {len(found)} of {len(labels)} training "
            f"examples, or those of other data; make (or finish) them with `{HOW}`"
        )
    if any(row.get("certifier") == "certify_soft" for row in found.values()):
        raise RunError(f"{folder} holds no votes for classes; make them with `{HOW}`")
    counts = np.asarray([found[i]["counts"] for i in range(len(labels))], np.float32)
    lost = np.asarray([found[i].get("invalid", 0) for i in range(len(labels))])
    return counts / (counts.sum(axis=1) + lost.astype(np.float32))[:, None]
