"""Attacks made of attacks.

A combined attack is an attack again: one example, pure, under jit and vmap. Where it
stops early, it stops for a whole batch only once every example is broken; the cascade
drops broken examples from the batch instead.

x itself is a candidate too, so that an attacked accuracy can never exceed the clean
one: with an explicit Box, x has to lie in it. `goal` is that of the attacks: where it
is "targeted", `label` is the class to reach and the loss is descended.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from certjax.attacks.apgd import apgd_towards
from certjax.attacks.fab import fab
from certjax.attacks.losses import Goal, Loss, margin_loss
from certjax.attacks.search import (
    at_random,
    bare,
    check_counts,
    guarded,
    judge,
    Judged,
    keep,
    repeat,
)
from certjax.threat import Threat
from certjax.types import Array, Attack, Classifier, Key


def strongest(
    *attacks: Attack, loss: Loss = margin_loss, goal: Goal = "untargeted"
) -> Attack:
    """All attacks; of their points the one with the highest loss at the label."""
    _needs_attacks(attacks)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        at = judge(at_random(f, key), label, loss, goal)
        best = at(x)
        for i, each in enumerate(attacks):
            own = jax.random.fold_in(key, i)
            best = keep(best, at(bare(each)(own, f, x, label)))
        return best.z

    return guarded(attack)


def restarts(
    attack: Attack,
    count: int,
    *,
    loss: Loss = margin_loss,
    goal: Goal = "untargeted",
) -> Attack:
    """The same attack with `count` keys, until one of them breaks the example."""
    check_counts(count=count)
    return _sequence(lambda _: attack, count, loss, goal)


def targeted_sweep(
    make: Callable[[Array], Attack], targets: int = 9, *, loss: Loss = margin_loss
) -> Attack:
    """`make(rank)` for rank 0, 1, .. in turn, until one breaks the example.

    Args:
      make: an attack towards the wrong class of a (traced) rank, e.g.
        `lambda rank: apgd_towards(threat, rank)`.
      targets: number of ranks; never more than there are wrong classes.
      loss: which point to return while nothing breaks.
    """
    check_counts(targets=targets)
    return _sequence(make, targets, loss, "untargeted", ranks=True)


def apgd_targeted(
    threat: Threat, *, steps: int = 100, targets: int = 9, early_exit: bool = True
) -> Attack:
    """APGD with the targeted DLR towards each likely wrong class (APGD-T).

    Source: Croce & Hein 2020, arXiv:2003.01690, section 4.2.
    """
    make = functools.partial(apgd_towards, threat, steps=steps, early_exit=early_exit)
    return targeted_sweep(make, targets)


def fab_targeted(
    threat: Threat, *, steps: int = 100, targets: int = 9, early_exit: bool = True
) -> Attack:
    """FAB towards each likely wrong class (FAB-T), one backward pass per step.

    Source: Croce & Hein 2020, arXiv:1907.02044, appendix.
    """

    def make(rank: Array) -> Attack:
        return fab(threat, rank=rank, steps=steps, early_exit=early_exit)

    return targeted_sweep(make, targets)


def until_broken(
    *attacks: Attack, loss: Loss = margin_loss, goal: Goal = "untargeted"
) -> Attack:
    """The attacks in turn; those after the first success have no effect."""
    _needs_attacks(attacks)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        at = judge(at_random(f, key), label, loss, goal)
        best = at(x)
        for i, each in enumerate(attacks):
            own = functools.partial(bare(each), jax.random.fold_in(key, i), f, x, label)
            again = lambda _, best, own=own: keep(best, at(own()))
            best = repeat(1, again, best, lambda best: best.fooled)
        return best.z

    return guarded(attack)


def minimal(
    attack: Callable[[Threat], Attack],
    threat: Threat,
    *,
    bisections: int = 10,
    goal: Goal = "untargeted",
) -> Attack:
    """The smallest radius at which an attack succeeds, by bisection of eps.

    Args:
      attack: `threat -> attack`, e.g. `functools.partial(pgd, steps=40)`.
      threat: its eps is the largest radius tried; the set must have an eps.
      bisections: halvings after the first try at the largest radius.
      goal: of the attack.

    Returns:
      An attack whose result is the point that reached the goal at the smallest radius,
      x itself where none was found.
    """
    check_counts(bisections=bisections)

    def run(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        at = judge(at_random(f, key), label, margin_loss, goal)

        def attempt(i: Array, eps: Array) -> Judged:
            own = bare(attack(with_radius(threat, eps)))
            return at(own(jax.random.fold_in(key, i), f, x, label))

        def halve(i: Array, state: tuple[Array, Array, Judged]) -> tuple:
            lower, upper, best = state
            middle = jnp.where(i == 0, upper, 0.5 * (lower + upper))
            new = attempt(i, middle)
            best = jax.tree.map(lambda a, b: jnp.where(new.fooled, a, b), new, best)
            lower = jnp.where(new.fooled, lower, middle)
            return lower, jnp.where(new.fooled, middle, upper), best

        eps = jnp.asarray(threat.eps, x.dtype)
        clean = at(x)
        state = jnp.zeros_like(eps), eps, clean._replace(z=x)
        best = repeat(bisections + 1, halve, state)[2]
        return jnp.where(clean.fooled, x, best.z)

    return guarded(run)


def with_radius(threat: Threat, eps: Array | float) -> Threat:
    """The same kind of set with another, possibly traced, radius."""
    if not hasattr(threat, "eps"):
        raise TypeError("a Box has no radius to change; use Linf, L2 or L1")
    return dataclasses.replace(threat, eps=eps)


def _needs_attacks(attacks: tuple[Attack, ...]) -> None:
    if not attacks:
        raise ValueError("need at least one attack, got none")


def _sequence(
    make: Callable[[Array], Attack],
    count: int,
    loss: Loss,
    goal: Goal,
    *,
    ranks: bool = False,
) -> Attack:
    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        at = judge(at_random(f, key), label, loss, goal)
        classes = jax.eval_shape(f, x).shape[0]

        def one(i: Array, best: Judged) -> Judged:
            own = jax.random.fold_in(key, i)
            return keep(best, at(bare(make(i))(own, f, x, label)))

        rounds = min(count, classes - 1) if ranks else count
        return repeat(rounds, one, at(x), lambda best: best.fooled).z

    return guarded(attack)
