"""Slopes found by gradient ascent: `alpha_crown(f)(threat, x) -> Interval`.

Every share of a relaxation is sound, so the shares are free variables: one per neuron
and output row, ascended on the bound itself by projected Adam. The best value of each
row is kept, the first being CROWN's own.

Source: Xu et al. 2021, arXiv:2011.13824 (alpha-CROWN).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from certjax.bounds import slopes
from certjax.bounds.interval import ibp
from certjax.bounds.linear import (
    Bound,
    close,
    enclose_output,
    pull_back,
    refinement,
)
from certjax.bounds.problem import (
    default_share,
    intersect,
    intersect_trees,
    MAX_BYTES,
    pose,
    Problem,
    Slope,
    solve,
    unflatten,
    values_of,
)
from certjax.bounds.relax import HALF, is_float, SHARED
from certjax.loops import fori
from certjax.threat import Threat
from certjax.types import Array, Interval, PyTree
from certjax.walk import Node


def alpha_crown(
    f: Callable[[PyTree], PyTree],
    steps: int = 20,
    intermediate: str = "crown",
    *,
    step_size: float = 0.5,
    decay: float = 0.98,
    slope: Slope = slopes.adaptive,
    max_bytes: int = MAX_BYTES,
) -> Bound:
    """Sound elementwise bounds of `f`: CROWN with optimised slopes.

    For every z in the set, lower <= f(z) <= upper in exact arithmetic; never looser
    than `crown(f, intermediate)`, whose intermediate intervals are kept fixed. Works
    under jit and vmap.

    Args:
      f: a function of one example (or of one tree of arrays).
      steps: of projected Adam.
      intermediate: "crown", "ibp" or "forward", as in `crown`.
      step_size: of the first step, in units of a share, which lies in [0, 1].
      decay: factor on the step size from one step to the next.
      slope: where relu-like shares start.
      max_bytes: budget for the intermediate bounds, as in `crown`.

    Returns:
      `bound(threat, x) -> Interval`, lower and upper each like f(x).
    """
    refine = refinement(intermediate)

    def bound(threat: Threat, x: PyTree) -> Interval:
        problem, tree = pose(f, threat, x, slope=slope, max_bytes=max_bytes)
        solve(problem, refine)
        optimizer = optax.adam(optax.exponential_decay(step_size, 1, decay))
        found = []
        for atom in problem.graph.outputs:
            known = enclose_output(problem, atom)
            if atom in problem.graph.depends and is_float(atom.aval):
                known = intersect(known, ascend(problem, atom, optimizer, steps))
            found.append(known)
        return intersect_trees(ibp(f)(threat, x), unflatten(tree, found))

    return bound


def ascend(
    problem: Problem, node: Node, optimizer: optax.GradientTransformation, steps: int
) -> Interval:
    """Bounds of every entry of a node, with shares of its own for each bound."""
    shape, dtype = node.aval.shape, node.aval.dtype
    size = int(np.prod(shape))
    rows = jnp.eye(size, dtype=dtype).reshape(size, *shape)
    start = starting_shares(problem, node, 2 * size)

    def lower(shares: dict[int, Array]) -> tuple[Array, Array]:
        values = close(problem, pull_back(problem, node, rows, shares))
        return -jnp.sum(values), values

    def step(_: int, state: tuple) -> tuple:
        shares, memory, best = state
        (_, values), gradient = jax.value_and_grad(lower, has_aux=True)(shares)
        gradient = jax.tree.map(jnp.nan_to_num, gradient)
        update, memory = optimizer.update(gradient, memory)
        shares = jax.tree.map(lambda s, u: jnp.clip(s + u, 0.0, 1.0), shares, update)
        return shares, memory, _greater(values, best)

    state = (start, optimizer.init(start), jnp.full(2 * size, -jnp.inf, dtype))
    shares, _, best = fori(steps, step, state) if start else state
    best = _greater(lower(shares)[1], best)
    low, negated = jnp.split(best, 2)
    return Interval(low.reshape(shape), -negated.reshape(shape))


def _greater(values: Array, best: Array) -> Array:
    return jnp.where(values > best, values, best)


def starting_shares(problem: Problem, node: Node, count: int) -> dict[int, Array]:
    """[count, *output] for every equation in front of `node` that reads a share."""
    shares: dict[int, Array] = {}
    for i, relaxation in problem.relaxations.items():
        equation = problem.graph.equations[i]
        if relaxation is None or equation.primitive not in SHARED:
            continue
        if i > problem.positions.get(node, -1):
            continue
        first: Any = default_share(problem, equation, values_of(problem, equation))
        output = equation.outputs[0].aval
        first = jnp.asarray(HALF if first is None else first, output.dtype)
        full = jnp.broadcast_to(_like_output(first, output.shape), output.shape)
        shares[i] = jnp.broadcast_to(full[None], (count, *output.shape))
    return shares


def _like_output(share: Array, shape: tuple[int, ...]) -> Array:
    return share if share.ndim == len(shape) else share.reshape((1,) * len(shape))
