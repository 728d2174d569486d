"""Training steps beside the sum of their parts: `benchmark suite=training`.

The parts are programs of their own, timed in the same turns: a step of natural
training, a step of IBP training (which holds the clean pass that batch normalisation
needs), one forward pass with its input gradient, and the same behind the cut of TAPS.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from certjax import training
from certjax.loops import loopable
from certjax.threat import Linf
from certjax.training.losses import cross_entropy
from certjax.training.segments import split
from certjax.types import Array, Objective
from experiments.suites import Case, Group, Network, network
from experiments.suites_linear import peers_bounds


EPS, STEPS, LATENT = 0.1, 8, 4
CLEAN, GRADIENT, IBP, BEHIND = range(4)  # positions of the parts in a group


def training_suite() -> list[Group]:
    """Every objective on the network of the quick recipes; IBP beside auto_LiRPA."""
    beside = (_peer_group("dm_medium", 100), _peer_group("dm_large", 32))
    return [training_group("cnn4_bn", 128), *(group for group in beside if group)]


def _peer_group(name: str, batch: int) -> Group | None:
    """A step of IBP training; the peer's is the reference."""
    peers = peers_bounds()
    if peers is None:
        return None
    net = network(name, batch)
    peer = Case(
        "IBP step of auto_LiRPA", peers.ibp_training_step(net, EPS), (), host=True
    )
    pure = training.ibp(Linf(EPS), kappa=0.0)  # as the peer: no natural pass
    ours = _step(net, "ibp step", pure, clean=False)._replace(target=0.9)
    return Group(f"{name} batch {batch}", [peer, ours])


def training_group(name: str, batch: int) -> Group:
    """The parts, then the methods."""
    net = network(name, batch)
    threat, ascent = Linf(EPS), partial(training.ascent, steps=STEPS)
    latent = partial(training.ascent, steps=LATENT)
    rows = 9  # margins of ten classes
    box = partial(training.small_box, attack=ascent)
    expressive = {"attack": ascent, "alpha": 0.3}
    attacked, one = {GRADIENT: float(STEPS)}, {IBP: 1.0}
    inside = {BEHIND: float(LATENT * rows)}
    methods: dict[str, tuple[Objective, dict[int, float]]] = {
        f"pgd-{STEPS}": (
            training.adversarial(threat, attack=ascent),
            {CLEAN: 2.0} | attacked,
        ),
        "sabr": (training.sabr(threat, attack=ascent), one | attacked),
        "mtl-ibp": (
            training.mtl_ibp(threat, **expressive),
            one | attacked | {CLEAN: 1.0},
        ),
        "cc-ibp": (
            training.cc_ibp(threat, **expressive),
            one | attacked | {CLEAN: 1.0},
        ),
        "exp-ibp": (
            training.exp_ibp(threat, **expressive),
            one | attacked | {CLEAN: 1.0},
        ),
        "crown-ibp, fused": (
            training.crown_ibp_fused(threat),
            one | {CLEAN: 1.0},
        ),
        "crown-ibp": (training.crown_ibp(threat), one | {CLEAN: float(rows)}),
        "taps": (training.taps(threat, attack=latent), one | inside),
        "staps": (
            training.taps(threat, attack=latent, box=box),
            one | inside | attacked,
        ),
    }
    cases = [
        _step(net, "natural step", training.natural()),
        Case("forward and input gradient", *_gradient(net)),
        _step(net, "ibp step", training.ibp(threat)),
        Case("the same behind the last activation but one", *_latent_gradient(net)),
    ]
    cases += [
        _step(net, text, objective)._replace(parts=tuple(parts.items()), target=1.15)
        for text, (objective, parts) in methods.items()
    ]
    return Group(f"{name} batch {batch}", cases)


def _step(net: Network, text: str, objective: Objective, **how: Any) -> Case:
    optimizer = training.adam(learning_rate=1e-3, clip=10.0)
    state = training.initial_state(net.variables, optimizer)
    recipe = training.unchanging(objective)
    step = training.train_step(net.model, recipe, optimizer, **how)
    return Case(text, step, (state, net.xs, net.labels))


def _gradient(net: Network) -> tuple[Callable, tuple]:
    """One step of an attack on the frozen network."""

    def gradient(variables: Any, xs: Array, labels: Array) -> Array:
        def one(x: Array, y: Array) -> Array:
            f = loopable(net.f(variables), x)
            return jax.value_and_grad(lambda z: cross_entropy(f(z), y))(x)

        return jax.vmap(one)(xs, labels)

    return gradient, (net.variables, net.xs, net.labels)


def _latent_gradient(net: Network) -> tuple[Callable, tuple]:
    """The same for the part of the network that TAPS attacks."""
    first = split(net.f(net.variables), net.xs[0], behind=1)[0]
    latents = jax.jit(jax.vmap(first))(net.xs)

    def gradient(variables: Any, vs: Array, labels: Array) -> Array:
        second = split(net.f(variables), jnp.zeros_like(net.xs[0]), behind=1)[1]

        def one(v: Array, y: Array) -> Array:
            return jax.value_and_grad(lambda z: cross_entropy(second(z), y))(v)

        return jax.vmap(one)(vs, labels)

    return gradient, (net.variables, latents, net.labels)
