"""What an attack maximises: losses of the logits of one example, and its goal.

Every loss is `loss(logits, label) -> []`, larger meaning closer to misclassified as
anything but `label`. A targeted attack minimises the same loss with `label` = target.
All of them are finite with finite gradients for finite logits, however saturated.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from certjax.types import Array


Loss: TypeAlias = Callable[[Array, Array], Array]
Goal: TypeAlias = Literal["untargeted", "targeted"]

_TINY = 1e-12  # keeps the quotients of the DLR losses finite, as in the reference


def cross_entropy(logits: Array, label: Array) -> Array:
    """`-log softmax(logits)[label]`; its float32 gradient is 0 once saturated."""
    return jax.nn.logsumexp(logits) - logits[label]


def log_odds(logits: Array, label: Array) -> Array:
    """Log of the odds of any other class, `log((1 - p) / p)` at the label's p.

    Cross-entropy is an increasing function of it, hence both have the same maximisers,
    the same order of points and gradients of the same direction: every attack that
    uses only these takes the same steps. Its gradient never saturates.
    """
    is_label = jnp.arange(logits.shape[0]) == label
    others = jnp.where(is_label, -jnp.inf, logits)
    return jax.nn.logsumexp(others) - logits[label]


def best_other(logits: Array, label: Array) -> Array:
    """The largest logit of the other classes; -inf where there is none."""
    is_label = jnp.arange(logits.shape[0]) == label
    return jnp.max(jnp.where(is_label, -jnp.inf, logits))


def margin_loss(logits: Array, label: Array) -> Array:
    """`max_{k != label} z_k - z_label`: positive exactly where misclassified.

    Source: Carlini & Wagner 2017, arXiv:1608.04644, f_6 without the cut at kappa.
    """
    return best_other(logits, label) - logits[label]


def dlr(logits: Array, label: Array) -> Array:
    """Difference of logits ratio, invariant to shift and scale of the logits; K >= 3.

    Source: Croce & Hein 2020, arXiv:2003.01690, equation 6.
    """
    _needs_classes(logits, 3, "dlr")
    top = jax.lax.top_k(logits, 3)[0]
    return margin_loss(logits, label) / (top[0] - top[2] + _TINY)


def dlr_towards(target: Array) -> Loss:
    """Targeted DLR: the loss that pulls an example from its label to `target`; K >= 4.

    Source: Croce & Hein 2020, arXiv:2003.01690, equation 7.
    """

    def loss(logits: Array, label: Array) -> Array:
        _needs_classes(logits, 4, "dlr_towards")
        top = jax.lax.top_k(logits, 4)[0]
        scale = top[0] - 0.5 * (top[2] + top[3]) + _TINY
        return (logits[target] - logits[label]) / scale

    return loss


def difference_towards(target: Array) -> Loss:
    """`z_target - z_label`: the loss of FAB-T, defined for any K >= 2."""

    def loss(logits: Array, label: Array) -> Array:
        return logits[target] - logits[label]

    return loss


def cross_entropy_towards(target: Array) -> Loss:
    """`log softmax(logits)[target]`, whatever the label."""

    def loss(logits: Array, label: Array) -> Array:  # noqa: ARG001
        return -cross_entropy(logits, target)

    return loss


def _needs_classes(logits: Array, least: int, name: str) -> None:
    if logits.shape[0] < least:
        raise ValueError(
            f"{name} is defined for at least {least} classes, got {logits.shape[0]}; "
            "use margin_loss or cross_entropy"
        )


def aimed(loss: Loss, goal: Goal) -> Loss:
    """The loss to maximise for a goal: itself, or its negative when targeted."""
    if goal not in ("untargeted", "targeted"):
        raise ValueError(f"goal must be 'untargeted' or 'targeted', got {goal!r}")
    return loss if goal == "untargeted" else lambda logits, label: -loss(logits, label)


def reached(logits: Array, label: Array, goal: Goal = "untargeted") -> Array:
    """[] bool: did the attack reach its goal? NaN logits never count as reached."""
    hit = jnp.argmax(logits) == label
    return (hit if goal == "targeted" else ~hit) & ~jnp.any(jnp.isnan(logits))
