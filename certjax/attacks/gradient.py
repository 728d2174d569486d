"""Attacks that follow the gradient with a fixed step: FGSM, BIM, PGD, MI, NI.

Each factory closes over numbers and returns `attack(key, f, x, label) -> z` for one
example; z lies in the threat set, is finite, and is the best point that was visited.
"""

import functools
import math

import jax
import jax.numpy as jnp

from certjax.attacks.losses import Goal, log_odds, Loss
from certjax.attacks.search import (
    at_random,
    check_counts,
    guarded,
    judge,
    Judged,
    keep,
    radius,
    slope,
    unit,
)
from certjax.loops import fori
from certjax.threat import L1, L2, Threat
from certjax.types import Array, Attack, Classifier, Key, Scalar


L1_SHARE = 0.01  # of the coordinates that one sparse l1 step moves


def fgsm(threat: Threat, *, loss: Loss = log_odds, goal: Goal = "untargeted") -> Attack:
    """One step to the end of the set along the steepest direction.

    Maximises the linearised loss over the ball (before the cut to the domain).

    Source: Goodfellow et al. 2015, arXiv:1412.6572, equation 2.
    """

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        clean, g = slope(at_random(f, key), label, loss, goal)(threat.project(x, x))
        step = radius(threat, x) * threat.ascend(unit(g))
        end = judge(at_random(f, key), label, loss, goal)(threat.project(x, x + step))
        return keep(clean, end).z

    return guarded(attack)


def pgd(  # noqa: PLR0913
    threat: Threat,
    *,
    steps: int = 40,
    step_size: Scalar | None = None,
    restarts: int = 1,
    momentum: float = 0.0,
    nesterov: bool = False,
    random_start: bool = True,
    loss: Loss = log_odds,
    goal: Goal = "untargeted",
) -> Attack:
    """Projected gradient ascent with a fixed step, the best visited point kept.

    The attack returns the point of highest loss among those that reach the goal, else
    the point of highest loss; more restarts never make it weaker. In l1 a step moves
    the steepest 1 % of the coordinates that can still move (Tramer & Boneh 2019).

    Args:
      threat: the perturbation set; Linf, L2, L1 or Box.
      steps: gradient evaluations of one restart.
      step_size: length of a step in the norm of the set, input units (for a Box: a
        share of its half width); None: 2.5 radii over `steps`.
      restarts: independent starts.
      momentum: weight of the accumulated, normalised gradients; 1.0 is MI-FGSM.
      nesterov: evaluate the gradient one momentum step ahead (NI-FGSM).
      random_start: start at a random point of the set instead of x.
      loss: `loss(logits, label)`, ascended; `log_odds` gives the steps of
        cross-entropy, without its saturation.
      goal: "targeted": `label` is the class to reach, and the loss is descended.

    Returns:
      attack(key, f, x, label) -> z, costing restarts * (steps + 1) + 1 forward and
      restarts * steps backward passes.

    Deviations from the papers: the best visited point is returned, not the last; the
    default step is 2.5 radii over `steps`; the gradient is that of the log odds, of the
    same direction as cross-entropy's where that has not vanished; in l2 and l1 the
    random start lies at a uniformly drawn distance, not uniformly in the ball.

    Source: Madry et al. 2018, arXiv:1706.06083; Dong et al. 2018, arXiv:1710.06081;
      Lin et al. 2020, arXiv:1908.06281; Tramer & Boneh 2019, arXiv:1904.13000.
    """
    check_counts(steps=steps, restarts=restarts)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        length = _step_length(threat, x, steps, step_size)

        def run(own: Key, i: Array, state: tuple[Array, Array, Judged]) -> tuple:
            z, velocity, best = state
            ahead = threat.project(x, z + length * momentum * velocity)
            fresh = at_random(f, jax.random.fold_in(own, i))
            here, g = slope(fresh, label, loss, goal)(ahead if nesterov else z)
            velocity = _accumulated(momentum, velocity, g)
            z_next = threat.project(x, z + length * _direction(threat, z, velocity))
            return z_next, velocity, keep(best, here)

        def restart(i: int, best: Judged) -> Judged:
            own = jax.random.fold_in(key, i)
            start = _start(threat, own, x) if random_start else threat.project(x, x)
            state = start, jnp.zeros_like(x), best
            z, _, best = fori(steps, functools.partial(run, own), state)
            return keep(best, at(z))

        at = judge(at_random(f, key), label, loss, goal)
        return fori(restarts, restart, at(threat.project(x, x))).z

    return guarded(attack)


def bim(
    threat: Threat,
    *,
    steps: int = 10,
    step_size: Scalar | None = None,
    goal: Goal = "untargeted",
) -> Attack:
    """The basic iterative method: PGD from x itself.

    Source: Kurakin et al. 2017, arXiv:1607.02533.
    """
    return pgd(threat, steps=steps, step_size=step_size, random_start=False, goal=goal)


def mi_fgsm(
    threat: Threat,
    *,
    steps: int = 10,
    momentum: float = 1.0,
    goal: Goal = "untargeted",
) -> Attack:
    """Momentum iterative FGSM, the base of transfer attacks.

    Source: Dong et al. 2018, arXiv:1710.06081, algorithm 1.
    """
    return _transfer(threat, steps, momentum, goal, nesterov=False)


def ni_fgsm(
    threat: Threat,
    *,
    steps: int = 10,
    momentum: float = 1.0,
    goal: Goal = "untargeted",
) -> Attack:
    """MI-FGSM with Nesterov's look-ahead.

    Source: Lin et al. 2020, arXiv:1908.06281, algorithm 1.
    """
    return _transfer(threat, steps, momentum, goal, nesterov=True)


def _transfer(
    threat: Threat, steps: int, momentum: float, goal: Goal, *, nesterov: bool
) -> Attack:
    """Steps that add up to one radius; of a Box, to its half width."""
    return pgd(
        threat,
        steps=steps,
        step_size=getattr(threat, "eps", 1.0) / steps,
        momentum=momentum,
        nesterov=nesterov,
        random_start=False,
        goal=goal,
    )


def _start(threat: Threat, key: Key, x: Array) -> Array:
    """A random point of the set; in l2 and l1 at a uniformly drawn distance.

    Nearly all of a high-dimensional ball lies at its surface, from where the attack
    would first have to undo the noise.
    """
    start = threat.sample(key, x)
    if not isinstance(threat, L2 | L1):
        return start
    share = jax.random.uniform(jax.random.fold_in(key, 1), (), x.dtype)
    return threat.project(x, x + share * (start - x))


def _step_length(
    threat: Threat, x: Array, steps: int, step_size: Scalar | None
) -> Scalar:
    if step_size is None:
        return 2.5 * radius(threat, x) / steps
    return step_size if hasattr(threat, "eps") else step_size * radius(threat, x)


def _accumulated(momentum: float, velocity: Array, g: Array) -> Array:
    """MI-FGSM's sum of l1-normalised gradients; plain g where momentum is 0."""
    if isinstance(momentum, float | int) and momentum == 0:
        return g
    g = unit(g)
    mean = jnp.mean(jnp.abs(g))
    return momentum * velocity + g / jnp.where(mean > 0, mean, 1.0)


def _direction(threat: Threat, z: Array, g: Array) -> Array:
    """A step of length 1 in the norm of the set."""
    g = unit(g)
    return _sparse(threat, z, g) if isinstance(threat, L1) else threat.ascend(g)


def _sparse(threat: L1, z: Array, g: Array) -> Array:
    """Equal steps along the steepest coordinates that the domain does not block.

    Source: Tramer & Boneh 2019, arXiv:1904.13000, section 3.
    """
    blocked = ((z <= threat.low) & (g < 0)) | ((z >= threat.high) & (g > 0))
    g = jnp.where(blocked, 0.0, g)
    count = max(1, math.ceil(L1_SHARE * g.size))
    least = jax.lax.top_k(jnp.abs(g).ravel(), count)[0][-1]
    chosen = jnp.where(jnp.abs(g) >= least, jnp.sign(g), 0.0)
    return chosen / jnp.maximum(jnp.sum(jnp.abs(chosen)), 1.0)
