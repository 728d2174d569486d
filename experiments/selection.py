"""Which weights of a training are kept: the last, or the best on held-out examples.

`selection=split` scores every epoch after the ramp on examples that are taken out of
the training set. `selection=test` scores on the test set, as much of the literature
does; the result says so. The best weights so far are kept beside the checkpoints, so
that an interrupted run goes on choosing where it stopped.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from certjax import training
from certjax.training import Evaluation
from experiments import checkpoint, devices
from experiments.evaluation import Examples, Weights
from experiments.judging import examples_of, restored_weights
from experiments.settings import Clock, threat_of, TrainSettings


BEST = "best"
STREAM = zlib.crc32(b"selection")


class Chooser(NamedTuple):
    """How weights are scored.

    score(weights) -> certified by IBP at test_eps, then clean: shares of held-out
    examples.  first: the step from which every `every`-th is scored.
    """

    score: Callable[[Weights], Evaluation]
    first: int
    every: int

    def due(self, step: int) -> bool:
        """Is this step's network a candidate?"""
        return step >= self.first and step % self.every == 0


def held_out(settings: TrainSettings, train: Examples) -> tuple[Examples, Examples]:
    """The training examples, and those the choice is made on; none for "last"."""
    if settings.selection == "last":
        return train, Examples(*(array[:0] for array in train))
    if settings.selection == "test":
        return train, examples_of(settings.data, "test")
    order = np.random.default_rng([settings.seed, STREAM]).permutation(
        len(train.labels)
    )
    count = max(1, round(settings.selection_share * len(order)))
    kept, held = np.sort(order[count:]), np.sort(order[:count])
    return (
        Examples(*(array[kept] for array in train)),
        Examples(*(array[held] for array in train)),
    )


def chooser(
    settings: TrainSettings, model: nn.Module, held: Examples, clock: Clock
) -> Chooser | None:
    """None where the last weights are kept."""
    if not len(held.labels):
        return None
    evaluate = training.evaluator(
        model, batch=min(len(held.labels), devices.default_batch())
    )
    threat = threat_of(settings.threat, settings.test_eps)

    def score(weights: Weights) -> Evaluation:
        return evaluate(*weights, held.images, held.labels, threat)

    ramp = settings.schedule.warm + settings.schedule.ramp
    return Chooser(score, max(1, clock.steps(ramp)), clock.steps_per_epoch)


def consider(
    choose: Chooser, path: Path, step: int, weights: Weights
) -> dict[str, float]:
    """Keep the weights if they are better than the best so far; the scores to log."""
    found = choose.score(weights)
    scores = {"certified": found.certified, "clean": found.natural}
    best = checkpoint.note(path / BEST)
    if best is None or (scores["certified"], scores["clean"]) > (
        best["certified"],
        best["clean"],
    ):
        checkpoint.save(path / BEST, step, weights, **scores)
    return {f"selection/{name}": 100 * share for name, share in scores.items()}


def chosen(
    settings: TrainSettings, path: Path, model: nn.Module, image: np.ndarray
) -> tuple[Weights, dict[str, Any]] | None:
    """The best weights and what the result says about them; None: keep the last."""
    found = restored_weights(path, model, image, folder=BEST)
    if settings.selection == "last" or found is None:
        return None
    return found.tree, {"step": found.step, **found.note}
