"""Speed and strength beside other libraries, on one network and the same images.

    python -m experiments.benchmark suite=attack_peers rounds=5 peers.only=pgd
    python -m experiments.benchmark suite=attack_peers "peers.only='ddn,fmn'" ..
    python -m experiments.benchmark suite=attack_peers peers.weights=weights.npz ..

`peers_contests` holds the comparisons: attack, budget, opponents.
All entrants of an attack run in this process, in turns, with as many threads; whatever
they return is judged here by one and the same function. Our compilation is timed
apart. Libraries that cannot be imported are left out with a word.
"""

import importlib.util
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from certjax import attacks
from certjax.types import Array, PyTree
from experiments import console, data
from experiments.peers_contests import Contest, contests, Field, Images, Run
from experiments.runs import RunError


SHAPES = {
    "conv1_w": (4, 4, 1, 16),
    "conv2_w": (4, 4, 16, 32),
    "fc1_w": (3200, 100),
    "fc2_w": (100, 10),
}
OUTSIDE = 1e-4  # relative; a point further out than this is not counted as broken


class Row(NamedTuple):
    """One entrant's result.

    seconds: median of the turns.  compile_s: what the first call took longer, ours.
    robust: share of images still classified correctly, or moved out of the set.
    median: distance, 0 where misclassified at once, inf where not broken.
    Each turn has its own seed; robust and median are means over the turns.
    """

    contest: str
    entrant: str
    seconds: float
    compile_s: float | None
    robust: float
    median: float


def classify(weights: PyTree, x: Array) -> Array:
    """Two convolutions and two matrices: [28, 28, 1] -> [10]."""

    def conv(x: Array, kernel: Array, stride: int) -> Array:
        layout = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(
            x[None], kernel, strides, "VALID", dimension_numbers=layout
        )[0]

    h = jax.nn.relu(conv(x, weights["conv1_w"], 2) + weights["conv1_b"][None, None])
    h = jax.nn.relu(conv(h, weights["conv2_w"], 1) + weights["conv2_b"][None, None])
    h = jax.nn.relu(h.ravel() @ weights["fc1_w"] + weights["fc1_b"])
    return h @ weights["fc2_w"] + weights["fc2_b"]


def trained(images: Images, *, steps: int = 300) -> PyTree:
    """Weights after a few seconds of plain training."""
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    weights = {
        name: jax.random.normal(key, shape) * np.sqrt(2 / np.prod(shape[:-1]))
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    for name, shape in SHAPES.items():
        weights[name.replace("_w", "_b")] = jnp.zeros(shape[-1])
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(weights: PyTree, state: PyTree, xs: Array, labels: Array) -> tuple:
        def loss(weights: PyTree) -> Array:
            logits = jax.vmap(lambda x: classify(weights, x))(xs)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(each)

        updates, state = optimizer.update(jax.grad(loss)(weights), state)
        return optax.apply_updates(weights, updates), state

    state = optimizer.init(weights)
    for i in range(steps):
        rows = data.batch(len(images.xs), 128, seed=0, step=i)
        weights, state = step(weights, state, images.xs[rows], images.labels[rows])
    return weights


def pictures(xs: np.ndarray, labels: np.ndarray) -> Images:
    """Grey images as floats of 28 x 28; smaller ones are magnified and padded."""
    factor = 28 // xs.shape[1]
    xs = xs.repeat(factor, axis=1).repeat(factor, axis=2)
    room = 28 - xs.shape[1]
    sides = (room // 2, room - room // 2)
    xs = np.pad(xs, ((0, 0), sides, sides, (0, 0)))
    return Images(xs.astype(np.float32) / np.float32(255), labels.astype(np.int32))


@dataclass(frozen=True)
class Plan:
    """The part of the config of `experiments.benchmark` that concerns peers.

    data: a data set of grey images.  weights: .npz of the network, None to train it.
    first, examples: which test images.  eps, radius: in linf and l2.
    queries: of Square alone.  only: names of contests begin with one of these words.
    """

    data: str
    weights: str | None
    first: int
    examples: int
    eps: float
    radius: float
    queries: int
    only: str | None

    def __post_init__(self) -> None:
        """Refuse an empty comparison."""
        if self.examples < 1 or self.queries < 1:
            raise ValueError("examples and queries must be at least 1")


def compare(plan: Plan, rounds: int) -> Iterator[Row]:
    """Run the contests, entrants in turns; a row for each entrant."""
    if importlib.util.find_spec("torch") is None:
        raise RunError("suite=attack_peers needs PyTorch; pip install certjax[bench]")
    field = prepared(plan)
    for each in contests(plan.eps, plan.radius, plan.queries):
        words = plan.only.split(",") if plan.only else [""]
        if any(each.name.startswith(word) for word in words):
            yield from held(each, field, rounds)


def prepared(plan: Plan) -> Field:
    """The network, for JAX and for torch, and the images."""
    from experiments import peers_torch

    dataset = data.load(plan.data)
    rows = slice(plan.first, plan.first + plan.examples)
    images = pictures(dataset.x_test[rows], dataset.y_test[rows])
    if plan.weights is None:
        weights = trained(pictures(dataset.x_train, dataset.y_train))
    else:
        with np.load(plan.weights) as file:
            weights = dict(file)
    weights = {name: np.asarray(array) for name, array in weights.items()}
    threads = len(os.sched_getaffinity(0))
    arena = peers_torch.arena(weights, *images, threads)
    return Field(Partial(classify, jax.device_put(weights)), images, arena)


def held(each: Contest, field: Field, rounds: int) -> Iterator[Row]:
    """One contest: ours once to compile, then `rounds` turns of all."""
    runs, colds = {}, {}
    for entrant in each.entrants:
        try:
            run = entrant.prepare(field)
            if entrant.name == "certjax":
                colds[entrant.name] = timed(run, 0)[0]
        except ImportError as error:
            console.warn(f"{each.name}: {entrant.name} is left out, {error}")
        else:
            runs[entrant.name] = run
    turns = [{name: timed(run, i) for name, run in runs.items()} for i in range(rounds)]
    for name in runs:
        seconds = statistics.median(turn[name][0] for turn in turns)
        cold = colds.get(name)
        compile_s = None if cold is None else max(cold - seconds, 0.0)
        verdicts = [judged(each, field, turn[name][1]) for turn in turns]
        means = map(statistics.mean, zip(*verdicts, strict=True))
        yield Row(each.name, name, seconds, compile_s, *means)


def timed(run: Run, seed: int) -> tuple[float, np.ndarray]:
    """Seconds of one run, and what it returned."""
    start = time.perf_counter()
    result = run(seed)
    seconds = time.perf_counter() - start
    return seconds, np.asarray(getattr(result, "detach", lambda: result)())


def judged(each: Contest, field: Field, zs: np.ndarray) -> tuple[float, float]:
    """Robust accuracy and median distance, by our own network."""
    xs, labels = field.images
    zs = zs.reshape(xs.shape)
    right = lambda xs: np.argmax(jax.jit(jax.vmap(field.f))(xs), axis=1) == labels
    still, clean = right(zs), right(xs)
    length = attacks.lengths(each.norm, xs, zs)
    robust = still
    if each.eps is not None:
        robust = still | (length > each.eps * (1 + OUTSIDE))
    distance = np.where(still, np.inf, np.where(clean, length, 0.0))
    return float(np.mean(robust)), float(np.median(distance))


def show(rows: list[Row]) -> None:
    """The table."""
    blank = lambda value, form: "" if value is None else format(value, form)
    cells = [
        [
            f"{row.contest}: {row.entrant}",
            f"{row.seconds:.2f}",
            blank(row.compile_s, ".1f"),
            f"{100 * row.robust:.1f}",
            f"{row.median:.4f}",
        ]
        for row in rows
    ]
    columns = ["attack", "seconds", "compile s", "robust %", "median distance"]
    console.table("attacks beside other libraries", columns, cells)
