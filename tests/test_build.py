"""Configs are checked in words before anything of certjax is called."""

import functools
from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf

from certjax.attacks import margin_loss
from certjax.models import ConvNet
from certjax.threat import Linf
from experiments import build
from experiments.build import ConfigError


PGD = {"_target_": "certjax.attacks.pgd", "_partial_": True}


def attack(**numbers):
    return build.build(PGD | numbers, where="attack")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        (" 1 / 3 ", 1 / 3),
        ("-1.5/2", -0.75),
        (".5/2", 0.25),
        ("8/255/2", "8/255/2"),
        ("data/8", "data/8"),
        ("0.3", "0.3"),
        (0.3, 0.3),
        (None, None),
    ],
)
def test_fractions_are_numbers(text, value):
    assert build.number(text) == value


def test_fractions_are_parsed_at_any_depth_and_through_interpolation():
    cfg = OmegaConf.create({"eps": "8/255", "a": {"b": ["1/2", "${eps}"]}})
    assert build.plain(cfg) == {"eps": 8 / 255, "a": {"b": [0.5, 8 / 255]}}


def test_products_of_fractions():
    build.register_resolvers()
    cfg = OmegaConf.create({"eps": "8/255", "step": "${times:${eps},0.25}"})
    assert build.plain(cfg)["step"] == pytest.approx(2 / 255)


@pytest.mark.parametrize(
    ("content", "word"),
    [({"a": "1/0"}, "divide by zero"), ({"a": "???"}, "a"), ({"a": "${b}"}, "b")],
)
def test_configs_that_cannot_be_resolved(content, word):
    with pytest.raises(ConfigError, match=word):
        build.plain(OmegaConf.create(content))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "certjaxy.attacks.pgd",
        "certjax.types.jax.jit",  # reachable through certjax, but not of certjax
        "certjax.attacks.gradient.math.sqrt",
        "certjax.attacks.nothing",
        "certjax.nowhere.pgd",
        "certjax",
        "certjax.__version__",
        None,
        3,
    ],
)
def test_foreign_targets_are_refused(target):
    with pytest.raises(ConfigError, match="_target_"):
        build.build({"_target_": target}, where="attack")


@pytest.mark.parametrize(
    "numbers",
    [
        {"steps": "ten"},
        {"steps": 1.5},
        {"steps": True},
        {"steps": None},
        {"step_size": "small"},
        {"random_start": 1},
        {"goal": "to win"},
        {"steps": [10]},
    ],
)
def test_values_of_the_wrong_type_are_refused(numbers):
    (key,) = numbers
    with pytest.raises(ConfigError, match=rf"`attack\.{key}` must be"):
        attack(**numbers)


@pytest.mark.parametrize(
    "numbers",
    [
        {"steps": 3},
        {"step_size": 1},
        {"step_size": 0.1},
        {"step_size": None},
        {"goal": "targeted"},
    ],
)
def test_values_of_the_right_type_are_bound(numbers):
    made = attack(**numbers)
    assert isinstance(made, functools.partial)
    assert made.keywords == numbers


def test_unknown_keys_are_named_with_their_neighbour():
    with pytest.raises(ConfigError, match=r"unknown key `stpes`.*did you mean `steps`"):
        attack(stpes=3)


def test_missing_keys_and_refused_numbers_are_blamed_on_the_config_key():
    with pytest.raises(ConfigError, match=r"`threat`.*eps"):
        build.build({"_target_": "certjax.threat.Linf"}, where="threat")
    with pytest.raises(ConfigError, match=r"`threat`: eps must lie in \[0, 1\].*3/255"):
        build.build({"_target_": "certjax.threat.Linf", "eps": 3}, where="threat")


def test_nested_targets_are_built():
    loss = {"_target_": "certjax.attacks.margin_loss", "_partial_": True}
    assert attack(loss=loss).keywords["loss"].func is margin_loss
    with pytest.raises(ConfigError, match=r"attack\.loss"):
        attack(loss={"_target_": "os.system"})


def test_given_objects_complete_the_numbers():
    node = {"_target_": "certjax.threat.Linf", "low": 0}
    assert build.build(node, where="threat", eps=0.1) == Linf(0.1)


def test_lists_become_tuples_and_their_elements_are_checked():
    node = {"_target_": "certjax.models.mlp", "hidden": [8, 8]}
    model = build.build(node, where="model")
    assert isinstance(model, ConvNet)
    assert model.hidden == (8, 8)
    with pytest.raises(ConfigError, match=r"model\.hidden"):
        build.build(node | {"hidden": [8, "wide"]}, where="model")


@dataclass(frozen=True)
class Example:
    name: str
    eps: float
    steps: int | None = None

    def __post_init__(self):
        if self.eps < 0:
            raise ValueError(f"eps is {self.eps}")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"name": "a", "eps": 1, "epsilon": 2}, "unknown key `epsilon`"),
        ({"name": "a", "eps": "x"}, "`eps` must be float"),
        ({"name": 3, "eps": 1}, "`name` must be str"),
        ({"name": "a"}, "eps"),
        ({"name": "a", "eps": -1}, "eps is -1"),
        ({"name": "a", "eps": 1, "steps": {"a": 1}}, "`steps` must be int or None"),
    ],
)
def test_settings_are_checked_like_factories(config, word):
    with pytest.raises(ConfigError, match=word):
        build.settings(Example, config)


def test_settings():
    assert build.settings(Example, {"name": "a", "eps": 1}) == Example("a", 1)
