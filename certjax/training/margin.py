"""Training of networks whose Lipschitz constant is known: large margins."""

import math

import jax
import jax.numpy as jnp

from certjax.threat import L1, L2, Linf
from certjax.training.losses import cross_entropy
from certjax.training.objectives import Itemized, Terms
from certjax.types import Array, Classifier, Key, Objective


def lipschitz_margin(
    threat: Linf | L2 | L1,
    *,
    constant: float = math.sqrt(2.0),
    temperature: float = 0.25,
) -> Objective:
    """temperature * CE of ((logits - offset of the label) / temperature).

    The offset is what a margin can lose within eps, constant * eps: beyond it the loss
    soon stops asking for more.

    Args:
      threat: the set of the certificate, in the norm of the network's constant.
      constant: change of a margin over the distance: `model.lipschitz.margin`.
      temperature: of the cross-entropy.
    Source: Prach & Lampert 2022, arXiv:2208.03160, equation 9.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:  # noqa: ARG001
        logits = f(x)
        lost = constant * jnp.max(jnp.asarray(threat.eps))
        shifted = logits - lost * jax.nn.one_hot(label, logits.shape[0])
        loss = temperature * cross_entropy(shifted / temperature, label)
        verified = (jnp.argmax(shifted) == label) & jnp.isfinite(loss)
        return Terms(loss, {"verified": verified})

    return objective
