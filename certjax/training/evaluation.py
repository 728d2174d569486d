"""Clean and IBP-certified accuracy of a network over a data set."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from certjax.bounds import ibp
from certjax.certificate import certificate
from certjax.models.batchnorm import classifier
from certjax.specification import margins
from certjax.threat import Threat
from certjax.training.pixels import images
from certjax.types import Array, PyTree


class Evaluation(NamedTuple):
    """Shares in [0, 1] of all examples; certified is NaN where no threat was given."""

    natural: float
    certified: float
    examples: int


def evaluator(model: nn.Module, *, batch: int = 500) -> Callable[..., Evaluation]:
    """Build `evaluate(params, statistics, images, labels, threat=None)`.

    One compiled program serves every radius and every number of examples: the last
    batch is padded and the padding masked. Nothing with a NaN counts as certified.

    Args:
      model: a Linen module of one example.
      batch: examples per compiled call.
    """

    @jax.jit
    def count(
        params: PyTree,
        statistics: PyTree,
        threat: Threat | None,
        xs: Array,
        labels: Array,
        mask: Array,
    ) -> tuple[Array, Array]:
        f = classifier(model, params, statistics)

        def one(x: Array, label: Array) -> tuple[Array, Array]:
            logits = f(x)
            if threat is None:
                return jnp.argmax(logits) == label, jnp.bool_(False)
            margin = ibp(lambda z: margins(f(z), label))(threat, x)
            judged = certificate(logits, label, margin.lower)
            return judged.prediction == label, judged.verified

        correct, verified = jax.vmap(one)(images(xs), labels)
        return jnp.sum(correct & mask), jnp.sum(verified & mask)

    def evaluate(
        params: PyTree,
        statistics: PyTree,
        xs: np.ndarray,
        labels: np.ndarray,
        threat: Threat | None = None,
    ) -> Evaluation:
        if len(xs) != len(labels) or not len(xs):
            raise ValueError(
                f"need as many labels as images, and some: got {len(xs)}, {len(labels)}"
            )
        totals = np.zeros(2, np.int64)
        for start in range(0, len(xs), batch):
            piece = slice(start, start + batch)
            padded = _padded(xs[piece], labels[piece], batch)
            totals += np.asarray(count(params, statistics, threat, *padded), np.int64)
        natural, certified = (totals / len(xs)).tolist()
        missing = threat is None
        return Evaluation(natural, float("nan") if missing else certified, len(xs))

    return evaluate


def _padded(xs: np.ndarray, labels: np.ndarray, size: int) -> tuple:
    """A full batch: the first example repeated at the end, and a mask."""
    missing = size - len(xs)
    index = np.concatenate([np.arange(len(xs)), np.zeros(missing, np.int64)])
    return xs[index], labels[index], np.arange(size) < len(xs)
