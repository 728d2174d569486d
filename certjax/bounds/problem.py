"""A bounding problem: a rewritten graph over a threat set, and what is known of it.

`solve` walks the equations in order. In front of each nonlinear one it asks a method
for the intervals of the operands, intersects them with interval arithmetic, and keeps
the relaxation that they give. The methods differ in nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.bounds.affine import is_affine, MIXING
from certjax.bounds.interval import interval_step
from certjax.bounds.relax import (
    bent_interval,
    is_float,
    operands,
    relax,
    Relaxation,
    Side,
)
from certjax.bounds.rewrite import prepare
from certjax.threat import Box, Linf, Threat
from certjax.types import Array, Interval, PyTree
from certjax.walk import Equation, Graph, Node, primitives as p, read


Slope = Callable[[Interval], Array]
MAX_BYTES = 2**26  # small enough for caches: larger chunks were slower on a CPU


class Problem(NamedTuple):
    """A rewritten graph over a threat set, and what is known of its nodes so far.

    env: intervals of the nodes that depend on the input, values of the others.
    relaxations: by position of the equation; filled as the intervals are found.
    anchors: one value of each node, 0 for the inputs, that satisfies every affine
      equation: a linear function of the nodes is carried by its value there, which
      an affine step does not change.
    trained: few rows, and a gradient of the weights behind them: see `solve` and
      `linear`.
    """

    graph: Graph
    threat: Threat
    x: PyTree
    env: dict[Any, Any]
    relaxations: dict[int, Relaxation]
    anchors: dict[Node, Array]
    positions: dict[Node, int]
    slope: Slope
    max_bytes: int
    trained: bool = False


Refine = Callable[[Problem, Node], Interval | None]


def pose(
    f: Callable,
    threat: Threat,
    x: PyTree,
    *,
    slope: Slope,
    max_bytes: int,
    trained: bool = False,
) -> tuple[Problem, Any]:
    """The problem before anything is known, and the tree of f's output."""
    graph, tree = prepare(f, x)
    box = threat.box(x)
    inputs = map(Interval, jax.tree.leaves(box.lower), jax.tree.leaves(box.upper))
    env = dict(zip(graph.inputs, inputs, strict=True))
    positions = {
        node: i
        for i, equation in enumerate(graph.equations)
        for node in equation.outputs
    }
    anchors = {node: jnp.zeros_like(env[node].lower) for node in graph.inputs}
    problem = Problem(
        graph, threat, x, env, {}, anchors, positions, slope, max_bytes, trained
    )
    return problem, tree


def solve(problem: Problem, refine: Refine) -> None:
    """Find the interval of every node and the relaxation of every nonlinearity.

    Of a `trained` problem, the centres of the intervals are the anchors behind the
    first nonlinearity. They need no pass of their own through the network, nor their
    derivatives one back: half of what one row costs. With very many rows, the lines'
    distances from them cost more.
    """
    centres: set[Node] = set()
    for i, equation in enumerate(problem.graph.equations):
        values = values_of(problem, equation)
        if is_nonlinear(equation, values):
            for node in {equation.inputs[j]: None for j in operands(values)}:
                found = refine(problem, node)
                if found is not None:
                    problem.env[node] = intersect(problem.env[node], found)
                    centres.discard(node)
            values = values_of(problem, equation)
            problem.relaxations[i] = relaxed(problem, equation, values)
        outputs = interval_step(equation, values)
        problem.env.update(zip(equation.outputs, outputs, strict=True))
        if problem.trained and _keeps_centre(problem, i, values, centres):
            problem.anchors[equation.outputs[0]] = (
                outputs[0].lower + outputs[0].upper
            ) / 2
            centres.add(equation.outputs[0])
        else:
            problem.anchors.update(_anchored(problem, i, values))


def _keeps_centre(problem: Problem, i: int, values: list, centres: set[Node]) -> bool:
    """May the result's anchor be its centre?

    That of a nonlinear equation may be anything; an affine one takes the centres of its
    operands to that of its result, whose interval is the exact image of theirs.
    """
    equation = problem.graph.equations[i]
    if i in problem.relaxations:
        relaxation = problem.relaxations[i]
        if relaxation is None:
            return False
        sides = (side._replace(homogeneous=False) for side in relaxation)
        problem.relaxations[i] = Relaxation(*sides)
        return True
    chosen = [equation.inputs[j] for j in operands(values)]
    return bool(chosen) and len(equation.outputs) == 1 and centres.issuperset(chosen)


def _anchored(problem: Problem, i: int, values: list) -> dict[Node, Array]:
    """The anchors of equation i's results.

    Those of a nonlinear one are free: its homogeneous line's value, if it has one,
    because that line then adds nothing to the rows, else 0.
    """
    equation = problem.graph.equations[i]
    chosen = operands(values)
    known = {j: problem.anchors.get(equation.inputs[j]) for j in chosen}
    if not known or any(anchor is None for anchor in known.values()):
        return {}
    if i not in problem.relaxations:
        full = [known.get(j, value) for j, value in enumerate(values)]
        return dict(zip(equation.outputs, equation.bind(*full), strict=True))
    relaxation = problem.relaxations[i]
    if relaxation is None:
        return {}
    line = next((side for side in relaxation if side.homogeneous), None)
    zero = jnp.zeros_like(relaxation.lower.offset)
    return {equation.outputs[0]: line.linear(*known.values()) if line else zero}


class Anchors(NamedTuple):
    """Those of a nonlinear equation: of its bounded operands, and of its result."""

    operands: list[Array]
    result: Array


def anchors_of(problem: Problem, i: int, values: list) -> Anchors:
    """The anchors of a nonlinear equation that is solved."""
    equation = problem.graph.equations[i]
    known = [problem.anchors[equation.inputs[j]] for j in operands(values)]
    return Anchors(known, problem.anchors[equation.outputs[0]])


def distance_at(side: Side, anchors: Anchors) -> Array | None:
    """How far a line lies above the result's anchor, at the operands' anchors.

    None: it goes through the anchor, which was chosen so.
    """
    if side.homogeneous:
        return None
    return side.linear(*anchors.operands) + side.offset - anchors.result


def values_of(problem: Problem, equation: Equation) -> list:
    """What is known of an equation's operands."""
    return [read(problem.env, atom) for atom in equation.inputs]


def is_nonlinear(equation: Equation, values: list) -> bool:
    """Does it need a relaxation?"""
    bounded = [isinstance(v, Interval) for v in values]
    floats = [is_float(v.lower) for v in values if isinstance(v, Interval)]
    return any(bounded) and not (is_affine(equation, bounded) and all(floats))


def relaxed(problem: Problem, equation: Equation, values: list) -> Relaxation | None:
    """The relaxation an equation starts from; None where the result is not a float."""
    if not is_float(equation.outputs[0].aval):
        return None
    return relax(equation, values, default_share(problem.slope, equation, values))


def default_share(slope: Slope, equation: Equation, values: list) -> Array | None:
    """The share of a relu-like equation by the caller's slope; None: the family's.

    Brought into [0, 1]: outside, the line would not bound the function.
    """
    x = bent_interval(equation, values)
    return None if x is None else jnp.clip(slope(x), 0.0, 1.0)


def is_exact(problem: Problem, node: Node) -> bool:
    """Has interval arithmetic lost nothing up to here?"""
    box_shaped = isinstance(problem.threat, Linf | Box)
    return node not in problem.positions or (box_shaped and mixings(problem, node) < 2)


def mixings(problem: Problem, node: Node, *, since_nonlinear: bool = False) -> int:
    """How often entries were mixed between the input and a node; 2: twice or unclear.

    Up to once, interval arithmetic on a box is exact. since_nonlinear: count from the
    last nonlinear equation on.
    """
    if node not in problem.positions:
        return 0
    equation = problem.graph.equations[problem.positions[node]]
    bounded = [a for a in equation.inputs if a in problem.graph.depends]
    if is_nonlinear(equation, values_of(problem, equation)):
        return 0 if since_nonlinear else 2
    if len(bounded) > 1:
        return 2
    before = mixings(problem, bounded[0], since_nonlinear=since_nonlinear)
    if equation.primitive in MIXING:
        return before + 1
    copies = np.prod(node.aval.shape) > np.prod(bounded[0].aval.shape)
    return 2 if copies or equation.primitive is p.gather_p else before


# --------------------------------------------------------------------- combining bounds


def intersect(known: Interval, found: Interval) -> Interval:
    """The tighter of two sound bounds at each end; `known` where `found` is NaN.

    Where rounding makes the two contradict each other, `known`.
    """
    lower = jnp.where(found.lower > known.lower, found.lower, known.lower)
    upper = jnp.where(found.upper < known.upper, found.upper, known.upper)
    agree = lower <= upper
    return Interval(
        jnp.where(agree, lower, known.lower), jnp.where(agree, upper, known.upper)
    )


def intersect_trees(known: Interval, found: Interval) -> Interval:
    """`intersect`, leaf by leaf."""
    leaves, tree = zip(*map(jax.tree.flatten, (*known, *found)), strict=True)
    pairs = [
        intersect(Interval(a, b), Interval(c, d))
        for a, b, c, d in zip(*leaves, strict=True)
    ]
    return unflatten(tree[0], pairs)


def unflatten(tree: Any, found: Sequence[Interval]) -> Interval:
    """A list of intervals as an interval of two trees."""
    return Interval(
        *(jax.tree.unflatten(tree, ends) for ends in zip(*found, strict=True))
    )
