"""Attack the network of a finished run: `python -m experiments.attack run=<dir>`."""

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import (
    attacking,
    attacking_pictures,
    attacking_record,
    attacking_results,
    judging,
    runs,
)
from experiments.build import ConfigError
from experiments.cli import Launch, launch
from experiments.judging import Judged, Plan, Trained
from experiments.settings import name_of, Node, read, Selection
from experiments.tracking import Tracker, Tracking


UNIT = 1024  # examples of a cascade between two saves: survivors fill its lanes


@dataclass(frozen=True, kw_only=True)
class AttackSettings(Selection):
    """The config of `experiments.attack`."""

    run: str
    attack: Node
    threat: Node | None = None
    tracking: Tracking = field(default_factory=Tracking)
    attack_eps: float | None = None
    seed: int = 0
    sigma: float = 0.0
    votes: int = 100
    draws: int = 16
    pictures: int = 8
    curve_points: int = 8
    curve_examples: int = 64
    loss_examples: int = 32
    fresh: bool = False
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        super().__post_init__()
        if self.threat is not None and self.attack_eps is None:
            raise ConfigError("another `threat` needs its radius: set attack_eps")
        for name in ("votes", "draws", "curve_examples"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        for name in ("sigma", "pictures", "curve_points", "loss_examples"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{name} must be at least 0, got {getattr(self, name)}"
                )


def work(config: dict[str, Any], launched: Launch) -> None:
    """Attack, from wherever that stands to its end."""
    settings = read(AttackSettings, config)
    trained = victim(
        judging.finished_training(settings.run, settings.data_dir), settings
    )
    plan = plan_of(settings, trained)
    illustrate = functools.partial(_illustrate, settings)
    config = config | {"attack_eps": plan.attack_eps}
    judging.judge_again(
        "attack", config, plan, trained, launched, illustrate=illustrate
    )


def victim(trained: Trained, settings: AttackSettings) -> Trained:
    """The trained network, or with sigma > 0 the smoothed classifier of it."""
    if settings.sigma == 0:
        return trained
    numbers = settings.sigma, settings.votes, settings.draws
    return trained._replace(model=attacking.Smoothed(trained.model, *numbers))


def plan_of(settings: AttackSettings, trained: Trained) -> Plan:
    """What is measured; checked against the certificates of the same classifier."""
    usual = trained.settings.attack_eps
    same = settings.threat is None and settings.sigma == 0
    rows = runs.read_lines(Path(settings.run) / judging.RECORDS) if same else []
    proved = ({k: v for k, v in row.items() if k != "robust"} for row in rows)
    unit = settings.eval_batch
    if unit is None and name_of(settings.attack).endswith("_stages"):
        unit = UNIT
    plan = judging.plan_of(trained.settings)
    return plan._replace(
        attack=settings.attack,
        attack_eps=usual if settings.attack_eps is None else settings.attack_eps,
        threat=plan.threat if settings.threat is None else settings.threat,
        certifier=None,
        selection=dataclasses.replace(settings, eval_batch=unit),
        seed=settings.seed,
        curve_points=0,
        pictures=settings.pictures,
        known=tuple(proved),
        about=plan.about | ({"sigma": settings.sigma} if settings.sigma else {}),
    )


def _illustrate(
    settings: AttackSettings, judged: Judged, tracker: Tracker
) -> dict[str, Any]:
    """The numbers that only an attack has, and its pictures."""
    plan, task, folder = judged.plan, judged.task, judged.run.path
    by_index = {row["index"]: row for row in runs.read_lines(folder / judging.RECORDS)}
    rows = [by_index[int(i)] for i in task.examples.index]
    threat, adversary = judging.adversary_of(plan)
    found = attacking_results.numbers(
        rows, nearest=adversary.result == "nearest", stages=adversary.stages(threat)
    )
    found["warnings"] = attacking_results.warnings(rows, plan, task)
    found["robustness"] = attacking_results.robustness(
        rows, plan, task, points=settings.curve_points, examples=settings.curve_examples
    )
    found["losses"] = attacking_record.of_task(
        plan, task, examples=settings.loss_examples
    )
    result = judged.result | found
    kept = attacking.Keep(folder / attacking.KEPT, settings.pictures).found()
    for name, picture in attacking_pictures.draw(folder, result, rows, kept).items():
        tracker.image(0, name, picture)
    tracker.table(0, attacking.KEPT, attacking_pictures.table(kept, rows))
    return found


if __name__ == "__main__":
    launch("attack", work)
