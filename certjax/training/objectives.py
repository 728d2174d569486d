"""Training objectives: `objective(key, f, x, label) -> []`, for one example.

Each factory takes the threat first, then numbers by keyword, and returns a pure
function; a batch is made by `jax.vmap`, the gradient is taken through whatever `f`
closes over. Attacks inside an objective are not differentiated.

An objective that knows more than its loss carries it in `.terms`, which `terms_of`
reads: named parts of the loss for the log, and the boxes that entered the activations,
for regularisers of the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from certjax import bounds
from certjax.specification import margins
from certjax.threat import Threat
from certjax.training.losses import cross_entropy, divergence, robust_cross_entropy
from certjax.types import Array, Attack, Classifier, Interval, Key, Objective, Scalar


class Terms(NamedTuple):
    """What an objective knows about one example (or [N] examples, after vmap).

    loss: [], what is minimised.
    metrics: named [] values for the log.
    layers: boxes that entered the activations, in order; empty where none was computed.
    region: the input box that was bounded, or None.
    """

    loss: Array
    metrics: dict[str, Array]
    layers: tuple[Interval, ...] = ()
    region: Interval | None = None


@dataclass(frozen=True)
class Itemized:
    """An objective made from a function that returns `Terms`."""

    terms: Callable[[Key, Classifier, Array, Array], Terms]

    def __call__(self, key: Key, f: Classifier, x: Array, label: Array) -> Array:
        """The loss alone."""
        return self.terms(key, f, x, label).loss


def terms_of(objective: Objective) -> Callable[[Key, Classifier, Array, Array], Terms]:
    """The `.terms` of an objective; of a plain function, its loss and nothing else."""

    def loss_alone(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        return Terms(objective(key, f, x, label), {})

    return getattr(objective, "terms", loss_alone)


AttackBuilder = Callable[..., Attack]
"""`build(threat, **more) -> attack`, e.g. `partial(pgd, steps=10)`."""


def detached(f: Classifier, x: Array) -> Classifier:
    """`f` with the values it closes over held constant under differentiation.

    Gives an attack inside an objective the classifier without the tangents of the
    parameters, so that nothing of the attack is differentiated or stored.
    """
    g, captured = jax.closure_convert(f, x)
    captured = jax.lax.stop_gradient(captured)
    return lambda z: g(z, *captured)


def adversary(attack: Attack, key: Key, f: Classifier, x: Array, label: Array) -> Array:
    """The point an attack finds, as a constant of the differentiation."""
    x = jax.lax.stop_gradient(x)
    return jax.lax.stop_gradient(attack(key, detached(f, x), x, label))


def natural() -> Objective:
    """Cross-entropy of the clean example."""

    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Array:  # noqa: ARG001
        return cross_entropy(f(x), label)

    return objective


def adversarial(threat: Threat, *, attack: AttackBuilder) -> Objective:
    """Cross-entropy of the point an attack finds.

    Args:
      threat: the perturbation set.
      attack: builds the attack from the threat, e.g. `partial(pgd, steps=10)`.
    Source: Madry et al. 2018, arXiv:1706.06083.
    """
    search = attack(threat)

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        logits = f(adversary(search, key, f, x, label))
        loss = cross_entropy(logits, label)
        robust = jnp.argmax(logits) == label
        return Terms(loss, {"adversarial": loss, "robust_accuracy": robust})

    return objective


def trades(threat: Threat, *, attack: AttackBuilder, beta: Scalar = 6.0) -> Objective:
    """Cross-entropy at x + beta * KL(f(x) || f(z)), z chosen to maximise that KL.

    Args:
      threat: the perturbation set.
      attack: builds the attack from the threat and `loss=`; it must start at a random
        point, since the divergence has gradient 0 at x.
      beta: weight of the robust term.
    Source: Zhang et al. 2019, arXiv:1901.08573, equation 5.
    """

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        logits = f(x)
        reference = jax.lax.stop_gradient(logits)
        search = attack(threat, loss=lambda z, _: divergence(reference, z))
        moved = f(adversary(search, key, f, x, label))
        clean, shift = cross_entropy(logits, label), divergence(logits, moved)
        robust = jnp.argmax(moved) == label
        metrics = {"divergence": shift, "robust_accuracy": robust}
        return Terms(clean + beta * shift, metrics)

    return objective


def mixed_with_natural(
    kappa: Scalar, f: Classifier, x: Array, label: Array, robust: Array
) -> Array:
    """kappa * CE at x + (1 - kappa) * robust; no clean pass where kappa is 0."""
    if isinstance(kappa, int | float) and kappa == 0:
        return robust
    return kappa * cross_entropy(f(x), label) + (1 - kappa) * robust


def ibp(threat: Threat, *, kappa: Scalar = 0.0) -> Objective:
    """Interval bounds: kappa * CE at x + (1 - kappa) * CE of the worst case.

    Args:
      threat: the perturbation set (its bounding box is what counts).
      kappa: weight of the natural term, in [0, 1].
    Source: Gowal et al. 2018, arXiv:1810.12715, equation 12.
    """

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:  # noqa: ARG001
        rows = bounds.ibp_with_layers(lambda z: margins(f(z), label))
        margin, layers = rows(threat, x)
        robust = robust_cross_entropy(margin.lower)
        loss = mixed_with_natural(kappa, f, x, label, robust)
        metrics = {"robust": robust, "verified": jnp.all(margin.lower > 0)}
        return Terms(loss, metrics, layers, threat.box(x))

    return objective
