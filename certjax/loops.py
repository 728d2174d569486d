"""The one place that decides how a loop over gradient steps is compiled.

XLA:CPU (jax 0.10 to 0.12 at least, jax-ml/jax#12868) runs the input gradient of a
convolution inside a loop body 10 to 40 times slower than at top level: the kernel
that autodiff reverses is not brought into canonical form there. `loopable` gives
every convolution of any function an input gradient in another form (a plain convolution
with the flipped kernel or, on the CPU, a matrix product where that is faster), so that
`fori` may be a compiled loop on every platform.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from certjax.transposed import input_gradient
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
        Without, only where that is at most twice the size of its result.
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
    scattered = _scattered_axes(static, shape, rhs, g)
    return input_gradient(static.params, shape, rhs, g, scattered=scattered)


def _scattered_axes(static: _Static, shape: tuple, rhs: Array, g: Array) -> int:
    """How many image axes to scatter over: all, the rows, or none.

    Measured on two cores, against none. All: 1.1 to 18 times as fast for strides of 2,
    2 to 4 times for 1 and 3 input channels. Rows, which need the memory of a kernel
    column and not of all taps: 1.3 to 2.4 times where there are 1.2 times as many rows
    of inputs as of outputs, or up to 20 channels and any more rows; but 0.8 times for
    1.08 times the rows and 128 channels.
    """
    numbers = static.params["dimension_numbers"]
    channels = rhs.shape[numbers.rhs_spec[1]]
    if jax.default_backend() != "cpu":
        return 0
    if max(static.params["window_strides"]) > 1 or channels < 4:
        outputs = rhs.shape[numbers.rhs_spec[0]]
        light = rhs.size / outputs <= 2 * outputs  # products per output channel of g
        return (len(shape) - 2) if static.scatter or light else 0
    taller = shape[numbers.lhs_spec[2]] / max(g.shape[numbers.out_spec[2]], 1)
    return int(taller >= 1.2 or (taller > 1.0 and channels <= 20))
