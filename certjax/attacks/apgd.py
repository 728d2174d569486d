"""Auto-PGD: projected gradient ascent that chooses its own step size.

Source: Croce & Hein 2020, arXiv:2003.01690, algorithm 1; for l1, Croce & Hein 2021,
arXiv:2103.01208, with its schedule of three shrinking radii.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from certjax.attacks.geometry import into_l1_box
from certjax.attacks.losses import dlr_towards, Goal, log_odds, Loss
from certjax.attacks.search import (
    at_random,
    check_counts,
    choose,
    guarded,
    judge,
    Judged,
    keep,
    radius,
    repeat,
    Slope,
    slope,
    unit,
)
from certjax.loops import fori
from certjax.threat import L1, L2, Linf, Threat
from certjax.types import Array, Attack, Classifier, Key


Aim: TypeAlias = Callable[[Key], Slope]

L1_RADII = (3.0, 2.0, 1.0)  # in units of eps, one after the other
L1_SHARES = (0.3, 0.3, 0.4)  # of the steps


def apgd(
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    loss: Loss = log_odds,
    rho: float = 0.75,
    goal: Goal = "untargeted",
    early_exit: bool = False,
) -> Attack:
    """Auto-PGD on any loss; in l1 its sparse variant.

    Args:
      threat: the perturbation set.
      steps: gradient evaluations of one restart after the first; may be traced in
        linf and l2, where another number of steps then needs no compilation.
      restarts: independent random starts.
      loss: `loss(logits, label)`, ascended: `log_odds` (in its steps the same
        as cross-entropy), `dlr`, `margin_loss`, ..
      rho: share of rising steps below which the step is halved at a checkpoint.
      goal: "targeted": `label` is the class to reach, and the loss is descended.
      early_exit: stop at the first point that reaches the goal instead of looking
        for a higher loss.

    Returns:
      attack(key, f, x, label) -> z, costing restarts * (steps + 1) gradients.
    """
    check_counts(steps=steps, restarts=restarts)
    plan = _Plan(threat, steps, rho, early_exit)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        aim = functools.partial(_slope_at, f, label, loss, goal)

        def restart(i: Array, found: Judged) -> Judged:
            return _run(plan, jax.random.fold_in(key, i), aim, x, found)

        clean = judge(at_random(f, key), label, loss, goal)(threat.project(x, x))
        return repeat(restarts, restart, clean, plan.stop).z

    return guarded(attack)


def apgd_towards(
    threat: Threat,
    rank: Array | int,
    *,
    steps: int = 100,
    loss_towards: Callable[[Array], Loss] = dlr_towards,
    early_exit: bool = False,
) -> Attack:
    """APGD towards the wrong class that is `rank`-th most likely at x, from 0.

    Untargeted in its goal: any misclassification counts. `rank` may be traced.

    Args:
      threat: the perturbation set.
      rank: of the target among the wrong classes.
      steps: gradient evaluations after the first.
      loss_towards: `target -> loss`; the targeted DLR needs four classes.
      early_exit: stop at the first misclassified point.
    """
    check_counts(steps=steps)
    plan = _Plan(threat, steps, 0.75, early_exit)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        logits = at_random(f, key)(x)
        loss = loss_towards(ranked_target(logits, label, rank))
        aim = functools.partial(_slope_at, f, label, loss, "untargeted")
        clean = judge(at_random(f, key), label, loss, "untargeted")
        found = clean(threat.project(x, x))
        # the loop does nothing where early_exit finds x misclassified already
        once = lambda _, found: _run(plan, key, aim, x, found)
        return repeat(1, once, found, plan.stop).z

    return guarded(attack)


def ranked_target(logits: Array, label: Array, rank: Array) -> Array:
    """[] int: the wrong class of the given rank, 0 the most likely one."""
    others = jnp.where(jnp.arange(logits.shape[0]) == label, -jnp.inf, logits)
    return jnp.argsort(-others)[rank]


class _Plan(NamedTuple):
    threat: Threat
    steps: int
    rho: float
    early_exit: bool

    @property
    def stop(self) -> Callable[[Judged], Array] | None:
        return (lambda found: found.fooled) if self.early_exit else None


class _Climb(NamedTuple):
    """What a run carries from step to step.

    z, before: the iterate and the one before it.  g, last: gradient and loss at z.
    peak, g_peak: the point of highest loss of this run and its gradient.
    found: the result so far, over all runs.
    """

    z: Array
    before: Array
    g: Array
    last: Array
    peak: Judged
    g_peak: Array
    found: Judged


def _slope_at(f: Classifier, label: Array, loss: Loss, goal: Goal, key: Key) -> Slope:
    return slope(at_random(f, key), label, loss, goal)


def _begin(start: Array, at: Slope, found: Judged, counts: Array | bool) -> _Climb:
    here, g = at(start)
    found = choose(jnp.asarray(counts), keep(found, here), found)
    return _Climb(start, start, g, here.loss, here, g, found)


def _moved(climb: _Climb, z: Array, at: Slope, counts: Array | bool) -> _Climb:
    """The climb after its next iterate; `counts`: may it become the result?"""
    here, g = at(z)
    higher = here.loss > climb.peak.loss
    return _Climb(
        z=z,
        before=climb.z,
        g=g,
        last=here.loss,
        peak=choose(higher, here, climb.peak),
        g_peak=jnp.where(higher, g, climb.g_peak),
        found=choose(jnp.asarray(counts), keep(climb.found, here), climb.found),
    )


def _back_to_peak(climb: _Climb, back: Array) -> _Climb:
    return climb._replace(
        z=jnp.where(back, climb.peak.z, climb.z),
        g=jnp.where(back, climb.g_peak, climb.g),
    )


def _run(plan: _Plan, key: Key, aim: Aim, x: Array, found: Judged) -> Judged:
    run = _run_l1 if isinstance(plan.threat, L1) else _run_dense
    return run(plan, key, aim, x, found)


class Windows(NamedTuple):
    """The window between two checkpoints: its length, and the step that ends it.

    Windows of 22 %, 19 %, 16 %, .. 6 % of the steps (section 3.1 of the paper). All
    numbers may be traced.
    """

    length: Array
    end: Array
    shorter: Array
    least: Array

    @classmethod
    def first(cls, steps: Array | int) -> "Windows":
        """The window that begins with step 0."""
        length, least, shorter = (
            jnp.maximum(percent * steps // 100, 1) for percent in (22, 6, 3)
        )
        return cls(length, length - 1, shorter, least)

    def next(self, i: Array) -> "Windows":
        """The window after step i."""
        length = jnp.maximum(self.length - self.shorter, self.least)
        after = Windows(length, self.end + length, self.shorter, self.least)
        return choose(i == self.end, after, self)


class _Dense(NamedTuple):
    """length: the step size in radii.  rises: rising steps of this window.

    checked: the peak's loss at the last checkpoint.  halved: was the step halved there?
    window: until the next one.
    """

    climb: _Climb
    length: Array
    rises: Array
    checked: Array
    halved: Array
    window: Windows


def _start(threat: Threat, key: Key, x: Array) -> Array:
    """A random point on the sphere of the ball, as the reference draws it."""
    if isinstance(threat, Linf):
        direction = unit(jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0))
    elif isinstance(threat, L2):
        direction = threat.ascend(jax.random.normal(key, x.shape, x.dtype))
    else:
        return threat.sample(key, x)
    return threat.project(x, x + threat.eps * direction)


def _run_dense(plan: _Plan, key: Key, aim: Aim, x: Array, found: Judged) -> Judged:
    """One restart in linf, l2 or a box."""
    threat, scale = plan.threat, radius(plan.threat, x)

    def step(i: Array, state: _Dense) -> _Dense:
        climb, old = state.climb, state.climb.last
        inertia = jnp.where(i > 0, 0.25, 0.0)
        direction = threat.ascend(unit(climb.g))
        ahead = threat.project(x, climb.z + state.length * scale * direction)
        move = (1 - inertia) * (ahead - climb.z) + inertia * (climb.z - climb.before)
        z = threat.project(x, climb.z + move)
        climb = _moved(climb, z, aim(jax.random.fold_in(key, i + 1)), counts=True)
        state = state._replace(climb=climb, rises=state.rises + (climb.last > old))
        return _checkpoint(state, i, plan.rho)

    climb = _begin(_start(threat, key, x), aim(key), found, counts=True)
    length, rises = jnp.asarray(2.0, x.dtype), jnp.zeros((), jnp.int32)
    window = Windows.first(plan.steps)
    state = _Dense(climb, length, rises, climb.peak.loss, jnp.ones((), bool), window)
    stop = (lambda state: state.climb.found.fooled) if plan.early_exit else None
    return repeat(plan.steps, step, state, stop).climb.found


def _checkpoint(state: _Dense, i: Array, rho: float) -> _Dense:
    """At the end of a window: halve the step and return to the peak where stuck."""
    ends = i == state.window.end
    oscillates = state.rises <= rho * state.window.length
    stalls = ~state.halved & (state.checked >= state.climb.peak.loss)
    halve = ends & (oscillates | stalls)
    return _Dense(
        climb=_back_to_peak(state.climb, halve),
        length=jnp.where(halve, 0.5 * state.length, state.length),
        rises=jnp.where(ends, 0, state.rises),
        checked=jnp.where(ends, state.climb.peak.loss, state.checked),
        halved=jnp.where(ends, halve, state.halved),
        window=state.window.next(i),
    )


class _Sparse(NamedTuple):
    """length: the step size.  share: of the coordinates a step moves.

    support: coordinates in which the peak differed from x at the last checkpoint.
    """

    climb: _Climb
    length: Array
    share: Array
    support: Array


class _Stage(NamedTuple):
    """A run within one l1 radius; `counts`: do its points lie in the threat set?"""

    eps: Array
    steps: Array
    counts: Array


def _run_l1(plan: _Plan, key: Key, aim: Aim, x: Array, found: Judged) -> Judged:
    """One restart in l1: three radii, each from the peak of the one before."""
    eps = plan.threat.eps
    first = [math.ceil(share * plan.steps) for share in L1_SHARES[:-1]]
    stages = _Stage(
        jnp.asarray(L1_RADII, x.dtype) * eps,
        jnp.asarray([*first, max(plan.steps - sum(first), 0)]),
        jnp.asarray(L1_RADII) == 1.0,
    )

    def run(i: Array, carry: tuple[Array, Judged]) -> tuple[Array, Judged]:
        stage = jax.tree.map(lambda column: column[i], stages)
        climb = _stage_l1(plan, jax.random.fold_in(key, i), aim, x, stage, *carry)
        return climb.peak.z, climb.found

    start = x + jax.random.normal(key, x.shape, x.dtype)
    return fori(len(L1_RADII), run, (start, found))[1]


def _stage_l1(
    plan: _Plan,
    key: Key,
    aim: Aim,
    x: Array,
    stage: _Stage,
    start: Array,
    found: Judged,
) -> _Climb:
    project = functools.partial(_into_set, plan.threat, x, stage)
    window = max(int(0.04 * plan.steps * min(L1_SHARES)), 1)

    def step(i: Array, state: _Sparse) -> _Sparse:
        climb = state.climb
        direction = _steepest(climb.g, state.share)
        z = project(climb.z + state.length * direction)
        at = aim(jax.random.fold_in(key, i + 1))
        climb = _moved(climb, z, at, stage.counts)
        return _adapted(
            state._replace(climb=climb), x, stage.eps, (i + 1) % window == 0
        )

    climb = _begin(project(start), aim(key), found, stage.counts)
    support = _support(climb.z, x)
    state = _Sparse(climb, stage.eps, support / x.size / 1.5, support)
    stop = (lambda state: state.climb.found.fooled) if plan.early_exit else None
    return repeat(stage.steps, step, state, stop).climb


def _into_set(threat: L1, x: Array, stage: _Stage, z: Array) -> Array:
    z = into_l1_box(threat, x, z, stage.eps)
    return jnp.where(stage.counts, threat.project(x, z), z)


def _support(z: Array, x: Array) -> Array:
    return jnp.sum(z != x).astype(x.dtype)


def _steepest(g: Array, share: Array) -> Array:
    """Equal steps, of l1 norm 1 in all, along the steepest share of the coordinates."""
    g = unit(g)
    magnitude = jnp.abs(g)
    rank = jnp.clip((1.0 - share) * g.size, 0, g.size - 1).astype(jnp.int32)
    chosen = jnp.where(magnitude >= jnp.sort(magnitude.ravel())[rank], jnp.sign(g), 0.0)
    return chosen / jnp.maximum(jnp.sum(jnp.abs(chosen)), 1.0)


def _adapted(state: _Sparse, x: Array, eps: Array, ends: Array) -> _Sparse:
    """At a checkpoint: follow the sparsity of the peak, slow down once it is stable."""
    support = _support(state.climb.peak.z, x)
    sparser = support / jnp.maximum(state.support, 1.0) < 0.95
    length = jnp.where(sparser, eps, jnp.maximum(state.length / 1.5, eps / 10.0))
    return _Sparse(
        climb=_back_to_peak(state.climb, ends & sparser),
        length=jnp.where(ends, length, state.length),
        share=jnp.where(ends, support / x.size / 1.5, state.share),
        support=jnp.where(ends, support, state.support),
    )
