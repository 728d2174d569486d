"""The one place that decides how a loop over gradient steps is compiled.

XLA:CPU (jax 0.10 to 0.12 at least, jax-ml/jax#12868) runs the input gradient of a
convolution inside a loop body 10 to 40 times slower than at top level: the kernel
that autodiff reverses is not brought into canonical form there. `loopable` gives
every convolution of any function an input gradient in another form (a plain convolution
with the flipped kernel or, on the CPU, a matrix product where that is faster), so that
`fori` may be a compiled loop on every platform.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from certjax.types import Array, Classifier
from certjax.walk import Equation, evaluate, primitives, trace


CONVOLUTION = primitives.conv_general_dilated_p


def fori(steps: int, body: Callable[[Array, Any], Any], init: Any) -> Any:
    """`for i in range(steps): state = body(i, state)`, compiled once.

    The number of steps may be traced: another number does not recompile then.
    """
    return jax.lax.fori_loop(0, steps, body, init)


def loopable(f: Classifier, x: Array, *, scatter: bool = True) -> Classifier:
    """`f` with convolutions whose input gradient is fast inside a loop.

    Args:
      f: any JAX function of one example; same values, same derivatives.
      x: an example of the input's shape and dtype.
      scatter: on the CPU, allow the form that is faster for strided convolutions and
        few input channels, but holds the products of all kernel taps at once: as many
        times the size of a convolution's input as its kernel has taps, over stride^2.
    """
    like = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    graph, tree = trace(f, like, keep_custom=True)
    if not any(e.primitive is CONVOLUTION for e in graph.equations):
        return f

    def rule(equation: Equation, values: list) -> list:
        if equation.primitive is CONVOLUTION and _plain(equation.params):
            return [_convolution(_Static(equation.params, scatter), *values)]
        return equation.bind(*values)

    def g(z: Array) -> Array:
        return jax.tree.unflatten(tree, evaluate(graph, rule, z))

    return g


class _Static:
    """Convolution parameters, and the choice of form, as a hashable static argument."""

    def __init__(self, params: dict, scatter: bool) -> None:
        self.params = params
        self.scatter = scatter
        self.name = f"{params} {scatter}"

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.name == other.name


def _plain(params: dict) -> bool:
    """Only ungrouped convolutions without input dilation have the closed form below."""
    return (
        params["feature_group_count"] == 1
        and params["batch_group_count"] == 1
        and all(d == 1 for d in params["lhs_dilation"])
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(static: _Static, lhs: Array, rhs: Array) -> Array:
    return CONVOLUTION.bind(lhs, rhs, **static.params)


def _forward(static: _Static, lhs: Array, rhs: Array) -> tuple[Array, tuple]:
    return _convolution(static, lhs, rhs), (lhs, rhs)


def _backward(static: _Static, residuals: tuple, g: Array) -> tuple[Array, Array]:
    lhs, rhs = residuals
    _, kernel_vjp = jax.vjp(lambda w: CONVOLUTION.bind(lhs, w, **static.params), rhs)
    return _input_gradient(static, lhs.shape, rhs, g), kernel_vjp(g)[0]


_convolution.defvjp(_forward, _backward)


def _input_gradient(static: _Static, shape: tuple, rhs: Array, g: Array) -> Array:
    """The gradient towards the input, in the form that is fast where it runs."""
    allowed = static.scatter and jax.default_backend() == "cpu"
    if allowed and _scatters_faster(static.params, shape, rhs, g):
        return _scattered(static.params, shape, rhs, g)
    return _gathered(static.params, shape, rhs, g)


def _scatters_faster(params: dict, shape: tuple, rhs: Array, g: Array) -> bool:
    """Would `_gathered` mostly multiply zeros, or have too few channels to fill?

    It visits every kernel tap at each input position, `_scattered` at each output
    position. Measured on two cores: 1.1 to 18 times as fast for strides of 2, 2 to 4
    times for 1 and 3 input channels, 2 times for 169 inputs of 100 outputs; but
    0.7 to 0.9 times where stride is 1 and inputs and outputs are as many.
    """
    numbers = params["dimension_numbers"]
    inputs = math.prod(shape[axis] for axis in numbers.lhs_spec[2:])
    outputs = math.prod(g.shape[axis] for axis in numbers.out_spec[2:])
    return rhs.shape[numbers.rhs_spec[1]] < 8 or inputs > 1.3 * outputs


def _scattered(params: dict, shape: tuple, rhs: Array, g: Array) -> Array:
    """One matrix product to all kernel taps, each then added where it came from."""
    numbers = params["dimension_numbers"]
    out_channel, in_channel, *space = numbers.rhs_spec
    batch, out, *places = numbers.out_spec
    kernel = jnp.transpose(rhs, (out_channel, *space, in_channel))
    g = jnp.transpose(g, (batch, *places, out))
    parts = jnp.tensordot(g, kernel, 1, precision=params["precision"])
    axes = _axes(params, shape, g)
    phases: dict[tuple, list[Array]] = {}
    for tap in itertools.product(*(range(rhs.shape[axis]) for axis in space)):
        phase = tuple(axis.phase(t) for axis, t in zip(axes, tap, strict=True))
        pads = [axis.shift(t) for axis, t in zip(axes, tap, strict=True)]
        part = parts[(slice(None),) * (1 + len(space)) + tap]
        phases.setdefault(phase, []).append(_padded(part, pads))
    total = jnp.zeros(
        (g.shape[0], *(axis.inputs for axis in axes), parts.shape[-1]), parts.dtype
    )
    for phase, shifted in phases.items():
        pads = [axis.interleave(r) for axis, r in zip(axes, phase, strict=True)]
        if all(axis.places(r) for axis, r in zip(axes, phase, strict=True)):
            total += _padded(functools.reduce(jnp.add, shifted), pads)
    first, channel, *rest = numbers.lhs_spec
    order = sorted(range(total.ndim), key=lambda i: (first, *rest, channel)[i])
    return jnp.transpose(total, order)


class _Axis(NamedTuple):
    """One image axis of `_scattered`: where a tap's products belong.

    Tap t of output i came from input `stride * i + dilation * t - before`. Taps of the
    same remainder, or phase, are added before they are spread `stride` apart.
    """

    inputs: int
    outputs: int
    stride: int
    dilation: int
    before: int

    def _offset(self, tap: int) -> tuple[int, int]:
        return divmod(self.dilation * tap - self.before, self.stride)

    def places(self, phase: int) -> int:
        return -((phase - self.inputs) // self.stride)

    def phase(self, tap: int) -> int:
        return self._offset(tap)[1]

    def shift(self, tap: int) -> tuple[int, int, int]:
        """Padding that moves a tap's products to their places among the phase's."""
        low, phase = self._offset(tap)
        return low, self.places(phase) - self.outputs - low, 0

    def interleave(self, phase: int) -> tuple[int, int, int]:
        """Padding that spreads the places of a phase over the inputs."""
        used = (self.places(phase) - 1) * self.stride + 1
        return phase, self.inputs - phase - used, self.stride - 1


def _axes(params: dict, shape: tuple, g: Array) -> list[_Axis]:
    """The image axes of a convolution; g is [batch, ..., channels]."""
    sizes = [shape[axis] for axis in params["dimension_numbers"].lhs_spec[2:]]
    return [
        _Axis(*numbers)
        for numbers in zip(
            sizes,
            g.shape[1:-1],
            params["window_strides"],
            params["rhs_dilation"],
            [before for before, _ in params["padding"]],
            strict=True,
        )
    ]


def _padded(part: Array, pads: list[tuple[int, int, int]]) -> Array:
    zero = jnp.zeros((), part.dtype)
    return jax.lax.pad(part, zero, [(0, 0, 0), *pads, (0, 0, 0)])


def _gathered(params: dict, shape: tuple, rhs: Array, g: Array) -> Array:
    """One convolution of g.

    With output stride s, g is dilated by s; the kernel is flipped in space and its
    input and output channels change places.
    """
    numbers = params["dimension_numbers"]
    out_channel, in_channel, *space = numbers.rhs_spec
    kernel = jnp.swapaxes(jnp.flip(rhs, space), out_channel, in_channel)
    padding = []
    for i, (before, _) in enumerate(params["padding"]):
        reach = params["rhs_dilation"][i] * (rhs.shape[space[i]] - 1) + 1
        size = shape[numbers.lhs_spec[2 + i]]
        spread = (
            params["window_strides"][i] * (g.shape[numbers.out_spec[2 + i]] - 1) + 1
        )
        low = reach - 1 - before
        padding.append((low, size + reach - 1 - spread - low))
    return jax.lax.conv_general_dilated(
        g,
        kernel,
        window_strides=(1,) * len(space),
        padding=padding,
        lhs_dilation=params["window_strides"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=jax.lax.ConvDimensionNumbers(
            numbers.out_spec, numbers.rhs_spec, numbers.lhs_spec
        ),
        precision=params["precision"],
    )
