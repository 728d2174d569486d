"""What bounds look like inside a network: intervals, stability, looseness per layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from certjax.bounds import slopes
from certjax.bounds.interval import ACTIVATIONS, interval_step
from certjax.bounds.linear import refinement
from certjax.bounds.problem import MAX_BYTES, pose, solve, values_of
from certjax.bounds.relax import bent_interval
from certjax.threat import Threat
from certjax.types import Array, Interval, PyTree
from certjax.walk import environment, read


class Layer(NamedTuple):
    """One activation of the network.

    name: the operation.  where: the line that wrote it.  interval: of its operand.
    active, inactive, unstable: [] counts of entries right of the bend, left of it, on
      both sides; for a smooth function all are unstable.
    width: [] mean width of the interval.  ibp_width: the same by interval arithmetic.
    sampled_width: [] mean width over sampled points, which no sound bound can beat.
    """

    name: str
    where: str
    interval: Interval
    active: Array
    inactive: Array
    unstable: Array
    width: Array
    ibp_width: Array
    sampled_width: Array

    @property
    def looseness(self) -> Array:
        """[] width over sampled width; 1 is exact."""
        return self.width / self.sampled_width


def report(
    f: Callable[[PyTree], PyTree],
    threat: Threat,
    x: PyTree,
    intermediate: str = "crown",
    *,
    samples: int = 64,
) -> tuple[Layer, ...]:
    """The layers of f over a threat set, in order of evaluation.

    Args:
      f: a function of one example.
      threat: the set.
      x: its centre.
      intermediate: the method of the intervals, as in `crown`.
      samples: points whose activations are compared with the intervals.
    """
    problem, _ = pose(f, threat, x, slope=slopes.adaptive, max_bytes=MAX_BYTES)
    inputs = [problem.env[node] for node in problem.graph.inputs]
    solve(problem, refinement(intermediate))
    plain = environment(problem.graph, interval_step, *inputs)
    keys = jax.random.split(jax.random.key(0), samples)

    def activations(key: Any) -> list:
        leaves = jax.tree.leaves(threat.sample(key, x))
        found = environment(problem.graph, lambda e, v: e.bind(*v), *leaves)
        return [found[node] for node in depending]

    depending = [n for n in problem.env if n in problem.graph.depends]
    sampled = dict(zip(depending, jax.vmap(activations)(keys), strict=True))
    layers = []
    for equation in problem.graph.equations:
        bounded = [a for a in equation.inputs if a in problem.graph.depends]
        if equation.primitive not in ACTIVATIONS or len(bounded) != 1:
            continue
        node, values = bounded[0], values_of(problem, equation)
        interval = read(problem.env, node)
        bent = bent_interval(equation, values)
        active, inactive = _stable(interval if bent is None else bent, bent is not None)
        points = sampled[node]
        layers.append(
            Layer(
                equation.primitive.name,
                equation.where(),
                interval,
                active,
                inactive,
                interval.lower.size - active - inactive,
                jnp.mean(interval.upper - interval.lower),
                jnp.mean(plain[node].upper - plain[node].lower),
                jnp.mean(jnp.max(points, 0) - jnp.min(points, 0)),
            )
        )
    return tuple(layers)


def _stable(x: Interval, bent: bool) -> tuple[Array, Array]:
    """Entries surely right of 0 and surely left of it."""
    if not bent:
        return jnp.zeros((), int), jnp.zeros((), int)
    return jnp.sum(x.lower >= 0), jnp.sum((x.upper <= 0) & (x.lower < 0))


def plot(layers: tuple[Layer, ...]) -> Any:
    """A matplotlib figure: stability and widths by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    counts, widths = figure.subplots(1, 2)
    places = range(len(layers))
    floor = [0.0] * len(layers)
    for kind in ("active", "inactive", "unstable"):
        height = [float(getattr(v, kind)) / v.interval.lower.size for v in layers]
        counts.bar(places, height, bottom=floor, label=kind)
        floor = [a + b for a, b in zip(floor, height, strict=True)]
    curves = {
        "interval bounds": "ibp_width",
        "these bounds": "width",
        "sampled points": "sampled_width",
    }
    for label, name in curves.items():
        height = [float(getattr(v, name)) for v in layers]
        widths.plot(places, height, "o-", label=label)
    counts.set(ylabel="share of neurons")
    widths.set(ylabel="mean width before the activation", yscale="log")
    for axes in (counts, widths):
        axes.set(xlabel="activation, in order", xticks=places)
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False
        )
    return figure
