"""What is to be proved: properties of the logits, as linear rows.

A property holds on a set when every row is positive for every point of the set.
"""

import jax.numpy as jnp

from certjax.types import Array


def margins(logits: Array, label: Array) -> Array:
    """Rows `z_label - z_other` for all other classes: [K] -> [K-1].

    The example is classified as `label` exactly where every row is positive. Inside
    `ibp(lambda z: margins(f(z), y))` the subtraction is folded into the last affine
    layer, which is the "elided last layer" of Gowal et al. 2018, arXiv:1810.12715.

    Args:
      logits: [K].
      label: [] integer in [0, K).

    Returns:
      [K-1], the other classes in ascending order.
    """
    if logits.ndim != 1:
        raise ValueError(
            f"margins takes the logits of one example, [K]; got shape {logits.shape}; "
            "batch with jax.vmap"
        )
    others = jnp.arange(logits.shape[0] - 1)
    others = others + (others >= label)
    return logits[label] - logits[others]


def targeted(logits: Array, label: Array, target: Array) -> Array:
    """The one row `z_label - z_target`: [K] -> [1]; positive: target not reached."""
    return (logits[label] - logits[target])[None]


def rows(matrix: Array, offset: Array | float = 0.0):  # noqa: ANN201
    """Arbitrary linear rows: a function [K] -> [R], `matrix @ logits + offset`."""
    matrix = jnp.asarray(matrix)

    def specification(logits: Array) -> Array:
        return matrix @ logits + offset

    return specification
