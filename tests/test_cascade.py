"""The cascade of certifiers: the same answers as its stages alone, stopped early."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runners import numbers, only, run, SMALL

from certjax import models
from certjax.threat import L2
from experiments import certify, runs, train
from experiments.build import ConfigError
from experiments.cascade import cascade_method
from experiments.evaluation import Examples, judge_batch, Method, Weights


FIRST = "max=60"
BOUNDS = ("ibp", "crown_ibp", "crown", "alpha_crown")


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
        assert row["certified"] == (row["stage"] in BOUNDS)
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


def test_without_an_attack_nothing_is_said_of_robustness(trained):
    words = ("certifier=cascade", "~certifier.stages.pgd", "~certifier.stages.crown")
    words += ("~certifier.stages.alpha_crown",)
    result, rows, _ = certified(trained, *words)
    assert "robust" not in result
    assert not any("robust" in row for row in rows)


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
    ("sound", "arithmetic"), [(BOUNDS[:2], "float32"), (BOUNDS[1:2], "real")]
)
def test_it_holds_in_float32_if_all_its_bounds_do(trained, sound, arithmetic):
    words = [f"~certifier.stages.{name}" for name in BOUNDS[2:]]
    words += [f"+certifier.stages.{name}.sound=true" for name in sound]
    words += ["certifier=cascade", "certifier.stages.pgd.steps=3", "max=4"]
    result, _, _ = certified(trained, *words)
    assert result["arithmetic"] == arithmetic
    assert ("in float32" in result["certifier"]) == (arithmetic == "float32")


def test_a_stage_is_told_the_network_and_has_any_number_of_lanes(monkeypatch):
    run_alone = judge_batch

    def judged(*arguments, batch, **numbers):
        assert batch == 8  # 5 lanes on 8 devices
        return run_alone(*arguments, batch=batch, **numbers)

    monkeypatch.setattr("experiments.devices.divisible", lambda size: -(-size // 8) * 8)
    monkeypatch.setattr("experiments.cascade.judge_batch", judged)
    net = models.aol_cnn(classes=3, width=4, depth=1, stages=1, hidden=())
    xs = np.asarray(jax.random.uniform(jax.random.key(0), (7, 4, 4, 2)))
    variables = net.init(jax.random.key(1), xs[0])
    labels = np.asarray(jax.vmap(lambda x: net.apply(variables, x).argmax())(xs))
    stages = {"lip": {"_target_": "certjax.models.lipschitz_bound", "lanes": 5}}
    method = cascade_method(net, {"stages": stages}, L2(0.01), NotImplemented)
    weights = Weights(variables["params"], {})
    rows = Examples(xs, labels, np.arange(7))
    found = method.judge(weights, 0.01, jax.random.key(2), rows)
    logits = jnp.sort(jax.vmap(lambda x: net.apply(variables, x))(xs))
    proved = logits[:, -1] - logits[:, -2] - 0.01 * net.lipschitz.margin
    np.testing.assert_allclose(found["margin"], proved, atol=1e-5)
    assert (found["certified"] == (found["margin"] > 0)).all()


def canned(**fields):
    """A method that answers the same for every example."""

    def judge(weights, eps, key, rows):
        known = {"nan": False, "outside": False, "margin": 1.0, "zero_gradient": False}
        found = known | fields
        return {name: np.full(len(rows.labels), v) for name, v in found.items()}

    return Method(judge, 0.1, {}, own_batches=True)


def answers(monkeypatch, attack, *bounds):
    """The fields of one example that an attack and then the bounds have judged."""
    waiting = iter(bounds)
    monkeypatch.setattr("experiments.cascade.bounds_of", lambda *_, **__: None)
    monkeypatch.setattr(
        "experiments.cascade.certify_method", lambda *_, **__: next(waiting)
    )
    stages = {"pgd": {"_target_": "certjax.attacks.pgd"}}
    stages |= {f"b{i}": {"_target_": "certjax.bounds.ibp"} for i in range(len(bounds))}
    method = cascade_method(
        None, {"stages": stages}, L2(0.1), lambda node, where: attack
    )
    rows = Examples(np.zeros((1, 2)), np.zeros(1, int), np.arange(1))
    found = method.judge(None, 0.1, jax.random.key(0), rows)
    assert method.failed.keys() | {"nan"} == found.keys()
    return {name: values[0] for name, values in found.items()}


NAN = canned(certified=False, nan=True, margin=np.nan)
PROOF = canned(certified=True)


def test_a_nan_in_a_bound_proves_nothing_and_a_later_bound_may(monkeypatch):
    survived = canned(robust=True)
    found = answers(monkeypatch, survived, NAN, PROOF)
    assert (found["certified"], found["robust"], found["nan"]) == (True,) * 3
    assert found["stage"] == "b1"
    found = answers(monkeypatch, survived, NAN, NAN)
    assert (found["certified"], found["robust"], found["nan"]) == (False, True, True)


def test_a_nan_under_attack_is_the_last_answer(monkeypatch):
    found = answers(monkeypatch, canned(robust=False, nan=True), PROOF)
    assert (found["certified"], found["robust"], found["nan"]) == (False, False, True)
    assert found["stage"] == "pgd"


def test_masked_gradients_are_remembered(monkeypatch):
    for flat in (True, False):
        attack = canned(robust=True, zero_gradient=flat)
        assert answers(monkeypatch, attack, PROOF)["zero_gradient"] == flat


def test_a_cascade_warns_of_masked_gradients(trained, monkeypatch):
    blind = lambda f, x, label: jnp.asarray(True)
    monkeypatch.setattr("experiments.attacking.vanishes", blind)
    words = [f"~certifier.stages.{name}" for name in BOUNDS[1:]]
    words += ["certifier=cascade", "certifier.stages.pgd.steps=2", "max=8"]
    result, rows, _ = certified(trained, *words)
    flat = sum(row["zero_gradient"] for row in rows)
    assert flat == sum(row["correct"] for row in rows)
    assert f"{flat} of 8 examples have a zero gradient" in result["warnings"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["certifier.stages.ibp.lanes=0"], "lanes"),
        (["certifier.stages.crown_ibp.intermediate=1"], "crown_ibp.intermediate"),
        (["certifier.stages.pgd.steps=0"], r"`certifier\.stages\.pgd`: steps must be"),
        (["certifier.stages.pgd._target_=os.system"], "certjax"),
        (["+certifier.stages.pgd.result=free"], "pgd.result` must be inside"),
        (["+certifier.stages.pgd.result=shared"], "pgd.result` must be inside"),
        (["+certifier.stages.clean._target_=certjax.bounds.ibp"], "rename the stage"),
        (["+certifier.stages.undecided._target_=certjax.bounds.ibp"], "rename"),
        (["+certifier.sound=true"], "unknown key `sound` in `certifier`"),
        (["+certifier.stages.last._target_=certjax.smoothing.certify"], "name a bound"),
        (["+certifier.stages.last._target_=certjax.models.lipschitz_bound"], "no Lips"),
        ([f"~certifier.stages.{name}" for name in BOUNDS], "proves nothing"),
    ],
)
def test_mistakes_name_the_stage(trained, words, message):
    place = (f"run={trained}", "tracking=disabled", FIRST, "certifier=cascade")
    with pytest.raises(ConfigError, match=message):
        run(certify.work, *place, *words, config="certify")
