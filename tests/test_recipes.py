"""Every experiment file still trains: on the digits, with a tiny network."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from runners import composed, only

from certjax import training
from experiments import data, runs, settings, train
from experiments.cli import Launch


CONF = Path(__file__).resolve().parents[1] / "conf"
NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
LIPSCHITZ = {"width": 4, "depth": 1, "stages": 1, "hidden": []}
TINY = {  # networks whose kind the objective or the certificate depends on
    "aol_cnn": LIPSCHITZ,
    "sll_cnn": LIPSCHITZ,
    "linf_distance_net": {"hidden": [4]},
    "sortnet": {"hidden": [4]},
}
SIZES = {"pixels": 64, "keep": 8, "width": 2}  # of what a noise shows of a digit


def shrunk(name: str) -> dict:
    """The experiment's config with everything that costs time made small."""
    config = composed(f"experiment={name}")
    digits = composed("data=digits")
    config["data"] = digits["data"]
    config["model"] = tiny_model(config)
    for key, value in {"epochs": 1, "batch": 32, "warm": 0, "drops": [0.5]}.items():
        config["schedule"][key] = value
    config["schedule"]["ramp"] = min(config["schedule"]["ramp"], 0.3)
    if config["schedule"].get("average") is not None:
        config["schedule"]["average"] = 0.6
    objective = config["objective"]
    for spans in (objective.get("ramps") or {},):
        objective["ramps"] = {path: [0, 0.3] for path in spans}
    few_steps(objective["loss"])
    small_noise(objective["loss"].get("noise", {}))
    return (
        config | {"curve_points": 0, "max": 8, "eval_batch": 8} | small_judges(config)
    )


def tiny_model(config: dict) -> dict:
    kind = config["model"]["_target_"].rpartition(".")[2]
    node = {"_target_": "certjax.models.mlp", "classes": 10}
    if kind in TINY:
        return node | {"_target_": config["model"]["_target_"]} | TINY[kind]
    if kind in {"Ablated", "ablated_cnn"}:
        network = node | {"hidden": [8]}
        return {"_target_": "certjax.models.Ablated", "network": network}
    behind = config["objective"]["loss"].get("behind", 0)
    return node | {"hidden": [8] * (behind + 1), "batch_norm": "bn" in kind}


def few_steps(node: dict) -> None:
    for key, value in node.items():
        if isinstance(value, dict):
            few_steps(value)
        elif key in ("steps", "restarts", "draws"):
            node[key] = min(value, 2)


def small_noise(node: dict) -> None:
    """Whole numbers only: a `keep` below 1 is a probability."""
    for key in SIZES.keys() & node.keys():
        node[key] = min(node[key], SIZES[key])


def votes_of(folder: Path) -> str:
    """A certification of the training digits, every vote for the label."""
    labels = data.load("digits").y_train.tolist()
    counts = 100 * np.eye(10, dtype=int)[labels]
    runs.append_lines(
        folder / "certificates.jsonl",
        [
            {"index": i, "split": "train", "n": 100, "counts": row}
            for i, row in enumerate(counts.tolist())
        ],
    )
    return str(folder)


def small_judges(config: dict) -> dict:
    attack = config.get("attack")
    return {"attack": attack and attack | {"steps": 2}}


def kind(name: str) -> tuple:
    """What decides the program of a step, numbers aside; read from the text."""
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    chosen = dict(re.findall(r"override /(\w+): (\w+)", text))
    model = chosen["model"] if chosen["model"] in TINY else "mlp"
    shrink = "shrink:" in text and chosen["objective"] == "sabr"
    return chosen["objective"], model, shrink


KINDS = {kind(name): name for name in reversed(NAMES)}  # the first name of each kind
# their programs are compiled by the tests of smoothing and of Lipschitz networks
ELSEWHERE = ("smoothing_", "sll_", "sortnet_")
STEPPED = sorted(n for n in KINDS.values() if not n.startswith(ELSEWHERE))


@pytest.fixture
def quick_to_compile():
    """Compile as little as possible: every program runs twice only."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("name", STEPPED)
def test_two_steps_of_a_recipe_of_each_kind(name):
    job = train.prepared(settings.read(settings.TrainSettings, shrunk(name)))
    batch = train.batches(job.train, job.settings)
    x = np.float32(job.train.images[0]) / 255
    variables = jax.jit(job.initialize)(jax.random.key(0), x)
    state = training.initial_state(variables, job.optimizer)
    for step in range(2):
        state, metrics = job.step(state, *batch(step))
        assert metrics["finite"], {n: float(v) for n, v in metrics.items()}
    assert state.step == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_from_its_start_to_its_result(name, tmp_path):
    config = shrunk(name) | {"tracking": composed("tracking=disabled")["tracking"]}
    config["paths"] = {"runs": str(tmp_path)}
    if "catrs" in name:
        config["objective"]["votes"] = votes_of(tmp_path)
    train.work(config, Launch((), None))
    result = runs.read_json(only(tmp_path) / "result.json")
    assert result["examples"] == 8
    assert result["consistent"]


def test_missing_data_are_named_with_their_files(tmp_path):
    config = composed("experiment=ctbench_sabr_mnist_0.1", f"data.dir={tmp_path}")
    with pytest.raises(data.DataError, match=r"mnist\.npz") as caught:
        train.work(config, Launch((), None))
    assert str(tmp_path) in str(caught.value)
