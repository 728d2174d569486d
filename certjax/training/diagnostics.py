"""What the bounds of a training batch say about the health of a network."""

import jax.numpy as jnp

from certjax.training.objectives import Terms
from certjax.types import Array, Interval


SEEN = 32  # examples: reading the boxes of the whole batch again costs 8 % of a step


def of_layers(terms: Terms) -> dict[str, Array]:
    """Metrics of the boxes that entered the activations; none where there are none.

    Of the first 32 examples:

    dead: share of units whose upper end is not above 0 for any of them: a relu there
      passes no gradient.
    undecided: share of units and examples whose box holds 0: what makes bounds loose.
    growth_i: mean width of the boxes in front of activation i, over that of the input
      region; a network trained for bounds keeps it near 1.

    Args:
      terms: of [N] examples.
    """
    if not terms.layers or terms.region is None:
        return {}
    layers = [Interval(box.lower[:SEEN], box.upper[:SEEN]) for box in terms.layers]
    units = sum(layer.lower[0].size for layer in layers)
    dead = sum(jnp.sum(_total(layer.upper) == 0) for layer in layers)
    undecided = sum(
        jnp.sum((layer.lower < 0) & (layer.upper > 0)) / len(layer.lower)
        for layer in layers
    )
    region = Interval(terms.region.lower[:SEEN], terms.region.upper[:SEEN])
    width = jnp.maximum(_width(region), 1e-12)
    growth = {f"growth_{i}": _width(layer) / width for i, layer in enumerate(layers)}
    return {"dead": dead / units, "undecided": undecided / units, **growth}


def _total(upper: Array) -> Array:
    """[units]: the positive parts of [N, ...] added up, as a product fast on a CPU."""
    positive = jnp.maximum(upper, 0).reshape(len(upper), -1)
    return jnp.ones(len(upper), positive.dtype) @ positive


def _width(box: Interval) -> Array:
    return jnp.mean(box.upper - box.lower)
