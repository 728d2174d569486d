"""`experiments.attack`: every attack of the config, records, errors, pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runners import composed, CONF, run
from targets import digits_params, digits_run, finished_run

from certjax import attacks
from certjax.models import mlp
from certjax.threat import L2, Linf
from experiments import attack, attacking_record, data, runs


QUICK = ("tracking=disabled", "curve_points=0", "loss_examples=0", "max=40")
WITH = {
    "boundary": ("threat=l2", "attack_eps=0.5"),
    "ddn": ("threat=l2", "attack_eps=0.5"),
    "smoothadv_ddn": ("threat=l2", "attack_eps=0.5", "sigma=0.1"),
    "smoothadv_pgd": ("sigma=0.1",),
    "autoattack_rand": ("sigma=0.1", "draws=4"),
    "ead": ("threat=l1", "attack_eps=2.0"),
}
ALL = sorted(path.stem for path in (CONF / "attack").glob("*.yaml"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return digits_run(tmp_path_factory.mktemp("runs"))


def attacked(trained, *words, fresh=False):
    """Result, records and directory of an attack on the run."""
    words = (f"run={trained}", *QUICK, *words, f"fresh={fresh}")
    config = composed(*words, config="attack")
    run(attack.work, *words, config="attack")
    found = {path.parent for path in (trained / "attack").rglob("done")}
    (path,) = (p for p in found if json_of(p) == plain(config))
    result = runs.read_json(path / "result.json")
    rows = runs.read_lines(path / "certificates.jsonl")
    return result, rows, path


def json_of(path):
    return {k: v for k, v in runs.saved_config(path).items() if k in KEPT}


def plain(config):
    return {k: v for k, v in config.items() if k in KEPT}


KEPT = ("attack", "threat", "max", "skip", "subset", "eval_batch", "sigma", "seed")
KEPT += ("curve_points", "loss_examples", "pictures", "tracking")


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def predicted(images):
    model = mlp(hidden=(64,))
    f = lambda x: model.apply({"params": digits_params()}, x)
    return np.asarray(jax.vmap(f)(jnp.asarray(images))).argmax(axis=1)


def test_what_a_record_says_is_true_of_the_point(trained):
    result, rows, path = attacked(trained, "attack.steps=5", "pictures=40")
    assert result["attack"] == "PGD-5"
    assert "white-box, steps=5" in result["adversary"]
    assert result["robust"] < result["clean"]
    broken = [row for row in rows if row["correct"] and not row["robust"]]
    kept = sorted(int(file.stem) for file in (path / "adversarial").glob("*.npz"))
    assert kept == [row["index"] for row in broken]
    assert not any(row["outside"] for row in rows)
    for row in broken:
        with np.load(path / "adversarial" / f"{row['index']}.npz") as file:
            x, z = file["clean"], file["adversarial"]
        assert Linf(0.1).contains(x, z)
        assert predicted(z[None])[0] == row["becomes"] != row["label"]
        assert np.abs(z - x).max() == pytest.approx(row["distance"], abs=1e-7)
        assert row["changed"] == (z != x).sum()
    assert all(row["distance"] is None for row in rows if row["robust"])
    assert all(row["distance"] == 0.0 for row in rows if not row["correct"])
    assert (path / "adversarial.png").stat().st_size > 10_000


def test_the_nearest_point_decides_and_gives_the_curve(trained):
    words = ("attack=fmn", "attack.steps=20", "curve_points=8")
    result, rows, path = attacked(trained, *words)
    for row in rows:
        assert row["robust"] == (row["correct"] and row["distance"] > 0.1)
    curve = result["robustness"]
    assert curve["robust"][0] == result["clean"]
    assert np.all(np.diff(curve["robust"]) <= 0)
    at = np.searchsorted(curve["eps"], 0.1)
    around = curve["robust"][at - 1], curve["robust"][at]
    assert max(around) >= result["robust"] >= min(around)
    away = sorted(row["distance"] for row in rows)
    assert away[19] == pytest.approx(result["distance"]["median"])
    assert (path / "attack.png").stat().st_size > 10_000


def test_a_cascade_names_what_broke_each_example(trained):
    _, by_pgd, _ = attacked(trained, "attack.steps=5")
    words = ("attack=autoattack",)
    result, rows, _ = attacked(trained, *words)
    causes = {row["broken_by"] for row in rows}
    assert causes <= {None, "clean", "apgd-ce", "apgd-t", "fab-t", "square"}
    for row in rows:
        assert (row["broken_by"] == "clean") == (not row["correct"])
        assert (row["broken_by"] is None) == row["robust"]
    total = sum(result["broken_by"].values()) + result["counts"]["robust"]
    assert total == len(rows)
    for row, other in zip(rows, by_pgd, strict=True):
        assert row["robust"] <= other["robust"]


CASCADE = pytest.param("autoattack", marks=pytest.mark.slow)


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("name", ["apgd", "ddn", CASCADE])
def test_records_do_not_depend_on_the_batch(trained, name, size):
    words = (f"attack={name}", *WITH.get(name, ()), *STEPS.get(name, ()), "max=12")
    _, whole, _ = attacked(trained, *words)
    _, pieces, _ = attacked(trained, *words, f"eval_batch={size}")
    assert timeless(pieces) == timeless(whole)


STEPS = {"apgd": ("attack.steps=10",), "ddn": ("attack.steps=10",)}


@pytest.mark.parametrize("name", ["apgd", CASCADE])
def test_records_do_not_depend_on_the_subset(trained, name):
    words = (f"attack={name}", *STEPS.get(name, ()))
    _, whole, _ = attacked(trained, *words, "max=12")
    _, some, _ = attacked(trained, *words, "skip=3", "max=4")
    known = {row["index"]: row for row in timeless(whole)}
    assert timeless(some) == [known[row["index"]] for row in some]


def test_an_interrupted_attack_continues_to_the_same_records(trained):
    words = ("attack=fmn", "attack.steps=20", "eval_batch=8")
    result, rows, path = attacked(trained, *words)
    file = path / "certificates.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:13]) + lines[13][:20])
    (path / "done").unlink()
    again, others, _ = attacked(trained, *words)
    assert timeless(others) == timeless(rows)
    assert again["distance"] == result["distance"]


def test_transfer_from_itself_is_the_direct_attack(trained):
    direct, _, _ = attacked(trained, "attack=mi_fgsm")
    words = ("attack=transfer", f"attack.surrogates=[{trained}]")
    result, _, _ = attacked(trained, *words)
    assert result["robust"] == pytest.approx(direct["robust"], abs=2.5)
    assert result["attack"] == "MI-FGSM-10 by transfer"
    assert "transfer" in result["adversary"]


def test_transfer_from_a_worse_network_breaks_less(trained, tmp_path):
    params = jax.tree.map(lambda w: w.at[...].set(0.0), digits_params())
    params["logits"]["bias"] = jnp.arange(10.0)
    words = ("model=mlp", "+model.hidden=[64]")
    blind = finished_run(tmp_path, params, *words)
    words = ("attack=transfer", f"attack.surrogates=[{blind}]")
    result, _, _ = attacked(trained, *words)
    assert result["robust"] == result["clean"]


def test_one_perturbation_for_all(trained):
    words = ("attack=universal", "attack.steps=30", "attack_eps=0.3", "pictures=3")
    result, _, path = attacked(trained, *words)
    assert result["robust"] < result["clean"]
    assert result["consistent"]
    deltas = []
    for file in sorted((path / "adversarial").glob("*.npz")):
        with np.load(file) as found:
            deltas.append((found["adversarial"] - found["clean"]).ravel())
    first, second = deltas[:2]
    both = (np.abs(first) > 1e-4) & (np.abs(second) > 1e-4)  # not cut by the domain
    assert np.all(np.sign(first[both]) == np.sign(second[both]))


def test_moved_images_and_patches_are_judged_whatever_eps_is(trained):
    for name in ("patch", "rotation_translation", "corruption"):
        result, rows, _ = attacked(trained, f"attack={name}", *FREE[name])
        assert result["consistent"]
        broken = [row for row in rows if row["correct"] and not row["robust"]]
        assert broken
        assert max(row["distance"] for row in broken) > 0.1


FREE = {
    "patch": ("attack.side=3", "attack.steps=5", "attack.places=2"),
    "rotation_translation": ("attack.angles=5", "attack.shifts=3"),
    "corruption": ("attack.severities=3",),
}


def test_a_smoothed_network_is_judged_by_its_votes(trained):
    words = ("sigma=0.3", "votes=64", "draws=4", "attack.steps=4", "attack_eps=0.05")
    result, _, _ = attacked(trained, *words)
    assert result["sigma"] == 0.3
    assert result["robust"] <= result["clean"]
    plain_result, _, _ = attacked(trained, "attack.steps=4", "attack_eps=0.05")
    assert result["clean"] < plain_result["clean"]  # the network was trained without


def test_queries_stay_within_the_budget(trained):
    result, rows, _ = attacked(trained, "attack=square", "attack.queries=50")
    assert "black-box" in result["adversary"]
    assert "queries=50" in result["adversary"]
    assert result["attack"] == "SQUARE-50"
    assert all(0 <= row.get("queries", 0) <= 50 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attack.goal=targeted"], "Could not override 'attack.goal'"),
        (["+attack.goal=targeted"], "`attack.goal` must be untargeted"),
        (["+attack.result=near"], "`attack.result` must be one of inside, nearest"),
        (["+attack.stpes=3"], "did you mean `steps`"),
        (["attack.steps=ten"], "`attack.steps` must be int"),
        (["attack.steps=0"], "`attack`: steps must be at least 1"),
        (["attack=boundary"], "`attack`: boundary minimises l2"),
        (["attack=patch", "attack.side=20"], "`attack`: a patch of side 20 needs"),
        (["attack=nes", "attack.queries=10"], "`attack`: queries must cover one step"),
        (["attack=transfer"], "`attack.surrogates` must list finished training runs"),
        (["attack=transfer", "attack.surrogates=[/nowhere]"], "is not a run"),
        (["attack=unheard"], "attack/unheard"),
        (["threat=l2"], "another `threat` needs its radius"),
        (["attack_eps=9"], "eps must lie in"),
        (["sigma=-1.0"], "sigma must be at least 0"),
        (["votes=0"], "votes must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(trained, words, message):
    before = set(trained.rglob("*"))
    with pytest.raises(Exception, match=message) as refused:
        run(attack.work, f"run={trained}", *words, config="attack")
    assert "Traceback" not in str(refused.value)
    assert set(trained.rglob("*")) == before


def test_a_network_without_numbers_is_reported(tmp_path, capsys):
    params = jax.tree.map(lambda w: w * jnp.nan, digits_params())
    path = finished_run(tmp_path, params, "model=mlp", "+model.hidden=[64]")
    result, _, _ = attacked(path, "attack=fgsm")
    assert result["nan"] == 40
    assert result["robust"] == result["clean"] == 0
    assert "error: 40 examples met a NaN" in capsys.readouterr().err
    assert any("NaN" in text for text in result["warnings"])


def test_saturated_logits_are_warned_of(tmp_path, capsys):
    params = digits_params()
    params["logits"] = jax.tree.map(lambda w: 1e4 * w, params["logits"])
    path = finished_run(tmp_path, params, "model=mlp", "+model.hidden=[64]")
    result, rows, _ = attacked(path, "attack=fgsm")
    flat = sum(row["zero_gradient"] for row in rows)
    assert flat > 30
    assert f"{flat} of 40 examples have a zero gradient" in capsys.readouterr().err
    assert any("zero gradient" in text for text in result["warnings"])


def test_integers_are_refused_in_words():
    x = jnp.zeros((8, 8, 1), jnp.uint8)
    f = lambda x: jnp.zeros(10) + jnp.sum(x)
    made = [attacks.pgd(Linf(0.1)), attacks.ddn(L2(0.1)), attacks.square(Linf(0.1))]
    for each in made:
        with pytest.raises(TypeError, match=r"floating-point input in \[0, 1\]"):
            each(jax.random.key(0), f, x, 0)
    run = attacks.cascade(attacks.autoattack_stages(Linf(0.1)), Linf(0.1))
    with pytest.raises(TypeError, match=r"floating-point input in \[0, 1\]"):
        run(jax.random.key(0), f, x[None], jnp.zeros(1, int))


def test_the_record_of_an_attack_is_what_it_saw():
    found = data.load("digits")
    xs = jnp.asarray(found.x_test[:8]) / 255.0
    labels = jnp.asarray(found.y_test[:8])
    model = mlp(hidden=(64,))
    f = lambda x: model.apply({"params": digits_params()}, x)
    make = attacks.pgd(Linf(0.1), steps=6, loss=attacks.margin_loss)
    keys = jax.random.split(jax.random.key(1), 8)
    seen = attacking_record.record(make, Linf(0.1), f, keys, xs, labels)
    assert len(seen.loss) == 1 + 6 + 1  # the example, six gradients, the last point
    assert seen.distance[0] == 0
    assert seen.distance.max() <= 0.1 + 1e-6
    assert np.all(np.diff(seen.best) >= 0)
    zs = jax.vmap(make, in_axes=(0, None, 0, 0))(keys, f, xs, labels)
    reached = jax.vmap(lambda z, y: attacks.margin_loss(f(z), y))(zs, labels)
    assert seen.best[-1] == pytest.approx(float(reached.mean()), rel=1e-4)


def test_losses_and_curves_are_in_the_result_and_the_picture(trained):
    words = ("attack.steps=5", "curve_points=4", "curve_examples=20")
    result, _, path = attacked(trained, *words, "loss_examples=8")
    assert result["robustness"]["examples"] == 20
    assert np.all(np.diff(result["robustness"]["robust"]) <= 0)
    assert result["losses"]["examples"] == 8
    assert np.all(np.diff(result["losses"]["best"]) >= 0)
    assert (path / "attack.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_pictures_reach_the_table_of_wandb(trained, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("attack.steps=3", "tracking=offline", "pictures=2")
    _, _, path = attacked(trained, *words)
    (table,) = (path / "wandb").rglob("adversarial*.table.json")
    found = json.loads(table.read_text())
    pictures = {"clean", "perturbation", "adversarial"}
    assert pictures | {"distance"} <= set(found["columns"])
    staged = [file.read_bytes() for file in (path / "wandb").rglob("staging/*")]
    assert sum(content.startswith(b"\x89PNG") for content in staged) == 6


TINY = {"steps": 4, "queries": 400, "searches": 2, "bisections": 2, "samples": 8}
TINY |= {"targets": 2, "angles": 3, "shifts": 3, "places": 1, "tries": 20}
TINY |= {"severities": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_attack_of_the_config_runs(trained, name):
    node = composed(f"attack={name}")["attack"] if name != "transfer" else {}
    words = [f"attack.{key}={value}" for key, value in TINY.items() if key in node]
    words += [f"attack.surrogates=[{trained}]"] if name == "transfer" else []
    more = ("max=8", "curve_points=2", "loss_examples=4")
    result, rows, _ = attacked(
        trained, f"attack={name}", *WITH.get(name, ()), *words, *more
    )
    assert result["consistent"]
    assert result["nan"] == 0
    assert len(rows) == 8
    assert result["robust"] <= result["clean"]


@pytest.mark.slow
def test_records_do_not_depend_on_the_number_of_devices(trained):
    words = ("attack=autoattack", "max=30"), ("attack=fmn", "max=30")
    whole = [timeless(attacked(trained, *each)[1]) for each in words]
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    )
    for each, rows in zip(words, whole, strict=True):
        run = [sys.executable, "-m", "experiments.attack", f"run={trained}"]
        subprocess.run(
            [*run, *QUICK, *each, "fresh=true"],
            check=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"XLA_FLAGS": flags},
        )
        assert timeless(attacked(trained, *each)[1]) == rows
