"""From a JAX function to a flat list of equations, and the loop that walks it.

This is the only file that touches JAX internals: `jax.extend.core`, and for a primitive
of our own `jax.interpreters`.
`trace` inlines every call (jit, custom derivatives, remat), unrolls a scan and turns a
cond into a selection wherever they depend on the traced arguments, so that a rule table
meets plain primitives only. `fuse` folds known runs of equations (softmax, gelu, ...)
into one named equation: matched against the reference function's own equations, traced
by the same JAX, so a lookalike with another meaning never matches.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import numpy as np
from jax.extend.core import primitives as p
from jax.interpreters import ad, batching, mlir


primitives = p  # the rule tables take them from here
stack_p = getattr(jax.lax, "stack_p", p.concatenate_p)  # primitives of newer versions
tile_p = getattr(jax.lax, "tile_p", p.broadcast_in_dim_p)
split_p = jax.lax.split_p


class Node:
    """One value of a graph: a shape and a dtype, compared by identity."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any) -> None:
        self.aval = aval


class Constant:
    """A value that does not depend on the traced arguments; may be an outer tracer."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def aval(self) -> Any:
        """Its shape and dtype."""
        return jax.typeof(self.value)


Atom = Node | Constant


class Composite:
    """A named function that stands for a run of primitives, as one equation."""

    multiple_results = False

    def __init__(self, name: str, function: Callable) -> None:
        self.name = name
        self.function = function

    def bind(self, *args: Any, **params: Any) -> Any:
        """Evaluate it."""
        return self.function(*args, **params)


class Equation(NamedTuple):
    """`outputs = primitive(*inputs, **params)`.

    sources: where it was written, innermost call first.
    """

    primitive: Any
    params: dict
    inputs: tuple[Atom, ...]
    outputs: tuple[Node, ...]
    sources: tuple

    def bind(self, *args: Any) -> list:
        """Evaluate the equation on arrays, with its own parameters untouched."""
        outs = self.primitive.bind(*args, **self.params)
        return list(outs) if self.primitive.multiple_results else [outs]

    def where(self) -> str:
        """The user's source line, for error messages."""
        lines = filter(None, map(_user_line, self.sources))
        return next(lines, "an unknown line")


Rule = Callable[[Equation, list], Iterable]


class Graph(NamedTuple):
    """Equations in the order of evaluation."""

    equations: tuple[Equation, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Atom, ...]
    depends: frozenset  # the nodes that depend on the inputs


INLINE = {
    p.jit_p: "jaxpr",
    p.closed_call_p: "call_jaxpr",
    p.remat_p: "jaxpr",
    p.custom_jvp_call_p: "call_jaxpr",
    p.custom_vjp_call_p: "call_jaxpr",
}
CUSTOM_DERIVATIVE = (p.custom_jvp_call_p, p.custom_vjp_call_p)


def trace(f: Callable, *args: Any, keep_custom: bool = False) -> tuple[Graph, Any]:
    """Flatten `f` at the shapes of `args`.

    Args:
      f: any JAX function; it may close over tracers of an outer transformation.
      args: arrays or `jax.ShapeDtypeStruct`s, or trees of them.
      keep_custom: leave functions with custom derivatives whole, as one equation, so
        that `jax.grad` of the walk uses those derivatives. Without, `stop_gradient` is
        left out too.

    Returns:
      The graph, with one input per leaf of args, and the tree of f's output.
    """
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    builder = _Builder(keep_custom)
    inputs = tuple(Node(v.aval) for v in closed.jaxpr.invars)
    builder.depends.update(inputs)
    outputs = tuple(builder.inline(closed.jaxpr, closed.consts, inputs))
    graph = Graph(tuple(builder.equations), inputs, outputs, frozenset(builder.depends))
    return graph, jax.tree.structure(shapes)


def held(f: Callable[[Any], Any], like: Any) -> tuple[Callable[[Any], Any], Any]:
    """`f` with all that it closes over constant for derivatives; its result's shape.

    (`jax.closure_convert` could do this, but keeps the last 4096 functions alive.)

    Args:
      f: a function of one tree of arrays.
      like: such a tree.
    """
    jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(like)
    constant = jaxpr.replace(consts=jax.lax.stop_gradient(jaxpr.consts))
    result = jax.tree.structure(shape)

    def g(arguments: Any) -> Any:
        values = jex.jaxpr_as_fun(constant)(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(result, values)

    return g, shape


def bilinear(
    name: str,
    compute: Callable[..., Any],
    *,
    shape: Callable[..., tuple[int, ...]],
    transposes: tuple[Callable[..., Any], Callable[..., Any]],
    batched: Callable[..., tuple[Any, int]],
) -> Any:
    """A primitive of two arrays, linear in each, whose derivatives are given.

    Args:
      name: shown in jaxprs.
      compute: `(a, b, **params) -> array`.
      shape: `(a, b, **params)` -> that of the result, whose dtype is b's.
      transposes: towards a and towards b, `(cotangent, a, b, **params) -> array`; the
        operand that is asked for has nothing but its `.aval`.
      batched: the rule of vmap, `((a, b), (axis, axis), **params) -> (array, axis)`.
    """
    primitive = jex.Primitive(name)
    primitive.def_impl(compute)
    primitive.def_abstract_eval(
        lambda a, b, **params: b.update(shape=shape(a, b, **params))
    )
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
    ad.defbilinear(primitive, *transposes)
    batching.primitive_batchers[primitive] = batched
    return primitive


def evaluate(graph: Graph, rule: Rule, *args: Any) -> list:
    """Run the graph: `rule(equation, input values)` gives the output values."""
    env = environment(graph, rule, *args)
    return [read(env, atom) for atom in graph.outputs]


def environment(graph: Graph, rule: Rule, *args: Any) -> dict[Node, Any]:
    """The value of every node of the graph."""
    env: dict[Node, Any] = dict(zip(graph.inputs, args, strict=True))
    for equation in graph.equations:
        values = rule(equation, [read(env, atom) for atom in equation.inputs])
        env.update(zip(equation.outputs, values, strict=True))
    return env


def read(env: dict, atom: Atom) -> Any:
    """The value of an atom."""
    return atom.value if isinstance(atom, Constant) else env[atom]


class _Builder:
    """Collects equations while calls are inlined."""

    def __init__(self, keep_custom: bool) -> None:
        self.equations: list[Equation] = []
        self.depends: set[Node] = set()
        self.calls: list[Any] = []  # the calls that are being inlined, outermost first
        self.keep_custom = keep_custom

    def inline(
        self, jaxpr: Any, consts: Sequence, inputs: Sequence[Atom]
    ) -> list[Atom]:
        """Append the equations of `jaxpr`, applied to `inputs`; return its outputs."""
        env: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update(zip(jaxpr.constvars, map(Constant, consts), strict=True))

        def atom(v: Any) -> Atom:
            return Constant(v.val) if isinstance(v, jex.Literal) else env[v]

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [atom(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [atom(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Atom]) -> Sequence[Atom]:
        """Append one equation, inlined where it is a call."""
        primitive = eqn.primitive
        dependent = any(a in self.depends for a in inputs if isinstance(a, Node))
        if primitive in CUSTOM_DERIVATIVE and self.keep_custom:
            return self.append(_Opaque(eqn), {}, inputs, eqn)
        if dependent and primitive is p.stop_gradient_p and not self.keep_custom:
            return inputs  # the identity; bounds must not pull back its derivative
        if primitive in INLINE:
            return self.call(eqn, eqn.params[INLINE[primitive]], inputs)
        if dependent and primitive is p.scan_p:
            return self.unroll(eqn.params, inputs)
        if dependent and primitive is p.cond_p and not self.on(inputs[0]):
            return self.select(eqn.params["branches"], inputs)
        return self.append(primitive, eqn.params, inputs, eqn)

    def call(self, eqn: Any, inner: Any, inputs: list[Atom]) -> list[Atom]:
        """The equations of a called jaxpr."""
        self.calls.append(eqn.source_info)
        jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
        outputs = self.inline(jaxpr, consts, inputs)
        self.calls.pop()
        return outputs

    def on(self, atom: Atom) -> bool:
        """Does the atom depend on the traced arguments?"""
        return isinstance(atom, Node) and atom in self.depends

    def append(self, primitive: Any, params: dict, inputs: list, eqn: Any) -> list:
        """Append a plain equation."""
        outputs = tuple(Node(v.aval) for v in eqn.outvars)
        if any(self.on(a) for a in inputs):
            self.depends.update(outputs)
        sources = (eqn.source_info, *reversed(self.calls))
        self.equations.append(
            Equation(primitive, params, tuple(inputs), outputs, sources)
        )
        return list(outputs)

    def splice(self, f: Callable, *inputs: Atom) -> list[Atom]:
        """Append the equations of a small JAX function, applied to atoms."""
        closed = jax.make_jaxpr(f)(*(_shape(a.aval) for a in inputs))
        return self.inline(closed.jaxpr, closed.consts, inputs)

    def unroll(self, params: dict, inputs: list[Atom]) -> list[Atom]:
        """A scan of constant length, written out."""
        body, length = params["jaxpr"], params["length"]
        n_consts, n_carry = _scan_counts(params)
        consts, xs = inputs[:n_consts], inputs[n_consts + n_carry :]
        carry, columns = inputs[n_consts : n_consts + n_carry], []
        for i in reversed(range(length)) if params["reverse"] else range(length):
            # i=i binds now; each slice is spliced before the next iteration
            here = [
                self.splice(lambda x, i=i: jax.lax.index_in_dim(x, i, 0, False), x)[0]
                for x in xs
            ]
            outs = self.inline(body.jaxpr, body.consts, [*consts, *carry, *here])
            carry = outs[:n_carry]
            columns.append(outs[n_carry:])
        columns = columns[::-1] if params["reverse"] else columns
        stacked = [self.stack(column) for column in zip(*columns, strict=True)]
        return [*carry, *stacked]

    def stack(self, column: tuple[Atom, ...]) -> Atom:
        """`jnp.stack` of atoms."""
        return self.splice(lambda *v: jax.numpy.stack(v), *column)[0]

    def select(self, branches: Sequence, inputs: list[Atom]) -> list[Atom]:
        """A cond whose index is known at run time: all branches, then a selection."""
        index, *operands = inputs
        results = [self.inline(b.jaxpr, b.consts, operands) for b in branches]

        def pick(i: Any, *cases: Any) -> Any:
            position = jax.numpy.clip(i, 0, len(cases) - 1)
            which = jax.numpy.broadcast_to(position, cases[0].shape)
            return jax.lax.select_n(which, *cases)

        return [
            self.splice(pick, index, *cases)[0] for cases in zip(*results, strict=True)
        ]


class _Opaque:
    """A call that is left whole: evaluated by JAX itself, custom derivative and all."""

    multiple_results = True

    def __init__(self, eqn: Any) -> None:
        # one variable per position: a repeated operand or a literal is passed by place
        jaxpr = jex.Jaxpr(
            (),
            [v for v in eqn.invars if not isinstance(v, jex.Literal)],
            eqn.outvars,
            [eqn],
            debug_info=jex.DebugInfo(eqn.primitive.name, __file__, None, None),
        )
        self.name = eqn.primitive.name
        self.positions = [
            i for i, v in enumerate(eqn.invars) if not isinstance(v, jex.Literal)
        ]
        self.function = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))

    def bind(self, *args: Any) -> Any:
        """Evaluate the call."""
        return self.function(*(args[i] for i in self.positions))


def _scan_counts(params: dict) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many its carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax >= 0.12
    return len(consts), len(carry)


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False)
    )


def _user_line(source: Any) -> str | None:
    """`file:line` of the innermost frame outside jax, flax and this package."""
    frames = getattr(getattr(source, "traceback", None), "frames", None) or ()
    libraries = ("/jax/", "/jaxlib/", "/flax/", "<frozen", os.path.dirname(__file__))
    for frame in frames:
        if not any(name in frame.file_name for name in libraries):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return None


# ------------------------------------------------------------------ fusing known runs


class Pattern(NamedTuple):
    """A composite and the reference function whose equations stand for it.

    reference: takes the tensor x and then `scalars` further scalars.
    params: static parameters that the fused equation carries, e.g. {"axis": 0}.
    """

    composite: Composite
    reference: Callable
    params: dict
    scalars: int = 0


def fuse(graph: Graph, patterns: Callable[[int], Sequence[Pattern]]) -> Graph:
    """Replace every run of equations that equals a pattern by one composite equation.

    Args:
      graph: from `trace`.
      patterns: rank of a tensor -> the patterns to look for.
    """
    equations, users, i = [], _users(graph), 0
    while i < len(graph.equations):
        fused, length = _match_any(graph, users, patterns, i)
        equations.append(fused)
        i += length
    return graph._replace(equations=tuple(equations))


def _users(graph: Graph) -> dict[Node, list[int]]:
    """Positions of the equations that read each node; -1 for a graph output."""
    users: dict[Node, list[int]] = {}
    for i, equation in enumerate(graph.equations):
        for atom in equation.inputs:
            if isinstance(atom, Node):
                users.setdefault(atom, []).append(i)
    for atom in graph.outputs:
        if isinstance(atom, Node):
            users.setdefault(atom, []).append(-1)
    return users


def _match_any(
    graph: Graph, users: dict, patterns: Callable, start: int
) -> tuple[Equation, int]:
    """The fused equation that begins at `start` and its length, else the equation."""
    first = graph.equations[start]
    tensor = next((a for a in first.inputs if a in graph.depends), None)
    if tensor is not None and jax.numpy.issubdtype(tensor.aval.dtype, np.floating):
        shape = _shape(tensor.aval)
        for pattern, weak in product(patterns(len(shape.shape)), (False, True)):
            template = _template(pattern.reference, pattern.scalars, shape, weak)
            run = graph.equations[start : start + len(template.equations)]
            inputs = _match(template, run)
            if inputs is not None and _private(run, users, start):
                fused = Equation(
                    pattern.composite,
                    pattern.params,
                    inputs,
                    run[-1].outputs,
                    first.sources,
                )
                return fused, len(run)
    return first, 1


@lru_cache(maxsize=1024)
def _template(
    reference: Callable, scalars: int, shape: jax.ShapeDtypeStruct, weak: bool
) -> Graph:
    """weak: a Python number that came as an argument is converted by an equation."""
    scalar = jax.ShapeDtypeStruct((), shape.dtype, weak_type=weak)
    return trace(reference, shape, *[scalar] * scalars)[0]


def _match(template: Graph, run: Sequence[Equation]) -> tuple[Atom, ...] | None:
    """The atoms that play the template's inputs, or None."""
    if len(run) < len(template.equations):
        return None
    bound: dict[Node, Atom] = {}
    for expected, found in zip(template.equations, run, strict=True):
        if not _same_operation(expected, found):
            return None
        pairs = zip(expected.inputs, found.inputs, strict=True)
        if not all(_unify(bound, a, b) for a, b in pairs):
            return None
        bound.update(zip(expected.outputs, found.outputs, strict=True))
    if bound.get(template.outputs[0]) is not run[-1].outputs[0]:
        return None
    return tuple(bound[node] for node in template.inputs)


def _same_operation(a: Equation, b: Equation) -> bool:
    return (
        a.primitive is b.primitive
        and len(a.inputs) == len(b.inputs)
        and [o.aval.shape for o in a.outputs] == [o.aval.shape for o in b.outputs]
        and str(a.params) == str(b.params)
    )


def _unify(bound: dict, expected: Atom, found: Atom) -> bool:
    """May `found` play the part of `expected`? Template inputs match any atom."""
    if isinstance(expected, Constant):
        return isinstance(found, Constant) and _same_value(expected.value, found.value)
    known = bound.setdefault(expected, found)
    if isinstance(known, Constant) and isinstance(found, Constant):
        return known is found or _same_value(known.value, found.value)
    same_shape = expected.aval.shape == found.aval.shape
    return known is found and same_shape


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.all(a == b))


def _private(run: Sequence[Equation], users: dict, start: int) -> bool:
    """No value inside the run, save its result, is read outside it."""
    inside = range(start, start + len(run))
    hidden = [node for equation in run[:-1] for node in equation.outputs]
    return all(i in inside for node in hidden for i in users.get(node, ()))
