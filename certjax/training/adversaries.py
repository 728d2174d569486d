"""Baselines of adversarial training beyond PGD and TRADES: MART, ARoW, EDAC."""

import jax
import jax.numpy as jnp

from certjax.models.batchnorm import EXAMPLES
from certjax.threat import Threat
from certjax.training.losses import cross_entropy, divergence
from certjax.training.objectives import adversary, AttackBuilder, Itemized, Terms
from certjax.types import Array, Classifier, Key, Objective, PyTree, Scalar


def mart(threat: Threat, *, attack: AttackBuilder, weight: Scalar = 5.0) -> Objective:
    """Boosted cross-entropy at z + weight * KL(f(x) || f(z)) * (1 - p(label | x)).

    The boosted cross-entropy adds -log(1 - the largest wrong probability).

    Args:
      threat: the perturbation set.
      attack: builds the attack, which maximises the cross-entropy.
      weight: of the second term (lambda of the paper).
    Source: Wang et al. 2020, "Improving adversarial robustness requires revisiting
      misclassified examples", equation 8.
    """
    search = attack(threat)

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        clean, moved = f(x), f(adversary(search, key, f, x, label))
        doubt = 1.0 - jax.nn.softmax(clean)[label]
        shift = divergence(clean, moved)
        boosted = cross_entropy(moved, label) + _runner_up(moved, label)
        metrics = {
            "adversarial": cross_entropy(moved, label),
            "divergence": shift,
            "robust_accuracy": jnp.argmax(moved) == label,
        }
        return Terms(boosted + weight * shift * doubt, metrics)

    return objective


def _runner_up(logits: Array, label: Array) -> Array:
    """-log(1 - max_{k != label} p_k), without cancellation."""
    others = jnp.where(jnp.arange(logits.shape[0]) == label, -jnp.inf, logits)
    best = jnp.argmax(others)
    rest = jnp.where(jnp.arange(logits.shape[0]) == best, -jnp.inf, logits)
    return jax.nn.logsumexp(logits) - jax.nn.logsumexp(rest)


def arow(
    threat: Threat,
    *,
    attack: AttackBuilder,
    weight: Scalar = 3.5,
    smoothing: float = 0.2,
) -> Objective:
    """CE with smoothed labels + 2 * weight * KL(f(x) || f(z)) * (1 - p(label | z)).

    Args:
      threat: the perturbation set.
      attack: builds the attack from the threat and `loss=`, which is the KL; it must
        start at a random point, as in `trades`.
      weight: of the second term (lambda of the paper).
      smoothing: of the labels, in [0, 1).
    Source: Yang et al. 2023, arXiv:2206.03353, algorithm 1.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        clean = f(x)
        reference = jax.lax.stop_gradient(clean)
        search = attack(threat, loss=lambda z, _: divergence(reference, z))
        moved = f(adversary(search, key, f, x, label))
        uniform = jnp.mean(jax.nn.logsumexp(clean) - clean)
        smoothed = (1 - smoothing) * cross_entropy(clean, label) + smoothing * uniform
        shift = divergence(clean, moved)
        doubt = 1.0 - jax.nn.softmax(moved)[label]
        metrics = {
            "divergence": shift,
            "robust_accuracy": jnp.argmax(moved) == label,
        }
        return Terms(smoothed + 2.0 * weight * shift * doubt, metrics)

    return objective


def edac(threat: Threat, *, attack: AttackBuilder, step: float = 0.03) -> Objective:
    """Cross-entropy of points that are adversarial to a less certain network.

    The weights take one step down the certainty, the standard deviation of the logits
    over the classes at adversarial points, averaged over the batch; the attack is
    repeated there, and the loss is that of the original weights at the points it finds.

    Two things differ from the authors' program, where the optimiser takes the step (its
    learning rate times a weight of 0.3; ours is that at a rate of 0.1) and the weights
    keep it: here it is one of plain gradient descent, undone afterwards, in whatever
    floating arrays f closes over, batch statistics included.

    Needs the batch: call it under `jax.vmap(..., axis_name=EXAMPLES)`, as `train_step`
    does.

    Args:
      threat: the perturbation set.
      attack: builds the attack.
      step: length of the step of the weights, in gradients.
    Source: Zhang et al. 2023, "Generating less certain adversarial examples improves
      robust generalization", arXiv:2310.04539.
    """
    search = attack(threat)

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        g, weights = jax.closure_convert(f, x)
        held = jax.lax.stop_gradient(weights)
        z = adversary(search, key, f, x, label)

        def certainty(weights: PyTree) -> Array:
            logits = g(z, *weights)
            return jnp.sqrt(jnp.var(logits) + 1e-12)  # no NaN where all are equal

        slope = jax.lax.pmean(jax.grad(certainty)(held), EXAMPLES)
        less = jax.tree.map(lambda w, s: w - step * s, held, slope)
        z = adversary(search, key, lambda v: g(v, *less), x, label)
        logits = f(z)
        loss = cross_entropy(logits, label)
        metrics = {"adversarial": loss, "robust_accuracy": jnp.argmax(logits) == label}
        return Terms(loss, metrics)

    return objective
