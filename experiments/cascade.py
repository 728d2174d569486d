"""Certification by a cascade: cheap methods first, each example until its first answer.

An attack answers with a misclassified point of the threat set, a bound with a proof.
After each stage the examples without an answer are packed into batches of the size that
the next one can hold in memory (`lanes`), the last padded, so that every stage is one
compiled program however many are left.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from certjax.threat import Threat
from certjax.types import Key
from experiments import build, devices
from experiments.build import ConfigError
from experiments.evaluation import (
    Bounds,
    certify_method,
    Examples,
    judge_batch,
    Method,
    Record,
    Weights,
)
from experiments.settings import label_of, Node


ATTACKS = "certjax.attacks."
BOUNDS = ("certjax.bounds.", "certjax.models.")
REFUTING = ("inside", "nearest")  # attacks whose point of one example is in the set
CLEAN, UNDECIDED = "clean", "undecided"
Fields = dict[str, np.ndarray]


class Stage(NamedTuple):
    """One method: its name, what it does, and how many examples it takes at once."""

    name: str
    method: Method
    lanes: int
    attacks: bool


def is_cascade(node: Node) -> bool:
    """Does a certifier's config list stages?"""
    return "stages" in node


def attacks_of(node: Node) -> list[str]:
    """Labels of the stages that attack."""
    stages = node.get("stages", {}).values()
    return [label_of(own) for own in stages if _attacks(own)]


def _attacks(node: Node) -> bool:
    return str(node.get("_target_")).startswith(ATTACKS)


def is_sound(node: Node) -> bool:
    """Does whatever a certifier's config proves hold for the float32 program itself?"""
    bounds = node["stages"].values() if is_cascade(node) else [node]
    return all(own.get("sound", False) for own in bounds if not _attacks(own))


def bounds_of(node: Node, model: nn.Module, *, where: str = "certifier") -> Bounds:
    """The bound transformation of a config; it is told the network if it asks for it.

    Raises:
      ConfigError: no bound, a mistake in its numbers, or one that the network is not
        made for.
    """
    target = str(node.get("_target_"))
    if not target.startswith(BOUNDS):
        raise ConfigError(
            f"`{where}` must name a bound in certjax.bounds, or "
            f"certjax.models.lipschitz_bound, got {target}"
        )
    bounds = build.build({**node, "_partial_": True}, where=where)
    if not build.accepts(bounds, "model"):
        return bounds
    bounds = functools.partial(bounds, model=model)
    with build.blamed(where):
        bounds(lambda x: x)  # refuses a network without a constant
    return bounds


def cascade_method(
    model: nn.Module,
    node: Node,
    threat: Threat,
    attack_method: Callable[[Node, str], Method],
) -> Method:
    """The stages of a config as one method.

    The fields of a record:
      certified: proved by some stage.  nan: of any stage. A NaN under an attack breaks
        the example; one in a bound proves nothing, and a later bound without one may
        certify it.
      robust: no stage broke it.  outside, zero_gradient: of a stage that attacks. All
        three are absent where none does.
      margin: the best lower bound of the margin; NaN where an attack answered first.
      stage: the stage that answered, "clean" for a misclassified example, or
        "undecided".
      seconds_<stage>: the example's share of the time of its batch, compilation
        included; 0 where it did not get there.

    Args:
      model: the network.
      node: config with `stages`: {name: config of an attack or of a bound}.
      threat: the perturbation set.
      attack_method: an attack's config and its key -> method.
    """
    build.check_known("`certifier`", node, ["stages"])
    stages = [
        _stage(name, own, model, threat, attack_method)
        for name, own in node["stages"].items()
    ]
    if all(stage.attacks for stage in stages):
        raise ConfigError("`certifier.stages` proves nothing; name at least one bound")

    def judge(weights: Weights, eps: float, key: Key, examples: Examples) -> Fields:
        board = _Board.of(len(examples.labels), stages)
        for stage in stages:
            run = functools.partial(_run, stage, weights, eps, key)
            board.ask(stage, run, examples)
        return board.fields

    failed: Record = {"certified": False, "margin": math.nan, "stage": CLEAN}
    if any(stage.attacks for stage in stages):
        failed |= {"robust": False, "outside": False, "zero_gradient": False}
    failed |= {f"seconds_{stage.name}": 0.0 for stage in stages}
    return Method(judge, threat.eps, failed, own_batches=True)


def _stage(
    name: str,
    node: Node,
    model: nn.Module,
    threat: Threat,
    attack_method: Callable[[Node, str], Method],
) -> Stage:
    where = f"certifier.stages.{name}"
    if name in (CLEAN, UNDECIDED):
        raise ConfigError(f"`{where}` would be taken for an answer; rename the stage")
    if not isinstance(node, Mapping):
        raise ConfigError(f"`{where}` must name a method by `_target_`, got {node!r}")
    lanes = node.get("lanes", devices.default_batch())
    own = {key: value for key, value in node.items() if key != "lanes"}
    if type(lanes) is not int or lanes < 1:
        raise ConfigError(f"`{where}.lanes` must be at least 1, got {lanes!r}")
    if not _attacks(own):
        bounds = bounds_of(own, model, where=where)
        return Stage(name, certify_method(model, bounds, threat), lanes, False)
    if own.get("result", "inside") not in REFUTING:
        raise ConfigError(
            f"`{where}.result` must be inside or nearest, got {own['result']!r}: only "
            "a point of the threat set, found for one example, refutes a certificate"
        )
    return Stage(name, attack_method(own, where), lanes, True)


def _run(
    stage: Stage, weights: Weights, eps: float, key: Key, rows: Examples
) -> Fields:
    """The fields of one stage for at most as many examples as it has lanes."""
    if stage.method.own_batches:
        return stage.method.judge(weights, eps, key, rows)
    method = stage.method._replace(eps=eps)  # bounds draw nothing: any seed
    batch = devices.divisible(stage.lanes)
    return judge_batch(method, weights, rows, seed=0, batch=batch)


class _Board:
    """What is known of the examples of one batch."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields

    @classmethod
    def of(cls, count: int, stages: list[Stage]) -> "_Board":
        """Nothing is known yet."""
        no, zero = np.zeros(count, bool), np.zeros(count)
        fields = {"certified": no.copy(), "nan": no.copy()}
        fields |= {"margin": np.full(count, np.nan)}
        fields |= {"stage": np.full(count, UNDECIDED, object)}
        fields |= {f"seconds_{stage.name}": zero.copy() for stage in stages}
        if any(stage.attacks for stage in stages):
            fields |= {"robust": ~no, "outside": no.copy(), "zero_gradient": no.copy()}
        return cls(fields)

    def ask(
        self, stage: Stage, run: Callable[[Examples], Fields], examples: Examples
    ) -> None:
        """One stage on all examples without an answer."""
        alive = np.flatnonzero(self.fields["stage"] == UNDECIDED)
        for start in range(0, len(alive), stage.lanes):
            chosen = alive[start : start + stage.lanes]
            rows = Examples(*(array[chosen] for array in examples))
            began = time.monotonic()
            found = run(rows)
            share = (time.monotonic() - began) / len(chosen)
            self.fields[f"seconds_{stage.name}"][chosen] = round(share, 6)
            self.write(stage, chosen, found)

    def write(self, stage: Stage, chosen: np.ndarray, found: Fields) -> None:
        """The answers of a stage; a NaN is remembered, and proves nothing."""
        self.fields["nan"][chosen] |= found["nan"]
        if stage.attacks:
            self.fields["robust"][chosen] = found["robust"]
            self.fields["outside"][chosen] = found["outside"]
            self.fields["zero_gradient"][chosen] |= found["zero_gradient"]
            answered = ~found["robust"]
        else:
            self.fields["certified"][chosen] = found["certified"]
            known = self.fields["margin"][chosen]
            self.fields["margin"][chosen] = np.fmax(known, found["margin"])
            answered = found["certified"]
        self.fields["stage"][chosen[answered]] = stage.name


def totals(node: Node, rows: list[Record]) -> dict[str, dict[str, Any]]:
    """For each stage: examples that came to it, that it answered, and its seconds."""
    names = [CLEAN, *node["stages"]]
    answered = {name: sum(row["stage"] == name for row in rows) for name in names}
    found, left = {}, len(rows)
    for name in names:
        spent = sum(row.get(f"seconds_{name}") or 0.0 for row in rows)
        found[name] = {"examples": left, "answered": answered[name]}
        found[name] |= {"seconds": round(spent, 3)}
        left -= answered[name]
    return found | {UNDECIDED: {"examples": left}}
