"""Certification of smoothed classifiers: records, interruptions, refusals, tables."""

import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runners import composed, numbers, only, run

from certjax.models import population_statistics
from certjax.smoothing import Gaussian, generator, judge
from certjax.smoothing.confidence import proportion_lower
from experiments import (
    benchmark,
    certify,
    cohen_logs,
    report,
    runs,
    smoothing,
    smoothing_report,
    suites,
    suites_smoothing,
    train,
)
from experiments.build import ConfigError
from experiments.runs import RunError
from experiments.settings import Objective
from experiments.smoothing_labels import smoothed_labels


ROOT = Path(__file__).resolve().parents[1]
NETWORK = (
    "objective=gaussian_augmentation",
    "model=mlp",
    "+model.hidden=[32]",
    "optimizer.learning_rate=0.01",
    "schedule.epochs=4",
    "schedule.warm=0",
    "schedule.ramp=0",
    "schedule.drops=[3]",
    "~attack",
    "~certifier",
    "test_eps=0.0",
    "curve_points=0",
    "tracking=disabled",
)
FEW = ("certifier=smoothing", "n=1000", "max=12", "tracking=disabled")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run(train.work, *NETWORK, f"paths.runs={root}")
    return only(root)


def certified(trained, *words) -> Path:
    """The directory of a certification."""
    before = set(trained.glob("certify/*"))
    run(certify.work, f"run={trained}", *FEW, *words, config="certify")
    made = set(trained.glob("certify/*")) - before
    return made.pop()


def rows_of(path: Path) -> list[dict]:
    return runs.read_lines(path / "certificates.jsonl")


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def first(trained):
    return certified(trained)


def test_the_trained_network_was_not_evaluated_as_something_else(trained):
    """The end of the training knows nothing of smoothing: only the base network."""
    result = numbers(trained)
    assert result["train_sigma"] == 0.25
    assert "certified" not in result
    assert "robust" not in result
    row = runs.read_lines(trained / "metrics.jsonl")[-1]
    assert 0 <= row["train/noisy"] <= 100
    assert "train/clean" not in row


def test_a_record_repeats_its_certificate(first):
    """Counts, numbers and kind of guarantee are there: the radius can be recomputed."""
    rows = rows_of(first)
    assert [row["index"] for row in rows] == list(range(12))
    for row in rows:
        again = judge(
            np.asarray(row["counts0"]),
            np.asarray(row["counts"]),
            Gaussian(row["sigma"]),
            64,
            row["n0"],
            row["n"],
            row["alpha"],
        )
        assert (again.prediction, again.radius) == (row["prediction"], row["radius"])
        assert row["abstain"] == (row["prediction"] == -1)
        assert row["correct"] == (row["prediction"] == row["label"])
        assert sum(row["counts"]) + row["invalid"] == row["n"] == 1000
        assert sum(row["counts0"]) == row["n0"] == 100
        assert (row["seed"], row["dtype"], row["generator"]) == (
            0,
            "float32",
            generator.NAME,
        )
        assert row["guarantee"].startswith("real arithmetic")
        assert row["sigma"] == row["train_sigma"] == 0.25
        assert row["seconds"] > 0


def test_the_result_is_that_of_the_records(first):
    result, rows = numbers(first), rows_of(first)
    assert (result["seed"], result["train_seed"]) == (0, 0)
    radii = [row["radius"] if row["correct"] else 0.0 for row in rows]
    assert result["acr"] == pytest.approx(np.mean(radii))
    for radius, share in zip(result["radii"], result["certified_at"], strict=True):
        assert share == np.mean([r >= radius and r > 0 for r in radii])
    names = {path.name for path in first.iterdir()}
    assert {"curves.png", "certificates.tsv", "result.json", "done"} <= names


def test_the_log_of_cohen_tells_alpha_and_n(first):
    log = cohen_logs.read(first / "certificates.tsv")
    radii = [row["radius"] for row in rows_of(first)]
    assert [row.radius for row in log.rows] == radii
    match = cohen_logs.identify(log.rows, 0.25)[0]
    assert (match.alpha, match.n, match.attained) == (0.001, 1000, 1.0)


def test_a_finished_certification_is_shown(trained, first, capsys):
    run(certify.work, f"run={trained}", *FEW, config="certify")
    shown = capsys.readouterr()
    assert "finished before" in shown.err
    printed = float(shown.out.split("ACR ")[1].split(",")[0])
    assert printed <= numbers(first)["acr"] < printed + 1e-4


def test_the_selection_changes_no_record(trained, first):
    known = {row["index"]: row for row in timeless(rows_of(first))}
    every = rows_of(certified(trained, "skip=5", "max=2", "batch=64"))
    named = rows_of(certified(trained, "indices=[7,3]"))
    assert [row["index"] for row in every] == [0, 5]
    assert [row["index"] for row in named] == [7, 3]
    for row in timeless(every + named):
        assert row == known[row["index"]]


def test_another_noise_level_is_warned_of_and_recorded(trained, capsys):
    path = certified(trained, "sigma=0.5", "max=2")
    assert "trained at sigma 0.25 and is certified at sigma 0.5" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    assert {(r["sigma"], r["train_sigma"]) for r in rows_of(path)} == {(0.5, 0.25)}


@pytest.mark.parametrize(
    ("words", "norm"),
    [
        (("certifier=smoothing_laplace",), "l1"),
        (("certifier=smoothing_uniform",), "l1"),
        (("certifier=smoothing_quantized",), "l2"),
        (("certifier=smoothing_soft",), "l2"),
        (("certifier=smoothing", "+certifier.noise.norm=linf"), "linf"),
        (("certifier=smoothing", "dtype=bfloat16"), "l2"),
        (("certifier=split", "certifier.levels=40"), "l1"),
    ],
)
def test_other_certifiers_of_the_library(trained, words, norm):
    size = () if words[0] == "certifier=split" else ("n=500",)
    words = (f"run={trained}", *words, *size, "max=2", "tracking=disabled", "seed=3")
    before = set(trained.glob("certify/*"))
    run(certify.work, *words, config="certify")
    (path,) = set(trained.glob("certify/*")) - before
    result, rows = numbers(path), rows_of(path)
    assert result["norm"] == norm
    exact = words[1].endswith(("quantized", "split"))
    assert all(r["guarantee"].startswith("floating") == exact for r in rows)
    assert all(0 <= row["radius"] < math.inf for row in rows)
    assert ("bfloat16" in {row["dtype"] for row in rows}) == ("dtype=bfloat16" in words)


REFUSED = {
    ("n=0",): r"n must be an integer .*got 0",
    ("n0=0",): r"n0 must be an integer .*got 0",
    ("alpha=1.0",): r"alpha must lie in \(0, 1\), got 1.0",
    ("alpha=0",): r"alpha must lie in \(0, 1\), got 0",
    ("sigma=0",): r"sigma must be positive and finite .*got 0",
    ("sigma=-0.5",): r"sigma must be positive and finite .*got -0.5",
    ("batch=0",): r"batch must be an integer .*got 0",
    ("indices=[1,1]",): r"distinct positions in the 364 examples",
    ("indices=[364]",): r"distinct positions in the 364 examples",
    ("test_eps=0.1",): r"smoothing finds the radius .*got test_eps",
    ("dtype=float16",): r"dtype",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_numbers_are_refused_before_anything_is_written(trained, words):
    before = set(trained.glob("certify/*"))
    with pytest.raises((ConfigError, ValueError), match=REFUSED[words]):
        certified(trained, *words)
    assert set(trained.glob("certify/*")) == before


def test_sigma_of_a_network_trained_without_noise_must_be_given(trained, tmp_path):
    words = [w for w in NETWORK if not w.startswith("objective")]
    words += ["objective=natural", "schedule.epochs=0.1", "schedule.drops=[]"]
    run(train.work, *words, f"paths.runs={tmp_path}")
    with pytest.raises(ConfigError, match="sigma is not set"):
        certified(only(tmp_path))
    (row,) = rows_of(certified(only(tmp_path), "sigma=0.1", "max=1"))
    assert row["train_sigma"] is None


def task_of(trained, *words) -> smoothing.Task:
    config = composed(f"run={trained}", *FEW, *words, config="certify")
    found = smoothing.judging.finished_training(config["run"], None)
    config = smoothing.completed(config, found.settings.objective.loss["noise"])
    config["tracking"] = smoothing.Tracking("disabled")
    settings = smoothing.build.settings(smoothing.SmoothingSettings, config)
    return smoothing.task_of(settings, found)


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_torn_last_line_is_reported_and_made_again(
    trained, first, tmp_path, capsys, cut
):
    """Wherever the process was killed while it wrote."""
    file = tmp_path / "certificates.jsonl"
    lines = (first / "certificates.jsonl").read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:8])[:-cut])
    again = smoothing.certify_all(task_of(trained), file, lambda: 0)
    assert "1 torn lines" in capsys.readouterr().err
    assert timeless(again) == timeless(rows_of(first))
    assert again[:7] == rows_of(first)[:7]  # not made twice: even the seconds are kept
    assert runs.read_lines(file) == again


@pytest.mark.parametrize(
    "words", [("seed=1",), ("sigma=0.5",), ("n=2000",), ("n0=50",), ("alpha=0.01",)]
)
def test_certificates_of_two_kinds_do_not_mix(trained, first, tmp_path, words):
    file = tmp_path / "certificates.jsonl"
    file.write_bytes((first / "certificates.jsonl").read_bytes())
    name = words[0].partition("=")[0]
    with pytest.raises(RunError, match=rf"written with {name} = .*must not mix"):
        smoothing.certify_all(task_of(trained, *words), file, lambda: 0)
    assert file.read_bytes() == (first / "certificates.jsonl").read_bytes()


def test_records_of_other_data_do_not_mix(trained, first, tmp_path):
    file = tmp_path / "certificates.jsonl"
    rows = rows_of(first)
    rows[3]["label"] += 1
    runs.append_lines(file, rows)
    with pytest.raises(RunError, match=r"written with label = .*must not mix"):
        smoothing.certify_all(task_of(trained), file, lambda: 0)
    others = tmp_path / "others.jsonl"
    with pytest.raises(RunError, match=r"written with label = .*must not mix"):
        smoothing.take_over(task_of(trained), [str(tmp_path)], others)
    assert not others.exists()


@pytest.mark.parametrize(("name", "other"), [("norm", "linf"), ("data", "0" * 12)])
def test_a_part_in_another_norm_or_of_other_images_is_refused(
    trained, first, tmp_path, name, other
):
    """Else its rows would pass for l2 radii, or theirs for those of these images."""
    rows = [row | {name: other} for row in rows_of(first)]
    runs.append_lines(tmp_path / "certificates.jsonl", rows)
    with pytest.raises(RunError, match=rf"written with {name} = {other}, now it is"):
        smoothing.take_over(task_of(trained), [str(tmp_path)], tmp_path / "ours.jsonl")


def test_nan_logits_certify_nothing_and_are_reported(trained, tmp_path, capsys):
    task = task_of(trained, "max=2")
    found = smoothing.judging.finished_training(str(trained), None)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, found.weights)
    config = composed(f"run={trained}", *FEW, "max=2", "sigma=1.0", config="certify")
    config["tracking"] = smoothing.Tracking("disabled")
    settings = smoothing.build.settings(smoothing.SmoothingSettings, config)
    task = smoothing.task_of(settings, found._replace(weights=broken))
    rows = smoothing.certify_all(task, tmp_path / "c.jsonl", lambda: 0)
    assert all(row["abstain"] and row["nan"] for row in rows)
    assert [row["invalid"] for row in rows] == [1000, 1000]
    about = {"dataset": "digits", "model": "mlp", "objective": "o"}
    smoothing.show(about | smoothing.summary(rows))
    assert "2 examples met NaN logits" in capsys.readouterr().err


KILLED = ("certifier=smoothing", "n=20000", "max=60", "tracking=disabled")


def started(trained: Path, *, until=lambda: False, signum: int = 0) -> tuple[int, str]:
    """Start the command, signal it when `until` is true: its exit code and words."""
    command = [sys.executable, "-m", "experiments.certify", f"run={trained}", *KILLED]
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


def test_killed_again_and_again_it_ends_with_the_same_records(trained, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        shutil.copytree(trained, place, ignore=shutil.ignore_patterns("certify"))
    files = lambda: list(here.glob("certify/*/certificates.jsonl"))
    lines = lambda: sum(len(runs.read_lines(file)) for file in files())

    code, _ = started(here, until=lambda: lines() >= 3, signum=signal.SIGKILL)
    assert code == -signal.SIGKILL
    first = lines()
    assert 3 <= first < 60
    (file,) = files()
    kept = rows_of(file.parent)[: first - 1]
    file.write_bytes(file.read_bytes()[:-9])  # as if it came in the middle of a line

    code, words = started(
        here, until=lambda: lines() >= first + 3, signum=signal.SIGTERM
    )
    assert code == 128 + signal.SIGTERM, words
    assert "torn lines" in words
    assert "the same command continues" in words

    code, words = started(here)
    assert code == 0, words
    assert started(there)[0] == 0
    again = rows_of(only(here / "certify"))
    assert timeless(again) == timeless(rows_of(only(there / "certify")))
    assert [row["index"] for row in again] == list(range(60))
    assert again[: len(kept)] == kept
    assert (
        numbers(only(here / "certify"))["acr"]
        == numbers(only(there / "certify"))["acr"]
    )


def test_the_report_merges_runs_and_logs(trained, first, tmp_path, capsys):
    other = certified(trained, "sigma=0.6", "max=12")
    log = tmp_path / "logs" / "noise_0.25"
    log.parent.mkdir()
    log.write_bytes((first / "certificates.tsv").read_bytes())
    (log.parent / "README").write_text("not a log")
    picture = tmp_path / "curves.png"
    words = [str(first), str(other), str(log.parent)]
    report.main([*words, "--sigma=0.25", f"--plot={picture}"])
    table = capsys.readouterr().out
    acr = numbers(first)["acr"]
    lines = [line for line in table.splitlines() if "| Gaussian | 0.25 |" in line]
    assert len([line for line in lines if "| 12 x 1 |" in line]) == 1
    (line,) = [line for line in table.splitlines() if "noise_0.25" in line]
    assert "| 0.25 | 1,000 | 0.001 | 12 x 1 |" in line
    printed = float(line.split("**")[1])
    assert printed <= acr < printed + 1e-4
    assert picture.stat().st_size > 10_000
    report.main([str(log.parent), "--latex"])
    assert r"\textbf{" in capsys.readouterr().out


def test_only_seeds_of_the_training_make_one_row(first):
    result = numbers(first)
    twice = result | {"seed": 1}  # the same network under other noise
    other = result | {"weights": "another", "seed": 1}
    train = other | {"split": "train"}
    rows = smoothing_report.rows_of([result, twice, other, train])
    assert sorted(len(row.means) for row in rows) == [1, 1, 2]
    table = smoothing_report.cells(rows, str, "±")
    assert sorted(line[0] for line in table) == ["digits", "digits", "digits train"]


def test_numbers_of_other_examples_neither_merge_nor_compete(first):
    """As many examples, but not the same: one row each, and the best of each bold."""
    result = numbers(first)
    assert result["indices"] == "0:12:1"
    other = result | {"weights": "another", "indices": "0:24:2", "acr": 1e-3}
    rows = smoothing_report.rows_of([result, other])
    assert [len(row.means) for row in rows] == [1, 1]
    table = smoothing_report.cells(rows, lambda text: f"*{text}*", "±")
    assert all(line[8].startswith("*") for line in table)


def test_every_printed_radius_is_at_most_the_stored_one(first):
    """The log repeats the radii bit for bit; none is above that of all votes."""
    rows = rows_of(first)
    stored = {row["index"]: row["radius"] for row in rows}
    for line in (first / "certificates.tsv").read_text().splitlines()[1:]:
        index, _, _, printed, *_ = line.split("\t")
        assert float(printed) == stored[int(index)]
    exact = proportion_lower(1000, 1000, 0.001)
    assert max(stored.values()) <= Gaussian(0.25).radius(exact)


@pytest.mark.slow
def test_the_benchmark_measures_votes_beside_the_forward_pass():
    group = suites_smoothing.votes_group("lenet", 8, suites.MNIST, peers=True)
    rows = list(benchmark.measure(group, 2))
    assert [row.case for row in rows][:2] == ["forward", "votes"]
    assert rows[1].target == pytest.approx(1 / 0.85, rel=1e-3)
    assert all(row.median_ms > 0 for row in rows)


def test_cat_rs_learns_from_the_votes_on_the_training_images(trained, tmp_path):
    words = [word for word in NETWORK if not word.startswith("objective")]
    words += ["objective=catrs", "schedule.epochs=0.1", "schedule.drops=[]"]
    words += [f"paths.runs={tmp_path}"]
    with pytest.raises(ConfigError, match=r"objective.votes must be .*split=train"):
        run(train.work, *words)
    few = certified(trained, "split=train", "n=64", "n0=64", "max=3")
    with pytest.raises(RunError, match="votes of 3 of 1433 training examples"):
        run(train.work, *words, f"objective.votes={few}")
    labels = smoothing.judging.examples_of(
        smoothing.judging.finished_training(str(trained), None).settings.data, "train"
    ).labels.tolist()
    shares = np.eye(10)[np.arange(1433) % 10] * 0.7 + 0.03
    lines = [
        {"index": i, "split": "train", "label": y, "counts": (1000 * row).tolist()}
        for i, (y, row) in enumerate(zip(labels, shares, strict=True))
    ]
    for other in ("votes", "others"):
        (tmp_path / other).mkdir()
    mixed = [*lines[:-1], lines[-1] | {"label": 10}]
    runs.append_lines(tmp_path / "others" / "certificates.jsonl", mixed)
    with pytest.raises(RunError, match="or those of other data"):
        run(train.work, *words, f"objective.votes={tmp_path / 'others'}")
    runs.append_lines(tmp_path / "votes" / "certificates.jsonl", lines)
    run(train.work, *words, f"objective.votes={tmp_path / 'votes'}", "fresh=true")
    assert numbers(only(tmp_path))["objective"] == "catrs"


def test_shares_are_of_the_votes_that_each_image_got(tmp_path):
    """Their number may differ, and a NaN is a vote for nothing."""
    rows = [
        {"index": 1, "split": "train", "label": 0, "counts": [6, 2], "invalid": 2},
        {"index": 0, "split": "train", "label": 1, "counts": [1, 3], "invalid": 0},
    ]
    runs.append_lines(tmp_path / "certificates.jsonl", rows)
    objective = Objective({"_target_": "certjax.training.catrs"}, votes=str(tmp_path))
    found = smoothed_labels(objective, np.array([1, 0]))
    np.testing.assert_allclose(found.probabilities, [[0.25, 0.75], [0.6, 0.2]])


def test_batch_norm_is_that_of_noisy_images(tmp_path):
    """In training and at its end: the smoothed classifier sees nothing else."""
    words = [w for w in NETWORK if w[:5] not in {"model", "+mode"}]
    words += ["model=mlp", "+model.hidden=[8]", "+model.batch_norm=true"]
    words += [
        "schedule.epochs=1",
        "schedule.drops=[]",
        "objective.loss.noise.sigma=1.0",
    ]
    run(train.work, *words, f"paths.runs={tmp_path}")
    found = smoothing.judging.finished_training(str(only(tmp_path)), None)
    images = smoothing.judging.examples_of(found.settings.data, "train").images
    xs = jnp.asarray(images[:1408].reshape(11, 128, 8, 8, 1) / 255.0, jnp.float32)
    noise = jax.random.normal(jax.random.key(5), xs.shape)
    variance = {}
    for name, batches in (("clean", xs), ("noisy", xs + noise)):
        statistics = population_statistics(found.model, found.weights.params, batches)
        variance[name] = np.asarray(statistics["dense_norm_0"]["var"])
    kept = np.asarray(found.weights.statistics["dense_norm_0"]["var"])
    np.testing.assert_allclose(kept, variance["noisy"], rtol=0.2)
    assert np.all(kept > 1.5 * variance["clean"])
