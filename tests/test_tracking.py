"""metrics.jsonl is the truth; W&B mirrors it offline, and is always finished."""

import json
import subprocess
import sys

import pytest

from experiments import runs
from experiments.tracking import rewind, Tracking, tracking


@pytest.fixture
def run(tmp_path):
    run = runs.choose({"name": "run", "eps": 8 / 255}, tmp_path, "grid")
    run.path.mkdir(parents=True)
    return run


def test_disabled_writes_metrics_and_imports_nothing(tmp_path):
    program = f"""
import sys, pathlib
from experiments import runs
from experiments.tracking import tracking, Tracking
run = runs.choose({{"name": "a"}}, pathlib.Path({str(tmp_path)!r}))
run.path.mkdir(parents=True)
with tracking(run, Tracking(mode="disabled"), job_type="train") as tracker:
    tracker.log(1, {{"train/loss": 0.5}})
    tracker.table(1, "examples", [])
    tracker.image(1, "curves", run.path)
    tracker.final({{}})
assert (run.path / "metrics.jsonl").exists()
heavy = {{"wandb", "matplotlib", "sklearn", "orbax"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_rewind_drops_what_will_be_made_again(run):
    with tracking(run, Tracking(mode="disabled"), job_type="train") as tracker:
        for step in range(1, 6):
            tracker.log(step, {"a": step / 3})
    rewind(run, 3)
    rows = runs.read_lines(run.path / "metrics.jsonl")
    assert rows == [{"step": s, "a": s / 3} for s in (1, 2, 3)]


def test_rewind_of_a_new_run(run):
    rewind(run, 0)


class Fake:
    """What of W&B the tracker uses, recorded."""

    def __init__(self):
        self.summary, self.rows, self.code, self.given = {}, [], None, None
        self.Table = lambda columns, data: ("table", columns, data)
        self.Image = lambda path: ("image", path)

    def init(self, **given):
        self.given = given
        return self

    def log(self, metrics, step):
        self.rows.append((step, metrics))

    def finish(self, exit_code):
        self.code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_identity_group_and_the_same_numbers(run, wandb):
    with tracking(run, Tracking(tags=("x",)), job_type="certify") as tracker:
        tracker.log(7, {"train/loss": 0.25})
        tracker.table(7, "examples", [{"a": 1}, {"b": 2}])
        tracker.image(7, "curves", run.path)
        tracker.final({"test/clean": 98.5})
    given = wandb.given
    assert (given["id"], given["group"], given["job_type"]) == (
        run.id,
        "grid",
        "certify",
    )
    assert (given["mode"], given["config"]) == ("offline", run.config)
    assert wandb.rows[0] == (7, {"train/loss": 0.25})
    assert wandb.rows[1][1]["examples"] == ("table", ["a", "b"], [[1, None], [None, 2]])
    assert wandb.summary == {"test/clean": 98.5}
    assert wandb.code == 0
    rows = runs.read_lines(run.path / "metrics.jsonl")
    assert rows == [{"step": 7, "train/loss": 0.25}]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_wandb_is_finished_on_any_exception(run, wandb, error):
    with pytest.raises(error), tracking(run, Tracking(), job_type="train"):
        raise error
    assert wandb.code == 1


@pytest.mark.filterwarnings("default")
def test_offline_needs_no_key_and_stays_in_the_run(run, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(run.path / "home"))
    for _ in range(2):  # a sweep runs several in one process
        with tracking(run, Tracking(), job_type="train") as tracker:
            tracker.log(1, {"train/loss": 0.5})
            tracker.table(1, "examples", [{"index": 0, "margin": 0.5}])
    assert len(list((run.path / "wandb").glob("offline-run-*"))) == 2
    (table, *_) = (run.path / "wandb").rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [[0, 0.5]]
