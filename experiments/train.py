"""Train a network, attack it, certify it: `python -m experiments.train`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from certjax import training
from certjax.models import population_statistics
from certjax.training.streams import stream
from certjax.types import PyTree
from experiments import build, checkpoint, console, data, devices, runs
from experiments.cli import Launch, launch
from experiments.evaluation import as_input, Examples, Weights
from experiments.judging import (
    examples_of,
    finish,
    judge,
    plan_of,
    restored_weights,
    show_finished,
    WEIGHTS,
)
from experiments.runs import Run, RunError, Stopped
from experiments.settings import (
    Clock,
    model_of,
    optimizer_of,
    read,
    recipe_of,
    regularizer_of,
    TrainSettings,
)
from experiments.tracking import rewind, Tracker, tracking


LOGGED = 400  # rows of metrics.jsonl over a whole training
# shares of the training batch become percentages, named as in the results
SHARES = {"accuracy": "clean", "verified": "certified", "robust_accuracy": "robust"}
NAMES = SHARES | {"natural": "natural_loss", "robust": "robust_loss"}
PATIENCE = 0.01  # share of steps that may be skipped for a loss that is not finite


class Trainer(NamedTuple):
    """A training: what a step does, where its results go, and when to stop."""

    step: Callable
    batch: Callable[[int], tuple[np.ndarray, np.ndarray]]
    clock: Clock
    folder: Path
    tracker: Tracker
    stop: Callable[[], int]
    checkpoint_seconds: float


def work(config: dict[str, Any], launched: Launch) -> None:
    """One run, from wherever it stands to its end."""
    settings = read(TrainSettings, config)
    root = Path(settings.paths.get("runs", "runs"))
    run = runs.choose(config, root, launched.sweep)
    if runs.finished(run.path) and not settings.fresh:
        show_finished(run)
        return
    with (
        runs.opened(run, fresh=settings.fresh, overrides=launched.overrides),
        runs.stop_requests() as stop,
        tracking(run, settings.tracking, job_type="train") as tracker,
    ):
        console.say(f"run directory: {run.path}")
        train_and_judge(run, settings, tracker, stop)


def train_and_judge(
    run: Run, settings: TrainSettings, tracker: Tracker, stop: Callable[[], int]
) -> None:
    """Train unless that is done, evaluate, write the result."""
    model, train = model_of(settings.model), examples_of(settings.data, "train")
    trained = restored_weights(run.path, model, train.images[0])
    if trained is None:
        state, seconds = fit(run, settings, model, train, tracker, stop)
        weights = final_weights(model, state, train, batch=settings.schedule.batch)
        step = Clock.of(settings.schedule, train.labels).total
        checkpoint.save(run.path / WEIGHTS, step, weights, seconds=seconds)
        trained = checkpoint.Restored(step, weights, {"seconds": seconds})
    result = judge(run, plan_of(settings), model, trained.tree, stop)
    result["seconds"] |= {"train": trained.note["seconds"]}
    finish(run, result, tracker, step=trained.step)


def fit(
    run: Run,
    settings: TrainSettings,
    model: nn.Module,
    train: Examples,
    tracker: Tracker,
    stop: Callable[[], int],
) -> tuple[training.TrainState, float]:
    """Train from the last checkpoint on; the last state, and the seconds it took."""
    clock = Clock.of(settings.schedule, train.labels)
    optimizer = optimizer_of(settings.optimizer, clock)
    first = training.initial_state(_variables(settings, model, train), optimizer)
    state, start, seconds = devices.replicate(first), 0, 0.0
    found = checkpoint.restore(run.path / "checkpoint", state)
    if found is not None:
        start, state, seconds = found.step, found.tree, found.note["seconds"]
        console.say(f"continuing after step {start} of {clock.total}")
    rewind(run, start)
    trainer = Trainer(
        _step(settings, model, optimizer, clock),
        batches(train, settings),
        clock,
        run.path / "checkpoint",
        tracker,
        stop,
        settings.checkpoint_seconds,
    )
    return loop(trainer, state, start, seconds)


def _variables(settings: TrainSettings, model: nn.Module, train: Examples) -> dict:
    """Initial variables, from the seed alone."""
    key, x = stream(settings.seed, "init"), as_input(jax.numpy.asarray(train.images[0]))
    node = settings.objective.initialize
    if node is None:
        return jax.jit(model.init)(key, x)
    initialize = build.build(node, where="objective.initialize")
    return jax.jit(lambda key, x: initialize(model, key, x))(key, x)


def _step(
    settings: TrainSettings, model: nn.Module, optimizer: Any, clock: Clock
) -> Callable:
    augment = settings.data.get("augment")
    return training.train_step(
        model,
        recipe_of(settings, clock),
        optimizer,
        seed=settings.seed,
        regularizer=regularizer_of(settings, clock),
        l1=settings.objective.l1,
        augment=augment and build.build(augment, where="data.augment"),
    )


def loop(
    trainer: Trainer, state: PyTree, start: int, seconds: float
) -> tuple[PyTree, float]:
    """Steps `start` to the last one; what a step does depends on its number alone.

    Raises:
      Stopped: a signal came, the state is saved.
      RunError: the training diverged.
    """
    began = saved = time.monotonic()
    spent = lambda: seconds + time.monotonic() - began
    every = max(1, trainer.clock.total // LOGGED)
    total = trainer.clock.total
    with console.progress("train", total=total, done=start) as advance:
        for step in range(start + 1, total + 1):
            state, metrics = trainer.step(state, *trainer.batch(step - 1))
            if step % every == 0 or step == total:
                advance(every, _log(trainer, step, state, metrics))
            due = time.monotonic() - saved > trainer.checkpoint_seconds
            signum = trainer.stop()
            if signum or due or step == total:
                checkpoint.save(trainer.folder, step, state, seconds=spent())
                saved = time.monotonic()
            if signum:
                raise Stopped(signum, f"after step {step} of {total}")
    return state, spent()


def _log(trainer: Trainer, step: int, state: PyTree, metrics: dict) -> str:
    """One row of metrics; the note for the progress bar."""
    row = {f"train/{NAMES.get(n, n)}": _readable(n, v) for n, v in metrics.items()}
    skipped = step - int(state.step)
    row |= {
        "train/skipped": skipped,
        "train/epoch": step / trainer.clock.steps_per_epoch,
    }
    if skipped > max(10, PATIENCE * trainer.clock.total):
        raise RunError(
            f"training diverged: {skipped} of {step} steps had a loss or gradient that "
            "is not finite; try a smaller optimizer.learning_rate, a smaller "
            "optimizer.clip or a longer schedule.ramp, and start with fresh=true"
        )
    trainer.tracker.log(step, row)
    return f"loss {row['train/loss']:.3f}"


def _readable(name: str, value: Any) -> float:
    """Accuracies in percent, as in the results."""
    return 100 * float(value) if name in SHARES else float(value)


def batches(train: Examples, settings: TrainSettings) -> Callable[[int], tuple]:
    """`batch(step) -> (images, labels)` on the devices: a function of (seed, step)."""
    size = settings.schedule.batch

    def batch(step: int) -> tuple[Any, Any]:
        chosen = data.batch(len(train.labels), size, seed=settings.seed, step=step)
        return devices.spread((train.images[chosen], train.labels[chosen]))

    return batch


def final_weights(
    model: nn.Module, state: training.TrainState, train: Examples, *, batch: int
) -> Weights:
    """What is evaluated: batch-norm statistics are those of all training examples."""
    if not state.statistics:
        return Weights(state.params, {})
    starts = range(0, len(train.labels) - batch + 1, batch)
    rows = (devices.spread(train.images[i : i + batch]) for i in starts)
    inputs = map(as_input, rows)
    return Weights(state.params, population_statistics(model, state.params, inputs))


if __name__ == "__main__":
    launch("train", work)
