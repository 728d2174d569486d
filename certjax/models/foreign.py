"""Networks of other module systems as pure functions of variables and one example."""

from collections.abc import Callable

from flax import nnx

from certjax.types import Array, PyTree


def from_nnx(module: nnx.Module) -> tuple[Callable[[PyTree, Array], Array], PyTree]:
    """Split a Flax NNX module into a pure function and its variables.

    The function never changes the module or the variables. Put the module in evaluation
    mode first (`module.eval()`), so that its batch norm is affine and its dropout off.

    Returns:
      `apply(variables, x) -> logits` for one example, and the variables, a pytree.
    """
    graph, variables = nnx.split(module)

    def apply(variables: PyTree, x: Array) -> Array:
        return nnx.merge(graph, variables)(x)

    return apply, variables
