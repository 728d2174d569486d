"""Several bounds of one function at once, and the fused worst-case loss."""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from certjax.bounds.interval import activations
from certjax.bounds.linear import (
    Bound,
    by_ibp,
    close,
    enclose,
    lower_ends,
    pull_back,
    refinement,
    rows_of,
)
from certjax.bounds.problem import (
    intersect,
    intersect_trees,
    MAX_BYTES,
    pose,
    Problem,
    solve,
)
from certjax.bounds.slopes import adaptive
from certjax.specification import margins
from certjax.threat import Threat
from certjax.types import Array, Classifier, Interval, PyTree


# widths outside of which a chord's slope would be rounding, or underflow to 0: it gets
# the slope at the greater end, which is no smaller
NARROW, WIDEST = 1e-6, 1e30


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
    fused = fused_with_layers(f, label, intermediate)
    return lambda threat, x: fused(threat, x).loss


class Fused(NamedTuple):
    """The fused loss, and the interval bounds that it was found with.

    loss: [], an upper bound of the cross-entropy.
    margins: [K - 1] bounds of z_label - z_k, by `intermediate` in front of the last
      activation and interval arithmetic behind it.
    layers: the intervals that enter each activation, as in `ibp_with_layers`.
    """

    loss: Array
    margins: Interval
    layers: tuple[Interval, ...]


def fused_with_layers(
    f: Classifier, label: Array, intermediate: str = "ibp"
) -> Callable[[Threat, Array], Fused]:
    """`fused_cross_entropy`, with all that it knows: nothing is bounded twice."""

    def fused(threat: Threat, x: Array) -> Fused:
        found = _solved(f, label, intermediate, threat, x)
        low, high = -found.margins.upper, -found.margins.lower
        # the greatest exponent, so that nothing overflows
        shift = jax.lax.stop_gradient(jnp.maximum(jnp.max(high), 0.0))
        at_low, at_high = jnp.exp(low - shift), jnp.exp(high - shift)
        # written out in the margins: the gradient has to stay finite while the bounds
        # of an untrained network are huge
        wide = (high - low > NARROW) & (high - low < WIDEST)
        slope = (at_high - at_low) / jnp.where(wide, high - low, 1.0)
        slope = jnp.where(wide, slope, at_high)
        rows = rows_of(found.problem, found.target, slope[None])
        (least,) = close(
            found.problem, pull_back(found.problem, found.target, rows, both=False)
        )
        chords = jnp.sum(at_low - slope * low) - least
        ends = jnp.sum(at_high)
        total = jnp.where(chords < ends, chords, ends)  # NaN proves nothing
        loss = shift + jnp.log(jnp.exp(-shift) + jnp.maximum(total, 0.0))
        return Fused(loss, found.margins, found.layers)

    return fused


class Margins(NamedTuple):
    """Bounds of z_label - z_k, [K - 1] each.

    linear: lower bounds by one linear row for each; margins, layers: as in `Fused`.
    """

    linear: Array
    margins: Interval
    layers: tuple[Interval, ...]


def margins_with_layers(
    f: Classifier, label: Array, intermediate: str = "ibp"
) -> Callable[[Threat, Array], Margins]:
    """Linear and interval bounds of the margins at once, the linear ones from below."""

    def bound(threat: Threat, x: Array) -> Margins:
        found = _solved(f, label, intermediate, threat, x)
        linear = enclose(found.problem, found.target, lower_ends)
        linear = intersect(found.margins, linear)
        return Margins(linear.lower, found.margins, found.layers)

    return bound


class _Solved(NamedTuple):
    """A problem solved up to the margins."""

    problem: Problem
    target: Any
    margins: Interval
    layers: tuple[Interval, ...]


def _solved(
    f: Classifier, label: Array, intermediate: str, threat: Threat, x: Array
) -> _Solved:
    rows = lambda z: margins(f(z), label)
    problem, _ = pose(
        rows, threat, x, slope=adaptive, max_bytes=MAX_BYTES, trained=True
    )
    solve(problem, refinement(intermediate))
    (target,) = problem.graph.outputs
    known = problem.env[target]
    folded = by_ibp(problem, target)
    known = known if folded is None else intersect(known, folded)
    return _Solved(problem, target, known, activations(problem.graph, problem.env))
