"""Evaluating a trained network, for all entry points: what, how, and the result."""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from certjax.threat import Threat
from experiments import (
    attacking,
    build,
    cascade,
    checkpoint,
    console,
    data,
    devices,
    plots,
    results,
    runs,
)
from experiments.cli import Launch
from experiments.evaluation import (
    as_input,
    certify_method,
    curve,
    evaluate,
    Evaluation,
    Examples,
    Method,
    select,
    Weights,
)
from experiments.runs import Run, RunError
from experiments.settings import (
    DataSettings,
    label_of,
    model_of,
    name_of,
    Node,
    read,
    Selection,
    threat_of,
    TrainSettings,
)
from experiments.tracking import Tracker, Tracking, tracking


WEIGHTS = "weights"
RECORDS = "certificates.jsonl"
SAMPLE = 100  # records in the table of W&B
SHARED = 512  # training images on which one perturbation for all is found


class Plan(NamedTuple):
    """What is measured; a node is None where there is nothing to certify or attack.

    known: records of other evaluations of the same network, to check against; their
    radii stand in for the one that is not measured here.
    pictures: number of adversarial examples that are kept and shown.
    """

    data: DataSettings
    threat: Node
    attack: Node | None
    attack_eps: float | None
    certifier: Node | None
    test_eps: float | None
    selection: Selection
    seed: int
    curve_points: int = 0
    curve_examples: int = 0
    about: dict[str, Any] = {}  # noqa: RUF012 - never changed
    known: tuple[dict[str, Any], ...] = ()
    pictures: int = 0


def plan_of(settings: TrainSettings) -> Plan:
    """Everything, as the config of a training run says."""
    return Plan(
        settings.data,
        settings.threat,
        settings.attack,
        settings.attack_eps,
        settings.certifier,
        settings.test_eps,
        settings,
        settings.seed,
        settings.curve_points,
        settings.curve_examples,
        about_training(settings),
    )


def about_training(settings: TrainSettings) -> dict[str, Any]:
    """Which network a result is about."""
    noise = settings.objective.loss.get("noise", {})
    return {
        "name": settings.name,
        "dataset": settings.data.name,
        "model": name_of(settings.model),
        "objective": name_of(settings.objective.loss),
        "train_eps": settings.train_eps,
        "validation": settings.data.validation,
        "selection": {"on": settings.selection},
        **({"train_sigma": noise["sigma"]} if "sigma" in noise else {}),
        "seed": settings.seed,
    }


def examples_of(wanted: DataSettings, split: str) -> Examples:
    """The "train" or "test" examples of the config's data set.

    With `data.validation` the test examples are held-out training examples.
    """
    found = dataset_of(wanted)
    images, labels = {
        "train": (found.x_train, found.y_train),
        "test": (found.x_test, found.y_test),
    }[split]
    if not len(labels):
        raise RunError(f"{found.name} has no {split} examples")
    return Examples(images, labels, np.arange(len(labels)))


def dataset_of(wanted: DataSettings) -> data.Dataset:
    """The data set of the config, verified."""
    found = data.load(wanted.name, wanted.dir, sha256=wanted.sha256)
    if found.classes != wanted.classes:
        raise build.ConfigError(
            f"data.classes is {wanted.classes}, but {found.name} has {found.classes}"
        )
    if wanted.validation is not None:
        found = data.split(found, validation=wanted.validation)
    return found


def restored_weights(
    path: Path, model: nn.Module, image: np.ndarray, *, folder: str = WEIGHTS
) -> checkpoint.Restored | None:
    """The verified final weights of a training run (or others kept), or None."""
    key, x = jax.random.key(0), as_input(jax.numpy.asarray(image))
    shapes = jax.eval_shape(model.init, key, x)
    like = Weights(shapes["params"], shapes.get("batch_stats", {}))
    found = checkpoint.restore(path / folder, like)
    return found and found._replace(tree=devices.replicate(Weights(*found.tree)))


def _methods(
    plan: Plan, model: nn.Module, image: np.ndarray, folder: Path | None
) -> tuple[Method, ...]:
    """The certifier and the attack of a plan, tried on their threat sets."""
    methods = []
    if plan.certifier is not None:
        methods.append(_certify_method(plan, model, image))
    if plan.attack is not None:
        methods.append(_attack_method(plan, model, image, folder))
    return tuple(methods)


def _certify_method(plan: Plan, model: nn.Module, image: np.ndarray) -> Method:
    threat = threat_of(plan.threat, plan.test_eps)
    if not cascade.is_cascade(plan.certifier):
        bounds = cascade.bounds_of(plan.certifier, model)
        return certify_method(model, bounds, threat)

    def attack_method(node: Node, where: str) -> Method:
        load = functools.partial(_network, plan.data.dir)
        adversary = attacking.adversary_of(node, load=load, where=where)
        attacking.check(adversary, model, threat, image, where=where)
        return attacking.attack_method(model, adversary, threat)

    return cascade.cascade_method(model, plan.certifier, threat, attack_method)


def _network(data_dir: str | None, path: str) -> attacking.Network:
    """The network of another run, for attacks by transfer."""
    other = finished_training(path, data_dir)
    return attacking.Network(other.model, other.weights)


def adversary_of(plan: Plan) -> tuple[Threat, attacking.Adversary]:
    """The threat set and the attack of a plan."""
    threat = threat_of(plan.threat, plan.attack_eps)
    load = functools.partial(_network, plan.data.dir)
    return threat, attacking.adversary_of(plan.attack, load=load)


def _attack_method(
    plan: Plan, model: nn.Module, image: np.ndarray, folder: Path | None
) -> Method:
    def training() -> Examples:
        found = examples_of(plan.data, "train")
        return Examples(*(array[:SHARED] for array in found))

    threat, adversary = adversary_of(plan)
    attacking.check(adversary, model, threat, image)
    keep = folder and attacking.Keep(folder / attacking.KEPT, plan.pictures)
    return attacking.attack_method(
        model, adversary, threat, training=training, keep=keep
    )


def evaluation_of(
    plan: Plan, model: nn.Module, folder: Path | None = None
) -> Evaluation:
    """Examples and methods of a plan, checked; the weights come later.

    folder: where adversarial examples are kept, if anywhere.
    """
    wanted, examples = plan.selection, examples_of(plan.data, "test")
    chosen = select(
        examples,
        subset=wanted.subset,
        skip=wanted.skip,
        limit=wanted.max,
        seed=plan.seed,
    )
    size = min(wanted.eval_batch or devices.default_batch(), len(chosen.labels))
    methods = _methods(plan, model, chosen.images[0], folder)
    batch = devices.divisible(size)
    return Evaluation(model, None, chosen, methods, plan.seed, batch)


def judge(
    run: Run,
    plan: Plan,
    evaluation: Evaluation,
    weights: Weights,
    stop: Callable[[], int],
) -> dict[str, Any]:
    """Records of every chosen example in the run's directory, and the result."""
    began = time.monotonic()
    task = evaluation._replace(weights=weights)
    rows = evaluate(task, run.path / RECORDS, stop)
    whole = results.joined(rows, plan.known)
    result = {
        **plan.about,
        **_described(plan),
        **results.summary(rows),
        **results.consistency(whole, comparable=_comparable(plan)),
    }
    if plan.certifier is not None and cascade.is_cascade(plan.certifier):
        result["stages"] = cascade.totals(plan.certifier, rows)
    if warnings := results.masked(rows):
        result["warnings"] = warnings
    if plan.curve_points and task.methods:
        result["curve"] = _curve(plan, task)
    result["data_sha256"] = dataset_of(plan.data).sha256
    result["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    result["seconds"] = {"evaluate": time.monotonic() - began}
    return result | runs.provenance(run)


def _comparable(plan: Plan) -> bool:
    """Does the certified set contain the attacked one?"""
    anywhere = plan.attack is not None and plan.attack.get("result") == "free"
    return (
        plan.attack_eps is not None
        and plan.test_eps is not None
        and plan.attack_eps <= plan.test_eps
        and not anywhere
    )


def _described(plan: Plan) -> dict[str, Any]:
    """The methods and the adversary in words."""
    found: dict[str, Any] = {"threat": name_of(plan.threat)}
    if plan.certifier is not None:
        label, sound = label_of(plan.certifier), cascade.is_sound(plan.certifier)
        label = label if sound else label.removesuffix(" in float32")
        found |= {"certifier": label, "test_eps": plan.test_eps}
        # which arithmetic the bounds hold in: of real numbers, or of the program
        found["arithmetic"] = "float32" if sound else "real"
    broken_by = cascade.attacks_of(plan.certifier or {})
    if broken_by:
        found |= {"attack": " > ".join(broken_by), "attack_eps": plan.test_eps}
    if plan.attack is not None:
        threat = threat_of(plan.threat, plan.attack_eps)
        found |= {"attack": label_of(plan.attack), "attack_eps": plan.attack_eps}
        found["adversary"] = attacking.describe(plan.attack, threat)
    return found


def _curve(plan: Plan, task: Evaluation) -> dict[str, Any]:
    """Percentages against eps, on the first examples that were chosen."""
    few = Examples(*(array[: plan.curve_examples] for array in task.examples))
    center = plan.test_eps if plan.test_eps is not None else plan.attack_eps
    steps = np.linspace(0.0, 2.0, plan.curve_points + 1)
    radii = [float(center * step) for step in steps]
    lines = curve(task._replace(examples=few), radii)
    return {"eps": radii, "examples": len(few.labels), **lines}


def finish(run: Run, result: dict[str, Any], tracker: Tracker, *, step: int) -> None:
    """Write the picture and the result, mirror them, mark the run done, show it."""
    if "curve" in result:
        picture = run.path / "curves.png"
        plots.curves(picture, runs.read_lines(run.path / "metrics.jsonl"), result)
        tracker.image(step, "curves", picture)
    rows = runs.read_lines(run.path / RECORDS)
    tracker.table(step, "examples", rows[:SAMPLE])
    names = [name for name in results.NAMES.values() if name in result]
    tracker.final({f"test/{name}": result[name] for name in names} | {"result": result})
    runs.write_json(run.path / "result.json", result)
    runs.write_text(run.path / "done", "")
    results.show(result)
    console.say(f"results: {run.path}")


class Trained(NamedTuple):
    """A trained network and where it came from."""

    path: Path
    settings: TrainSettings
    model: nn.Module
    weights: Weights


def finished_training(path: str, data_dir: str | None) -> Trained:
    """The network of a finished training run.

    Raises:
      RunError: the directory holds no trained network.
    """
    folder = Path(path)
    settings = read(TrainSettings, runs.saved_config(folder))
    if data_dir is not None:
        settings = replace(settings, data=replace(settings.data, dir=data_dir))
    model = model_of(settings.model)
    image = examples_of(settings.data, "test").images[0]
    found = restored_weights(folder, model, image)
    if found is None:
        raise RunError(
            f"{folder} holds no trained network; finish it first: start the same "
            "`python -m experiments.train` again"
        )
    return Trained(folder, settings, model, found.tree)


class Judged(NamedTuple):
    """A finished evaluation: what was evaluated, in which run, and the result."""

    run: Run
    plan: Plan
    task: Evaluation
    result: dict[str, Any]


def judge_again(
    job: str,
    config: dict[str, Any],
    plan: Plan,
    trained: Trained,
    launched: Launch,
    *,
    illustrate: Callable[[Judged, Tracker], dict[str, Any]] | None = None,
) -> None:
    """Evaluate a trained network once more, in `<its directory>/<job>/<hash>`.

    illustrate: adds pictures to the run, and numbers to its result.
    """
    config = config | {"name": job, "train_run": trained.path.resolve().name}
    run = runs.choose(config, trained.path)
    if runs.finished(run.path) and not config["fresh"]:
        show_finished(run, trained.settings.data)
        return
    how = build.settings(Tracking, config["tracking"], where="tracking")
    evaluation = evaluation_of(plan, trained.model, run.path)
    with (
        runs.opened(run, fresh=config["fresh"], overrides=launched.overrides),
        runs.stop_requests() as stop,
        tracking(run, how, job_type=job) as tracker,
    ):
        result = judge(run, plan, evaluation, trained.weights, stop)
        if illustrate is not None:
            task = evaluation._replace(weights=trained.weights)
            result |= illustrate(Judged(run, plan, task, result), tracker)
        finish(run, result, tracker, step=0)


def show_finished(
    run: Run, wanted: DataSettings, show: Callable[[Any], None] = results.show
) -> None:
    """A finished run is shown, not redone.

    The folder of the data is no part of what a run is, their content is. Where the data
    are gone the result is shown as it is.

    Raises:
      RunError: the run was finished on other data of the same name.
    """
    result = runs.read_json(run.path / "result.json")
    with contextlib.suppress(data.DataError):
        check_same_data(run, wanted, result.get("data_sha256"))
    console.say(f"finished before (fresh=true does it again): {run.path}")
    show(result)


def check_same_data(run: Run, wanted: DataSettings, known: str | None) -> None:
    """Refuse to go on with a run on other data than it was begun with.

    known: the sha256 that the run wrote down; None: it is too old to have one.

    Raises:
      RunError: the data of that name are others now.
    """
    found = dataset_of(wanted).sha256
    if known not in {None, found}:
        raise RunError(
            f"{run.path} was made on other data: {wanted.name} had sha256 "
            f"{known[:12]}, here it has {found[:12]}; name the folder of those data, "
            "or do the run again on these with fresh=true"
        )
