"""Tries to break bounds with float programs: `ibp(f)` against `ibp(f, sound=True)`.

    python -m experiments.soundness_search --cases 300
    python -m experiments.soundness_search --method crown --cases 100

Random networks are made hard on purpose: their bounds are attained at a known corner,
and the last bias puts the margin there within a few roundings of zero. Each is then
evaluated at corners, at random points and at the centre, in float32 or bfloat16 and in
many orders of summation (and by XLA, and in float64). Any value outside the bounds, and
any NaN under a bound that is not NaN, is a violation; a lower bound > 0 with a value
<= 0 is a false certificate.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from certjax.bounds import alpha_crown, crown, ibp, Interval
from certjax.specification import margins
from certjax.threat import Box


class Batch(NamedTuple):
    """Networks with their boxes.

    layers: [(W, b), ...], W [N, in, out], or [N, h, w, in, out] for a convolution of
      square images, which are flat between the layers.
    worst: [N, in], the corner of the box where the margins are least.
    activation: a name in ACTIVATIONS.
    """

    layers: list
    lower: np.ndarray
    upper: np.ndarray
    worst: np.ndarray
    activation: str = "relu"


class Row(NamedTuple):
    """One line of the table; sound and plain: see `_judge`."""

    family: str
    values: int
    plain: dict
    sound: dict
    overhead: float


# ----------------------------------------------------------------- orders of summation


def _one_by_one(terms: np.ndarray) -> np.ndarray:
    total = terms[:, 0]
    for i in range(1, terms.shape[1]):
        total = total + terms[:, i]
    return total


def _pairwise(terms: np.ndarray) -> np.ndarray:
    while terms.shape[1] > 1:
        if terms.shape[1] % 2:
            terms = np.concatenate([terms, np.zeros_like(terms[:, :1])], axis=1)
        terms = terms[:, ::2] + terms[:, 1::2]
    return terms[:, 0]


def _lanes(terms: np.ndarray, width: int = 8) -> np.ndarray:
    """As vector units do: `width` partial sums, then a tree."""
    missing = -terms.shape[1] % width
    shape = (terms.shape[0], missing, *terms.shape[2:])
    terms = np.concatenate([terms, np.zeros(shape, terms.dtype)], axis=1)
    lanes = terms.reshape(terms.shape[0], -1, width, *terms.shape[2:])
    return _pairwise(_one_by_one(lanes))


def _permuted(terms: np.ndarray) -> np.ndarray:
    order = np.random.default_rng(1).permutation(terms.shape[1])
    return _one_by_one(terms[:, order])


ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "first to last": _one_by_one,
    "last to first": lambda t: _one_by_one(t[:, ::-1]),
    "pairwise": _pairwise,
    "lanes": _lanes,
    "permuted": _permuted,
    "smallest first": lambda t: _one_by_one(np.sort(t, axis=1)),
    "largest first": lambda t: _one_by_one(np.sort(t, axis=1)[:, ::-1]),
}


def _dot(order: str, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    if order == "fused":
        return _fused(x, w)
    return ORDERS[order](x[:, :, None] * w)


def _fused(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Fused multiply-adds: products are exact in twice the precision."""
    total = np.zeros_like(w[:, 0])
    for i in range(w.shape[1]):
        product = x[:, i, None].astype(np.float64) * w[:, i].astype(np.float64)
        total = (product + total.astype(np.float64)).astype(w.dtype)
    return total


def _layer(order: str, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A dense layer, or a convolution as a dense layer of every patch."""
    if w.ndim == 3:
        return _dot(order, x, w) + b
    n, rows, _, features, channels = w.shape
    side = math.isqrt(x.shape[1] // features)
    images = x.reshape(n, side, side, features)
    windows = np.lib.stride_tricks.sliding_window_view(images, (rows, rows), (1, 2))
    places = (side - rows + 1) ** 2
    patches = np.moveaxis(windows, 3, 5).reshape(n * places, -1)
    weights = np.repeat(w.reshape(n, -1, channels), places, axis=0)
    out = _dot(order, patches, weights).reshape(n, places, channels)
    return (out + b[:, None]).reshape(n, -1)


def _rounded(f: Callable) -> Callable:
    """F in float64, rounded once."""
    return lambda x: f(x.astype(np.float64)).astype(x.dtype)


# for numpy, and for JAX; nondecreasing
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "relu": (lambda x: np.maximum(x, np.zeros((), x.dtype)), jax.nn.relu),
    "tanh": (_rounded(np.tanh), jnp.tanh),
    "sigmoid": (_rounded(scipy.special.expit), jax.nn.sigmoid),
    "softplus": (_rounded(lambda x: np.logaddexp(x, 0.0)), jax.nn.softplus),
}


def run(order: str, batch: Batch, x: np.ndarray) -> np.ndarray:
    """Margins of class 0: [N, classes - 1]."""
    for i, (w, b) in enumerate(batch.layers):
        x = ACTIVATIONS[batch.activation][0](x) if i else x
        x = _layer(order, x, w, b)
    return x[:, :1] - x[:, 1:]


def network(activation: str, layers: list, x: jax.Array) -> jax.Array:
    """The same function of one example, for JAX."""
    for i, (w, b) in enumerate(layers):
        x = ACTIVATIONS[activation][1](x) if i else x
        x = x @ w + b if w.ndim == 2 else _convolution(x, w, b)
    return margins(x, 0)


def _convolution(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    side = math.isqrt(x.size // w.shape[2])
    image = x.reshape(1, side, side, w.shape[2])
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(
        image, w, (1, 1), "VALID", dimension_numbers=numbers
    )
    return (out + b[None, None, None]).reshape(-1)


# ------------------------------------------------------------------------- the networks


def monotone(
    rng: np.random.Generator,
    cases: int,
    *,
    shapes: tuple[tuple[int, ...], ...],
    eps: float,
    activation: str = "relu",
    scales: tuple[float, float] = (1.0, 1.0),
    dtype: Any = np.float32,
) -> Batch:
    """Networks monotone in every input: interval bounds are attained at one corner.

    The first weights of one input have one sign, later ones are positive; in the last
    layer class 0 has positive weights and the others negative ones. Its bias makes the
    least margin zero, up to rounding. `scales`: of the first and of later weights.
    """
    layers = []
    for i, shape in enumerate(shapes):
        spread = np.exp2(rng.uniform(-6, 0, (cases, *shape))) / math.prod(shape[:-1])
        bias = 0.1 * scales[0] * scales[1] ** i * rng.normal(size=(cases, shape[-1]))
        layers.append((scales[min(i, 1)] * spread, bias))
    # a convolution has positive weights: no input would keep one sign otherwise
    dense = len(shapes[0]) == 2
    inputs = shapes[0][0] if dense else _pixels(*shapes[0], shapes[1][0])
    signs = rng.choice([-1.0, 1.0] if dense else [1.0], (cases, inputs))
    if dense:
        layers[0] = (layers[0][0] * signs[:, :, None], layers[0][1])
    w, b = layers[-1]
    layers[-1] = (w * np.where(np.arange(b.shape[1]) == 0, 1.0, -1.0), 0.0 * b)
    centre = rng.uniform(0.2, 0.8, (cases, inputs)).astype(dtype)
    lower, upper = (centre - dtype(eps)), (centre + dtype(eps))
    worst = np.where(signs > 0, lower, upper)
    batch = Batch(_as(layers, dtype), lower, upper, worst, activation)
    least = run("pairwise", _exact(batch), worst.astype(np.float64))
    shift = np.concatenate([0 * least[:, :1], least], axis=1)
    batch.layers[-1] = (batch.layers[-1][0], shift.astype(dtype))
    return batch


def _pixels(rows: int, _: int, features: int, channels: int, outputs: int) -> int:
    """Size of the square image that a "VALID" convolution maps to `outputs`."""
    return (math.isqrt(outputs // channels) + rows - 1) ** 2 * features


def cancelling(rng: np.random.Generator, cases: int, *, size: int, eps: float) -> Batch:
    """A linear map whose two halves cancel: large terms, margins near zero."""
    half = rng.normal(size=(cases, size // 2, 2)) * np.exp2(
        rng.integers(0, 12, (cases, size // 2, 1))
    )
    w = np.concatenate([half, -half[:, ::-1]], axis=1).astype(np.float32)
    x = rng.uniform(0.2, 0.8, (cases, size // 2)).astype(np.float32)
    centre = np.concatenate([x, x[:, ::-1]], axis=1)
    lower, upper = centre - np.float32(eps), centre + np.float32(eps)
    worst = np.where(w[:, :, 0] - w[:, :, 1] > 0, lower, upper)
    layers = [(w, np.zeros((cases, 2), np.float32))]
    return Batch(layers, lower, upper, worst)


def locally_linear(
    rng: np.random.Generator, cases: int, *, sizes: tuple[int, ...], eps: float
) -> Batch:
    """Random networks on boxes so small that hardly a relu changes sides.

    There linear bounds are attained, at the corner that the gradient names, and
    interval bounds are not.
    """
    layers = [
        (rng.normal(size=(cases, n, m)) / math.sqrt(n), rng.normal(size=(cases, m)) / 4)
        for n, m in pairwise(sizes)
    ]
    layers = _as(layers, np.float32)
    centre = rng.uniform(0.2, 0.8, (cases, sizes[0])).astype(np.float32)
    lower, upper = centre - np.float32(eps), centre + np.float32(eps)
    rows, x = np.eye(sizes[0])[None].repeat(cases, 0), centre.astype(np.float64)
    for i, (w, b) in enumerate(_as(layers, np.float64)):
        x, rows = _layer("pairwise", x, w, b), rows @ w
        if i < len(layers) - 1:
            rows, x = rows * (x > 0)[:, None], np.maximum(x, 0.0)
    worst = np.where(rows[:, :, 0] - rows[:, :, 1] > 0, lower, upper)
    batch = Batch(layers, lower, upper, worst)
    least = run("pairwise", _exact(batch), worst.astype(np.float64))
    shift = np.concatenate([0 * least[:, :1], least], axis=1)
    layers[-1] = (layers[-1][0], (layers[-1][1] + shift).astype(np.float32))
    return batch


def _as(layers: list, dtype: Any) -> list:
    return [(w.astype(dtype), b.astype(dtype)) for w, b in layers]


def _exact(batch: Batch) -> Batch:
    return batch._replace(layers=_as(batch.layers, np.float64))


DENSE = ((32, 24), (24, 24), (24, 3))

FAMILIES: dict[str, Callable[[np.random.Generator, int], Batch]] = {
    "linear, 256 inputs": partial(monotone, shapes=((256, 3),), eps=0.02),
    "linear, cancelling": partial(cancelling, size=128, eps=1e-4),
    "linear, one point": partial(cancelling, size=128, eps=0.0),
    "relu": partial(monotone, shapes=DENSE, eps=0.05),
    "relu, eps 1e-6": partial(monotone, shapes=DENSE, eps=1e-6),
    "relu, one point": partial(monotone, shapes=DENSE, eps=0.0),
    "relu, locally linear": partial(locally_linear, sizes=(32, 24, 24, 3), eps=1e-4),
    "tanh": partial(monotone, shapes=DENSE, eps=1e-3, activation="tanh"),
    "sigmoid": partial(monotone, shapes=DENSE, eps=1e-3, activation="sigmoid"),
    "softplus": partial(monotone, shapes=DENSE, eps=1e-3, activation="softplus"),
    "convolution": partial(monotone, shapes=((3, 3, 2, 4), (64, 3)), eps=0.01),
    "huge weights": partial(monotone, shapes=DENSE, eps=0.02, scales=(1e18, 1e7)),
    "overflowing weights": partial(
        monotone, shapes=DENSE, eps=0.02, scales=(1e28, 1e5)
    ),
    "tiny weights": partial(monotone, shapes=DENSE, eps=0.02, scales=(1e-22, 1e-8)),
    "bfloat16": partial(
        monotone, shapes=((16, 16), (16, 3)), eps=0.05, dtype=jnp.bfloat16.dtype.type
    ),
}


# ------------------------------------------------------------------------ the judgement


def _points(rng: np.random.Generator, batch: Batch) -> Iterator[np.ndarray]:
    """The worst corner and its opposite, the centre, random corners and points."""
    low, high = batch.lower, batch.upper
    yield batch.worst
    yield np.where(batch.worst == low, high, low)
    yield np.clip((low + (high - low) / 2).astype(low.dtype), low, high)
    yield np.where(rng.random(low.shape) < 0.5, low, high)
    inner = low + (high - low) * rng.random(low.shape).astype(low.dtype)
    yield np.clip(inner, low, high)


def _values(rng: np.random.Generator, batch: Batch) -> Iterator[np.ndarray]:
    """What float programs return, and the exact values; [N, classes - 1] each."""
    dtype = batch.lower.dtype
    f = partial(network, batch.activation)
    batched = jax.jit(jax.vmap(f))
    alone = jax.jit(lambda layers, x: jax.lax.map(lambda v: f(*v), (layers, x)))
    for x in _points(rng, batch):
        for order in [*ORDERS, *(["fused"] if dtype == np.float32 else [])]:
            yield run(order, batch, x)
        yield np.asarray(batched(batch.layers, x))
        yield np.asarray(alone(batch.layers, x))
        yield run("pairwise", _exact(batch), x.astype(np.float64))


# plain and sound
METHODS: dict[str, tuple[Callable, Callable]] = {
    "ibp": (ibp, partial(ibp, sound=True)),
    "crown": (crown, partial(crown, sound=True)),
    "alpha_crown": (
        partial(alpha_crown, steps=5),
        partial(alpha_crown, steps=5, sound=True),
    ),
}


def _bounds(batch: Batch, method: Callable) -> Interval:
    def bound(layers: list, lower: jax.Array, upper: jax.Array) -> Interval:
        f = partial(network, batch.activation, layers)
        return method(f)(Box(lower, upper), lower)

    ends = jax.jit(jax.vmap(bound))(batch.layers, batch.lower, batch.upper)
    return Interval(*(np.asarray(end).astype(np.float64) for end in ends))


def _scale(batch: Batch) -> np.ndarray:
    """[N, classes - 1]: the sums of the magnitudes that make the margins."""
    x = np.maximum(np.abs(batch.lower), np.abs(batch.upper)).astype(np.float64)
    last = len(batch.layers) - 1
    for i, (w, b) in enumerate(_exact(batch).layers):
        x = _layer("pairwise", x, np.abs(w), np.abs(b))
        x = x if i == last else ACTIVATIONS[batch.activation][0](x)
    return x[:, :1] + x[:, 1:]


def _judge(bounds: Interval, values: np.ndarray, ulp: np.ndarray) -> dict:
    """Values outside, the worst in ulps, false certificates, bounds that say nothing.

    values: [V, N, classes - 1] in float64.
    ulp: [N, classes - 1], one unit in the last place of the sum of magnitudes.
    """
    lower, upper = bounds
    known = ~(np.isnan(lower) | np.isnan(upper))
    with np.errstate(invalid="ignore"):
        excess = np.fmax(lower - values, values - upper)
        excess = np.where(np.isnan(values), np.inf, excess)
        outside = known & (excess > 0)
        ulps = np.where(outside, excess / ulp, 0.0)
    certified = np.all(lower > 0, axis=-1)
    false = certified & np.any(~(values > 0), axis=(0, 2))
    return {
        "outside": int(outside.sum()),
        "ulps": float(ulps.max()),
        "false": int(false.sum()),
        "empty": float(np.mean(~(np.isfinite(lower) & np.isfinite(upper)))),
    }


def search(family: str, cases: int, seed: int = 0, method: str = "ibp") -> Row:
    """One family of networks: counts of violations of both kinds of bounds."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        batch = FAMILIES[family](rng, cases)
        values = np.stack([np.asarray(v, np.float64) for v in _values(rng, batch)])
    plain, sound = (_bounds(batch, bound) for bound in METHODS[method])
    ulp = float(jnp.finfo(batch.lower.dtype).eps) * _scale(batch)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (sound.upper - sound.lower) / (plain.upper - plain.lower)
    finite = ratio[np.isfinite(ratio)]
    overhead = float(np.median(finite)) - 1 if finite.size else float("nan")
    judged = [_judge(bounds, values, ulp) for bounds in (plain, sound)]
    return Row(family, values.size, *judged, overhead)


def table(rows: list[Row], method: str) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"| networks | values | outside `{method}` | worst, ulps | false certificates "
        "| outside `sound=True` | false certificates | no bound | wider by |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        plain, sound = row.plain, row.sound
        wider = f"{100 * row.overhead:.2g} %" if np.isfinite(row.overhead) else "-"
        lines.append(
            f"| {row.family} | {row.values} | {plain['outside']} | {plain['ulps']:.2g} "
            f"| {plain['false']} | {sound['outside']} | {sound['false']} "
            f"| {sound['empty']:.0%} | {wider} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all families and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300, help="networks per family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=METHODS, default="ibp")
    chosen = parser.parse_args()
    numbers = (chosen.cases, chosen.seed, chosen.method)
    print(table([search(family, *numbers) for family in FAMILIES], chosen.method))


if __name__ == "__main__":
    main()
