"""Published numbers beside ours, and the picture of what robustness costs."""

import pytest
import yaml

from experiments import ctbench, pareto, report, runs
from experiments.ctbench import Point
from experiments.runs import RunError


MTL = {"_target_": "certjax.training.mtl_ibp", "alpha": 0.5}


def finished(folder, *, loss=MTL, clean=98.0, certified=90.0, seed=0, **changes):
    """What a finished training leaves behind, as far as the tables read it."""
    data = {"name": "mnist", "validation": changes.pop("validation", None)}
    config = {"objective": {"loss": loss, "kappa": 0.0}, "seed": seed, "data": data}
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    result = {"dataset": "mnist", "test_eps": 0.1, "name": "r", "model": "cnn4_bn"}
    result |= {"clean": clean, "certified": certified, "seed": seed}
    result |= {"certifier": "IBP", "examples": 10} | changes
    runs.write_json(folder / "result.json", result)
    runs.write_text(folder / "done", "")
    return folder


def lines_of(text, method):
    return [line for line in text.splitlines() if f"| {method} |" in line]


def test_what_was_not_run_is_empty(tmp_path):
    text = ctbench.table([tmp_path])
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(ctbench.SETTINGS) * len(ctbench.METHODS)
    assert lines_of(text, "MTL-IBP")[1].endswith("98.74 / 93.90 |  |  |  |  |  |  |")


def test_seeds_are_merged_and_verifiers_kept_apart(tmp_path):
    first = finished(tmp_path / "a", certified=90.0)
    finished(tmp_path / "b", certified=92.0, seed=1)
    again = first / "certify" / "x"
    finished(again, certified=95.0, certifier="CASCADE")
    (again / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"run": "a"}))
    found = lines_of(ctbench.table([tmp_path]), "MTL-IBP")
    assert "| 98.00 | 95.00 | CASCADE | 10 x 1 |" in found[0]
    assert "| 98.00 ± 0.00 | 91.00 ± 1.41 | IBP | 10 x 2 |" in found[1]


def test_a_network_that_was_certified_twice_is_one_seed(tmp_path):
    for seed in (0, 1):
        trained = finished(tmp_path / str(seed), seed=seed, certifier="CROWN")
        for again, certified in (("x", 80.0), ("y", 80.0 + seed)):
            folder = finished(
                trained / "certify" / again, seed=seed, certified=certified
            )
            (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"run": "a"}))
    found = lines_of(ctbench.table([tmp_path]), "MTL-IBP")
    ours = [line for line in found if "| IBP |" in line]
    assert [line.rpartition("| IBP |")[2].strip() for line in ours] == ["10 x 2 |"] * 2


def test_other_radii_held_out_data_and_unfinished_runs_do_not_count(tmp_path):
    finished(tmp_path / "a", test_eps=0.2)
    finished(tmp_path / "b", validation=0.1)
    (finished(tmp_path / "c") / "done").unlink()
    assert ctbench.table([tmp_path]) == ctbench.table([tmp_path / "nothing"])


def test_a_small_box_makes_taps_staps():
    loss = {"_target_": "certjax.training.taps"}
    assert ctbench.method_of({"objective": {"loss": loss}}) == "taps"
    assert (
        ctbench.method_of({"objective": {"loss": loss | {"box": {"a": 1}}}}) == "staps"
    )
    fused = {"_target_": "certjax.training.crown_ibp_fused"}
    assert ctbench.method_of({"objective": {"loss": fused}}) == "crown_ibp"


def test_the_front_takes_the_most_that_was_proved(tmp_path, capsys):
    for alpha, clean, certified in ((0.1, 99.0, 80.0), (0.5, 98.0, 90.0)):
        loss = MTL | {"alpha": alpha}
        finished(tmp_path / str(alpha), loss=loss, clean=clean, certified=certified)
    again = tmp_path / "0.1" / "certify" / "x"
    finished(again, certified=88.0)
    (again / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"run": "a"}))
    found = ctbench.points([tmp_path])
    assert found == [
        Point("mtl_ibp", 0.1, 99.0, 88.0),
        Point("mtl_ibp", 0.5, 98.0, 90.0),
    ]
    picture = tmp_path / "pictures" / "pareto.png"
    report.main(["table=pareto", str(tmp_path), "--plot", str(picture)])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "alpha = 0.1 | 99.00 | 88.00" in capsys.readouterr().out
    mean = pareto.mean_points([*found, found[0]._replace(clean=97.0)])
    assert mean[0] == Point("mtl_ibp", 0.1, 98.0, 88.0)


def test_a_front_of_nothing_says_so(tmp_path):
    with pytest.raises(RunError, match="no finished training"):
        ctbench.points([tmp_path])
