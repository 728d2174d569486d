"""A small run on the digits, for the tests of the runners."""

from pathlib import Path

from hydra import compose, initialize_config_dir

from experiments import build, runs
from experiments.cli import Launch


CONF = Path(__file__).resolve().parents[1] / "conf"
SMALL = (
    "model=mlp",
    "+model.hidden=[16]",
    "schedule.epochs=3",
    "schedule.warm=0",
    "schedule.ramp=1",
    "schedule.drops=[2]",
    "objective.reg=0.0",
    "optimizer.learning_rate=0.01",
    "attack.steps=3",
    "curve_points=0",
    "test_eps=0.02",
    "tracking=disabled",
)
PLACE = ("seconds", "git_commit")


def composed(*overrides: str, config: str = "train") -> dict:
    build.register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build.plain(compose(config, list(overrides)))


def run(work, *overrides: str, config: str = "train") -> None:
    """Do what the command line does, in this process."""
    work(composed(*overrides, config=config), Launch(overrides, None))


def only(folder: Path) -> Path:
    """The directory of the only run in a folder."""
    (result,) = folder.rglob("result.json")
    return result.parent


def numbers(path: Path) -> dict:
    """A result without what differs from one start to the next."""
    result = runs.read_json(path / "result.json")
    return {key: value for key, value in result.items() if key not in PLACE}
