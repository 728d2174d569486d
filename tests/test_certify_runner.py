"""`certify` and `attack` on a finished run, the report, and the evaluation's claims."""

import dataclasses
import json
import math
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from runners import numbers, only, run, SMALL

from certjax.attacks import pgd
from certjax.bounds import ibp
from certjax.threat import Linf
from experiments import (
    attack,
    attacking,
    certify,
    evaluation,
    judging,
    report,
    results,
    runs,
    train,
)
from experiments.build import ConfigError
from experiments.evaluation import Examples, Method, Weights
from experiments.runs import RunError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run(train.work, *SMALL, "schedule.epochs=4", f"paths.runs={root}")
    return only(root)


def task_of(trained, *, batch: int, **changes) -> evaluation.Evaluation:
    network = judging.finished_training(str(trained), None)
    plan = judging.plan_of(network.settings)
    task = judging.evaluation_of(plan, network.model)
    return task._replace(weights=network.weights, batch=batch, **changes)


def evaluated(task, folder):
    return evaluation.evaluate(task, folder / "certificates.jsonl", lambda: 0)


def few(examples: Examples, count: int) -> Examples:
    return Examples(*(array[:count] for array in examples))


def test_certify_repeats_the_run_and_a_smaller_radius_proves_more(trained, capsys):
    of_run = numbers(trained)
    place = (f"run={trained}", "tracking=disabled")
    run(certify.work, *place, config="certify")
    again = numbers(only(trained / "certify"))
    assert again["counts"]["certified"] == of_run["counts"]["certified"]
    assert again["test_eps"] == of_run["test_eps"]
    run(certify.work, *place, "test_eps=1/255", config="certify")
    folders = [path.parent for path in (trained / "certify").rglob("result.json")]
    small = next(n for n in map(numbers, folders) if n["test_eps"] == 1 / 255)
    assert small["certified"] >= again["certified"]
    run(certify.work, *place, config="certify")
    assert "finished before" in capsys.readouterr().err


@pytest.fixture
def own(tmp_path):
    """Own data of one name in two folders, and again in a third."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, 40, 4, 4, 1), np.uint8)
    labels = np.arange(40) % 3
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, xs in zip(folders, (images[0], images[1], images[0]), strict=True):
        folder.mkdir()
        arrays = {"x_train": xs, "y_train": labels, "x_test": xs, "y_test": labels}
        np.savez(folder / "own.npz", **arrays)
    return folders


def test_a_finished_run_on_other_data_of_the_same_name_is_not_shown(
    own, tmp_path, capsys
):
    here, other, moved = own
    root = tmp_path / "runs"
    words = (*SMALL, "schedule.batch=20", "data.name=own", "data.classes=3")
    words += (f"paths.runs={root}",)
    run(train.work, *words, f"data.dir={here}")
    path = only(root)
    place = (f"run={path}", "tracking=disabled")
    run(certify.work, *place, config="certify")
    run(train.work, *words, f"data.dir={moved}")
    run(certify.work, *place, f"data_dir={moved}", config="certify")
    assert capsys.readouterr().err.count("finished before") == 2
    with pytest.raises(RunError, match=r"made on other data.*fresh=true"):
        run(train.work, *words, f"data.dir={other}")
    with pytest.raises(RunError, match=r"made on other data.*fresh=true"):
        run(certify.work, *place, f"data_dir={other}", config="certify")
    run(certify.work, *place, f"data_dir={other}", "fresh=true", config="certify")
    run(train.work, *words, f"data.dir={tmp_path / 'gone'}")  # shown without its data
    (path / "done").unlink()  # killed before its end: it goes on on its own data only
    with pytest.raises(RunError, match=r"made on other data.*fresh=true"):
        run(train.work, *words, f"data.dir={other}")
    shutil.rmtree(path / "weights")
    with pytest.raises(RunError, match=r"made on other data.*fresh=true"):
        run(train.work, *words, f"data.dir={other}")
    run(train.work, *words, f"data.dir={moved}")
    assert "continuing after step" in capsys.readouterr().err


def test_a_point_outside_the_set_contradicts_no_certificate(trained, tmp_path):
    """Found by an attack of the training run that may leave the set."""
    path = tmp_path / "copy"
    shutil.copytree(trained, path, ignore=shutil.ignore_patterns("certify", "attack"))
    config = runs.saved_config(path)
    config["attack"] |= {"result": "free"}
    runs.write_text(path / ".hydra/config.yaml", yaml.safe_dump(config))
    rows = runs.read_lines(path / "certificates.jsonl")
    broken = "".join(json.dumps(row | {"robust": False}) + "\n" for row in rows)
    runs.write_text(path / "certificates.jsonl", broken)
    run(certify.work, f"run={path}", "tracking=disabled", config="certify")
    assert numbers(only(path / "certify"))["consistent"]


def test_attack_a_subset(trained):
    words = (f"run={trained}", "attack=fgsm", "subset=100", "skip=2", "max=30")
    run(attack.work, *words, "tracking=disabled", config="attack")
    path = only(trained / "attack")
    result, rows = numbers(path), runs.read_lines(path / "certificates.jsonl")
    assert (result["examples"], len(rows)) == (30, 30)
    assert result["attack"] == "FGSM"
    assert "certified" not in result
    assert result["robust"] <= result["clean"]
    low, high = result["intervals"]["robust"]
    assert high - low > 5  # a subset of 30 is told apart from the whole


@pytest.mark.parametrize("work", [certify, attack])
def test_what_is_not_a_run_is_named(work, tmp_path):
    name = work.__name__.rpartition(".")[2]
    with pytest.raises(RunError, match="not a run"):
        run(work.work, f"run={tmp_path}", config=name)


def test_an_unfinished_run_is_named(trained, tmp_path):
    runs.write_text(tmp_path / "x", "")
    (tmp_path / ".hydra").mkdir()
    config = (trained / ".hydra/config.yaml").read_text()
    runs.write_text(tmp_path / ".hydra/config.yaml", config)
    with pytest.raises(RunError, match="holds no trained network"):
        run(certify.work, f"run={tmp_path}", config="certify")


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_records_do_not_depend_on_the_batch(trained, tmp_path, batch):
    task = task_of(trained, batch=40)
    task = task._replace(examples=few(task.examples, 40))
    one = evaluated(task, tmp_path / "..")
    other = evaluated(task._replace(batch=batch), tmp_path)
    for a, b in zip(one, other, strict=True):
        margins = [row.pop("margin") or 0.0 for row in (a, b)]
        assert margins[0] == pytest.approx(margins[1], rel=1e-4, abs=1e-5)
        assert a == b


def test_records_do_not_depend_on_the_subset(trained, tmp_path):
    task = task_of(trained, batch=16)
    whole = evaluated(task._replace(examples=few(task.examples, 40)), tmp_path / "..")
    part = evaluation.select(task.examples, subset=None, skip=3, limit=13, seed=0)
    some = evaluated(task._replace(examples=part), tmp_path)
    known = {row["index"]: row for row in whole}
    for row in some:
        expected = known[row["index"]]
        assert {**row, "margin": None} == {**expected, "margin": None}


@pytest.mark.parametrize("cut", [1, 8, 9, 20, 39])
def test_an_interrupted_evaluation_continues_bit_for_bit(trained, tmp_path, cut):
    task = task_of(trained, batch=8)
    task = task._replace(examples=few(task.examples, 40))
    whole = evaluated(task, tmp_path)
    file = tmp_path / "certificates.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:cut]) + lines[cut][:5])
    assert evaluated(task, tmp_path) == whole
    assert file.read_bytes() == b"".join(lines)


def test_records_of_other_data_are_made_again(trained, tmp_path):
    """Of another network, of other examples at the same positions, or of nothing."""
    task = task_of(trained, batch=8)
    task = task._replace(examples=few(task.examples, 10))
    whole = evaluated(task, tmp_path)
    file = tmp_path / "certificates.jsonl"
    foreign = [{"label": 10}, {"weights": "x"}, {"image": "x"}]
    foreign += [{"index": 99}, {"index": None}]
    for change in foreign:
        rows = [whole[0] | change | {"certified": "!"}, *whole[1:5]]
        nothing = {"weights": whole[0]["weights"]}
        runs.write_text(
            file, "".join(json.dumps(row) + "\n" for row in [nothing, *rows])
        )
        assert evaluated(task, tmp_path) == whole
        assert len(runs.read_lines(file)) == len(whole)


def test_select():
    rows = np.arange(10)
    examples = Examples(rows, rows, rows)
    pick = partial(evaluation.select, examples, seed=0)
    every = pick(subset=None, skip=1, limit=None).index
    assert list(every) == list(range(10))
    assert list(pick(subset=None, skip=4, limit=2).index) == [0, 4]
    some = pick(subset=4, skip=1, limit=None).index
    assert len(set(some)) == 4
    assert list(some) == sorted(some)
    assert list(pick(subset=99, skip=1, limit=None).index) == list(range(10))


class Linear:
    """A network of the weights alone: logits = w @ x."""

    def apply(self, variables, x):
        return variables["params"]["w"] @ x

    def __hash__(self):
        return 0


PGD = attacking.Adversary(partial(pgd, steps=2))


def poisoned(w, count=4):
    """Examples of class 0 for a linear network with the given weights."""
    xs = np.full((count, 2), 0.5, np.float32)
    labels = np.zeros(count, np.int32)
    examples = Examples(xs, labels, np.arange(count))
    threat = Linf(0.1)
    methods = (
        evaluation.certify_method(Linear(), ibp, threat),
        attacking.attack_method(Linear(), PGD, threat),
    )
    weights = Weights({"w": jnp.asarray(w, jnp.float32)}, {})
    return evaluation.Evaluation(Linear(), weights, examples, methods, 0, 4)


def test_hand_computed_margin(tmp_path):
    rows = evaluated(poisoned([[1.0, 0.0], [0.0, 0.5]]), tmp_path)
    for row in rows:  # 0.5 - 0.25 at the centre, worst at the corner (0.4, 0.6)
        assert row["margin"] == pytest.approx(0.1, abs=1e-6)
        assert row["certified"]
        assert row["robust"]
        assert not row["nan"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_never_certified_and_is_counted(tmp_path, bad):
    rows = evaluated(poisoned([[1.0, 0.0], [0.0, bad]]), tmp_path)
    assert not any(row["certified"] or row["robust"] for row in rows)
    if math.isnan(bad):
        assert results.summary(rows)["nan"] == 4


@pytest.mark.parametrize(
    ("backend", "chosen", "used"),
    [
        ("cpu", None, None),
        ("tpu", None, "highest"),
        ("gpu", None, "highest"),
        ("gpu", "tensorfloat32", "tensorfloat32"),
    ],
)
def test_no_device_cuts_the_factors_of_a_bound(
    tmp_path, monkeypatch, backend, chosen, used
):
    seen = set()

    class Noting(Linear):
        def apply(self, variables, x):
            seen.add(jax.config.jax_default_matmul_precision)
            return super().apply(variables, x)

    net, task = Noting(), poisoned([[1.0, 0.0], [0.0, 0.5]])
    methods = (
        evaluation.certify_method(net, ibp, Linf(0.1)),
        attacking.attack_method(net, PGD, Linf(0.1)),
    )
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with jax.default_matmul_precision(chosen):
        evaluated(task._replace(model=net, methods=methods), tmp_path)
        evaluation.curve(task._replace(model=net, methods=methods), [0.2])
    assert seen == {used}


def constant(task, **fields):
    """The task with a method that answers the same for every example."""

    def judge(weights, eps, keys, xs, labels):
        return {n: jnp.full(len(labels), v) for n, v in fields.items()} | {
            "nan": jnp.zeros(len(labels), bool)
        }

    methods = (*task.methods, Method(judge, 0.1, dict.fromkeys(fields, False)))
    return task._replace(methods=methods)


def test_a_nan_in_one_method_alone_is_counted(tmp_path):
    task = poisoned([[1.0, 0.0], [0.0, 0.5]])
    broken = lambda f: (
        lambda threat, x: jax.tree.map(lambda v: v * jnp.nan, ibp(f)(threat, x))
    )
    method = evaluation.certify_method(Linear(), broken, Linf(0.1))
    rows = evaluated(task._replace(methods=(method, task.methods[1])), tmp_path)
    assert results.summary(rows) | {"intervals": 0, "counts": 0} == {
        "clean": 100.0,
        "robust": 100.0,
        "certified": 0.0,
        "examples": 4,
        "nan": 4,
        "intervals": 0,
        "counts": 0,
    }


def test_a_nan_under_attack_is_not_certified(tmp_path):
    """Even where a bound proves every margin."""
    into_nan = lambda threat: lambda key, f, x, label: x * jnp.nan
    task = poisoned([[1.0, 0.0], [0.0, 0.5]])
    attacked = attacking.attack_method(
        Linear(), attacking.Adversary(into_nan), Linf(0.1)
    )
    for methods in [(task.methods[0], attacked), (attacked, task.methods[0])]:
        rows = evaluated(task._replace(methods=methods), tmp_path)
        (tmp_path / "certificates.jsonl").unlink()
        assert all(row["nan"] and row["margin"] > 0 for row in rows)
        assert not any(row["certified"] or row["robust"] for row in rows)


def test_a_contradiction_is_found(tmp_path):
    task = poisoned([[1.0, 0.0], [0.0, 0.9]])  # the corner (0.4, 0.6) is class 1
    rows = evaluated(task, tmp_path)
    assert results.consistency(rows, comparable=True)["consistent"]
    assert not any(row["robust"] or row["certified"] for row in rows)
    lying = [{**row, "certified": True} for row in rows]
    found = results.consistency(lying, comparable=True)
    assert found == {"consistent": False, "contradictions": [0, 1, 2, 3]}
    assert results.consistency(lying, comparable=False)["consistent"]


def test_an_attack_that_leaves_its_set_is_found(tmp_path):
    task = poisoned([[1.0, 0.0], [0.0, 0.5]])
    cheat = lambda threat: lambda key, f, x, label: x - 0.2
    made = attacking.Adversary(cheat)
    method = attacking.attack_method(Linear(), made, Linf(0.1))
    rows = evaluated(task._replace(methods=(method,)), tmp_path)
    assert not results.consistency(rows, comparable=True)["consistent"]


@pytest.mark.parametrize("name", ["nan", "outside"])
def test_a_flag_of_one_method_is_not_lowered_by_the_next(tmp_path, name):
    def method(**raised):
        def judge(weights, eps, keys, xs, labels):
            fields = {"nan": False, "outside": False} | raised
            return {k: jnp.full(len(labels), v) for k, v in fields.items()}

        return Method(judge, 0.1, {"outside": False})

    task = poisoned([[1.0, 0.0], [0.0, 0.5]])
    methods = (method(), method(**{name: True}), method(), task.methods[0])
    rows = evaluated(task._replace(methods=methods), tmp_path)
    assert all(row[name] for row in rows)


def test_only_correct_examples_are_judged(tmp_path):
    task = poisoned([[0.0, 0.5], [1.0, 0.0]])
    refuse = Method(lambda *_: pytest.fail("judged"), 0.1, {"certified": False})
    rows = evaluated(task._replace(methods=(refuse,)), tmp_path)
    assert [row["correct"] for row in rows] == [False] * 4


def test_other_evaluations_are_checked_against():
    rows = [{"index": 1, "weights": "a", "correct": True, "certified": True}]
    others = [{"index": 1, "weights": "a", "correct": True, "robust": False}]
    both = results.joined(rows, others)
    assert not results.consistency(both, comparable=True)["consistent"]
    for change in ({"weights": "b"}, {"image": "b"}):
        both = results.joined(rows, [others[0] | change])
        assert results.consistency(both, comparable=True)["consistent"]


def test_records_of_earlier_versions_still_refute():
    """They name no image, and are taken for those of the same network."""
    row = {"index": 1, "weights": "a", "correct": True, "certified": True}
    old = [{"index": 1, "weights": "a", "correct": True, "robust": False}]
    both = results.joined([row | {"image": "x"}], old)
    assert not results.consistency(both, comparable=True)["consistent"]


def test_what_either_attack_broke_refutes_a_certificate():
    """A cascade whose own attack failed does not hide what another one found."""
    row = {"index": 1, "weights": "a", "correct": True, "certified": True}
    broken = [{"index": 1, "weights": "a", "correct": True, "robust": False}]
    both = results.joined([row | {"robust": True}], broken)
    assert not results.consistency(both, comparable=True)["consistent"]


def finished_result(folder, *, seed=0, train_seed=0, clean=98.0, eps=8 / 255, **config):
    folder.mkdir(parents=True)
    about = {"dataset": "mnist", "test_eps": eps, "attack_eps": eps, "model": "mlp_x"}
    about |= {"name": "a", "objective": "ibp", "train_eps": eps, "examples": 10}
    about |= {"attack": "PGD-40", "certifier": "IBP", "robust": 90.0, "certified": 80.0}
    about |= {"clean": clean, "seed": train_seed if "run" in config else seed}
    runs.write_json(folder / "result.json", about)
    runs.write_text(folder / "done", "")
    run_ = runs.Run(folder, {"name": "a", "seed": seed} | config, "x", "a", None)
    with runs.opened(run_, fresh=False):
        pass


def test_report_merges_seeds_and_marks_the_best(tmp_path, capsys):
    finished_result(tmp_path / "1", seed=0, clean=98.0)
    finished_result(tmp_path / "2", seed=1, clean=99.0)
    finished_result(tmp_path / "3", seed=0, clean=90.0, epochs=3)
    finished_result(tmp_path / "4", seed=0, clean=50.0, eps=0.3)
    (tmp_path / "5").mkdir()
    runs.write_json(tmp_path / "5/result.json", {"unfinished": True})
    report.main([str(tmp_path)])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert "robust % PGD-40" in head
    assert len(lines) == 3
    text = "\n".join(lines)
    assert "**98.50 ± 0.71**" in text
    assert "| 90.00 |" in text  # not the best at 8/255
    assert "**50.00**" in text  # the only one at 0.3
    assert "| 8/255 |" in text
    report.main([str(tmp_path), "--latex"])
    text = capsys.readouterr().out
    assert r"\textbf{98.50 $\pm$ 0.71}" in text
    assert r"mlp\_x" in text


def test_rows_say_what_they_do_not_share(tmp_path):
    """Norm, held-out data, a choice on the test set; verifiers that differ."""
    for name, changes in {
        "1": {"threat": "Linf"},
        "2": {"threat": "L2", "certifier": "CROWN"},
        "3": {"threat": "Linf", "validation": 0.1},
        "4": {"threat": "Linf", "selection": {"on": "test"}},
    }.items():
        finished_result(tmp_path / name, epochs=name)
        file = tmp_path / name / "result.json"
        runs.write_json(file, runs.read_json(file) | changes)
    text = report.markdown(report.merged(report.results_below([tmp_path])))
    assert "| mnist | L2 8/255 |" in text
    assert "**80.00 (CROWN)**" in text  # the only row of its norm
    assert "**80.00 (IBP)**" in text
    assert "| mnist (held out) | Linf 8/255 |" in text
    assert "| mnist (weights selected on it) |" in text


def test_a_network_that_was_evaluated_twice_is_one_seed(tmp_path):
    for seed in (0, 1):
        trained = tmp_path / str(seed)
        finished_result(trained, seed=seed)
        for again in (0, 1):  # another draw of the test examples
            folder = trained / "certify" / str(again)
            finished_result(folder, seed=again, train_seed=seed, run="r")
    seeds = [
        row.about["seeds"] for row in report.merged(report.results_below([tmp_path]))
    ]
    assert seeds == [2, 2, 2]  # of trainings; never 4 of certifications


def test_report_of_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    assert stopped.value.code == 1
    assert "no finished run" in capsys.readouterr().err


def test_settings_of_another_threat_are_told(trained):
    wanted = judging.finished_training(str(trained), None).settings
    plan = judging.plan_of(dataclasses.replace(wanted, test_eps=3.0))
    with pytest.raises(ConfigError, match="eps must lie"):
        judging.evaluation_of(plan, None)
