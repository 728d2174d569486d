"""The one place that decides how a loop over gradient steps is compiled.

XLA:CPU (jax 0.10 to 0.12 at least, jax-ml/jax#12868) runs the input gradient of a
convolution inside a loop body 10 to 40 times slower than at top level: the kernel
that autodiff reverses is not brought into canonical form there. `loopable` gives
every convolution of any function an input gradient in another form, that of
`certjax.convolution`, so that `fori` may be a compiled loop on every platform.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from certjax.convolution import convolve
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
      f: any JAX function of one example; the same function to rounding.
      x: an example of the input's shape and dtype.
      scatter: as in `convolution.convolve`.
    """
    like = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    graph, tree = trace(f, like, keep_custom=True)
    if not any(e.primitive is CONVOLUTION for e in graph.equations):
        return f

    def rule(equation: Equation, values: list) -> list:
        if equation.primitive is CONVOLUTION:
            return [convolve(equation.params, *values, scatter=scatter)]
        return equation.bind(*values)

    def g(z: Array) -> Array:
        return jax.tree.unflatten(tree, evaluate(graph, rule, z))

    return g
