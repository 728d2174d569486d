"""Initial weights for training with interval bounds."""

import math
import zlib

import flax.linen as nn
import jax

from certjax.types import Array, Key, PyTree


JOINED = "joined"  # prefix of the layers whose outputs a residual block adds


def ibp_initialize(
    model: nn.Module, key: Key, x: Array, *, last: str = "logits"
) -> dict:
    """Variables whose interval bounds neither explode nor vanish with depth.

    Every weight tensor but that of the last layer is drawn from N(0, 2 pi / fan_in^2),
    so that the expected half-width of a layer's bounds equals that of its input. A
    layer whose name starts with "joined" enters a sum of two branches and is halved.
    Biases, the last layer and the rest keep the module's own initialisation.

    Args:
      model: a Linen module of one example.
      key: the draw of each tensor depends on the key and the tensor's path only.
      x: an example, for its shape.
      last: name of the last layer.

    Returns:
      The variables {"params": ..., "batch_stats": ...}.
    Source: Shi et al. 2021, "Fast certified robust training", arXiv:2103.16889,
    section 4.1.
    """
    variables = model.init(key, x)

    def redraw(path: tuple, value: Array) -> Array:
        *layers, leaf = (entry.key for entry in path)
        if leaf != "kernel" or layers[-1] == last:
            return value
        here = jax.random.fold_in(key, zlib.crc32("/".join(layers).encode()))
        std = math.sqrt(2 * math.pi) / math.prod(value.shape[:-1])
        halved = 0.5 if layers[-1].startswith(JOINED) else 1.0
        return halved * std * jax.random.normal(here, value.shape, value.dtype)

    params: PyTree = jax.tree_util.tree_map_with_path(redraw, variables["params"])
    return {**variables, "params": params}
