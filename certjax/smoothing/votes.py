"""Votes of the base classifier on noisy copies of one example, counted in integers.

Sample i of an example is drawn from `fold_in(key, i)` and classified in a forward pass
of `block` rows, always the same compiled shape. So the counts do not depend on the
batch size, on the order of the chunks, on the number of devices or of processes: not
even through the last bit of a logit. Memory does not depend on n.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from certjax.smoothing.confidence import check_trials
from certjax.types import Array, Classifier, Key


BLOCK = 64  # rows of one forward pass; on GPU and TPU pass more, e.g. block=512
AXIS = "samples"

Draw: TypeAlias = Callable[[Any, Array, Array], Array]
"""`draw(source, i, x) -> z`: the i-th noisy copy of x; `source` is a pytree."""


def sample_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over which `votes` spreads its samples; default: all devices."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (AXIS,))


def votes(
    f: Classifier,
    noise: Any,
    key: Key,
    x: Array,
    n: int,
    batch: int = 1000,
    *,
    block: int = BLOCK,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
) -> np.ndarray:
    """Count the predictions of `f` on n noisy copies of x.

    A copy with a NaN logit votes for no class; `n - counts.sum()` says how many did.

    Args:
      f: classifier of one example. A pytree such as `jax.tree_util.Partial(apply,
        params)` is compiled once for all weights; any other function once for itself.
      noise: a distribution of `certjax.smoothing.noise`.
      key: threefry key of this example.
      x: [...] one example, input units.
      n: number of samples, in [1, 2^31).
      batch: samples between two returns to the host; rounded up to whole blocks. It
        changes neither the counts nor the memory.
      block: rows of one forward pass.
      mesh: spread the blocks over these devices (see `sample_mesh`); None: one device.
      dtype: of the noisy input and of the floating leaves of f, e.g. jnp.bfloat16.

    Returns:
      [K] int64 counts on the host.

    Raises:
      ValueError: n or batch below 1, or a dtype that f has no leaves to be cast to.
    """
    check_trials("n", n)
    return count_range(
        f, _draw_keyed, (key, noise), x, n, batch, block=block, mesh=mesh, dtype=dtype
    )


def _draw_keyed(source: tuple[Key, Any], i: Array, x: Array) -> Array:
    key, noise = source
    return noise.sample(jax.random.fold_in(key, i), x)


def count_range(
    f: Classifier,
    draw: Draw,
    source: Any,
    x: Array,
    n: int,
    batch: int,
    *,
    block: int = BLOCK,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
) -> np.ndarray:
    """Count the predictions on `draw(source, i, x)` for i in 0..n-1; see `votes`."""
    check_trials("batch", batch)
    f = _cast(f, dtype)
    devices = 1 if mesh is None else mesh.devices.size
    last = -(-n // block)
    stride = max(1, batch // (block * devices)) * devices
    leaves, tree = jax.tree.flatten(f)
    static = tuple(None if _is_array(leaf) else leaf for leaf in leaves)
    arrays = [leaf if _is_array(leaf) else None for leaf in leaves]
    operands = _replicate((arrays, source, jnp.asarray(x, jnp.float32)), mesh)
    count = partial(
        _count_blocks, (tree, static), draw, block=block, mesh=mesh, dtype=dtype
    )
    chunks = [
        count(operands, n, first, min(first + stride, last))
        for first in range(0, last, stride)
    ]
    return np.sum([np.asarray(c, np.int64) for c in chunks], axis=0)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _cast(f: Classifier, dtype: Any) -> Classifier:
    if dtype == jnp.float32:
        return f
    leaves = [leaf for leaf in jax.tree.leaves(f) if _is_array(leaf)]
    if not leaves:
        raise ValueError(
            f"dtype={jnp.dtype(dtype).name} needs an f whose weights are leaves, got a "
            "plain function; write jax.tree_util.Partial(model.apply, variables)"
        )

    def cast(leaf: Any) -> Any:
        floating = _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(leaf, dtype) if floating else leaf

    return jax.tree.map(cast, f)


def _replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Put the operands on every device of the mesh (of every process)."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = np.asarray(jax.random.key_data(leaf))
            impl = jax.random.key_impl(leaf)
            return jax.random.wrap_key_data(jax.device_put(words, sharding), impl=impl)
        return jax.device_put(np.asarray(leaf), sharding)

    return jax.tree.map(put, tree)


@partial(jax.jit, static_argnums=(0, 1), static_argnames=("block", "mesh", "dtype"))
def _count_blocks(
    function: tuple,
    draw: Draw,
    operands: tuple,
    n: Array,
    first: Array,
    last: Array,
    *,
    block: int,
    mesh: Mesh | None,
    dtype: Any,
) -> Array:
    """[K] int32: the votes of blocks first..last-1, samples >= n masked out."""
    tree, static = function

    def count(
        operands: tuple, n: Array, first: Array, last: Array, step: int = 1
    ) -> Array:
        arrays, source, x = operands
        pairs = zip(arrays, static, strict=True)
        f = jax.tree.unflatten(tree, [s if a is None else a for a, s in pairs])

        def classify(i: Array) -> Array:
            return f(draw(source, i, x).astype(dtype))

        classes = jax.eval_shape(classify, 0).shape[0]
        body = partial(_add_block, classify, n, block, first, step)
        zero = jnp.zeros(classes, jnp.int32)
        steps = (last - first + step - 1) // step
        return jax.lax.fori_loop(0, steps, body, zero)

    if mesh is None:
        return count(operands, n, first, last)

    def local(operands: tuple, n: Array, first: Array, last: Array) -> Array:
        mine = first + jax.lax.axis_index(AXIS)
        counts = count(operands, n, mine, last, mesh.devices.size)
        return jax.lax.psum(counts, AXIS)

    everywhere = PartitionSpec()
    spread = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(everywhere,) * 4,
        out_specs=everywhere,
        check_vma=False,
    )
    return spread(operands, n, first, last)


def _add_block(
    classify: Callable[[Array], Array],
    n: Array,
    block: int,
    first: Array,
    step: int,
    turn: Array,
    counts: Array,
) -> Array:
    index = (first + turn * step) * block + jnp.arange(block)
    logits = jax.vmap(classify)(index)
    valid = (index < n) & ~jnp.any(jnp.isnan(logits), axis=-1)
    chosen = jnp.argmax(logits, axis=-1)[:, None] == jnp.arange(counts.size)
    return counts + jnp.sum(chosen & valid[:, None], axis=0, dtype=jnp.int32)
