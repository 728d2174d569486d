"""Random numbers for smoothing: the same on every device, batch and version of JAX.

Why not `jax.random.normal`: its float32 uniforms have 23 bits, so that |z| never
exceeds 5.42. A Gaussian does with probability 6e-8 per coordinate, 0.9 % per ImageNet
example: the samples would come from another distribution than the theorem's. Here the
radius of each pair has 32 bits, up to 6.76; 2e-10 per pair is missing, 2e-5 per
ImageNet example.

Why not `jax.random.bits`: it hashes two words and returns one, which one depends on
`jax_threefry_partitionable`, and rbg keys under `vmap` draw by the batch, so that the
votes of a resumed certificate could change. `threefry_2x32` is a fixed function.

Cost, CPU microseconds for 784 numbers (2 cores, vmapped over 256): 2.9, of which 2.7
for the words; `jax.random.normal` 7.6 with threefry, 10.0 with rbg.
"""

import math

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

from certjax.types import Array, Key


NAME = "threefry2x32, normals by Box-Muller"  # for records

# cos(pi/2 t) and sin(pi/2 t) / t for t in [0, 1], powers of t^2: Taylor
QUARTER = math.pi / 2
COSINE = tuple((-1) ** i * QUARTER ** (2 * i) / math.factorial(2 * i) for i in range(7))
SINE = tuple(
    (-1) ** i * QUARTER ** (2 * i + 1) / math.factorial(2 * i + 1) for i in range(7)
)


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


def normal_pair(radius: Array, angle: Array) -> tuple[Array, Array]:
    """Two independent standard normals from two words; at most 6.77 in size.

    Source: Box & Muller 1958, "A note on the generation of random normal deviates".
    """
    tail = (radius.astype(jnp.float32) + 0.5) * 2.0**-32
    length = jnp.sqrt(-2.0 * jnp.log(tail))
    # two bits choose the quadrant, thirty the place in it
    share = ((angle & 0x3FFFFFFF).astype(jnp.float32) + 0.5) * 2.0**-30
    square = share * share
    return (
        _signed(angle, length * _polynomial(COSINE, square)),
        _signed(angle << 1, length * share * _polynomial(SINE, square)),
    )


def _signed(word: Array, value: Array) -> Array:
    """`value`, negative where the first bit of the word is set."""
    return jnp.where(word >> 31 == 0, value, -value)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    total = jnp.full(x.shape, coefficients[-1], x.dtype)
    for c in coefficients[-2::-1]:
        total = total * x + c
    return total


def standard_normal(key: Key, shape: tuple[int, ...]) -> Array:
    """Independent standard normals, float32."""
    size = math.prod(shape)
    half = (size + 1) // 2
    words = bits(key, (2, half))
    pair = normal_pair(words[0], words[1])
    return jnp.concatenate(pair)[:size].reshape(shape)


def standard_laplace(key: Key, shape: tuple[int, ...]) -> Array:
    """Independent Laplace variables of scale 1, float32; at most 22.2 in size."""
    sign, tail = sign_and_tail(bits(key, shape))
    return -sign * jnp.log(tail)


def symmetric_uniform(key: Key, shape: tuple[int, ...]) -> Array:
    """Independent uniforms on [-1, 1], float32."""
    sign, tail = sign_and_tail(bits(key, shape))
    return sign * tail
