"""Functions of jax.nn that get one tight rule instead of a chain of loose ones.

`fuse_activations` finds them in a traced graph, however they were called: JAX inlines
softmax and gelu, and wraps silu and elu in a call. The match is by the equations of
the reference function itself, so another function of the same name is never taken
for it.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import jax

from certjax.walk import Composite, fuse, Graph, Pattern


def _axis_function(f: Callable) -> Callable:
    def evaluate(x: jax.Array, *, axis: int) -> jax.Array:
        return f(x, axis=axis)

    return evaluate


leaky_relu = Composite("leaky_relu", jax.nn.leaky_relu)
elu = Composite("elu", jax.nn.elu)
silu = Composite("silu", jax.nn.silu)
hard_tanh = Composite("hard_tanh", jax.nn.hard_tanh)
softplus = Composite("softplus", jax.nn.softplus)
gelu_erf = Composite("gelu_erf", partial(jax.nn.gelu, approximate=False))
gelu_tanh = Composite("gelu_tanh", partial(jax.nn.gelu, approximate=True))
softmax = Composite("softmax", _axis_function(jax.nn.softmax))
log_softmax = Composite("log_softmax", _axis_function(jax.nn.log_softmax))
logsumexp = Composite("logsumexp", _axis_function(jax.nn.logsumexp))

ELEMENTWISE = (
    Pattern(leaky_relu, jax.nn.leaky_relu, {}, scalars=1),
    Pattern(elu, jax.nn.elu, {}, scalars=1),
    Pattern(hard_tanh, jax.nn.hard_tanh, {}),
    Pattern(silu, jax.nn.silu, {}),
    Pattern(softplus, jax.nn.softplus, {}),
    Pattern(gelu_erf, gelu_erf.function, {}),
    Pattern(gelu_tanh, gelu_tanh.function, {}),
)


@lru_cache
def _patterns(rank: int) -> Sequence[Pattern]:
    """The elementwise composites, and those along each axis of a tensor."""
    along = [
        Pattern(composite, partial(composite.function, axis=axis), {"axis": axis})
        for composite in (log_softmax, logsumexp, softmax)
        for axis in range(rank)
    ]
    return (*ELEMENTWISE, *along)


def fuse_activations(graph: Graph) -> Graph:
    """The graph with every known activation as one equation."""
    return fuse(graph, _patterns)
