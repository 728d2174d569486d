"""The one place that decides how a loop over gradient steps is compiled.

XLA:CPU (jax 0.10 to 0.12 at least, jax-ml/jax#12868) runs the input gradient of a
convolution inside a loop body 10 to 40 times slower than at top level: the kernel
that autodiff reverses is not brought into canonical form there. `loopable` gives
every convolution of any function an input gradient that is itself a plain convolution
with the flipped kernel, so that `fori` may be a compiled loop on every platform.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

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


def loopable(f: Classifier, x: Array) -> Classifier:
    """`f` with convolutions whose input gradient is fast inside a loop.

    Args:
      f: any JAX function of one example; same values, same derivatives.
      x: an example of the input's shape and dtype.
    """
    like = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    graph, tree = trace(f, like, keep_custom=True)
    if not any(e.primitive is CONVOLUTION for e in graph.equations):
        return f

    def g(z: Array) -> Array:
        return jax.tree.unflatten(tree, evaluate(graph, _rule, z))

    return g


def _rule(equation: Equation, values: list) -> list:
    if equation.primitive is CONVOLUTION and _plain(equation.params):
        return [_convolution(_Static(equation.params), *values)]
    return equation.bind(*values)


class _Static:
    """Convolution parameters as a hashable static argument."""

    def __init__(self, params: dict) -> None:
        self.params = params

    def __hash__(self) -> int:
        return hash(str(self.params))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and str(self.params) == str(other.params)


def _plain(params: dict) -> bool:
    """Only ungrouped convolutions without input dilation have the closed form below."""
    return (
        params["feature_group_count"] == 1
        and params["batch_group_count"] == 1
        and all(d == 1 for d in params["lhs_dilation"])
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(static: _Static, lhs: Array, rhs: Array) -> Array:
    return CONVOLUTION.bind(lhs, rhs, **static.params)


def _forward(static: _Static, lhs: Array, rhs: Array) -> tuple[Array, tuple]:
    return _convolution(static, lhs, rhs), (lhs, rhs)


def _backward(static: _Static, residuals: tuple, g: Array) -> tuple[Array, Array]:
    lhs, rhs = residuals
    _, kernel_vjp = jax.vjp(lambda w: CONVOLUTION.bind(lhs, w, **static.params), rhs)
    return _input_gradient(static.params, lhs.shape, rhs, g), kernel_vjp(g)[0]


_convolution.defvjp(_forward, _backward)


def _input_gradient(params: dict, shape: tuple, rhs: Array, g: Array) -> Array:
    """The gradient towards the input, as one convolution of g.

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
