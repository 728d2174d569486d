"""Ensembles: the base classifier is the mean of several networks."""

import jax
import jax.numpy as jnp

from certjax.types import Array, Classifier


def mean_logits(*members: Classifier) -> Classifier:
    """The classifier whose logits are the mean of the members' logits.

    A pytree: with members that are `jax.tree_util.Partial`s, one compilation serves all
    weights.

    Source: Horvath et al. 2022, "Boosting randomized smoothing with variance reduced
    classifiers", arXiv:2106.06946.
    """
    if not members:
        raise ValueError("an ensemble needs members, got none; pass classifiers")
    return jax.tree_util.Partial(_mean, members)


def _mean(members: tuple[Classifier, ...], x: Array) -> Array:
    return jnp.mean(jnp.stack([f(x) for f in members]), axis=0)
