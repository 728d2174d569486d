"""Linear bounds: beside auto_LiRPA where it is importable, and sound beside plain."""

from collections.abc import Callable
from typing import Any

import jax

from certjax import bounds
from certjax.threat import Linf
from certjax.types import Array, Interval, PyTree
from experiments.console import warn
from experiments.suites import Case, Group, Network, network


EPS = 0.01


def linear_groups() -> list[Group]:
    """The measurements of "what it must reach", one group for each method."""
    crown_ibp = lambda f, **how: bounds.crown(f, "ibp", **how)
    return [
        _group("dm_small", 128, crown_ibp, "CROWN-IBP", 0.6),
        _group("dm_small", 16, bounds.crown, "CROWN", 0.4),
        _group("dm_medium", 4, bounds.crown, "CROWN", 0.5),
        _group("dm_small", 4, bounds.alpha_crown, "alpha-CROWN", None, alpha=True),
    ]


def _group(
    name: str,
    batch: int,
    method: Callable,
    label: str,
    target: float | None,
    *,
    alpha: bool = False,
) -> Group:
    """A method; the peer's, if there is one, as the reference; the sound variant."""
    net = network(name, batch)

    def case(label: str, how: dict, target: float | None, **relation: Any) -> Case:
        def bound(variables: PyTree, xs: Array) -> Interval:
            of_one = method(net.f(variables), **how)
            return jax.vmap(lambda x: of_one(Linf(EPS), x))(xs)

        return Case(label, bound, (net.variables, net.xs), target=target, **relation)

    cases = _peer(net, label)
    plain = len(cases)
    cases.append(case(label, {}, target if plain else None))
    if alpha:
        moving = f"{label}, optimised intermediate bounds"
        cases.append(case(moving, {"intermediate": "alpha"}, 0.4 if plain else None))
    sound = {"parts": ((plain, 1.0),)}
    cases.append(case(f"{label}, sound=True", {"sound": True}, 2.0, **sound))
    return Group(f"{name} batch {batch}", cases)


def _peer(net: Network, label: str) -> list[Case]:
    peers = peers_bounds()
    if peers is None:
        return []
    run = peers.auto_lirpa(net, label, EPS)
    return [Case(f"{label} of auto_LiRPA", run, (), host=True)]


def peers_bounds() -> Any:
    """The module of that name where torch and auto_LiRPA are installed, or None."""
    try:
        from experiments import peers_bounds
    except ImportError as error:
        warn(f"auto_LiRPA is not compared with: {error}")
        return None
    return peers_bounds
