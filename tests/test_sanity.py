"""The sanity panel: an honest network passes, one that hides its gradients does not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from runners import numbers, only, run
from targets import digits_params, digits_run

from certjax.models import mlp
from certjax.threat import L1, L2, Linf
from experiments import data, runs, sanity, sanity_checks
from experiments.build import ConfigError
from experiments.sanity_checks import Effort


FEW = Effort(steps=20, few_steps=5, restarts=2, queries=300, noise=20)
SMALL = tuple(f"{name}={value}" for name, value in FEW._asdict().items())
SMALL += ("max=40", "tracking=disabled")
BALL = Linf(0.1)


def honest(params, x):
    return mlp(hidden=(64,)).apply({"params": params}, x)


def saturated(params, x):
    return 1e4 * honest(params, x)


def quantised(params, x):
    return honest(params, jnp.round(4 * x) / 4)


def panel(f, threat=BALL, **more):
    found = data.load("digits")
    xs = jnp.asarray(found.x_test[:60]) / 255.0
    rows = sanity_checks.measurements(
        Partial(f, digits_params()),
        threat,
        jax.random.key(0),
        xs,
        jnp.asarray(found.y_test[:60]),
        effort=FEW,
        **more,
    )
    return {name: measure() for name, measure in rows.items()}


def failed(broken):
    return {c.name for c in sanity_checks.checks(broken, slack=2.0) if not c.passed}


def test_an_honest_network_passes_every_check():
    other = partial(honest, jax.tree.map(lambda w: 1.01 * w, digits_params()))
    broken = panel(honest, surrogates=[other])
    found = sanity_checks.checks(broken, slack=2.0)
    assert {c.name for c in found} == {
        *("steps", "restarts", "one step", "noise", "average", "transfer"),
        *("eps", "black box", "unbounded", "gradients"),
    }
    assert failed(broken) == set()
    assert not broken["clean"].all()
    assert broken["pgd"].sum() > broken["clean"].sum()


@pytest.mark.slow
@pytest.mark.parametrize("threat", [L2(0.5), L1(2.0)])
def test_an_honest_network_passes_in_other_norms(threat):
    assert failed(panel(honest, threat)) == set()


def test_saturated_logits_fail_by_their_gradients_alone():
    """The losses of the attacks do not saturate; the cross-entropy does."""
    assert failed(panel(saturated)) == {"gradients"}


def test_a_quantised_input_fails_where_gradients_are_followed():
    broken = panel(quantised)
    assert {"gradients", "unbounded", "black box"} <= failed(broken)
    assert broken["zero gradient"].all()
    assert not broken["unbounded"].all()


def test_a_rise_of_accuracy_in_eps_fails():
    none, all_ = np.zeros(10, bool), np.ones(10, bool)
    names = ("clean", "zero gradient", "noise", "fgsm", "pgd", "pgd, few steps")
    names += ("pgd, restarts", "apgd", "square", "noisy pgd")
    names += tuple(f"pgd, eps x {f:g}" for f in sanity_checks.FACTORS)
    broken = dict.fromkeys(names, none) | {"unbounded": all_}
    assert failed(broken) == set()
    assert failed(broken | {"pgd, eps x 0.5": all_}) == {"eps"}
    (check,) = (
        c
        for c in sanity_checks.checks(broken | {"pgd, eps x 0.5": all_}, slack=0.0)
        if c.name == "eps"
    )
    assert (check.left, check.right) == (100.0, 0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return digits_run(tmp_path_factory.mktemp("runs"))


def test_the_panel_of_a_run(trained, capsys):
    words = (f"run={trained}", *SMALL)
    run(sanity.work, *words, config="sanity")
    path = only(trained / "sanity")
    result = numbers(path)
    assert result["failed"] == []
    assert result["examples"] == 40
    assert (path / "sanity.png").stat().st_size > 10_000
    assert all(check["left"] <= check["right"] + 1.0 for check in result["checks"])
    rows = runs.read_lines(path / "measurements.jsonl")
    assert len(rows) == len(result["accuracy"]) + 1
    # killed after some measurements: they are not made again, the numbers are the same
    (path / "done").unlink()
    (path / "measurements.jsonl").write_text(
        "".join((path / "measurements.jsonl").read_text().splitlines(True)[:9]) + "{"
    )
    run(sanity.work, *words, config="sanity")
    assert numbers(path) == result
    run(sanity.work, *words, config="sanity")
    assert "finished before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=0", "steps must be at least 1"),
        ("slack=-1.0", "slack must be at least 0"),
        ("threat=l2", "needs its radius"),
        ("attack_eps=8", "eps must lie in"),
        ("attack_eps=ten", "`attack_eps` must be float"),
    ],
)
def test_wrong_numbers_are_refused(trained, word, message):
    with pytest.raises(ConfigError, match=message):
        run(sanity.work, f"run={trained}", word, config="sanity")
