"""What every attack shares: checking its input, judging points, keeping the best one.

The order of points is lexicographic: a point that reaches the goal beats one that does
not, then the higher loss wins. The clean input is always judged first, so that an
attacked accuracy can never exceed the clean one.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import field
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from certjax.attacks.geometry import largest
from certjax.attacks.losses import aimed, Goal, Loss, reached
from certjax.loops import fori, loopable
from certjax.threat import Box, Threat
from certjax.types import Array, Attack, Classifier, Key, PyTree, Scalar


class Judged(NamedTuple):
    """z: like x.  loss: [] to maximise, -inf where NaN.  fooled: [] bool."""

    z: Array
    loss: Array
    fooled: Array


Judge: TypeAlias = Callable[[Array], Judged]
Slope: TypeAlias = Callable[[Array], tuple[Judged, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Expectation:
    """A randomised classifier, attacked in expectation over its own randomness (EOT).

    Gradients and losses are means over `draws` fresh draws at every step of an attack.

    Args:
      sample: `sample(key, x) -> logits`, one draw.
      draws: draws per evaluation.
      key: the draws of `self(x)`, which returns the log of the mean softmax; attacks
        replace it at every step.

    Source: Athalye et al. 2018, arXiv:1707.07397.
    """

    sample: Callable[[Key, Array], Array] = field(metadata={"static": True})
    draws: int = field(metadata={"static": True})
    key: Key

    def each(self, x: Array) -> Array:
        """[draws, K] logits."""
        keys = jax.random.split(self.key, self.draws)
        return jax.vmap(self.sample, in_axes=(0, None))(keys, x)

    def __call__(self, x: Array) -> Array:
        """[K]: the logits of the mean probabilities."""
        return _mean_logits(self.each(x))


def at_random(f: Classifier, key: Key) -> Classifier:
    """`f`, with fresh draws if it is randomised."""
    return dataclasses.replace(f, key=key) if isinstance(f, Expectation) else f


def _mean_logits(logits: Array) -> Array:
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return jax.nn.logsumexp(log_p, axis=0) - jnp.log(logits.shape[0])


def guarded(attack: Attack) -> Attack:
    """The attack with its input checked and gradients fast in loops.

    With one class nothing can be misclassified: returns x. The result is a constant
    for differentiation: no gradient flows through the attack into x or the weights.
    """

    def run(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        x = jax.lax.stop_gradient(checked_input(x))
        if classes_of(f, x) < 2:
            return x
        return jax.lax.stop_gradient(attack(key, _prepared(f, x), x, label))

    run.bare = attack  # ty: ignore[missing-attribute]
    return run


def counting(
    counted: Callable[[Key, Classifier, Array, Array], tuple[Array, Array]],
) -> Attack:
    """The attack `counted(..)[0]`, with `attack.counted(..) -> (z, queries)` beside it.

    queries: [] int32, the forward passes until the point was found, or all of them.
    """
    attack = guarded(lambda *arguments: counted(*arguments)[0])

    def run(key: Key, f: Classifier, x: Array, label: Array) -> tuple[Array, Array]:
        x = jax.lax.stop_gradient(checked_input(x))
        if classes_of(f, x) < 2:
            return x, jnp.int32(0)
        z, queries = counted(key, _prepared(f, x), x, label)
        return jax.lax.stop_gradient(z), queries

    attack.counted = run  # ty: ignore[missing-attribute]
    return attack


def bare(attack: Attack) -> Attack:
    """The attack for inputs that a surrounding attack has prepared already."""
    return getattr(attack, "bare", attack)


def _prepared(f: Classifier, x: Array) -> Classifier:
    """`f`, its weights cut off from outer differentiation, its gradients loopable."""
    if isinstance(f, Expectation):

        def sample(key: Key, z: Array) -> Array:
            return loopable(lambda v: f.sample(key, v), z)(z)

        return dataclasses.replace(f, sample=sample)
    g, weights = jax.closure_convert(f, x)
    weights = jax.lax.stop_gradient(weights)
    return loopable(lambda z: g(z, *weights), x)


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
    valued = _valued(f, label, aimed(loss, goal))

    def at(z: Array) -> Judged:
        return _judged(z, *valued(z), label, goal)

    return at


def slope(f: Classifier, label: Array, loss: Loss, goal: Goal) -> Slope:
    """`z -> (Judged, gradient of the loss)`, one forward and one backward pass.

    The gradient is finite: NaN becomes 0 and infinities the largest float.
    """
    valued = _valued(f, label, aimed(loss, goal))

    def at(z: Array) -> tuple[Judged, Array]:
        (value, logits), g = jax.value_and_grad(valued, has_aux=True)(z)
        return _judged(z, value, logits, label, goal), jnp.nan_to_num(g)

    return at


def _valued(f: Classifier, label: Array, objective: Loss) -> Callable:
    """`z -> (loss, logits)`; of a randomised classifier, means over its draws."""
    if isinstance(f, Expectation):

        def valued(z: Array) -> tuple[Array, Array]:
            logits = f.each(z)
            losses = jax.vmap(objective, in_axes=(0, None))(logits, label)
            return jnp.mean(losses), _mean_logits(logits)

        return valued

    def valued_once(z: Array) -> tuple[Array, Array]:
        logits = f(z)
        return objective(logits, label), logits

    return valued_once


def _judged(z: Array, value: Array, logits: Array, label: Array, goal: Goal) -> Judged:
    value = jnp.where(jnp.isnan(value), -jnp.inf, value)
    return Judged(z, value, reached(logits, label, goal))


def repeat(
    steps: int | Array,
    body: Callable[[Array, PyTree], PyTree],
    init: PyTree,
    stop: Callable[[PyTree], Array] | None = None,
) -> PyTree:
    """`for i in range(steps): if stop(state): break; state = body(i, state)`."""
    if stop is None:
        return fori(steps, body, init)

    def goes_on(carry: tuple[Array, PyTree]) -> Array:
        return (carry[0] < steps) & ~stop(carry[1])

    def advance(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        return carry[0] + 1, body(*carry)

    return jax.lax.while_loop(goes_on, advance, (jnp.int32(0), init))[1]


def check_counts(**counts: int) -> None:
    """Refuse numbers of steps, restarts, .. below 1."""
    for name, value in counts.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


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
    steepest = largest(g)
    safe = jnp.where(steepest > 0, steepest, 1.0)
    return jnp.where(steepest > 0, g / safe, 0.0)


def radius(threat: Threat, x: Array) -> Scalar:
    """eps, or for an explicit box its half width, coordinate by coordinate."""
    if isinstance(threat, Box):
        lower, upper = threat.box(x)
        return 0.5 * (upper - lower)
    return threat.eps
