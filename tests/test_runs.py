"""The same config is the same run; files are whole, and torn lines are tolerated."""

import errno
import json
import math
import os
import signal
from pathlib import Path

import pytest
import yaml

from experiments import runs
from experiments.runs import RunError, Stopped


CONFIG = {
    "name": "run",
    "seed": 0,
    "data": {"name": "digits", "dir": "/a"},
    "tracking": {"mode": "offline"},
    "paths": {"runs": "runs"},
    "fresh": False,
}


@pytest.fixture
def run(tmp_path):
    return runs.choose(CONFIG, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"tracking": {"mode": "disabled"}},
        {"paths": {"runs": "elsewhere"}},
        {"fresh": True},
        {"data": {"name": "digits", "dir": "/b"}},
        {"checkpoint_seconds": 3},
    ],
)
def test_the_hash_ignores_place_and_presentation(change):
    assert runs.config_hash(CONFIG | change) == runs.config_hash(CONFIG)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"name": "other"}, {"data": {"name": "mnist"}}, {"new": None}],
)
def test_the_hash_sees_what_is_done(change):
    assert runs.config_hash(CONFIG | change) != runs.config_hash(CONFIG)


def test_the_hash_does_not_depend_on_the_order_of_keys():
    assert runs.config_hash(dict(reversed(CONFIG.items()))) == runs.config_hash(CONFIG)


def test_the_hash_depends_on_the_order_of_stages():
    stages = {"ibp": {"steps": 1, "sound": True}, "crown": {"lanes": 8}}
    of = lambda **node: runs.config_hash(CONFIG | {"certifier": node})
    swapped = dict(reversed(stages.items()))
    assert of(stages=stages) != of(stages=swapped)
    assert of(stages=stages | {"crown": {}}) != of(stages=stages)
    inside = stages | {"ibp": dict(reversed(stages["ibp"].items()))}
    assert of(stages=stages) == of(stages=inside)
    assert of(stages=3, other=swapped) == of(other=stages, stages=3)


def test_sweeps_have_their_own_folder(tmp_path):
    alone, swept = runs.choose(CONFIG, tmp_path), runs.choose(CONFIG, tmp_path, "seeds")
    assert alone.path == tmp_path / "run" / alone.id
    assert swept.path == tmp_path / "run" / "seeds" / alone.id


def test_a_run_keeps_its_config_and_overrides(run):
    with runs.opened(run, fresh=False, overrides=["seed=0"]):
        pass
    assert runs.saved_config(run.path) == CONFIG
    assert yaml.safe_load((run.path / ".hydra/overrides.yaml").read_text()) == [
        "seed=0"
    ]


def test_fresh_empties_the_directory_and_nothing_else_does(run):
    with runs.opened(run, fresh=False):
        (run.path / "metrics.jsonl").write_text("{}\n")
        (run.path / "checkpoint").mkdir()
    with runs.opened(run, fresh=False):
        assert (run.path / "metrics.jsonl").exists()
    with runs.opened(run, fresh=True):
        assert {p.name for p in run.path.iterdir()} == {".hydra", "lock"}


def test_a_run_killed_while_it_is_emptied_is_not_finished(run, monkeypatch):
    with runs.opened(run, fresh=False):
        for name in ("certificates.jsonl", "result.json", "done"):
            runs.write_text(run.path / name, "{}")
    unlink = Path.unlink

    def unlink_once(path, **how):
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: pytest.fail("killed"))
        unlink(path, **how)

    order = sorted(run.path.iterdir())
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(order))
    monkeypatch.setattr(Path, "unlink", unlink_once)
    with pytest.raises(pytest.fail.Exception, match="killed"):
        runs.opened(run, fresh=True).__enter__()
    assert not runs.finished(run.path)


def test_two_processes_do_not_share_a_run(run):
    with runs.opened(run, fresh=False):
        assert_cannot_open(run, "another process")
    with runs.opened(run, fresh=False):
        pass


def test_a_file_system_without_locks_is_named(run, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", refuse)
    assert_cannot_open(run, r"cannot lock files \(No locks available\).*paths\.runs")


def assert_cannot_open(run, reason):
    opening = runs.opened(run, fresh=True)
    with pytest.raises(RunError, match=reason):
        opening.__enter__()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    run = runs.choose(CONFIG, tmp_path)
    assert_cannot_open(run, r"cannot write to .*paths\.runs")


def test_a_full_disk_is_named(run):
    with (
        pytest.raises(RunError, match=r"No space left on device.*free some space"),
        runs.opened(run, fresh=False),
        Path("/dev/full").open("w") as file,
    ):
        file.write("x")


def test_other_errors_of_the_system_stay_what_they_are(run):
    with pytest.raises(ConnectionError), runs.opened(run, fresh=False):
        raise ConnectionResetError(errno.ECONNRESET, "reset by the other side")


def test_only_a_run_has_a_saved_config(tmp_path):
    with pytest.raises(RunError, match="not a run"):
        runs.saved_config(tmp_path)


def test_finished_needs_the_result_and_the_mark(tmp_path):
    assert not runs.finished(tmp_path)
    runs.write_text(tmp_path / "done", "")
    assert not runs.finished(tmp_path)
    runs.write_json(tmp_path / "result.json", {})
    assert runs.finished(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    runs.write_json(file, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        runs.write_json(file, {"a": 2})
    assert runs.read_json(file) == {"a": 1}


def test_numbers_keep_all_digits_and_nan_is_null(tmp_path):
    file = tmp_path / "a.jsonl"
    runs.append_lines(file, [{"a": 0.1 + 0.2, "b": math.nan, "c": [-math.inf, 1]}])
    assert runs.read_lines(file) == [{"a": 0.1 + 0.2, "b": None, "c": [None, 1]}]


@pytest.mark.parametrize(
    "damage",
    [b'{"step": 3', b'{"step": 3}', b"\xff\xfe\n", b"\x00\x00\x00\n", b"[3]\n", b"3\n"],
)
def test_damaged_lines_are_dropped_and_made_room_for(tmp_path, damage):
    file = tmp_path / "a.jsonl"
    whole = [{"step": 1}, {"step": 2}]
    runs.append_lines(file, whole)
    with file.open("ab") as torn:
        torn.write(damage)
    assert runs.read_lines(file) == whole
    assert runs.keep_lines(file, lambda row: True) == whole
    runs.append_lines(file, [{"step": 3}])
    assert [json.loads(s)["step"] for s in file.read_text().split("\n")[:-1]] == [
        1,
        2,
        3,
    ]


def test_lines_of_no_file():
    assert runs.read_lines(Path("/nowhere/a.jsonl")) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_a_second_one_insists(signum):
    before = signal.getsignal(signum)
    with runs.stop_requests() as stop:
        assert stop() == 0
        os.kill(os.getpid(), signum)
        assert stop() == signum
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signum)
        assert stopped.value.code == 128 + signum
    assert signal.getsignal(signum) is before


def test_provenance_names_everything(run):
    about = runs.provenance(run)
    assert about["config_hash"] == run.id
    assert {"python", "jax", "flax", "numpy"} <= set(about["versions"])
    assert about["device"].count(":") == 1
    assert len(about["git_commit"] or "0" * 40) >= 40
