"""The cascade of certifiers: the same answers as its stages alone, stopped early."""

import numpy as np
import pytest
from runners import numbers, only, run, SMALL

from experiments import certify, runs, train
from experiments.build import ConfigError


FIRST = "max=60"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trained for interval bounds, at a radius where some examples stay undecided."""
    root = tmp_path_factory.mktemp("runs")
    words = ("schedule.epochs=4", "optimizer.learning_rate=0.003", "train_eps=0.03")
    run(train.work, *SMALL, *words, "max=60", f"paths.runs={root}")
    return only(root)


def certified(trained, *words):
    before = set(trained.glob("certify/*"))
    place = (f"run={trained}", "tracking=disabled", FIRST, "test_eps=0.05")
    run(certify.work, *place, *words, config="certify")
    (folder,) = set(trained.glob("certify/*")) - before
    return numbers(folder), runs.read_lines(folder / "certificates.jsonl"), folder


@pytest.fixture(scope="module")
def cascade(trained):
    words = ("certifier=cascade", "certifier.stages.crown.lanes=3")
    return certified(trained, *words)


def test_each_example_stops_at_its_first_answer(cascade):
    result, rows, _ = cascade
    stages = result["stages"]
    names = list(stages)
    assert names == [
        "clean",
        "pgd",
        "ibp",
        "crown_ibp",
        "crown",
        "alpha_crown",
        "undecided",
    ]
    left = 60
    for name in names[:-1]:
        assert stages[name]["examples"] == left
        left -= stages[name]["answered"]
        answered = [row for row in rows if row["stage"] == name]
        assert len(answered) == stages[name]["answered"]
    assert stages["undecided"]["examples"] == left
    for row in rows:
        reached = names.index(row["stage"])
        for later in names[reached + 1 : -1]:
            assert row[f"seconds_{later}"] == 0


def test_the_answers_are_consistent(cascade):
    result, rows, _ = cascade
    assert result["consistent"]
    assert result["certified"] <= result["robust"] <= result["clean"]
    assert result["attack"] == "PGD-40x2"
    for row in rows:
        assert row["certified"] == (
            row["stage"] in ("ibp", "crown_ibp", "crown", "alpha_crown")
        )
        if row["certified"]:
            assert row["margin"] > 0
        if row["stage"] == "undecided":
            assert row["margin"] <= 0
    assert len({row["stage"] for row in rows}) >= 4  # the test sees several stages


def test_it_proves_what_its_stages_prove_alone(trained, cascade):
    _, rows, _ = cascade
    broken = np.array([row["stage"] == "pgd" for row in rows])
    proved = np.array([row["certified"] for row in rows])
    for name in ("ibp", "crown"):
        _, alone, _ = certified(trained, f"certifier={name}", "eval_batch=8")
        found = np.array([row["certified"] for row in alone])
        assert not (found & broken).any()
        assert (proved >= found).all()


def test_a_killed_cascade_goes_on(trained, cascade):
    result, rows, folder = cascade
    file = folder / "certificates.jsonl"
    runs.write_text(file, "".join(file.read_text().splitlines(keepends=True)[:7]))
    (folder / "done").unlink()
    words = ("certifier=cascade", "certifier.stages.crown.lanes=3")
    place = (f"run={trained}", "tracking=disabled", FIRST, "test_eps=0.05")
    run(certify.work, *place, *words, config="certify")
    again = runs.read_lines(file)
    for old, new in zip(rows, again, strict=True):
        for name in ("index", "certified", "robust", "stage"):
            assert old[name] == new[name]
    assert numbers(folder)["certified"] == result["certified"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["certifier.stages.ibp.lanes=0"], "lanes"),
        (["certifier.stages.crown_ibp.intermediate=1"], "crown_ibp.intermediate"),
        (["certifier.stages.pgd.steps=0"], "steps must be at least 1"),
        (["certifier.stages.pgd._target_=os.system"], "certjax"),
    ],
)
def test_mistakes_name_the_stage(trained, words, message):
    place = (f"run={trained}", "tracking=disabled", FIRST, "certifier=cascade")
    with pytest.raises(ConfigError, match=message):
        run(certify.work, *place, *words, config="certify")
