"""Random numbers for smoothing: the same on every device, batch and version of JAX.

Why not `jax.random.normal`: its float32 uniforms have 23 bits, so that |z| never
exceeds 5.42. A Gaussian does with probability 6e-8 per coordinate, 0.9 % per ImageNet
example: the samples would come from another distribution than the theorem's. Here 31
bits give |z| up to 6.33; 2e-10 per coordinate is missing, 4e-5 per ImageNet example.

Why not `jax.random.bits`: it hashes two words and returns one, which one depends on
`jax_threefry_partitionable`, and rbg keys under `vmap` draw by the batch, so that the
votes of a resumed certificate could change. `threefry_2x32` is a fixed function.

Cost, CPU microseconds for 784 numbers (2 cores, vmapped over 64): 5.2, against 5.5 of
`jax.random.normal` with threefry; the words alone 1.7, against 2.7.
"""

import math

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jax.scipy.special import ndtri

from certjax.types import Array, Key


NAME = "threefry2x32"  # of the generator, for records


def _words(key: Key) -> Array:
    """The two words of a threefry key, typed or raw."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(key) if typed else key
    if data.shape != (2,):
        raise ValueError(
            f"smoothing needs one threefry2x32 key (two words), got words of shape "
            f"{data.shape}; write jax.random.key(seed, impl='threefry2x32'): the draws "
            "of rbg depend on the batch, so counts would too"
        )
    return data


def bits(key: Key, shape: tuple[int, ...]) -> Array:
    """Independent uniform uint32 words, [*shape]."""
    size = math.prod(shape)
    half = (size + 1) // 2
    high, low = _words(key)
    counters = jnp.arange(2 * half, dtype=jnp.uint32)
    return threefry_2x32((high, low), counters)[:size].reshape(shape)


def sign_and_tail(word: Array) -> tuple[Array, Array]:
    """A fair sign, and a uniform in (0, 1] on 2^31 midpoints, precise near 0."""
    sign = jnp.where(word >> 31 == 0, 1.0, -1.0).astype(jnp.float32)
    magnitude = (word & 0x7FFFFFFF).astype(jnp.float32)
    return sign, (magnitude + 0.5) * 2.0**-31


def normal_of(word: Array) -> Array:
    """The standard normal whose two-sided tail probability the word is; |z| <= 6.34."""
    sign, tail = sign_and_tail(word)
    return -sign * ndtri(0.5 * tail)


def standard_normal(key: Key, shape: tuple[int, ...]) -> Array:
    """Independent standard normals, float32."""
    return normal_of(bits(key, shape))


def standard_laplace(key: Key, shape: tuple[int, ...]) -> Array:
    """Independent Laplace variables of scale 1, float32; at most 22.2 in size."""
    sign, tail = sign_and_tail(bits(key, shape))
    return -sign * jnp.log(tail)


def symmetric_uniform(key: Key, shape: tuple[int, ...]) -> Array:
    """Independent uniforms on [-1, 1], float32."""
    sign, tail = sign_and_tail(bits(key, shape))
    return sign * tail
