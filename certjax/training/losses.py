"""Losses of logits or of margin bounds, for one example."""

import jax
import jax.numpy as jnp

from certjax.attacks.losses import cross_entropy
from certjax.types import Array


__all__ = ["cross_entropy", "divergence", "robust_cross_entropy"]


def robust_cross_entropy(margins_lower: Array) -> Array:
    """Cross-entropy of the worst logits that the bounds allow: log(1 + sum exp(-m)).

    Never below the cross-entropy of any point of the set.

    Args:
      margins_lower: [K-1] lower bounds of z_label - z_other.
    Source: Gowal et al. 2018, arXiv:1810.12715, equation 10.
    """
    worst = jnp.concatenate([jnp.zeros(1, margins_lower.dtype), -margins_lower])
    return jax.nn.logsumexp(worst)


def divergence(reference: Array, logits: Array) -> Array:
    """KL(softmax(reference) || softmax(logits)) of two [K] arrays."""
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))
