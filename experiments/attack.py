"""Attack the network of a finished run: `python -m experiments.attack run=<dir>`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import judging, runs
from experiments.cli import Launch, launch
from experiments.settings import Node, read, Selection
from experiments.tracking import Tracking


@dataclass(frozen=True, kw_only=True)
class AttackSettings(Selection):
    """The config of `experiments.attack`."""

    run: str
    attack: Node
    tracking: Tracking = field(default_factory=Tracking)
    attack_eps: float | None = None
    seed: int = 0
    fresh: bool = False
    data_dir: str | None = None


def work(config: dict[str, Any], launched: Launch) -> None:
    """Attack, from wherever that stands to its end."""
    settings = read(AttackSettings, config)
    trained = judging.finished_training(settings.run, settings.data_dir)
    usual = trained.settings.attack_eps
    eps = usual if settings.attack_eps is None else settings.attack_eps
    plan = judging.plan_of(trained.settings)._replace(
        attack=settings.attack,
        attack_eps=eps,
        certifier=None,
        selection=settings,
        seed=settings.seed,
        curve_points=0,
        known=tuple(runs.read_lines(Path(settings.run) / judging.RECORDS)),
    )
    judging.judge_again("attack", config | {"attack_eps": eps}, plan, trained, launched)


if __name__ == "__main__":
    launch("attack", work)
