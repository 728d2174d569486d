"""Votes of the base classifier on noisy copies of one example, counted in integers.

Sample i of an example is drawn from `fold_in(key, i)` and classified in a forward pass
of `block` rows, always the same compiled shape. So the counts do not depend on the
batch size, on the order of the chunks, on the number of devices or of processes: not
even through the last bit of a logit. Memory does not depend on n.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from certjax.smoothing.confidence import check_trials
from certjax.types import Array, Classifier, Key


AXIS = "samples"

Draw: TypeAlias = Callable[[Any, Array, Array], Array]
"""`draw(source, i, x) -> z`: the i-th noisy copy of x; `source` is a pytree."""

Vote: TypeAlias = Callable[[Array], Array]
"""`vote(logits) -> [V] bool`: what is counted of a copy."""


class Forward(NamedTuple):
    """How a forward pass is computed; the keywords of `votes` and `certify`.

    block: rows of one forward pass; on GPU and TPU pass more, e.g. 512.
    mesh: spread the blocks over these devices (see `sample_mesh`); None: one device.
    dtype: of the noisy input and of the floating leaves of f, e.g. jnp.bfloat16.
    """

    block: int = 64
    mesh: Mesh | None = None
    dtype: Any = jnp.float32


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
    **how: Any,
) -> np.ndarray:
    """Count the predictions of `f` on n noisy copies of x.

    A copy with a NaN logit votes for no class; `n - counts.sum()` says how many did.

    Args:
      f: classifier of one example. A pytree such as `jax.tree_util.Partial(apply,
        params)` is compiled once for all weights; any other function once for itself.
      noise: a distribution of `certjax.smoothing.noise`.
      key: threefry key of this example.
      x: [...] one example, input units.
      n: number of samples, in [1, 2^30].
      batch: samples between two returns to the host, in whole blocks, at least one per
        device. It changes neither the counts nor the memory.
      **how: `block`, `mesh`, `dtype`, see `Forward`.

    Returns:
      [K] int64 counts on the host.

    Raises:
      ValueError: n, batch or block below 1, an f that does not return [K] logits, a
        dtype that f has no leaves to be cast to, or an x that the noise is not for.
    """
    if check := getattr(noise, "check", None):
        check(x)
    return count_range(f, _draw_keyed, (key, noise), x, n, batch, Forward(**how))


def _draw_keyed(source: tuple[Key, Any], i: Array, x: Array) -> Array:
    key, noise = source
    return noise.sample(jax.random.fold_in(key, i), x)


def count_range(  # noqa: PLR0913 - as `votes`, and what is drawn and counted
    f: Classifier,
    draw: Draw,
    source: Any,
    x: Array,
    n: int,
    batch: int = 1000,
    how: Forward = Forward(),  # noqa: B008 - a tuple
    *,
    vote: Vote | None = None,
) -> np.ndarray:
    """Count the predictions on `draw(source, i, x)` for i in 0..n-1; see `votes`.

    vote: hashable, what else than the top class is counted; [V] counts.
    """
    for name, number in (("n", n), ("batch", batch), ("block", how.block)):
        check_trials(name, number)
    how = how._replace(dtype=jnp.dtype(how.dtype))
    f = _cast(f, how.dtype)
    devices = 1 if how.mesh is None else how.mesh.devices.size
    last = -(-n // how.block)
    stride = max(1, batch // (how.block * devices)) * devices
    leaves, tree = jax.tree.flatten(f)
    static = tuple(None if _is_array(leaf) else leaf for leaf in leaves)
    arrays = [leaf if _is_array(leaf) else None for leaf in leaves]
    operands = (arrays, source, jnp.asarray(x, jnp.float32))
    count = partial(
        _count_blocks,
        (tree, static),
        (draw, vote or top_class),
        how,
        _replicate(operands, how.mesh),
        n,
    )
    total = np.int64(0)
    for first in range(0, last, stride):
        total = total + np.asarray(count(first, min(first + stride, last)))
    return total


def top_class(logits: Array) -> Array:
    """[K] bool: the class of the largest logit; none where one is NaN."""
    valid = ~jnp.any(jnp.isnan(logits))
    return valid & (jnp.arange(logits.size) == jnp.argmax(logits))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _cast(f: Classifier, dtype: np.dtype) -> Classifier:
    if dtype == np.float32:
        return f
    leaves = [leaf for leaf in jax.tree.leaves(f) if _is_array(leaf)]
    if not leaves:
        raise ValueError(
            f"dtype={dtype.name} needs an f whose weights are leaves, got a "
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
        if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = np.asarray(jax.random.key_data(leaf))
            impl = jax.random.key_impl(leaf)
            return jax.random.wrap_key_data(jax.device_put(words, sharding), impl=impl)
        return jax.device_put(np.asarray(leaf), sharding)

    return jax.tree.map(put, tree)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _count_blocks(
    function: tuple,
    rule: tuple[Draw, Vote],
    how: Forward,
    operands: tuple,
    n: Array,
    first: Array,
    last: Array,
) -> Array:
    """[V] int32: the votes of blocks first..last-1, samples >= n masked out."""
    if how.mesh is None:
        voter = _voter(function, rule, how.dtype, operands)
        return _count_steps(voter, how.block, n, first, last, 1)

    def local(operands: tuple, n: Array, first: Array, last: Array) -> Array:
        voter = _voter(function, rule, how.dtype, operands)
        mine = first + jax.lax.axis_index(AXIS)
        counts = _count_steps(voter, how.block, n, mine, last, how.mesh.size)
        return jax.lax.psum(counts, AXIS)

    everywhere = PartitionSpec()
    spread = jax.shard_map(
        local,
        mesh=how.mesh,
        in_specs=(everywhere,) * 4,
        out_specs=everywhere,
        check_vma=False,
    )
    return spread(operands, n, first, last)


def _voter(
    function: tuple, rule: tuple[Draw, Vote], dtype: np.dtype, operands: tuple
) -> Callable[[Array], Array]:
    """`voter(i) -> [V] bool` of the i-th noisy copy."""
    (tree, static), (arrays, source, x) = function, operands
    pairs = zip(arrays, static, strict=True)
    f = jax.tree.unflatten(tree, [s if a is None else a for a, s in pairs])
    draw, vote = rule
    classify = lambda i: f(draw(source, i, x).astype(dtype))
    _check_classes(classify)
    return lambda i: vote(classify(i))


def _count_steps(
    voter: Callable[[Array], Array],
    block: int,
    n: Array,
    first: Array,
    last: Array,
    step: int,
) -> Array:
    """The votes of blocks first, first + step, ... below last."""

    def counted(i: Array) -> Array:
        return (i < n) & voter(i)

    def add_block(turn: Array, counts: Array) -> Array:
        index = (first + turn * step) * block + jnp.arange(block)
        return counts + jnp.sum(jax.vmap(counted)(index), axis=0, dtype=jnp.int32)

    steps = (last - first + step - 1) // step
    zero = jnp.zeros(jax.eval_shape(voter, 0).shape, jnp.int32)
    return jax.lax.fori_loop(0, steps, add_block, zero)


def _check_classes(classify: Callable[[Array], Array]) -> None:
    logits = jax.eval_shape(classify, 0)
    shape = getattr(logits, "shape", logits)
    if len(shape) != 1 or not shape[0]:
        raise ValueError(
            f"f must return [K] logits of one example, got {shape}; batches are made "
            "here: write lambda z: model(z[None])[0]"
        )
