"""A network in two parts, and interval bounds that look at what enters each activation.

The parts are found in the traced function, so that any JAX function can be cut: no
network needs to be written as a list of layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from certjax import bounds
from certjax.bounds.interval import ACTIVATIONS, interval_step
from certjax.threat import Box, Threat
from certjax.types import Array, Classifier, Interval
from certjax.walk import Equation, Graph, Node, read, trace


Layered = Callable[[Threat, Array], tuple[Interval, tuple[Interval, ...]]]
"""`bound(threat, x) -> (bounds of the output, boxes that enter the activations)`."""


def split(f: Classifier, x: Array, *, behind: int) -> tuple[Classifier, Classifier]:
    """`first` and `second` with `f(z) = second(first(z))`, cut after an activation.

    Args:
      f: a function of one example.
      x: an example, for its shape.
      behind: number of activations in the second part.

    Raises:
      ValueError: there are not that many, or the cut would sever a second connection
        (a residual branch).
    """
    graph, tree = trace(f, jax.ShapeDtypeStruct(x.shape, x.dtype), keep_custom=True)
    places = [i for i, e in enumerate(graph.equations) if _activates(graph, e)]
    if not 0 <= behind < len(places):
        raise ValueError(
            f"cannot leave {behind} activations behind the cut: the function has "
            f"{len(places)}, and one stays in front; choose 0 to {len(places) - 1}"
        )
    position = places[len(places) - behind - 1]
    (cut,) = graph.equations[position].outputs
    before, after = _parts(graph, position, cut)

    def first(z: Array) -> Array:
        return read(_run(before, dict(zip(graph.inputs, [z], strict=True))), cut)

    def second(v: Array) -> Array:
        env = _run(after, {cut: v})
        return jax.tree.unflatten(tree, [read(env, atom) for atom in graph.outputs])

    return first, second


def _activates(graph: Graph, equation: Equation) -> bool:
    """Is it a nonlinear function of one tensor that depends on the input?"""
    primitive = equation.primitive
    named = primitive in ACTIVATIONS or primitive.name == "custom_jvp_call"
    bounded = [a for a in equation.inputs if a in graph.depends]
    return named and len(bounded) == 1 and len(equation.outputs) == 1


def _parts(graph: Graph, position: int, cut: Node) -> tuple[list, list]:
    """Equations up to the cut, and those behind it with all that are constant."""
    before = list(graph.equations[: position + 1])
    known = {o for e in before for o in e.outputs} | set(graph.inputs)
    fixed = [e for e in before if not any(o in graph.depends for o in e.outputs)]
    later = list(graph.equations[position + 1 :])
    crossing = [
        a
        for e in later
        for a in e.inputs
        if isinstance(a, Node) and a in graph.depends and a in known and a is not cut
    ]
    if crossing:
        raise ValueError(
            "the cut would sever a residual branch; choose another number of "
            "activations behind it"
        )
    return before, fixed + later


def _run(equations: list[Equation], env: dict[Node, Any]) -> dict[Node, Any]:
    for equation in equations:
        values = equation.bind(*(read(env, atom) for atom in equation.inputs))
        env.update(zip(equation.outputs, values, strict=True))
    return env


def shrunk_ibp(f: Classifier, *, shrink: float) -> Layered:
    """`ibp_with_layers`, upper ends of undecided activations multiplied by `shrink`.

    Not sound for shrink < 1: a heuristic of training, never a certificate. The boxes
    it returns are the scaled ones.

    Source: Mueller et al. 2023 (SABR), arXiv:2210.04871, section 4.3.
    """

    def bound(threat: Threat, x: Array) -> tuple[Interval, tuple[Interval, ...]]:
        first, last = split(f, x, behind=0)
        graph, _ = trace(first, x)
        layers, env = (
            [],
            dict(zip(graph.inputs, [Interval(*threat.box(x))], strict=True)),
        )
        for equation in graph.equations:
            values = [read(env, atom) for atom in equation.inputs]
            if _activates(graph, equation):
                values = [_shrunk(v, shrink) for v in values]
                layers += [v for v in values if isinstance(v, Interval)]
            env.update(
                zip(equation.outputs, interval_step(equation, values), strict=True)
            )
        box = read(env, graph.outputs[0])
        centre = 0.5 * (box.lower + box.upper)
        return bounds.ibp(last)(Box(*box), centre), tuple(layers)

    return bound


def _shrunk(value: Any, shrink: float) -> Any:
    if not isinstance(value, Interval):
        return value
    crossing = (value.lower < 0) & (value.upper > 0)
    return Interval(value.lower, jnp.where(crossing, shrink * value.upper, value.upper))
