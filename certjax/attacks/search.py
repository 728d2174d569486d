"""What every attack shares: checking its input, judging points, keeping the best one.

The order of points is lexicographic: a point that reaches the goal beats one that does
not, then the higher loss wins. The clean input is always judged first, so that an
attacked accuracy can never exceed the clean one.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from certjax.attacks.losses import aimed, Goal, Loss, reached
from certjax.loops import loopable
from certjax.threat import Box, Threat
from certjax.types import Array, Attack, Classifier, Key, Scalar


class Judged(NamedTuple):
    """z: like x.  loss: [] to maximise, -inf where NaN.  fooled: [] bool."""

    z: Array
    loss: Array
    fooled: Array


Judge: TypeAlias = Callable[[Array], Judged]
Slope: TypeAlias = Callable[[Array], tuple[Judged, Array]]


def guarded(attack: Attack) -> Attack:
    """The attack with its input checked and gradients fast in loops.

    With one class nothing can be misclassified: returns x. The result is a constant
    for differentiation: no gradient flows through the attack into x or the weights.
    """

    def run(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        x = jax.lax.stop_gradient(checked_input(x))
        if classes_of(f, x) < 2:
            return x
        z = attack(key, loopable(_frozen(f, x), x), x, label)
        return jax.lax.stop_gradient(z)

    return run


def _frozen(f: Classifier, x: Array) -> Classifier:
    """`f` with the weights it closes over cut off from outer differentiation."""
    g, weights = jax.closure_convert(f, x)
    weights = jax.lax.stop_gradient(weights)
    return lambda z: g(z, *weights)


def checked_input(x: Array) -> Array:
    """The input as a float array; integers are refused, because eps is in [0, 1]."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"attacks need a floating-point input in [0, 1], got {x.dtype} {x.shape}; "
            "convert images with x.astype(jnp.float32) / 255"
        )
    return x


def classes_of(f: Classifier, x: Array) -> int:
    """K, from the shape of `f(x)` alone."""
    shape = jax.eval_shape(f, x).shape
    if len(shape) != 1:
        raise ValueError(
            f"f must map one example to logits [K], got {shape} for x {x.shape}; "
            "write f for one example and batch with jax.vmap"
        )
    return shape[0]


def judge(f: Classifier, label: Array, loss: Loss, goal: Goal) -> Judge:
    """`z -> Judged`, one forward pass."""
    objective = aimed(loss, goal)

    def at(z: Array) -> Judged:
        logits = f(z)
        return _judged(z, objective(logits, label), logits, label, goal)

    return at


def slope(f: Classifier, label: Array, loss: Loss, goal: Goal) -> Slope:
    """`z -> (Judged, gradient of the loss)`, one forward and one backward pass.

    The gradient is finite: NaN becomes 0 and infinities the largest float.
    """
    objective = aimed(loss, goal)

    def valued(z: Array) -> tuple[Array, Array]:
        logits = f(z)
        return objective(logits, label), logits

    def at(z: Array) -> tuple[Judged, Array]:
        (value, logits), g = jax.value_and_grad(valued, has_aux=True)(z)
        return _judged(z, value, logits, label, goal), jnp.nan_to_num(g)

    return at


def _judged(z: Array, value: Array, logits: Array, label: Array, goal: Goal) -> Judged:
    value = jnp.where(jnp.isnan(value), -jnp.inf, value)
    return Judged(z, value, reached(logits, label, goal))


def better(new: Judged, old: Judged) -> Array:
    """[] bool: does `new` strictly precede `old` in the order of points?"""
    same = new.fooled == old.fooled
    return (new.fooled & ~old.fooled) | (same & (new.loss > old.loss))


def keep(best: Judged, new: Judged) -> Judged:
    """The better of two judged points, the older one in a tie."""
    return choose(better(new, best), new, best)


def choose(condition: Array, new: Judged, old: Judged) -> Judged:
    """`jnp.where` for trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def unit(g: Array) -> Array:
    """`g / max|g|`: the same direction, without overflow of squares; 0 stays 0."""
    largest = jnp.max(jnp.abs(g))
    safe = jnp.where(largest > 0, largest, 1.0)
    return jnp.where(largest > 0, g / safe, 0.0)


def radius(threat: Threat, x: Array) -> Scalar:
    """eps, or for an explicit box its half width, coordinate by coordinate."""
    if isinstance(threat, Box):
        lower, upper = threat.box(x)
        return 0.5 * (upper - lower)
    return threat.eps
