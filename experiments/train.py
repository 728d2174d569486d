"""Train a network, attack it, certify it: `python -m experiments.train`."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from certjax import training
from certjax.models import population_statistics
from certjax.training.streams import stream
from certjax.types import Array, Key
from experiments import build, checkpoint, console, data, devices, runs, selection
from experiments.build import ConfigError
from experiments.cli import Launch, launch
from experiments.evaluation import as_input, Evaluation, Examples, Weights
from experiments.judging import (
    check_same_data,
    dataset_of,
    evaluation_of,
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
    check_fits,
    check_shown,
    Clock,
    initializer_of,
    model_of,
    Node,
    Objective,
    optimizer_of,
    read,
    recipe_of,
    regularizer_of,
    threat_of,
    TrainSettings,
)
from experiments.smoothing_labels import smoothed_labels
from experiments.tracking import rewind, Tracker, tracking


LOGGED = 400  # rows of metrics.jsonl over a whole training
# shares of the training batch become percentages, named as in the results
SHARES = {"accuracy": "clean", "verified": "certified", "robust_accuracy": "robust"}
SHARES |= {"noisy_accuracy": "noisy"}
NAMES = SHARES | {"natural": "natural_loss", "robust": "robust_loss"}
PATIENCE = 0.01  # share of steps that may be skipped for a loss that is not finite


class Job(NamedTuple):
    """All that a run needs, made and checked before its directory is touched."""

    settings: TrainSettings
    train: Examples
    evaluation: Evaluation
    clock: Clock
    optimizer: optax.GradientTransformation
    initialize: Callable[[Key, Array], dict]
    step: Callable
    choose: selection.Chooser | None


class Place(NamedTuple):
    """Where the numbers of a run go, and whether a signal asks it to stop."""

    run: Run
    tracker: Tracker
    stop: Callable[[], int]


def work(config: dict[str, Any], launched: Launch) -> None:
    """One run, from wherever it stands to its end."""
    settings = read(TrainSettings, config)
    root = Path(settings.paths.get("runs", "runs"))
    run = runs.choose(config, root, launched.sweep)
    if runs.finished(run.path) and not settings.fresh:
        show_finished(run, settings.data)
        return
    job = prepared(settings)
    with (
        runs.opened(run, fresh=settings.fresh, overrides=launched.overrides),
        runs.stop_requests() as stop,
        tracking(run, settings.tracking, job_type="train") as tracker,
    ):
        console.say(f"run directory: {run.path}")
        train_and_judge(job, Place(run, tracker, stop))


def prepared(settings: TrainSettings) -> Job:
    """Build everything the config names.

    Raises:
      ConfigError: the config cannot be run.
    """
    train = examples_of(settings.data, "train")
    train, held = selection.held_out(settings, train)
    model = model_of(settings.model)
    check_fits(model, train.images[0])
    _check_noise(settings, model, train.images[0])
    clock = Clock.of(settings.schedule, train.labels)
    optimizer = optimizer_of(settings.optimizer, clock)
    step = step_of(settings, model, optimizer, clock, train.images[0])
    evaluation = evaluation_of(plan_of(settings), model)
    initialize = initializer_of(settings.objective, model)
    _check_trains(step, initialize, optimizer, batches(train, settings)(0))
    choose = selection.chooser(settings, model, held, clock)
    return Job(settings, train, evaluation, clock, optimizer, initialize, step, choose)


def _check_noise(settings: TrainSettings, model: nn.Module, image: np.ndarray) -> None:
    if node := settings.objective.loss.get("noise"):
        where = "objective.loss.noise"
        noise = build.build(node, where=where)
        check_shown(model, noise.sample, image, where=where)


def _check_trains(
    step: training.step.Step,
    initialize: Callable[[Key, Array], dict],
    optimizer: optax.GradientTransformation,
    batch: tuple[Any, Any],
) -> None:
    """Trace the step, which JAX remembers: what it cannot do is refused before it runs.

    Raises:
      ConfigError: the step's own complaint.
    """
    image = jax.ShapeDtypeStruct(batch[0].shape[1:], jnp.float32)
    try:
        variables = jax.eval_shape(initialize, jax.random.key(0), image)
        state = jax.eval_shape(
            lambda v: training.initial_state(v, optimizer), variables
        )
        jax.eval_shape(step, devices.replicated(state), *batch)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"`objective` cannot train this `model`: {error}") from error


def step_of(
    settings: TrainSettings,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    clock: Clock,
    image: np.ndarray,
) -> training.step.Step:
    """The training step of a config, for images like the given one."""
    recipe = recipe_of(settings, clock)
    with build.blamed("objective.loss"):
        recipe(0)
    return training.train_step(
        model,
        recipe,
        optimizer,
        seed=settings.seed,
        regularizer=regularizer_of(settings, clock),
        l1=settings.objective.l1,
        clean=needs_clean_batch(settings, model, image),
        **options(settings),
    )


def options(settings: TrainSettings) -> dict[str, Any]:
    """What a config may add to the training step."""
    objective, augment = settings.objective, settings.data.augment
    nodes = {
        "augment": (augment, "data.augment"),
        "perturb": (objective.perturb, "objective.perturb"),
        "statistics_at": (_statistics_at(objective), "objective.statistics_at"),
    }
    made = {n: build.build(v, where=w) for n, (v, w) in nodes.items() if v}
    if "statistics_at" in made:  # so far a builder, which waits for the threat set
        threat = threat_of(settings.threat, settings.train_eps)
        with build.blamed("objective.statistics_at"):
            made["statistics_at"] = made["statistics_at"](threat)
    return made


def _statistics_at(objective: Objective) -> Node | None:
    """Where batch-norm statistics are taken; under its noise if it has one."""
    noise = objective.loss.get("noise")
    if objective.statistics_at is not None or noise is None:
        return objective.statistics_at
    target = "certjax.training.noisy_copy"
    return {"_target_": target, "_partial_": True, "noise": noise}


def needs_clean_batch(
    settings: TrainSettings, model: nn.Module, image: np.ndarray
) -> bool:
    """Not where every pass of the objective is noisy and nothing is normalised."""
    x = jax.ShapeDtypeStruct(image.shape, jnp.float32)
    made = jax.eval_shape(model.init, jax.random.key(0), x)
    return "batch_stats" in made or "noise" not in settings.objective.loss


def train_and_judge(job: Job, place: Place) -> None:
    """Train unless that is done, evaluate, write the result."""
    path, total, model = place.run.path, job.clock.total, job.evaluation.model
    trained = restored_weights(path, model, job.train.images[0])
    if trained is not None:
        _check_continued(job, place, trained)
    else:
        state, seconds = fit(job, place)
        best = selection.chosen(job.settings, path, model, job.train.images[0])
        weights, note = best or (final_weights(job, state), {"step": total})
        note = {"seconds": seconds, "selected": note}
        checkpoint.save(path / WEIGHTS, total, weights, **note, **_data_of(job))
        trained = checkpoint.Restored(total, weights, note)
    plan = plan_of(job.settings)
    result = judge(place.run, plan, job.evaluation, trained.tree, place.stop)
    result["seconds"] |= {"train": trained.note["seconds"]}
    result["selection"] = {
        "on": job.settings.selection,
        **trained.note.get("selected", {}),
    }
    finish(place.run, result, place.tracker, step=total)


def fit(job: Job, place: Place) -> tuple[training.TrainState, float]:
    """Train from the last checkpoint on; the last state, and the seconds it took."""
    first = as_input(jnp.asarray(job.train.images[0]))
    variables = jax.jit(job.initialize)(stream(job.settings.seed, "init"), first)
    state = devices.replicate(training.initial_state(variables, job.optimizer))
    found = checkpoint.restore(place.run.path / "checkpoint", state)
    if found is None:
        rewind(place.run, 0)
        return loop(job, place, state, 0, 0.0)
    _check_continued(job, place, found)
    console.say(f"continuing after step {found.step} of {job.clock.total}")
    rewind(place.run, found.step)
    return loop(job, place, found.tree, found.step, found.note["seconds"])


def loop(
    job: Job, place: Place, state: training.TrainState, start: int, seconds: float
) -> tuple[training.TrainState, float]:
    """Steps `start` to the last one; what a step does depends on its number alone.

    Raises:
      Stopped: a signal came, the state is saved.
      RunError: the training diverged.
    """
    began = saved = time.monotonic()
    spent = lambda: seconds + time.monotonic() - began
    total, batch = job.clock.total, batches(job.train, job.settings)
    every = max(1, total // LOGGED)
    with console.progress("train", total=total, done=start) as advance:
        for step in range(start + 1, total + 1):
            state, metrics = job.step(state, *batch(step - 1))
            if step % every == 0 or step == total:
                check(job, place, Progress(step, state, metrics, spent()))
                advance(every, _log(job, place, step, state, metrics))
            if job.choose is not None and job.choose.due(step):
                weights = final_weights(job, state)
                scores = selection.consider(job.choose, place.run.path, step, weights)
                place.tracker.log(step, scores)
            due = time.monotonic() - saved > job.settings.checkpoint_seconds
            signum = place.stop()
            if signum or due or step == total:
                save(job, place, step, state, spent())
                saved = time.monotonic()
            if signum:
                raise Stopped(signum, f"after step {step} of {total}")
    return state, spent()


def save(
    job: Job, place: Place, step: int, state: training.TrainState, seconds: float
) -> Path:
    """Save the state of a training; where it is."""
    folder = place.run.path / "checkpoint"
    checkpoint.save(folder, step, state, seconds=seconds, **_data_of(job))
    return folder / str(step)


def _data_of(job: Job) -> dict[str, str]:
    """What a checkpoint says of the data it was made on."""
    return {"data_sha256": dataset_of(job.settings.data).sha256}


def _check_continued(job: Job, place: Place, found: checkpoint.Restored) -> None:
    check_same_data(place.run, job.settings.data, found.note.get("data_sha256"))


class Progress(NamedTuple):
    """Where a training stands after a step."""

    step: int
    state: training.TrainState
    metrics: dict[str, Any]
    seconds: float


def check(job: Job, place: Place, now: Progress) -> None:
    """Stop a training that diverges, the last good state saved.

    A step with a loss or gradient that is not finite leaves the state alone, so the
    state is the last good one.

    Raises:
      RunError: too many steps were skipped; what the last one looked like.
    """
    skipped = now.step - int(now.state.step)
    if skipped <= max(10, PATIENCE * job.clock.total):
        return
    kept = save(job, place, int(now.state.step), now.state, now.seconds)
    raise RunError(
        f"training diverged: {skipped} of {now.step} steps had a loss or gradient that "
        f"is not finite. Step {now.step}: {describe(now.metrics)}. The last good state "
        f"is kept in {kept}. Try a smaller optimizer.learning_rate, a smaller "
        "optimizer.clip or a longer schedule.ramp, and start with fresh=true"
    )


def describe(metrics: dict[str, Any]) -> str:
    """The loss terms of a step, and the layer whose bounds exploded."""
    values = {name: float(value) for name, value in metrics.items()}
    growth = {n: v for n, v in values.items() if n.startswith("growth_")}
    hidden = {"finite", *growth}
    terms = [f"{n} {v:.4g}" for n, v in sorted(values.items()) if n not in hidden]
    broken = [name for name, value in growth.items() if not math.isfinite(value)]
    if broken:
        terms.append(f"the bounds of activation {broken[0][7:]} are not finite")
    elif growth:
        name = max(growth, key=lambda n: growth[n])
        terms.append(
            f"the widest bounds are those of activation {name[7:]}, "
            f"{growth[name]:.3g} times as wide as the input"
        )
    return ", ".join(terms)


def _log(
    job: Job, place: Place, step: int, state: training.TrainState, metrics: dict
) -> str:
    """One row of metrics; the note for the progress bar."""
    row = {f"train/{NAMES.get(n, n)}": _readable(n, v) for n, v in metrics.items()}
    skipped = step - int(state.step)
    row |= {
        "train/skipped": skipped,
        "train/epoch": step / job.clock.steps_per_epoch,
    }
    place.tracker.log(step, row)
    return f"loss {row['train/loss']:.3f}"


def _readable(name: str, value: Any) -> float:
    """Accuracies in percent, as in the results."""
    return 100 * float(value) if name in SHARES else float(value)


def batches(train: Examples, settings: TrainSettings) -> Callable[[int], tuple]:
    """`batch(step) -> (images, labels)` on the devices: a function of (seed, step)."""
    size = settings.schedule.batch
    pairs = (train.images, smoothed_labels(settings.objective, train.labels))

    def batch(step: int) -> tuple[Any, Any]:
        chosen = data.batch(len(train.labels), size, seed=settings.seed, step=step)
        return devices.spread(jax.tree.map(lambda array: array[chosen], pairs))

    return batch


def final_weights(job: Job, state: training.TrainState) -> Weights:
    """What is evaluated: the averaged weights where the config averages them.

    Batch-norm statistics are averages over the training examples in whole batches, not
    augmented, under the noise of the objective if it has one.
    """
    params = training.averaged_params(state.opt_state, state.params)
    if not state.statistics:
        return Weights(params, {})
    images, batch = job.train.images, job.settings.schedule.batch
    starts = range(0, len(images) - batch + 1, batch)
    seen = _noisy(job.settings)
    inputs = (seen(i, as_input(devices.spread(images[i : i + batch]))) for i in starts)
    model = job.evaluation.model
    return Weights(params, population_statistics(model, params, inputs))


def _noisy(settings: TrainSettings) -> Callable[[int, Array], Array]:
    """`seen(number, xs)`: a batch as the objective's noise shows it, or as it is."""
    node = settings.objective.loss.get("noise")
    if node is None:
        return lambda _, xs: xs
    noise = build.build(node, where="objective.loss.noise")
    first = stream(settings.seed, "statistics")

    @jax.jit
    def seen(number: Array, xs: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(first, number), len(xs))
        return jax.vmap(noise.sample)(keys, xs)

    return seen


if __name__ == "__main__":
    launch("train", work)
