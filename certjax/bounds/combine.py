"""Several bounds of one function at once, and the fused worst-case loss."""

from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp

from certjax.bounds.interval import ibp
from certjax.bounds.linear import Bound, crown
from certjax.bounds.problem import intersect_trees
from certjax.specification import margins
from certjax.threat import Threat
from certjax.types import Array, Classifier, Interval, PyTree


NARROW = 1e-6  # width under which the tangent at the greater end is taken for a chord


def best(*bounds: Bound) -> Bound:
    """The intersection of several bounds of the same function.

    Args:
      bounds: e.g. `crown(f)`, `forward(f)`, `alpha_crown(f)`.

    Returns:
      `bound(threat, x) -> Interval`, at each end the tightest of them.
    """
    if not bounds:
        raise ValueError("best needs at least one bound, got none; pass e.g. crown(f)")

    def bound(threat: Threat, x: PyTree) -> Interval:
        return reduce(intersect_trees, (each(threat, x) for each in bounds))

    return bound


def fused_cross_entropy(
    f: Classifier, label: Array, intermediate: str = "ibp"
) -> Callable[[Threat, Array], Array]:
    """An upper bound of the cross-entropy over a threat set, by ONE linear row.

    `log(1 + sum_k e^(z_k - z_label))` is bounded as a whole: each exponential by its
    chord over the margin's interval, the sum of the chords by one backward pass instead
    of one for each class. Never above the loss of interval bounds.

    Args:
      f: classifier of one example.
      label: [] integer.
      intermediate: as in `crown`; "ibp" is the loss of CROWN-IBP training.

    Returns:
      `loss(threat, x) -> []`, differentiable in whatever f closes over.

    Source: Xu et al. 2020, arXiv:2002.12920, section 3.3 (loss fusion).
    """
    rows = lambda z: margins(f(z), label)

    def loss(threat: Threat, x: Array) -> Array:
        known = ibp(rows)(threat, x)
        low, high = -known.upper, -known.lower
        # the greatest exponent, so that nothing overflows
        shift = jax.lax.stop_gradient(jnp.maximum(jnp.max(high), 0.0))
        at_low, at_high = jnp.exp(low - shift), jnp.exp(high - shift)
        # written out in the margins: the gradient has to stay finite while the bounds
        # of an untrained network are huge
        wide = high - low > NARROW
        slope = (at_high - at_low) / jnp.where(wide, high - low, 1.0)
        slope = jnp.where(wide, slope, at_high)
        linear = crown(lambda z: -jnp.sum(slope * rows(z)), intermediate)(threat, x)
        chords = jnp.sum(at_low - slope * low) + linear.upper
        total = jnp.minimum(chords, jnp.sum(at_high))
        return shift + jnp.log(jnp.exp(-shift) + jnp.maximum(total, 0.0))

    return loss
