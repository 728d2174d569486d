"""Aliases and the shape vocabulary that every docstring uses.

Shapes: `[H, W, C]` one image, `[...]` any one example, `[K]` logits of K classes,
`[N]` examples, `[S]` noise draws, `[R]` rows of a linear specification. Everything
is written for ONE example; a batch is made by `jax.vmap` at the edge.

Units: `eps` and `sigma` are in input units, i.e. pixels in [0, 1] BEFORE the
normalisation, which is the first layer of the model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax


Array: TypeAlias = jax.Array
Key: TypeAlias = jax.Array
Scalar: TypeAlias = float | jax.Array
PyTree: TypeAlias = Any

Classifier: TypeAlias = Callable[[Array], Array]
"""`f(x) -> logits`: a pure function of one example."""

Objective: TypeAlias = Callable[[Key, Classifier, Array, Array], Array]
"""`objective(key, f, x, label) -> []`: the training loss of one example."""

Attack: TypeAlias = Callable[[Key, Classifier, Array, Array], Array]
"""`attack(key, f, x, label) -> z`: an adversarial point, shaped like x."""


class Interval(NamedTuple):
    """The box {z : lower <= z <= upper}; two arrays (or trees of arrays) alike.

    A bound that is NaN proves nothing: compare with `>` and `<`, never with `not`.
    """

    lower: Any
    upper: Any
