"""May an attacked accuracy be believed? `python -m experiments.sanity run=<dir>`."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from certjax.models import classifier
from certjax.types import Array, Classifier
from experiments import build, console, judging, runs, sanity_checks, sanity_pictures
from experiments.build import ConfigError
from experiments.cli import Launch, launch
from experiments.evaluation import as_input, Examples, select
from experiments.judging import Trained
from experiments.runs import Run, Stopped
from experiments.sanity_checks import Check, Effort
from experiments.settings import Node, read, Selection, threat_of
from experiments.tracking import Tracker, Tracking, tracking


MEASURED = "measurements.jsonl"
BOX = "a Box has no radius; choose threat=linf, l2 or l1"


@dataclass(frozen=True, kw_only=True)
class SanitySettings(Selection):
    """The config of `experiments.sanity`."""

    run: str
    threat: Node | None = None
    tracking: Tracking = field(default_factory=Tracking)
    attack_eps: float | None = None
    surrogates: tuple[str, ...] = ()
    slack: float = 1.0
    seed: int = 0
    steps: int = 100
    few_steps: int = 10
    restarts: int = 5
    queries: int = 2000
    noise: int = 200
    fresh: bool = False
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Refuse budgets that mean nothing."""
        super().__post_init__()
        if self.threat is not None and self.attack_eps is None:
            raise ConfigError("another `threat` needs its radius: set attack_eps")
        for name in Effort._fields:
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        if self.slack < 0:
            raise ConfigError(f"slack must be at least 0, got {self.slack}")

    @property
    def effort(self) -> Effort:
        """The budgets."""
        return Effort(*(getattr(self, name) for name in Effort._fields))


def work(config: dict[str, Any], launched: Launch) -> None:
    """Measure and check, in `<the run>/sanity/<hash>`."""
    settings = read(SanitySettings, config)
    trained = judging.finished_training(settings.run, settings.data_dir)
    usual = trained.settings.attack_eps
    eps = usual if settings.attack_eps is None else settings.attack_eps
    settings = dataclasses.replace(settings, attack_eps=eps)
    panel = panel_of(settings, trained)
    about = {"name": "sanity", "train_run": trained.path.resolve().name}
    config = config | about | {"attack_eps": eps}
    run = runs.choose(config, trained.path)
    if runs.finished(run.path) and not settings.fresh:
        console.say(f"finished before (fresh=true does it again): {run.path}")
        show(runs.read_json(run.path / "result.json"))
        return
    with (
        runs.opened(run, fresh=settings.fresh, overrides=launched.overrides),
        runs.stop_requests() as stop,
        tracking(run, settings.tracking, job_type="sanity") as tracker,
    ):
        began = time.monotonic()
        broken = measured(panel.measurements, run.path / MEASURED, stop)
        found = sanity_checks.checks(broken, slack=settings.slack)
        result = result_of(settings, trained, broken, found)
        result["seconds"] = {"evaluate": time.monotonic() - began}
        finish(run, result | runs.provenance(run), panel, tracker)


@dataclass(frozen=True)
class Panel:
    """The network, its examples and what is measured of them."""

    f: Classifier
    threat: Any
    xs: Array
    labels: Array
    measurements: dict[str, sanity_checks.Broken]


def panel_of(settings: SanitySettings, trained: Trained) -> Panel:
    """The panel of a trained network, every number checked, nothing measured yet."""
    node = trained.settings.threat if settings.threat is None else settings.threat
    threat = threat_of(node, settings.attack_eps)
    if not hasattr(threat, "eps"):
        raise ConfigError(f"`threat`: {BOX}")
    chosen = examples_of(settings, trained)
    xs, labels = as_input(jnp.asarray(chosen.images)), jnp.asarray(chosen.labels)
    where = settings.data_dir
    others = [judging.finished_training(path, where) for path in settings.surrogates]
    f = function_of(trained)
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    with build.blamed("sanity"):
        rows = sanity_checks.measurements(
            f,
            threat,
            key,
            xs,
            labels,
            effort=settings.effort,
            surrogates=[function_of(other) for other in others],
        )
    return Panel(f, threat, xs, labels, rows)


def function_of(trained: Trained) -> Classifier:
    """The network, its weights beside the program."""
    model = trained.model
    return Partial(lambda weights, x: classifier(model, *weights)(x), trained.weights)


def examples_of(settings: SanitySettings, trained: Trained) -> Examples:
    """The chosen test examples."""
    return select(
        judging.examples_of(trained.settings.data, "test"),
        subset=settings.subset,
        skip=settings.skip,
        limit=settings.max,
        seed=settings.seed,
    )


def measured(
    rows: dict[str, sanity_checks.Broken], file: Path, stop: Callable[[], int]
) -> dict[str, np.ndarray]:
    """All measurements; those already in `file` are not made again.

    Raises:
      Stopped: a signal came; what is finished is in the file.
    """
    done = {row["name"]: row for row in runs.keep_lines(file, lambda _: True)}
    with console.progress("measure", total=len(rows), done=len(done)) as advance:
        for name, run in rows.items():
            if name in done:
                continue
            if signum := stop():
                raise Stopped(signum, f"after {len(done)} of {len(rows)} measurements")
            broken = np.asarray(run())
            hits = np.flatnonzero(broken).tolist()
            done[name] = {"name": name, "examples": len(broken), "broken": hits}
            runs.append_lines(file, [done[name]])
            advance(1, name)
    return {name: _flags(done[name]) for name in rows}


def _flags(row: dict[str, Any]) -> np.ndarray:
    flags = np.zeros(row["examples"], bool)
    flags[row["broken"]] = True
    return flags


def result_of(
    settings: SanitySettings,
    trained: Trained,
    broken: dict[str, np.ndarray],
    found: tuple[Check, ...],
) -> dict[str, Any]:
    """The numbers and verdicts of the panel."""
    accuracy = {
        name: 100 * float(np.mean(~hit))
        for name, hit in broken.items()
        if name != sanity_checks.FLAT
    }
    return {
        **judging.about_training(trained.settings),
        "attack_eps": settings.attack_eps,
        "examples": len(broken["clean"]),
        "slack": settings.slack,
        "accuracy": accuracy,
        "checks": [check._asdict() for check in found],
        "failed": [check.name for check in found if not check.passed],
    }


def finish(run: Run, result: dict[str, Any], panel: Panel, tracker: Tracker) -> None:
    """Write the pictures and the result, mirror them, mark the run done, show it."""
    surfaces = sanity_pictures.surfaces(panel.f, panel.threat, panel.xs, panel.labels)
    picture = run.path / "sanity.png"
    sanity_pictures.draw(picture, result, surfaces)
    tracker.image(0, "sanity", picture)
    tracker.table(0, "checks", result["checks"])
    tracker.final({"sanity/failed": len(result["failed"]), "result": result})
    runs.write_json(run.path / "result.json", result)
    runs.write_text(run.path / "done", "")
    show(result)
    console.say(f"results: {run.path}")


def show(result: dict[str, Any]) -> None:
    """Print the panel, and a warning if a check failed."""
    grid = [
        [
            check["claim"],
            f"{check['left']:.1f}",
            f"{check['right']:.1f}",
            "pass" if check["passed"] else "FAIL",
        ]
        for check in result["checks"]
    ]
    title = (
        f"{result['dataset']} · {result['model']} · {result['objective']}, "
        f"eps = {result['attack_eps']:.4g}, {result['examples']} test examples"
    )
    console.table(title, ["left <= right", "left %", "right %", "verdict"], grid)
    if result["failed"]:
        console.warn(
            f"failed: {', '.join(result['failed'])}. Attacks that follow the gradient "
            "overestimate the robustness of this network; attack it with queries "
            "(attack=square, hopskipjump), or through a stand-in for what hides its "
            "gradients (certjax.attacks.straight_through)"
        )


if __name__ == "__main__":
    launch("sanity", work)
