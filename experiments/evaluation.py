"""Clean, attacked and certified accuracy, one record per test example.

The examples that the network classifies correctly are cut into units of one compiled
shape, the last one padded. A unit is certified and attacked, its records are appended
to `certificates.jsonl`, and a run that was killed goes on with the first unit that is
not complete. An example's random key is derived from its index in the data, so its
record does not depend on the batch, the subset or the interruption.
"""

import contextlib
import dataclasses
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from certjax.certificate import certificate
from certjax.models import classifier
from certjax.specification import margins
from certjax.threat import Threat
from certjax.types import Array, Classifier, Interval, Key, PyTree
from experiments import checkpoint, devices
from experiments.console import progress
from experiments.runs import append_lines, finite, keep_lines, Stopped


Bounds = Callable[[Classifier], Callable[[Threat, Array], Interval]]
Record = dict[str, Any]
STREAM = zlib.crc32(b"evaluation")
FLAGS = {"nan", "outside"}  # true of a record if any method says so


class Weights(NamedTuple):
    """What a frozen network is evaluated with."""

    params: PyTree
    statistics: PyTree


class Examples(NamedTuple):
    """A split of a data set: images uint8 [N, ...], labels [N], positions [N]."""

    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray


class Method(NamedTuple):
    """Something that judges a batch of correctly classified examples.

    judge(weights, eps, keys, xs, labels) -> {field: [B]}, among them "nan": [B] bool;
    eps: the radius it is asked for; failed: the fields of a misclassified example.
    own_batches: judge is a host function of (weights, eps, key, examples) instead,
    which cuts the examples to its own size and derives their keys itself.
    """

    judge: Callable[..., dict[str, Any]]
    eps: float
    failed: Record
    own_batches: bool = False


def as_input(images: Array) -> Array:
    """uint8 to float32 in [0, 1]; floats are taken as they are.

    Call it outside of a compiled program: inside, the division may be contracted with
    what follows, and two programs would disagree about x by one rounding.
    """
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255.0
    return images


def select(
    examples: Examples, *, subset: int | None, skip: int, limit: int | None, seed: int
) -> Examples:
    """A random sample of `subset`, of it each `skip`-th, of these `limit` at most."""
    chosen = np.arange(len(examples.labels))
    if subset is not None and subset < len(chosen):
        chosen = np.random.default_rng(seed).choice(chosen, subset, replace=False)
        chosen.sort()
    chosen = chosen[::skip][:limit]
    return Examples(*(array[chosen] for array in examples))


def certify_method(model: nn.Module, bounds: Bounds, threat: Threat) -> Method:
    """Margins proved by a bound transformation, e.g. `ibp`, over the threat set."""

    def one(f: Classifier, eps: Array, x: Array, label: Array) -> dict[str, Array]:
        around = dataclasses.replace(threat, eps=eps)
        proved = bounds(lambda z: margins(f(z), label))(around, x).lower
        judged = certificate(f(x), label, proved)
        nan = jnp.any(jnp.isnan(proved))
        return {"certified": judged.verified, "margin": judged.margin, "nan": nan}

    @jax.jit
    def judged(weights: Weights, eps: Array, xs: Array, labels: Array) -> dict:
        f = classifier(model, *weights)
        return jax.vmap(lambda x, label: one(f, eps, x, label))(xs, labels)

    def judge(
        weights: Weights, eps: Array, keys: Key, xs: Array, labels: Array
    ) -> dict:
        del keys
        return judged(weights, eps, as_input(xs), labels)

    return Method(judge, threat.eps, {"certified": False, "margin": math.nan})


def padded(array: np.ndarray, size: int) -> np.ndarray:
    """The last row repeated up to `size` rows: one compiled shape for every batch."""
    missing = size - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])


@jax.jit
def example_keys(key: Key, index: Array) -> Key:
    """The random key of each example, from its index in the data alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def predictions(
    model: nn.Module, weights: Weights, images: np.ndarray, *, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted class [N], and whether the logits hold a NaN [N]."""

    @jax.jit
    def predict(weights: Weights, xs: Array) -> tuple[Array, Array]:
        logits = jax.vmap(classifier(model, *weights))(xs)
        return jnp.argmax(logits, axis=-1), jnp.any(jnp.isnan(logits), axis=-1)

    parts = []
    for start in range(0, len(images), batch):
        rows = images[start : start + batch]
        found = predict(weights, as_input(devices.spread(padded(rows, batch))))
        parts.append([np.asarray(part)[: len(rows)] for part in found])
    columns = zip(*parts, strict=True)
    return tuple(np.concatenate(column) for column in columns)  # type: ignore[return-value]


def judge_batch(
    method: Method, weights: Weights, examples: Examples, *, seed: int, batch: int
) -> dict[str, np.ndarray]:
    """The fields of a method for up to `batch` examples."""
    count = len(examples.labels)
    key = jax.random.fold_in(jax.random.key(seed), STREAM)
    if method.own_batches:
        return method.judge(weights, method.eps, key, examples)
    filled = Examples(*(padded(array, batch) for array in examples))
    keys = devices.spread(example_keys(key, filled.index))
    images, labels = devices.spread((filled.images, filled.labels))
    found = method.judge(weights, jnp.float32(method.eps), keys, images, labels)
    return {name: np.asarray(field)[:count] for name, field in found.items()}


class Evaluation(NamedTuple):
    """What is evaluated, on which examples, by which methods.

    weights: None until the network is trained.
    """

    model: nn.Module
    weights: Weights | None
    examples: Examples
    methods: tuple[Method, ...]
    seed: int
    batch: int


class _Clean(NamedTuple):
    """Of every example: predicted class, is it the label, do the logits hold a NaN."""

    prediction: np.ndarray
    correct: np.ndarray
    nan: np.ndarray


def full_precision() -> contextlib.AbstractContextManager[None]:
    """Within, factors of float32 keep their 24 bits, as they do on a CPU anyway.

    GPUs leave 11 of them by default and TPUs 8, which would make bounds of the exact
    function wrong by far more than float32 does. JAX_DEFAULT_MATMUL_PRECISION, where it
    is set, decides instead.
    """
    chosen = jax.config.jax_default_matmul_precision  # ty: ignore[missing-attribute]
    if jax.default_backend() == "cpu" or chosen is not None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def evaluate(task: Evaluation, file: Path, stop: Callable[[], int]) -> list[Record]:
    """Records of all examples in order; those already in `file` are not made again.

    Raises:
      Stopped: a signal came; what is finished is in the file.
    """
    weights = checkpoint.digest(task.weights)[:12]
    pairs = zip(task.examples.index, task.examples.labels, strict=True)
    labels = {int(i): int(label) for i, label in pairs}
    images = dict(zip(labels, map(_fingerprint, task.examples.images), strict=True))

    def alike(row: Record) -> bool:
        """Is it of this network and these data?"""
        about = (labels.get(row.get("index")), images.get(row.get("index")), weights)
        return about == (row.get("label", -1), row.get("image", ""), row.get("weights"))

    found = {row["index"]: row for row in keep_lines(file, alike)}
    clean, total = _clean(task), len(task.examples.index)
    with progress("evaluate", total=total, done=len(found)) as advance:
        for unit in _units(clean.correct, task.batch):
            if all(int(i) in found for i in task.examples.index[unit]):
                continue
            if signum := stop():
                raise Stopped(signum, f"after {len(found)} of {total} test examples")
            rows = [
                _row(row, weights=weights, image=images[row["index"]])
                for row in _judge(task, unit, clean)
            ]
            new = [row for row in rows if row["index"] not in found]
            append_lines(file, new)
            found |= {row["index"]: row for row in new}
            advance(len(new), "")
    return [found[int(i)] for i in task.examples.index]


def _fingerprint(image: np.ndarray) -> str:
    content = np.ascontiguousarray(image).tobytes()
    return hashlib.blake2s(content, digest_size=6).hexdigest()


def _row(row: Record, **about: str) -> Record:
    """A record as it is read back: it names what it is about, and NaN is None."""
    return finite(row | about)


def _clean(task: Evaluation) -> _Clean:
    with full_precision():
        prediction, nan = predictions(
            task.model, task.weights, task.examples.images, batch=task.batch
        )
    return _Clean(prediction, (prediction == task.examples.labels) & ~nan, nan)


def _units(correct: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Consecutive positions; each unit but the last has `batch` correct examples."""
    before = np.cumsum(correct) - correct  # correct ones before each position
    for number in range(int(before[-1]) // batch + 1):
        yield np.flatnonzero(before // batch == number)


def _judge(task: Evaluation, unit: np.ndarray, clean: _Clean) -> list[Record]:
    """The records of one unit; only its correct examples cost anything."""
    correct = unit[clean.correct[unit]]
    judged = dict(zip(correct.tolist(), _judged(task, correct), strict=True))
    failed = {name: value for m in task.methods for name, value in m.failed.items()}
    return [
        {
            "index": int(task.examples.index[i]),
            "label": int(task.examples.labels[i]),
            "prediction": int(clean.prediction[i]),
            "correct": bool(clean.correct[i]),
            "nan": bool(clean.nan[i]),
            **judged.get(i, failed),
        }
        for i in unit.tolist()
    ]


def _judged(task: Evaluation, positions: np.ndarray) -> list[Record]:
    """The fields of every method for correct examples; flags if any raised them.

    What met a NaN under an attack is not certified, whatever a bound says: the bound is
    about a function that has logits. A NaN in a bound proves nothing, but refutes
    nothing either.
    """
    if not len(positions):
        return []
    rows = Examples(*(array[positions] for array in task.examples))
    columns: dict[str, np.ndarray] = {"nan": np.zeros(len(positions), bool)}
    lost = columns["nan"]
    for method in task.methods:
        with full_precision():
            found = judge_batch(
                method, task.weights, rows, seed=task.seed, batch=task.batch
            )
        both = FLAGS & columns.keys() & found.keys()
        columns |= found | {name: columns[name] | found[name] for name in both}
        lost = lost | (found["nan"] & ~found["robust"] if "robust" in found else False)
    if "certified" in columns:
        columns["certified"] = columns["certified"] & ~lost
    names, values = columns.keys(), zip(*columns.values(), strict=True)
    return [
        {name: _plain(value) for name, value in zip(names, row, strict=True)}
        for row in values
    ]


def _plain(value: Any) -> Any:
    """A numpy scalar as Python's; words and None are so already."""
    return value.item() if isinstance(value, np.generic) else value


def curve(task: Evaluation, radii: list[float]) -> dict[str, list[float]]:
    """Percent of the task's examples that survive each method, for each radius."""
    correct = np.flatnonzero(_clean(task).correct)
    total = len(task.examples.index)
    lines = {"clean": [100 * len(correct) / total] * len(radii)}
    for radius in radii:
        methods = tuple(method._replace(eps=radius) for method in task.methods)
        rows = []
        for start in range(0, len(correct), task.batch):
            positions = correct[start : start + task.batch]
            rows += _judged(task._replace(methods=methods), positions)
        for name in ("robust", "certified"):
            if any(name in method.failed for method in methods):
                count = sum(row[name] for row in rows)
                lines.setdefault(name, []).append(
                    100 * count / len(task.examples.index)
                )
    return lines
