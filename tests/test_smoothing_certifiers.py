"""Patches, l0, given radii, and the records of several machines: their certifications.

The certifiers of lengths and what all share: `test_smoothing_runner.py`.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
from runners import composed, CONF, numbers, only, run

from certjax.smoothing import Ablation, Discrete, Gaussian, judge
from certjax.smoothing.confidence import proportion_lower, split_alpha
from experiments import build, certify, report, runs, smoothing, train
from experiments.build import ConfigError
from experiments.runs import RunError


NETWORK = (
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
GAUSSIAN = ("objective=gaussian_augmentation", "model=mlp", "+model.hidden=[32]")
GAUSSIAN += ("optimizer.learning_rate=0.01",)
ABLATED = ("objective=ablation", "objective.loss.noise.keep=24")
ABLATED += ("objective.loss.noise.pixels=64", "model=ablated_cnn")
ABLATED += ("optimizer.learning_rate=0.003", "schedule.epochs=3", "schedule.drops=[2]")
BAND = ("certifier=patch_band", "certifier.width=2", "max=8")
BLOCK = ("certifier=patch_block", "certifier.width=4", "max=8")
BLOCK += ("certifier.threshold=null",)
L0 = ("certifier=ablation", "n=1000", "max=8")
RADIUS = ("certifier=smoothing_radius", "radius=0.3", "certifier.rounds=[200,1000]")
RADIUS += ("max=12",)
SHADES = ("certifier=discrete", "certifier.noise.keep=0.9", "n=1000", "max=8")
SHADES += ("certifier.noise.levels=4",)


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    root = tmp_path_factory.mktemp("gaussian")
    run(train.work, *NETWORK, *GAUSSIAN, f"paths.runs={root}")
    return only(root)


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablated")
    run(train.work, *NETWORK, *ABLATED, f"paths.runs={root}")
    return only(root)


def certified(trained: Path, *words: str) -> Path:
    """The directory of a certification."""
    before = set(trained.glob("certify/*"))
    run(certify.work, f"run={trained}", "tracking=disabled", *words, config="certify")
    (made,) = set(trained.glob("certify/*")) - before
    return made


def rows_of(path: Path) -> list[dict]:
    return runs.read_lines(path / "certificates.jsonl")


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def made(gaussian, ablated):
    """A certification of each kind."""
    kinds = {"band": BAND, "block": BLOCK, "l0": L0}
    found = {name: certified(ablated, *words) for name, words in kinds.items()}
    found |= {"radius": certified(gaussian, *RADIUS)}
    return found | {"shades": certified(gaussian, *SHADES)}


# ---- configs

CERTIFIERS = sorted(
    path.stem
    for path in (CONF / "certifier").glob("*.yaml")
    if "certjax.smoothing." in path.read_text().partition("_target_:")[2]
)


@pytest.mark.parametrize("name", CERTIFIERS)
def test_every_certifier_of_smoothed_classifiers_can_be_built(name):
    words = ("radius=0.5",) if name == "smoothing_radius" else ()
    config = composed("run=x", f"certifier={name}", *words, config="certify")
    known = {"sigma": 0.25, "width": 4, "pixels": 784, "levels": 2}
    known["keep"] = 0.8 if name == "discrete" else 45
    config = smoothing.completed(config, known)
    assert smoothing.is_smoothing(config["certifier"])
    made = build.build(config["certifier"], where="certifier")
    assert build.accepts(made, "x")


# ---- records


def test_the_ablated_network_learns_what_is_left_of_the_images(ablated):
    """The end of its training shows it whole images; its objective never did."""
    assert numbers(ablated)["clean"] > 50
    assert runs.read_lines(ablated / "metrics.jsonl")[-1]["train/noisy"] > 30


@pytest.mark.parametrize(("kind", "touched"), [("band", 1), ("block", 2)])
def test_a_patch_touches_fewer_positions_than_the_class_leads_by(made, kind, touched):
    rows = rows_of(made[kind])
    assert [row["index"] for row in rows] == list(range(8))
    assert any(row["radius"] > 0 for row in rows)
    for row in rows:
        counts = np.asarray(row["counts"]) - 0.5 * np.arange(10) / 10  # ties: the lower
        second, first = np.sort(counts)[-2:]
        lead, more = np.floor(first - second), row["width"] - 1
        fits = [m for m in range(1, 9) if 2 * min(8, m + more) ** touched <= lead]
        assert row["prediction"] == np.argmax(counts)
        assert row["radius"] == row["size"] == max(fits, default=0)
        assert row["threshold"] == (0.2 if kind == "band" else None)
        assert 0 <= min(row["counts"]) <= max(row["counts"]) <= 8**touched
        if row["threshold"] is None:
            assert sum(row["counts"]) + row["invalid"] == 8**touched
        assert row["norm"] == "patch"
        assert row["guarantee"].startswith("floating point")
        assert row["train_noise"] == "Ablation, keep 24, pixels 64"
        assert "alpha" not in row


@pytest.mark.parametrize(
    ("kind", "noise"), [("l0", Ablation(24, 64)), ("shades", Discrete(0.9, 4))]
)
def test_an_l0_record_repeats_its_certificate(made, kind, noise):
    rows = rows_of(made[kind])
    assert any(row["radius"] > 0 for row in rows)
    for row in rows:
        counts = (np.asarray(row[name]) for name in ("counts0", "counts"))
        again = judge(*counts, noise, 64, row["n0"], row["n"], row["alpha"])
        assert (again.prediction, again.radius) == (row["prediction"], row["radius"])
        assert row["radius"] == int(row["radius"])
        assert (row["norm"], row["sigma"]) == ("l0", None)
        assert row["guarantee"] == noise.guarantee


def test_a_given_radius_is_reached_at_the_share_of_alpha_of_its_round(made):
    rows, noise = rows_of(made["radius"]), Gaussian(0.25)
    assert {row["n"] for row in rows} == {200, 1000}  # easy ones and hard ones
    for row in rows:
        budget = split_alpha(0.001, 2)
        assert row["budget"] == {"alpha": 0.001, "parts": list(budget.parts)}
        assert (row["fixed_radius"], row["rounds"]) == (0.3, [200, 1000])
        assert row["guarantee"].startswith("real arithmetic")
        most = int(np.max(row["counts"]))
        reached = noise.radius(proportion_lower(most, row["n"], budget.parts[0])) >= 0.3
        assert reached != row["abstain"]
        assert row["radius"] == (0.3 if reached else 0.0)
    result = numbers(made["radius"])
    assert result["samples"] == sum(row["n"] for row in rows)
    assert result["radii"] == [0.3]
    assert "n" not in result
    share = np.mean([row["correct"] and row["radius"] > 0 for row in rows])
    assert result["certified_at"] == [share]


def test_the_split_of_alpha_is_printed_and_the_radius_in_all_its_digits(made, capsys):
    result = numbers(made["radius"]) | {"radii": [0.29999999]}
    smoothing.show(result)
    shown = " ".join(capsys.readouterr().out.split())
    assert "alpha 0.001 = 0.0005 + 0.0005" in shown
    assert "0.29999999" in shown
    assert "fixed_radius 0.3" in shown


def test_the_numbers_of_the_training_are_taken_where_none_are_given(made, ablated):
    row = rows_of(made["l0"])[0]
    assert (row["keep"], row["pixels"]) == (24, 64)
    for name in ("width", "keep"):
        words = {"width": "certifier=patch_band", "keep": "certifier=discrete"}[name]
        config = composed(f"run={ablated}", words, config="certify")
        with pytest.raises(ConfigError, match=rf"{name} is not set.*certifier\."):
            smoothing.completed(config, {"_target_": "certjax.smoothing.Gaussian"})


def test_another_noise_than_in_training_is_warned_of(ablated, capsys):
    certified(ablated, *L0, "certifier.noise.keep=16", "n=64", "max=1")
    said = capsys.readouterr().err.replace("\n", " ")
    assert "trained with Ablation, keep 24, pixels 64 and is certified with" in said
    assert "with Ablation, keep 16, pixels 64; every" in said


# ---- refusals and interruptions

REFUSED = {
    ("gaussian", *BAND): r"network of `model` does not take .* model=ablated_cnn",
    ("gaussian", *L0, "certifier.noise.keep=3", "certifier.noise.pixels=64"): (
        r"network of `model` does not take .*shape \(8, 8, 2\)"
    ),
    ("ablated", *L0, "certifier.noise.pixels=784"): r"784 pixels, got \(8, 8, 1\)",
    ("ablated", *L0, "certifier.noise.keep=65"): r"keep must lie in \[1, pixels=64\]",
    ("ablated", *BLOCK, "certifier.width=9"): r"width at most H and W, got \(8, 8, 1\)",
    ("gaussian", *RADIUS[:1]): r"radius",
    ("gaussian", *RADIUS, "indices=0:400:x"): r"distinct positions.*got 0:400:x",
    ("gaussian", *RADIUS, "max=1", "parts=[nowhere]"): r"no nowhere.*directories of",
}


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: " ".join(words[:2]))
def test_what_cannot_be_certified_is_refused(words, request):
    trained = request.getfixturevalue(words[0])
    with pytest.raises((ConfigError, RunError), match=REFUSED[words]):
        certified(trained, *words[1:])
    for path in trained.glob("certify/*"):
        assert runs.finished(path) or not (path / "certificates.jsonl").is_file()


def test_a_radius_that_means_nothing_is_refused(gaussian):
    for words in (("radius=0",), ("certifier.rounds=[1000,200]",)):
        with pytest.raises(ConfigError, match=r"`certifier`: .*got"):
            certified(gaussian, *RADIUS, *words)


def task_of(trained: Path, *words: str) -> smoothing.Task:
    config = composed(f"run={trained}", *words, config="certify")
    found = smoothing.judging.finished_training(config["run"], None)
    config = smoothing.completed(config, found.settings.objective.loss["noise"])
    config["tracking"] = smoothing.Tracking("disabled")
    settings = smoothing.build.settings(smoothing.SmoothingSettings, config)
    return smoothing.task_of(settings, found)


KINDS = {
    "band": ("ablated", *BAND),
    "l0": ("ablated", *L0),
    "radius": ("gaussian", *RADIUS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_certification_goes_on(made, kind, tmp_path, request, capsys):
    """The torn line is made again, the others are not: even the seconds are kept."""
    network, *words = KINDS[kind]
    file, whole = tmp_path / "certificates.jsonl", rows_of(made[kind])
    lines = (made[kind] / "certificates.jsonl").read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4])[:-30])
    task = task_of(request.getfixturevalue(network), *words)
    again = smoothing.certify_all(task, file, lambda: 0)
    assert "1 torn lines" in capsys.readouterr().err
    assert again[:3] == whole[:3]
    assert timeless(again) == timeless(whole)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("band", "certifier.width=3"),
        ("band", "certifier.threshold=0.3"),
        ("l0", "certifier.noise.keep=20"),
        ("radius", "radius=0.4"),
        ("radius", "certifier.rounds=[100,1000]"),
    ],
)
def test_certificates_of_two_kinds_do_not_mix(made, kind, word, tmp_path, request):
    network, *words = KINDS[kind]
    file = tmp_path / "certificates.jsonl"
    file.write_bytes((made[kind] / "certificates.jsonl").read_bytes())
    task = task_of(request.getfixturevalue(network), *words, word)
    with pytest.raises(RunError, match="must not mix"):
        smoothing.certify_all(task, file, lambda: 0)


# ---- several machines


@pytest.mark.parametrize(
    ("network", "words"),
    [("gaussian", ("certifier=smoothing", "n=500")), ("ablated", BAND[:2])],
)
def test_the_records_of_several_machines_are_those_of_one(
    network, words, tmp_path, request, capsys
):
    """Each certifies its share; the whole takes them over and computes nothing."""
    trained = request.getfixturevalue(network)
    shares = ("indices=0:12:3", "indices=[1,4,7,10]", "indices=2:12:3")
    parts = [certified(trained, *words, share) for share in shares]
    with (parts[1] / "certificates.jsonl").open("ab") as file:
        file.write(b'{"index": 13, "lab')  # still at work, or killed
    once = certified(trained, *words, "max=12", "batch=500")
    moved = [tmp_path / f"machine_{number}" for number in range(3)]
    for part, place in zip(parts, moved, strict=True):
        part.rename(place)
    merged = certified(
        trained, *words, "max=12", f"parts=[{','.join(map(str, moved))}]"
    )
    assert capsys.readouterr().err.count("4 records taken over from") == 3
    theirs = {row["index"]: row for part in moved for row in rows_of(part)}
    assert sorted(theirs) == list(range(12))
    assert sorted(rows_of(merged), key=lambda row: row["index"]) == [
        theirs[index] for index in range(12)
    ]  # the seconds, too
    ordered = sorted(rows_of(merged), key=lambda row: row["index"])
    assert timeless(ordered) == timeless(rows_of(once))
    same = ("acr", "certified_at", "table", "abstained", "examples", "intervals")
    for name in same:
        assert numbers(merged)[name] == numbers(once)[name]
    logs = [(path / "certificates.tsv").read_text() for path in (merged, once)]
    without = [[line.rsplit("\t", 1)[0] for line in log.splitlines()] for log in logs]
    assert without[0] == without[1]
    capsys.readouterr()
    tables = []
    for path in (merged, once):
        report.main([str(path)])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert "| 12 x 1 |" in tables[0]


def test_parts_made_in_another_way_are_refused(gaussian, tmp_path):
    words = ("certifier=smoothing", "n=100", "n0=10")
    other = certified(gaussian, *words, "indices=[0,1]", "seed=5")
    before = set(gaussian.glob("certify/*"))
    with pytest.raises(RunError, match="written with seed = 5, now it is 0"):
        certified(gaussian, *words, "max=2", f"parts=[{other}]")
    (left,) = set(gaussian.glob("certify/*")) - before
    assert not (left / "certificates.jsonl").is_file()


@pytest.mark.slow
def test_cat_rs_from_its_first_network_to_its_certificates(gaussian, tmp_path):
    """The commands of its recipe, on the digits: two machines make the votes."""
    votes = ("certifier=smoothing", "split=train", "n=64", "n0=16")
    parts = [certified(gaussian, *votes, f"indices={i}:1433:2") for i in (0, 1)]
    whole = certified(gaussian, *votes, f"parts=[{parts[0]},{parts[1]}]")
    words = ("experiment=smoothing_catrs_mnist_0.25", "data=digits", "model=mlp")
    words += ("+model.hidden=[16]", "schedule.epochs=1", "schedule.drops=[]")
    words += (f"objective.votes={whole}", "tracking=disabled")
    run(train.work, *words, f"paths.runs={tmp_path}")
    network = only(tmp_path)
    assert numbers(network)["train_sigma"] == 0.25
    assert (
        len(rows_of(certified(network, "certifier=smoothing", "n=100", "max=3"))) == 3
    )


# ---- reports


def test_each_kind_of_radius_has_a_table_of_its_own(made, tmp_path, capsys):
    report.main([str(path) for path in made.values()])
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 3
    titles = ("l0", "patch", "samples")
    text = {name: table for table in tables for name in titles if f" {name} " in table}
    assert "| Ablation, keep 24 |" in text["l0"]
    assert "| Discrete, levels 4, keep 0.9 |" in text["l0"]
    assert "| certify_band, width 2, threshold 0.2 |" in text["patch"]
    assert "| certify_block, width 4 |" in text["patch"]
    (line,) = [t for t in text["samples"].splitlines() if "radius 0.3" in t]
    result = numbers(made["radius"])
    assert f"| {result['samples'] / 12:,.0f} |" in line
    assert f"{100 * result['certified_at'][0]:.1f}" in line
    assert "ACR" not in "".join(tables)
    for kind, other in itertools.pairwise(("band", "l0", "radius")):
        words = [str(made[kind]), str(made[other]), f"--plot={tmp_path / 'no.png'}"]
        with pytest.raises(SystemExit):
            report.main(words)
        assert "needs certifications in one norm" in capsys.readouterr().err
    report.main([str(made["band"]), str(made["block"]), f"--plot={tmp_path / 'p.png'}"])
    assert (tmp_path / "p.png").stat().st_size > 10_000
    report.main([str(made["l0"]), "--latex"])
    assert "mean l0 radius & correct" in capsys.readouterr().out
