"""Slopes found by gradient ascent: `alpha_crown(f)(threat, x) -> Interval`.

Every share of a relaxation is sound, so the shares are free variables: one for every
coefficient of every row, ascended on the bound itself by projected Adam. The best value
of each row is kept, the first being CROWN's own. The intervals in front of the
nonlinearities can be ascended in the same way, layer by layer.

Source: Xu et al. 2021, arXiv:2011.13824 (alpha-CROWN).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from certjax.bounds import patches, slopes
from certjax.bounds.climb import best_of, Climb
from certjax.bounds.interval import ibp
from certjax.bounds.linear import (
    Bound,
    close,
    Closing,
    crown,
    enclose,
    enclose_output,
    pull_back,
    refinement,
    Rows,
)
from certjax.bounds.patches import Patches
from certjax.bounds.problem import (
    default_share,
    intersect_trees,
    is_exact,
    MAX_BYTES,
    pose,
    Problem,
    Refine,
    Slope,
    solve,
    unflatten,
    values_of,
)
from certjax.bounds.relax import HALF, SHARED
from certjax.bounds.rounding_linear import sound_crown
from certjax.threat import Threat
from certjax.types import Array, Interval, PyTree
from certjax.walk import Node


COPIES = 16  # shares, two moments, gradient and what the way back keeps


def alpha_crown(
    f: Callable[[PyTree], PyTree],
    steps: int = 20,
    intermediate: str = "crown",
    *,
    intermediate_steps: int = 5,
    slope: Slope = slopes.adaptive,
    max_bytes: int = MAX_BYTES,
    sound: bool = False,
) -> Bound:
    """Sound elementwise bounds of `f`: CROWN with optimised slopes.

    For every z in the set, lower <= f(z) <= upper in exact arithmetic; never looser
    than `crown(f, intermediate)` or, for "alpha", `crown(f)`. Works under jit, vmap and
    grad; its derivative is that of the bounds at the last slopes, held fixed.

    Args:
      f: a function of one example (or of one tree of arrays).
      steps: of projected Adam.
      intermediate: where the intervals in front of each nonlinearity come from: fixed,
        by "crown", "ibp" or "forward"; or "alpha": by this method, which is the
        tightest and costs several times as much.
      intermediate_steps: with "alpha", steps for these intervals.
      slope: where relu-like shares start.
      max_bytes: what the coefficients of ONE example may occupy at a time, as in
        `crown`.
      sound: enclose whatever a float evaluation of f returns, as in `crown`;
        `intermediate` is then "crown" or "ibp".

    Returns:
      `bound(threat, x) -> Interval`, lower and upper each like f(x).
    """
    climb = Climb(steps)
    if sound:
        settings = {"slope": slope, "max_bytes": max_bytes}
        return sound_crown(f, intermediate, climb=climb, **settings)
    closing = climbing(climb)
    if intermediate == "alpha":
        refine = by_alpha(climbing(climb._replace(steps=intermediate_steps)))
        known = crown(f, slope=slope, max_bytes=max_bytes)
    else:
        refine, known = refinement(intermediate), ibp(f)

    def bound(threat: Threat, x: PyTree) -> Interval:
        problem, tree = pose(f, threat, x, slope=slope, max_bytes=max_bytes)
        solve(problem, refine)
        found = [
            enclose_output(problem, atom, closing, copies=COPIES)
            for atom in problem.graph.outputs
        ]
        return intersect_trees(known(threat, x), unflatten(tree, found))

    return bound


def by_alpha(closing: Closing) -> Refine:
    """The intervals in front of the nonlinearities, by optimised slopes."""

    def refine(problem: Problem, node: Node) -> Interval | None:
        if is_exact(problem, node):
            return None
        return enclose(problem, node, closing, copies=COPIES)

    return refine


def climbing(climb: Climb) -> Closing:
    """A way to close rows: the best of some steps, with shares of its own for each."""

    def closing(problem: Problem, node: Node, rows: Rows) -> Array:
        def lower(shares: dict[int, Array]) -> tuple[Array, Array]:
            own = lambda i, _: shares.get(i)
            found = close(problem, pull_back(problem, node, copied(rows), own))
            return found, found

        start = starting_shares(problem, node, rows)
        return best_of(climb, lower, start) if start else lower({})[0]

    return closing


def copied(rows: Rows) -> Rows:
    """The rows; the walk back changes its dictionary."""
    return rows._replace(coefficients=dict(rows.coefficients))


def starting_shares(problem: Problem, node: Node, rows: Rows) -> dict[int, Array]:
    """The default shares, one for every coefficient that will arrive at them."""
    shares: dict[int, Array] = {}

    def note(i: int, coefficients: Any) -> None:
        equation = problem.graph.equations[i]
        if equation.primitive not in SHARED:
            return
        share = default_share(problem.slope, equation, values_of(problem, equation))
        output = equation.outputs[0].aval
        share = jnp.asarray(HALF if share is None else share, output.dtype)
        lead = (1,) * (len(output.shape) - share.ndim)
        whole = jnp.broadcast_to(share.reshape(*lead, *share.shape), output.shape)
        shares[i] = _for_each(whole, coefficients)

    pull_back(problem, node, copied(rows), note)
    return shares


def _for_each(share: Array, coefficients: Any) -> Array:
    if not isinstance(coefficients, Patches):
        return jnp.broadcast_to(share[None], coefficients.shape)
    under = patches.unfold(share, coefficients.window)
    count = coefficients.values.shape[0]
    return jnp.broadcast_to(under[None], (count, *under.shape))
