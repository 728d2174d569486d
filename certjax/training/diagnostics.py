"""What the bounds of a training batch say about the health of a network."""

import jax.numpy as jnp

from certjax.training.objectives import Terms
from certjax.types import Array, Interval


def of_layers(terms: Terms) -> dict[str, Array]:
    """Metrics of the boxes that entered the activations; none where there are none.

    dead: share of units whose upper end is not above 0 for any example of the batch: a
      relu there passes no gradient.
    undecided: share of units and examples whose box holds 0: what makes bounds loose.
    growth_i: mean width of the boxes in front of activation i, over that of the input
      region; a network trained for bounds keeps it near 1.

    Args:
      terms: of [N] examples.
    """
    if not terms.layers or terms.region is None:
        return {}
    units = sum(layer.lower[0].size for layer in terms.layers)
    dead = sum(jnp.sum(_total(layer.upper) == 0) for layer in terms.layers)
    undecided = sum(
        jnp.sum((layer.lower < 0) & (layer.upper > 0)) / len(layer.lower)
        for layer in terms.layers
    )
    width = jnp.maximum(_width(terms.region), 1e-12)
    growth = {
        f"growth_{i}": _width(layer) / width for i, layer in enumerate(terms.layers)
    }
    return {"dead": dead / units, "undecided": undecided / units, **growth}


def _total(upper: Array) -> Array:
    """[units]: the positive parts of [N, ...] added up, as a product fast on a CPU."""
    positive = jnp.maximum(upper, 0).reshape(len(upper), -1)
    return jnp.ones(len(upper), positive.dtype) @ positive


def _width(box: Interval) -> Array:
    return jnp.mean(box.upper - box.lower)
