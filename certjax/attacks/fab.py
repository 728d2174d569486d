"""Fast adaptive boundary attack: the nearest misclassified point by linearisation.

Source: Croce & Hein 2020, arXiv:1907.02044, algorithm 1.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from certjax.attacks.apgd import ranked_target
from certjax.attacks.geometry import (
    dual_size,
    largest,
    size,
    to_hyperplane,
    total,
)
from certjax.attacks.losses import margin_loss, reached
from certjax.attacks.search import (
    at_random,
    check_counts,
    guarded,
    judge,
    keep,
    radius,
    repeat,
    unit,
)
from certjax.threat import Box, L1, L2, Linf, Threat
from certjax.types import Array, Attack, Classifier, Key


OVERSHOOT = 1.05  # eta
PULL_BACK = 0.9  # beta
PULL_TO_CLEAN = 0.1  # alpha_max


def fab(
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    rank: Array | int | None = None,
    early_exit: bool = False,
) -> Attack:
    """FAB within a threat set: the nearest boundary point if it lies in the set.

    Args:
      threat: Linf, L2 or L1; its norm is minimised.
      steps: linearisations of one restart; one forward more each, and one backward
        pass per class where untargeted.
      restarts: the first starts at x, the others at random points of the set.
      rank: None: at each step towards the nearest of all linearised boundaries; else
        towards the wrong class of that rank at x, 0 the most likely one (FAB-T is
        `targeted_sweep` over ranks). It may be traced.
      early_exit: stop at the first misclassified point inside the set.
    """
    nearest = _nearest(_plan(threat, steps, early_exit=early_exit), restarts, rank)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        at = judge(at_random(f, key), label, margin_loss, "untargeted")
        z = threat.project(x, nearest(key, f, x, label).z)
        return keep(at(threat.project(x, x)), at(z)).z

    return guarded(attack)


def fab_minimum(
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    rank: Array | int | None = None,
) -> Attack:
    """FAB as a minimum-norm attack: the nearest misclassified point that it finds.

    Args:
      threat: names norm and domain; its eps is the radius of the random restarts.
      steps: linearisations of one restart.
      restarts: the first starts at x, the others at random.
      rank: None or the rank of the target, as in `fab`.

    Returns:
      attack(key, f, x, label) -> z in the domain; x itself where nothing was found.
    """
    nearest = _nearest(_plan(threat, steps, early_exit=False), restarts, rank)
    return guarded(lambda key, f, x, label: nearest(key, f, x, label).z)


class _Nearest(NamedTuple):
    """z: the nearest misclassified point; x and an infinite distance before any."""

    z: Array
    distance: Array


class _Plan(NamedTuple):
    threat: Linf | L2 | L1
    steps: int
    early_exit: bool

    def stop(self, best: _Nearest) -> Array:
        return self.early_exit & (
            best.distance <= jnp.max(jnp.asarray(self.threat.eps))
        )


def _plan(threat: Threat, steps: int, *, early_exit: bool) -> _Plan:
    check_counts(steps=steps)
    if isinstance(threat, Box):
        raise TypeError("fab minimises a norm: it needs Linf, L2 or L1, got Box")
    return _Plan(threat, steps, early_exit)


def _nearest(
    plan: _Plan, restarts: int, rank: Array | int | None
) -> Callable[[Key, Classifier, Array, Array], _Nearest]:
    check_counts(restarts=restarts)

    def search(key: Key, f: Classifier, x: Array, label: Array) -> _Nearest:
        f = at_random(f, key)
        logits = f(x)
        plane = _all_planes
        if rank is not None:
            plane = functools.partial(_one_plane, ranked_target(logits, label, rank))
        plane_at = functools.partial(plane, f, label)
        distance = jnp.where(reached(logits, label), 0.0, jnp.inf)

        def run(i: Array, best: _Nearest) -> _Nearest:
            start = _start(plan.threat, jax.random.fold_in(key, i), x, i > 0)
            return _run(plan, plane_at, f, x, label, start, best)

        best = _Nearest(x, distance.astype(x.dtype))
        stop = plan.stop if plan.early_exit else None
        return repeat(restarts, run, best, stop)

    return search


def _start(threat: Threat, key: Key, x: Array, at_random: Array) -> Array:
    """x, or half a radius away from it in a random direction."""
    draw = jax.random.uniform if isinstance(threat, Linf) else jax.random.normal
    t = draw(key, x.shape, x.dtype)
    t = 2.0 * t - 1.0 if isinstance(threat, Linf) else t
    away = x + 0.5 * radius(threat, x) * t / size(type(threat), t)
    return jnp.where(at_random, jnp.clip(away, threat.low, threat.high), x)


class _Plane(NamedTuple):
    """The linearised boundary {z : <normal, z> = offset}; `gap` at the iterate."""

    normal: Array
    gap: Array


def _one_plane(
    target: Array,
    f: Classifier,
    label: Array,
    norm: type,  # noqa: ARG001
    z: Array,
) -> _Plane:
    def difference(z: Array) -> Array:
        logits = f(z)
        return logits[target] - logits[label]

    gap, normal = jax.value_and_grad(difference)(z)
    return _Plane(jnp.nan_to_num(normal), jnp.nan_to_num(gap))


def _all_planes(f: Classifier, label: Array, norm: type, z: Array) -> _Plane:
    """The nearest of the K - 1 linearised boundaries."""
    logits, pull = jax.vjp(f, z)
    classes = logits.shape[0]
    seeds = jnp.eye(classes) - jax.nn.one_hot(label, classes)[None]
    normals = jnp.nan_to_num(jax.vmap(lambda seed: pull(seed)[0])(seeds))
    gaps = jnp.nan_to_num(logits - logits[label])
    lengths = jax.vmap(functools.partial(dual_size, norm))(normals)
    distance = jnp.abs(gaps) / (1e-12 + lengths)
    nearest = jnp.argmin(jnp.where(jnp.arange(classes) == label, jnp.inf, distance))
    return _Plane(normals[nearest], gaps[nearest])


def _run(
    plan: _Plan,
    plane_at: Callable[[type, Array], _Plane],
    f: Classifier,
    x: Array,
    label: Array,
    start: Array,
    best: _Nearest,
) -> _Nearest:
    threat, norm = plan.threat, type(plan.threat)

    def step(_: int, state: tuple[Array, _Nearest]) -> tuple[Array, _Nearest]:
        z, best = state
        z = _towards(threat, plane_at(norm, z), x, z)
        fooled = reached(f(z), label)
        distance = size(norm, z - x)
        closer = fooled & (distance < best.distance)
        best = _Nearest(
            jnp.where(closer, z, best.z), jnp.where(closer, distance, best.distance)
        )
        return jnp.where(fooled, x + PULL_BACK * (z - x), z), best

    stop = (lambda state: plan.stop(state[1])) if plan.early_exit else None
    return repeat(plan.steps, step, (start, best), stop)[1]


def _towards(threat: Threat, plane: _Plane, x: Array, z: Array) -> Array:
    """Past the plane, from a mixture of the steps from z and from x."""
    norm = type(threat)
    # a rescaled plane is the same plane: unit() keeps the squares in range
    scale = largest(plane.normal)
    safe = jnp.where(scale > 0, scale, 1.0)
    normal = unit(plane.normal)
    offset = total(normal * z) - plane.gap / safe
    offset = jnp.where(scale > 0, offset, 0.0)
    step = lambda at: to_hyperplane(norm, at, normal, offset, threat.low, threat.high)
    from_z, from_x = jax.vmap(step)(jnp.stack([z, x]))  # one loop for both
    near = jnp.maximum(size(norm, from_z), 1e-8)
    far = jnp.maximum(size(norm, from_x), 1e-8)
    mix = jnp.minimum(near / (near + far), PULL_TO_CLEAN)
    moved = (1 - mix) * (z + OVERSHOOT * from_z) + mix * (x + OVERSHOOT * from_x)
    return jnp.clip(moved, threat.low, threat.high)
