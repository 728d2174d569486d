"""What a training run says of itself: divergence, health of bounds, chosen weights."""

import math

import pytest
from runners import numbers, only, run, SMALL

from experiments import checkpoint, runs, train
from experiments.runs import RunError


HUGE = ("optimizer.learning_rate=1e30", "optimizer.clip=null", "schedule.epochs=30")


def test_divergence_says_where_and_keeps_the_last_good_state(tmp_path):
    with pytest.raises(RunError, match="diverged") as caught:
        run(train.work, *SMALL, *HUGE, f"paths.runs={tmp_path}")
    words = str(caught.value)
    for word in ("Step ", "eps ", "loss ", "of activation 0", "is kept in"):
        assert word in words
    (config,) = tmp_path.rglob("config.yaml")
    folder = config.parents[1] / "checkpoint"
    kept = words.partition(f"{folder}/")[2].partition(".")[0]
    assert (folder / kept).is_dir()
    assert checkpoint.note(folder)["seconds"] > 0


def test_the_layer_whose_bounds_exploded_is_named():
    metrics = {"loss": math.nan, "eps": 0.1, "finite": 0.0, "growth_0": 2.0}
    said = train.describe(metrics | {"growth_1": math.inf, "growth_2": math.nan})
    assert said.endswith("the bounds of activation 1 are not finite")
    said = train.describe(metrics | {"growth_1": 50.0})
    assert said.startswith("eps 0.1, loss nan")
    assert said.endswith("activation 1, 50 times as wide as the input")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    words = ("selection=split", "selection_share=0.2", "max=40", f"paths.runs={root}")
    run(train.work, *SMALL, *words)
    return only(root)


def test_the_best_weights_on_a_split_are_kept(chosen):
    rows = runs.read_lines(chosen / "metrics.jsonl")
    scored = [row for row in rows if "selection/certified" in row]
    assert len(scored) == 3  # every epoch from the end of the ramp on
    result = numbers(chosen)["selection"]
    assert result["on"] == "split"
    best = max(row["selection/certified"] for row in scored)
    assert 100 * result["certified"] == pytest.approx(best)
    steps = [r["step"] for r in scored if r["selection/certified"] == best]
    assert result["step"] in steps
    last = [row for row in rows if "train/loss" in row][-1]
    assert last["train/epoch"] == pytest.approx(3)
    assert last["step"] < 3 * 22  # a fifth of the examples is not trained on


def test_the_bounds_of_the_layers_are_logged(chosen):
    rows = [r for r in runs.read_lines(chosen / "metrics.jsonl") if "train/loss" in r]
    assert all(0 <= row["train/dead"] <= 1 for row in rows)
    assert all(row["train/growth_0"] > 0 for row in rows)


def test_an_interrupted_choice_goes_on(chosen, tmp_path):
    """The best weights so far are remembered, and the result is the same."""
    before = numbers(chosen)
    (chosen / "done").unlink()
    for folder in (chosen / "weights", chosen / "checkpoint"):
        newest = max(folder.iterdir(), key=lambda p: p.name)
        newest.rename(tmp_path / folder.name)
    words = ("selection=split", "selection_share=0.2", "max=40")
    run(train.work, *SMALL, *words, f"paths.runs={chosen.parents[1]}")
    assert numbers(chosen) == before


def test_averaged_weights_are_evaluated(tmp_path):
    words = ("+schedule.average=1", "+schedule.average_every=5", "max=40")
    run(train.work, *SMALL, *words, f"paths.runs={tmp_path}")
    path = only(tmp_path)
    assert numbers(path)["selection"] == {"on": "last", "step": 66}
