"""`python -m experiments.train`: what a run leaves behind; it can be killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runners import composed, numbers, only, run, SMALL

from experiments import checkpoint, runs, settings, train
from experiments.build import ConfigError
from experiments.cli import Launch
from experiments.runs import RunError, Stopped


ROOT = Path(__file__).resolve().parents[1]
KILLED = (*SMALL, "eval_batch=1", "max=120", "checkpoint_seconds=0.0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run, with everything that is written."""
    root = tmp_path_factory.mktemp("runs")
    small = [word for word in SMALL if not word.startswith(("tracking", "curve"))]
    run(train.work, *small, "curve_points=2", f"paths.runs={root}")
    return only(root)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("uninterrupted")
    run(train.work, *KILLED, f"paths.runs={root}")
    return only(root)


def test_a_run_leaves_its_files(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        ".hydra",
        "certificates.jsonl",
        "checkpoint",
        "curves.png",
        "done",
        "lock",
        "metrics.jsonl",
        "result.json",
        "wandb",
        "weights",
    }


def test_the_result_holds_the_records(finished):
    result, rows = numbers(finished), runs.read_lines(finished / "certificates.jsonl")
    assert [row["index"] for row in rows] == list(range(result["examples"]))
    assert result["examples"] >= 360
    for name, field in (("clean", "correct"), ("robust",) * 2, ("certified",) * 2):
        assert result["counts"][name] == sum(row[field] for row in rows)
        low, high = result["intervals"][name]
        assert low <= result[name] <= high
    assert result["certified"] <= result["robust"] <= result["clean"]
    assert result["consistent"]
    assert result["nan"] == 0
    assert result["config_hash"] == finished.name
    assert result["adversary"].startswith(
        "Linf eps=0.02, untargeted, white-box, steps=3"
    )


def test_the_curve_falls_and_meets_the_result(finished):
    result = numbers(finished)
    curve = result["curve"]
    assert curve["eps"] == [0.0, 0.02, 0.04]
    rows = runs.read_lines(finished / "certificates.jsonl")[: curve["examples"]]
    for name in ("robust", "certified"):
        assert curve[name] == sorted(curve[name], reverse=True)
        count = sum(row[name] for row in rows)
        assert curve[name][1] == 100 * count / curve["examples"]
    assert curve["robust"][0] == curve["clean"][0]


def test_the_metrics_are_readable(finished):
    rows = runs.read_lines(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    last = rows[-1]
    assert last["train/eps"] == pytest.approx(0.02)
    assert 0 <= last["train/certified"] <= last["train/clean"] <= 100
    assert last["train/skipped"] == 0


def test_a_finished_run_is_shown_and_not_redone(finished, capsys):
    before = (finished / "result.json").stat().st_mtime_ns
    small = [word for word in SMALL if not word.startswith(("tracking", "curve"))]
    root = finished.parents[1]
    run(train.work, *small, "curve_points=2", f"paths.runs={root}")
    shown = capsys.readouterr()
    assert "finished before" in shown.err
    assert "certified by IBP" in shown.out
    assert (finished / "result.json").stat().st_mtime_ns == before


def test_fresh_redoes_a_run_with_the_same_numbers(uninterrupted):
    before = numbers(uninterrupted)
    metrics = (uninterrupted / "metrics.jsonl").read_bytes()
    records = (uninterrupted / "certificates.jsonl").read_bytes()
    root = uninterrupted.parents[1]
    run(train.work, *KILLED, f"paths.runs={root}", "fresh=true")
    assert numbers(uninterrupted) == before
    assert (uninterrupted / "metrics.jsonl").read_bytes() == metrics
    assert (uninterrupted / "certificates.jsonl").read_bytes() == records


def started(root: Path, *, until=lambda: False, signum: int = 0) -> tuple[int, str]:
    """Start the command, signal it when `until` is true: its exit code and words."""
    command = [sys.executable, "-m", "experiments.train", *KILLED, f"paths.runs={root}"]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            while process.poll() is None and not until():
                time.sleep(0.002)
            process.send_signal(signum)
            words = process.communicate(timeout=300)[1]
        finally:
            process.kill()
    return process.returncode, words


def steps(root: Path) -> int:
    saved = (p.name for p in root.glob("*/*/checkpoint/*") if p.name.isdecimal())
    return max(map(int, saved), default=0)


def records(root: Path) -> int:
    return sum(len(runs.read_lines(p)) for p in root.glob("*/*/certificates.jsonl"))


def test_killed_again_and_again_it_ends_with_the_same_numbers(tmp_path, uninterrupted):
    total = steps(uninterrupted.parents[1])

    saved = lambda count: lambda: steps(tmp_path) >= count
    code, words = started(tmp_path, until=saved(5), signum=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, words  # it saved, then ended
    assert "the same command continues" in words
    first = steps(tmp_path)
    assert 5 <= first < total

    code, words = started(tmp_path, until=saved(first + 5), signum=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert f"continuing after step {first}" in words
    assert steps(tmp_path) < total

    some = lambda: records(tmp_path) >= 5
    code, _ = started(tmp_path, until=some, signum=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert 5 <= records(tmp_path) < 120
    (file,) = tmp_path.rglob("certificates.jsonl")
    file.write_bytes(file.read_bytes()[:-7])  # as if it came in the middle of a line
    assert not list(tmp_path.rglob("done"))

    code, words = started(tmp_path)
    assert code == 0, words
    path = only(tmp_path)
    assert numbers(path) == numbers(uninterrupted)
    for name in ("metrics.jsonl", "certificates.jsonl"):
        assert (path / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_a_signal_in_certification_loses_nothing(tmp_path, uninterrupted, monkeypatch):
    root = tmp_path / "runs"
    words = (*KILLED, f"paths.runs={root}")
    done = runs.append_lines

    def interrupted(path, rows):
        done(path, rows)
        if path.name == "certificates.jsonl" and records(root) == 10:
            os.kill(os.getpid(), signal.SIGINT)

    for module in ("evaluation", "tracking"):
        monkeypatch.setattr(f"experiments.{module}.append_lines", interrupted)
    with pytest.raises(Stopped) as stopped:
        run(train.work, *words)
    assert stopped.value.code == 130
    assert records(root) == 10
    run(train.work, *words)
    assert numbers(only(root)) == numbers(uninterrupted)


def test_certificates_of_other_weights_are_not_believed(uninterrupted, tmp_path):
    """A line that names other weights is made again, whatever it claims."""
    root = uninterrupted.parents[1]
    file = uninterrupted / "certificates.jsonl"
    whole, before = file.read_bytes(), numbers(uninterrupted)
    (uninterrupted / "done").unlink()
    claim = {"index": 0, "correct": True, "certified": True, "weights": "0" * 12}
    runs.append_lines(file, [claim])
    run(train.work, *KILLED, f"paths.runs={root}")
    assert numbers(uninterrupted) == before
    assert file.read_bytes() == whole


def test_damaged_weights_are_trained_again(uninterrupted):
    before = numbers(uninterrupted)
    (uninterrupted / "done").unlink()
    for file in (uninterrupted / "weights").rglob("*"):
        if file.is_file() and file.stat().st_size > 500:
            file.write_bytes(file.read_bytes()[:-1])
    run(train.work, *KILLED, f"paths.runs={uninterrupted.parents[1]}")
    assert numbers(uninterrupted) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attack.steps=0"], "`attack`: steps must be at least 1"),
        (["test_eps=2"], "eps must lie in"),
        (["objective=pgd", "objective.reg=0.5"], "need the bounds of each layer"),
        (["schedule.batch=100000"], "more than the"),
        (["schedule.warm=100"], "eps would never"),
        (["model=dm_small"], "does not take images of shape"),
        (["objective.kappa=[1,0.5,0]"], "objective.kappa"),
        (["train_eps=0"], "`objective.reg` follows eps"),
        (["train_eps=0", "objective.reg=0", "objective.kappa=[1,0.5]"], "one number"),
        (["optimizer.learning_rate=fast"], "learning_rate"),
        (["+objective.loss.kapa=1"], "unknown key `kapa`"),
        (["+threat.eps=0.1"], "set test_eps"),
        (["data.classes=9"], "has 10"),
        (["max=0"], "max must be at least 1"),
        (["seed=zero"], "`seed` must be int"),
    ],
)
def test_mistakes_are_told_before_a_directory_is_made(words, message, tmp_path):
    config = composed(*words, f"paths.runs={tmp_path / 'runs'}")
    with pytest.raises(ConfigError, match=message):
        train.work(config, Launch((), None))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_only_attacks_has_curves_too(tmp_path):
    words = ("~certifier", "curve_points=2", "curve_examples=20", "max=20")
    run(train.work, *SMALL, *words, f"paths.runs={tmp_path}")
    assert "certified" not in numbers(only(tmp_path))
    assert (only(tmp_path) / "curves.png").exists()


def test_divergence_is_an_error_and_not_a_result(tmp_path):
    words = (*SMALL, "optimizer.learning_rate=1e30", "optimizer.clip=null")
    with pytest.raises(RunError, match="diverged"):
        run(train.work, *words, "schedule.epochs=30", f"paths.runs={tmp_path}")
    assert not list(tmp_path.rglob("result.json"))


def test_batch_norm_is_evaluated_with_the_statistics_of_all_data(tmp_path):
    words = ("+model.batch_norm=true", "max=5", f"paths.runs={tmp_path}")
    run(train.work, *SMALL, *words)
    path = only(tmp_path)
    wanted = settings.read(settings.TrainSettings, runs.saved_config(path))
    job = train.prepared(wanted)
    weights = train.restored_weights(path, job.evaluation.model, job.train.images[0])
    means = [np.asarray(layer["mean"]) for layer in weights.tree.statistics.values()]
    assert checkpoint.digest(weights.tree)
    assert all(np.isfinite(mean).all() and np.any(mean != 0) for mean in means)
