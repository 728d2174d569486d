"""Certify the network of a finished run: `python -m experiments.certify run=<dir>`."""

from dataclasses import dataclass, field
from typing import Any

from experiments import judging, runs, smoothing
from experiments.cli import Launch, launch
from experiments.settings import Node, read, Selection
from experiments.tracking import Tracking


@dataclass(frozen=True, kw_only=True)
class CertifySettings(Selection):
    """The config of `experiments.certify`."""

    run: str
    certifier: Node
    tracking: Tracking = field(default_factory=Tracking)
    test_eps: float | None = None
    seed: int = 0
    fresh: bool = False
    data_dir: str | None = None


def work(config: dict[str, Any], launched: Launch) -> None:
    """Certify, from wherever that stands to its end."""
    if smoothing.is_smoothing(config["certifier"]):
        smoothing.work(config, launched)
        return
    settings = read(CertifySettings, config)
    trained = judging.finished_training(settings.run, settings.data_dir)
    attack = trained.settings.attack
    # points found at any distance refute no certificate
    anywhere = attack is not None and attack.get("result") == "free"
    known = () if anywhere else runs.read_lines(trained.path / judging.RECORDS)
    eps = trained.settings.test_eps if settings.test_eps is None else settings.test_eps
    plan = judging.plan_of(trained.settings)._replace(
        attack=None,
        certifier=settings.certifier,
        test_eps=eps,
        selection=settings,
        seed=settings.seed,
        curve_points=0,
        known=tuple(known),
    )
    judging.judge_again("certify", config | {"test_eps": eps}, plan, trained, launched)


if __name__ == "__main__":
    launch("certify", work)
