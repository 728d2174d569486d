"""Published numbers beside ours, and the picture of what robustness costs."""

import pytest
import yaml

from experiments import ctbench, pareto, report, runs
from experiments.ctbench import Point
from experiments.runs import RunError


CERTIFIED = {"run": "a", "certifier": {"_target_": "certjax.bounds.crown"}}
MTL = {"_target_": "certjax.training.mtl_ibp", "alpha": 0.5}


def finished(folder, *, loss=MTL, clean=98.0, certified=90.0, seed=0, **changes):
    """What a finished training leaves behind, as far as the tables read it."""
    data = {"name": "mnist", "validation": changes.pop("validation", None)}
    threat = {"_target_": changes.pop("threat", "certjax.threat.Linf")}
    config = {"objective": {"loss": loss, "kappa": 0.0}, "seed": seed, "data": data}
    config |= {"threat": threat}
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
    (again / ".hydra" / "config.yaml").write_text(yaml.safe_dump(CERTIFIED))
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
            (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(CERTIFIED))
    found = lines_of(ctbench.table([tmp_path]), "MTL-IBP")
    ours = [line for line in found if "| IBP |" in line]
    assert [line.rpartition("| IBP |")[2].strip() for line in ours] == ["10 x 2 |"] * 2


def test_other_radii_held_out_data_and_unfinished_runs_do_not_count(tmp_path):
    finished(tmp_path / "a", test_eps=0.2)
    finished(tmp_path / "b", validation=0.1)
    (finished(tmp_path / "c") / "done").unlink()
    finished(tmp_path / "d", threat="certjax.threat.L2")
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
    finished(again, clean=99.0, certified=88.0)
    (again / ".hydra" / "config.yaml").write_text(yaml.safe_dump(CERTIFIED))
    found = ctbench.points([tmp_path])
    assert found == [
        Point("mtl_ibp", 0.1, 99.0, 88.0, 10),
        Point("mtl_ibp", 0.5, 98.0, 90.0, 10),
    ]
    picture = tmp_path / "pictures" / "pareto.png"
    report.main(["table=pareto", str(tmp_path), "--plot", str(picture)])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "alpha = 0.1 | 99.00 | 88.00" in capsys.readouterr().out
    mean = pareto.mean_points([*found, found[0]._replace(clean=97.0)])
    assert mean[0] == Point("mtl_ibp", 0.1, 98.0, 88.0, 10)


def test_a_front_of_nothing_says_so(tmp_path):
    with pytest.raises(RunError, match="no finished training"):
        ctbench.points([tmp_path])


def test_a_few_examples_are_a_front_of_their_own(tmp_path):
    """The first 100 of a network that was judged on 10 are another line."""
    again = finished(tmp_path / "a") / "certify" / "x"
    finished(again, clean=99.0, certified=99.0, examples=100)
    (again / ".hydra" / "config.yaml").write_text(yaml.safe_dump(CERTIFIED))
    assert ctbench.points([tmp_path]) == [
        Point("mtl_ibp", 0.5, 98.0, 90.0, 10),
        Point("mtl_ibp", 0.5, 99.0, 99.0, 100),
    ]


def test_a_front_leaves_out_what_does_not_compare(tmp_path):
    smoothed = finished(tmp_path / "a") / "certify" / "x"
    finished(smoothed, test_eps=None, certified=95.0)
    finished(tmp_path / "b", validation=0.1)
    for folder in (smoothed, tmp_path / "a" / "certify" / "y"):
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(CERTIFIED))
    unfinished = {"certified": 99.0, "clean": 99.0, "examples": 10, "test_eps": 0.1}
    runs.write_json(tmp_path / "a" / "certify" / "y" / "result.json", unfinished)
    assert ctbench.points([tmp_path]) == [Point("mtl_ibp", 0.5, 98.0, 90.0, 10)]
    finished(tmp_path / "c", dataset="cifar10")
    with pytest.raises(RunError, match="do not compare"):
        ctbench.points([tmp_path])


def test_cascades_of_other_stages_are_other_rows(tmp_path):
    """Two verifiers with the same label are not two seeds."""
    for seed in (0, 1):
        trained = finished(tmp_path / str(seed), seed=seed)
        for name, certified in (("x", 90.0 + seed), ("y", 96.0)):
            node = {"_target_": "certjax.bounds.crown", "name": name}
            again = trained / "certify" / f"{name}{seed}"
            finished(again, seed=seed, certified=certified, certifier="CROWN")
            saved = yaml.safe_dump({"run": str(seed), "certifier": node})
            (again / ".hydra" / "config.yaml").write_text(saved)
    found = lines_of(ctbench.table([tmp_path]), "MTL-IBP")
    text = "\n".join(found)
    assert "| 90.50 ± 0.71 | CROWN |" in text
    assert "| 96.00 ± 0.00 | CROWN |" in text
