"""Every experiment and every choice of a config group composes and can be built."""

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from certjax.threat import L1, L2, Linf
from experiments import attacking, build, settings


CONF = Path(__file__).resolve().parents[1] / "conf"
SHAPES = {"digits": (8, 8, 1), "tinyimagenet": (64, 64, 3)}
SHAPES |= dict.fromkeys(("mnist", "fashion_mnist"), (28, 28, 1))
SHAPES |= dict.fromkeys(("cifar10", "cifar100", "svhn"), (32, 32, 3))


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str, config: str = "train") -> dict:
    build.register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build.plain(compose(config, list(overrides)))


def check_can_be_built(config: dict) -> settings.TrainSettings:
    """All objects of a config, from shapes alone: no data file is read."""
    wanted = settings.read(settings.TrainSettings, config)
    clock = settings.Clock.of(wanted.schedule, range(50_000))
    image = np.zeros(SHAPES[wanted.data.name], np.uint8)
    settings.check_fits(settings.model_of(wanted.model), image)
    settings.optimizer_of(wanted.optimizer, clock)
    settings.regularizer_of(wanted, clock)
    settings.recipe_of(wanted, clock)(0)
    for eps in (wanted.test_eps, wanted.train_eps, wanted.attack_eps):
        threat = settings.threat_of(wanted.threat, eps)
        if wanted.attack is not None:
            attacking.adversary_of(wanted.attack, load=str).make(threat=threat)
    if wanted.certifier is not None:
        build.build(wanted.certifier, where="certifier")
    return wanted


@pytest.mark.parametrize("name", names("experiment"))
def test_experiment_can_be_built_and_says_what_to_expect(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ")
    for word in (
        "Expected:",
        "Time:",
        f"Command:  python -m experiments.train experiment={name}",
    ):
        assert f"# {word}" in text
    config = composed(f"experiment={name}")
    assert config["name"] == name
    assert {"test_eps", "train_eps", "attack_eps"} <= set(config)
    check_can_be_built(config)


@pytest.mark.parametrize(
    "override",
    [
        f"{group}={name}"
        for group in ("data", "threat", "objective", "optimizer", "schedule")
        for name in names(group)
    ],
)
def test_every_choice_can_be_built(override):
    check_can_be_built(composed(override))


@pytest.mark.parametrize("name", names("attack"))
def test_every_attack_can_be_built(name):
    """For the norm of the config, or for the one whose distance it minimises."""
    words = ("+attack.surrogates=[x]",) if name == "transfer" else ()
    node = composed(f"attack={name}", *words)["attack"]
    adversary = attacking.adversary_of(node, load=str)
    refused = []
    for threat in (Linf(0.1), L2(0.1), L1(0.1)):
        try:
            adversary.make(threat=threat)
        except TypeError as error:
            refused.append(str(error))
    assert len(refused) < 3
    assert all("got" in text for text in refused)


@pytest.mark.parametrize("name", names("model"))
def test_every_model_takes_the_images_of_mnist(name):
    check_can_be_built(composed("data=mnist", f"model={name}"))


@pytest.mark.parametrize("mode", ["offline", "online", "disabled"])
def test_tracking_modes(mode):
    config = composed(f"tracking={mode}")
    assert settings.read(settings.TrainSettings, config).tracking.mode == mode


@pytest.mark.parametrize("name", names("sweep"))
def test_sweeps_start_a_multirun(name):
    build.register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"sweep={name}"], return_hydra_config=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert cfg.hydra.sweeper.params


def test_the_published_recipes_of_ctbench_keep_their_numbers():
    """Spot checks against the scripts of the paper (robust weight 0.7 is kappa 0.3)."""
    config = composed("experiment=ctbench_ibp_mnist_0.1")
    assert config["objective"]["kappa"] == pytest.approx(0.3)
    assert config["train_eps"] == pytest.approx(2 * config["test_eps"])
    wanted = check_can_be_built(composed("experiment=ctbench_ibp_cifar10_2_255"))
    assert wanted.test_eps == 2 / 255
    clock = settings.Clock(wanted.schedule, 390)
    eps = clock.eps(wanted.train_eps)
    assert float(eps(390)) == 0.0
    assert float(eps(81 * 390)) == pytest.approx(2 / 255)
    rate = clock.learning_rate(5e-4)
    assert float(rate(141 * 390)) == pytest.approx(5e-4 * 0.04)


@pytest.mark.parametrize("config", ["certify", "attack"])
def test_other_entry_points_compose(config):
    assert composed("run=somewhere", config=config)["run"] == "somewhere"
