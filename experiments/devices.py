"""All local devices share one batch; every array of weights is on each of them."""

import functools

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from certjax.types import PyTree


@functools.cache
def _mesh() -> Mesh:
    count = jax.local_device_count()
    axes = (AxisType.Auto,)  # the default, Explicit, refuses indexing with arrays
    return jax.make_mesh((count,), ("data",), axes, devices=jax.local_devices())


def _sharding(*axes: str) -> Sharding:
    return NamedSharding(_mesh(), PartitionSpec(*axes))


def spread(tree: PyTree) -> PyTree:
    """Arrays [N, ...] cut along N over the devices, which must divide N."""
    return jax.device_put(tree, _sharding("data"))


def replicate(tree: PyTree) -> PyTree:
    """Arrays copied to each device."""
    return jax.device_put(tree, _sharding())


def replicated(tree: PyTree) -> PyTree:
    """Shapes and types in the place of arrays, as `replicate` would put them there."""
    place = _sharding()
    return jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place), tree
    )


def divisible(size: int) -> int:
    """The smallest multiple of the number of devices that is at least `size`."""
    count = jax.local_device_count()
    return -(-size // count) * count


def default_batch() -> int:
    """Examples evaluated at once: what fills the device without wasting its cache."""
    return 256 if jax.default_backend() == "cpu" else 2048
