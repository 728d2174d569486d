"""Equations in the form that linear relaxations want.

A few operations bound better, or only, as a composition of others: softmax through
differences of its inputs, a quotient as a product with a reciprocal, the greater of two
values through their difference. `prepare` writes them out and drops what no output
needs. The rewritten graph computes the same function in exact arithmetic.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from certjax.bounds import composite, interval
from certjax.types import Array, Interval, PyTree
from certjax.walk import (
    Atom,
    Composite,
    Equation,
    Graph,
    Node,
    primitives as p,
    trace,
)


class Rewritten(NamedTuple):
    """What stands for an equation.

    function: of the equation's operands. Without `last` it is the whole equation; with
      `last`, an equation of that primitive follows, whose operands are those of the
      original equation and then the result of `function`.
    """

    function: Callable[..., Array]
    last: Composite | None = None
    params: dict = {}  # noqa: RUF012


rewritings: dict[Any, Callable[[Equation, list[bool]], Rewritten | None]] = {}


def prepare(f: Callable, x: PyTree) -> tuple[Graph, Any]:
    """Trace `f`, fuse its activations, rewrite, and keep what the outputs need."""
    graph, tree = trace(f, x)
    return live(rewrite(composite.fuse_activations(graph))), tree


def live(graph: Graph) -> Graph:
    """The graph without the equations that no output reads."""
    needed = {a for a in graph.outputs if isinstance(a, Node)}
    kept = []
    for equation in reversed(graph.equations):
        if needed.intersection(equation.outputs):
            needed.update(a for a in equation.inputs if isinstance(a, Node))
            kept.append(equation)
    return graph._replace(equations=tuple(reversed(kept)))


def rewrite(graph: Graph) -> Graph:
    """The graph with every rewriting of the table applied, until none applies."""
    writer = _Writer(graph)
    for equation in graph.equations:
        writer.add(equation)
    return graph._replace(
        equations=tuple(writer.equations),
        outputs=tuple(map(writer.name, graph.outputs)),
        depends=frozenset(writer.depends),
    )


class _Writer:
    """Collects the equations of the rewritten graph."""

    def __init__(self, graph: Graph) -> None:
        self.depends: set[Atom] = set(graph.depends)
        self.equations: list[Equation] = []
        self.names: dict[Atom, Atom] = {}

    def name(self, atom: Atom) -> Atom:
        """The atom that stands for `atom` in the new graph."""
        return self.names.get(atom, atom)

    def add(self, equation: Equation) -> None:
        """Append an equation, or what it is rewritten to."""
        equation = equation._replace(inputs=tuple(map(self.name, equation.inputs)))
        bounded = [a in self.depends for a in equation.inputs]
        choose = rewritings.get(equation.primitive) if any(bounded) else None
        rewritten = choose(equation, bounded) if choose else None
        if rewritten is None:
            self.keep(equation)
            return
        result = self.splice(rewritten.function, equation)
        if rewritten.last is None:
            self.names[equation.outputs[0]] = result
        else:
            inputs = (*equation.inputs, result)
            self.keep(
                Equation(
                    rewritten.last,
                    rewritten.params,
                    inputs,
                    equation.outputs,
                    equation.sources,
                )
            )

    def keep(self, equation: Equation) -> None:
        """Append an equation as it is."""
        if any(a in self.depends for a in equation.inputs):
            self.depends.update(equation.outputs)
        self.equations.append(equation)

    def splice(self, function: Callable, equation: Equation) -> Atom:
        """Append the equations of a function of the equation's operands."""
        like = [
            jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in equation.inputs
        ]
        graph, _ = trace(function, *like)
        self.names.update(zip(graph.inputs, equation.inputs, strict=True))
        for step in graph.equations:
            self.add(step._replace(sources=equation.sources))
        return self.name(graph.outputs[0])


def rewrites(*primitives: Any) -> Callable:
    """Register a rewriting of some primitives."""

    def keep(choose: Callable) -> Callable:
        rewritings.update(dict.fromkeys(primitives, choose))
        return choose

    return keep


# --------------------------------------------------------------------------- witnesses

# max(a, b) = b + max(a - b, 0), bounded as a maximum, relaxed in the difference
greater = Composite("greater", lambda a, b, _: jnp.maximum(a, b))
lesser = Composite("lesser", lambda a, b, _: jnp.minimum(a, b))
# log sum e^x = mean + log sum e^(x - mean), relaxed in the mean and the sum
log_of_sum = Composite("log_of_sum", lambda x, _, axis: jax.nn.logsumexp(x, axis=axis))


@interval.register(greater, lesser, log_of_sum)
def _monotone_without_witness(equation: Equation, *values: Any) -> Interval:
    """Bounds from the operands alone: nondecreasing in each of them."""
    ends = [
        equation.bind(*(v[i] if isinstance(v, Interval) else v for v in values))[0]
        for i in (0, 1)
    ]
    return Interval(*ends)


@rewrites(p.max_p, p.min_p)
def _of_two(equation: Equation, bounded: list[bool]) -> Rewritten | None:
    if not all(bounded) or not _is_float(equation):
        return None
    last = greater if equation.primitive is p.max_p else lesser
    return Rewritten(lambda a, b: a - b, last)


@rewrites(composite.logsumexp)
def _logsumexp(equation: Equation, _: list[bool]) -> Rewritten:
    axis = equation.params["axis"]

    def witness(x: Array) -> Array:
        mean = jnp.mean(x, axis=axis, keepdims=True)
        total = jnp.sum(jnp.exp(x - mean), axis=axis)
        return jnp.stack([jnp.squeeze(mean, axis), total])

    return Rewritten(witness, log_of_sum, {"axis": axis})


# -------------------------------------------------------------------------- whole ones


def _is_float(equation: Equation) -> bool:
    return jnp.issubdtype(equation.outputs[0].aval.dtype, jnp.floating)


def _sum_of_ratios(x: Array, axis: int) -> Array:
    """`sum_j e^(x_j - x_i)` for every i; the term j = i is the constant 1."""
    x = jnp.moveaxis(x, axis, -1)
    size = x.shape[-1]
    difference = x[..., None, :] - x[..., :, None]
    own = np.eye(size, dtype=bool).reshape((1,) * (x.ndim - 1) + (size, size))
    total = jnp.sum(jnp.exp(jnp.where(own, jnp.zeros((), x.dtype), difference)), -1)
    return jnp.moveaxis(total, -1, axis)


@rewrites(composite.softmax)
def _softmax(equation: Equation, _: list[bool]) -> Rewritten:
    """Source: Wei et al. 2023, arXiv:2303.01713, section 3 (exponential-reciprocal)."""
    axis = equation.params["axis"]
    return Rewritten(lambda x: lax.integer_pow(_sum_of_ratios(x, axis), -1))


@rewrites(composite.log_softmax)
def _log_softmax(equation: Equation, _: list[bool]) -> Rewritten:
    axis = equation.params["axis"]
    return Rewritten(lambda x: -jnp.log(_sum_of_ratios(x, axis)))


@rewrites(p.div_p)
def _quotient(equation: Equation, bounded: list[bool]) -> Rewritten | None:
    if not bounded[1] or not _is_float(equation):
        return None
    return Rewritten(lambda a, b: a * lax.integer_pow(b, -1))


@rewrites(p.mul_p)
def _product(equation: Equation, _: list[bool]) -> Rewritten | None:
    same = equation.inputs[0] is equation.inputs[1]
    return (
        Rewritten(lambda x, _: lax.square(x)) if same and _is_float(equation) else None
    )


@rewrites(p.clamp_p)
def _clamp(equation: Equation, bounded: list[bool]) -> Rewritten | None:
    if not _is_float(equation) or bounded != [False, True, False]:
        return None
    return Rewritten(lambda low, x, high: jnp.minimum(jnp.maximum(x, low), high))


@rewrites(composite.hard_tanh)
def _hard_tanh(*_: Any) -> Rewritten:
    return Rewritten(lambda x: jnp.minimum(jnp.maximum(x, -1.0), 1.0))


@rewrites(p.erfc_p)
def _erfc(*_: Any) -> Rewritten:
    return Rewritten(lambda x: 1.0 - lax.erf(x))


@rewrites(p.reduce_window_max_p, p.reduce_window_min_p)
def _pool(equation: Equation, _: list[bool]) -> Rewritten | None:
    params = equation.params
    if not _is_float(equation) or not _plain_windows(equation):
        return None
    reduce = jnp.max if equation.primitive is p.reduce_window_max_p else jnp.min
    return Rewritten(lambda x: reduce(_windows(x, params), axis=0))


def _plain_windows(equation: Equation) -> bool:
    """No dilation, and no window that lies in the padding alone."""
    params, shape = equation.params, equation.inputs[0].aval.shape
    dilations = (*params["base_dilation"], *params["window_dilation"])
    starts = [
        (n - 1) * s - low
        for n, s, (low, _) in zip(
            equation.outputs[0].aval.shape,
            params["window_strides"],
            params["padding"],
            strict=True,
        )
    ]
    return (
        all(d == 1 for d in dilations)
        and all(start < n for start, n in zip(starts, shape, strict=True))
        and all(
            low < k
            for (low, _), k in zip(
                params["padding"], params["window_dimensions"], strict=True
            )
        )
    )


def _windows(x: Array, params: dict) -> Array:
    """[window size, *output]: the entries under each window, side by side.

    Padding repeats the border entry: it lies in the same window, so that a maximum
    does not change, and no infinity enters an affine equation.
    """
    size, strides = params["window_dimensions"], params["window_strides"]
    x = jnp.pad(x, params["padding"], mode="edge")
    steps = [(n - k) // s + 1 for n, k, s in zip(x.shape, size, strides, strict=True)]
    shifted: list[Array] = []
    for start in np.ndindex(*size):
        ends = [
            i + (n - 1) * s + 1 for i, n, s in zip(start, steps, strides, strict=True)
        ]
        shifted.append(lax.slice(x, start, ends, strides))
    return jnp.stack(shifted)
