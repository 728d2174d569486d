"""Batch normalisation for networks of one example, and who decides its statistics.

The policy: a training step runs the clean batch once (`clean_forward`), which yields
the logits and the statistics of that batch as differentiable values. Attacks, bounds
and losses of the same step then see the network frozen at these statistics
(`classifier`), an ordinary function of one example. Evaluation freezes the running
averages (`running_average`) or the mean over batches (`population_statistics`).

Batch statistics are means over the examples of a `jax.vmap` whose axis is named
`EXAMPLES`. Source of the policy: Mao et al. 2025 (CTBench), arXiv:2406.04848.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from certjax.types import Array, Classifier, PyTree


EXAMPLES = "examples"


class BatchNorm(nn.Module):
    """`(x - mean) * scale / sqrt(var + epsilon) + bias` over the last axis.

    With `train=True`, mean and (biased) variance are those of the batch, and are
    written to the collection "batch_stats" together with the count of values each was
    taken over; otherwise they are read from there, and the layer is affine.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[..., C] -> [..., C]."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        count = self.variable("batch_stats", "count", jnp.ones, ())
        if train:
            total = jax.lax.psum(1, EXAMPLES) * (x.size // shape[0])
            mean.value = _batch_mean(x, total)
            var.value = _batch_mean(jnp.square(x - _broadcast(mean.value, x)), total)
            count.value = jnp.float32(total)
        slope = scale * jax.lax.rsqrt(var.value + self.epsilon)
        centred = x - _broadcast(mean.value, x)
        return centred * _broadcast(slope, x) + _broadcast(bias, x)


def _batch_mean(x: Array, total: int) -> Array:
    """Mean over all axes but the last, and over the examples; one reduction in XLA."""
    return jax.lax.psum(jnp.sum(x, range(x.ndim - 1)), EXAMPLES) / total


def _broadcast(v: Array, x: Array) -> Array:
    return v.reshape((1,) * (x.ndim - 1) + v.shape)


def clean_forward(model: nn.Module, params: PyTree, xs: Array) -> tuple[Array, PyTree]:
    """One pass of a clean batch in training mode.

    Args:
      model: a Linen module of one example; if its `__call__` has a `train` keyword it
        is called with `train=True`.
      params: its "params" collection.
      xs: [N, ...] batch.

    Returns:
      Logits [N, K] and the statistics of this batch (an empty tree for a network
      without batch normalisation); both are differentiable in params and xs.
    """
    apply = partial(model.apply, train=True) if has_train_mode(model) else model.apply

    def one(x: Array) -> tuple[Array, PyTree]:
        return apply({"params": params}, x, mutable=["batch_stats"])

    logits, updated = jax.vmap(one, axis_name=EXAMPLES, out_axes=(0, None))(xs)
    return logits, updated.get("batch_stats", {})


def has_train_mode(model: nn.Module) -> bool:
    """Does the module's `__call__` take a `train` keyword?"""
    return "train" in inspect.signature(type(model).__call__).parameters


def classifier(model: nn.Module, params: PyTree, statistics: PyTree) -> Classifier:
    """The network frozen at given statistics: `f(x) -> logits` of one example."""
    variables = {"params": params}
    if statistics:
        variables["batch_stats"] = statistics

    def f(x: Array) -> Array:
        return cast(Array, model.apply(variables, x))

    return f


def _map_layers(rule: Callable[..., dict], *trees: PyTree) -> PyTree:
    """Apply `rule` to the {mean, var, count} record of every layer."""
    first = trees[0]
    if isinstance(first, Mapping) and set(first) == {"mean", "var", "count"}:
        return rule(*trees)
    return {name: _map_layers(rule, *(tree[name] for tree in trees)) for name in first}


def _unbiased(layer: dict) -> Array:
    n = layer["count"]
    return layer["var"] * (n / jnp.maximum(n - 1.0, 1.0))


def running_average(running: PyTree, batch: PyTree, *, momentum: float = 0.1) -> PyTree:
    """`(1 - momentum) * running + momentum * batch`, with the unbiased variance.

    The same rule, momentum and variance as `torch.nn.BatchNorm2d` in training mode.
    """

    def update(old: dict, new: dict) -> dict:
        mean = (1 - momentum) * old["mean"] + momentum * new["mean"]
        var = (1 - momentum) * old["var"] + momentum * _unbiased(new)
        return {"mean": mean, "var": var, "count": new["count"]}

    return _map_layers(update, running, batch)


def population_statistics(
    model: nn.Module, params: PyTree, batches: Iterable[Array]
) -> PyTree:
    """Average of the batch statistics over data, weighted by the size of each batch.

    What evaluation should use in place of running averages, whose weights lag behind
    the parameters.

    Args:
      model: a Linen module of one example, without arrays as attributes.
      params: its parameters.
      batches: arrays [N, ...] in [0, 1], best all of the size used in training.

    Raises:
      ValueError: there is no batch.
      TypeError: the model has an array for an attribute.
    """
    _check_hashable(model)

    def add(total: dict, new: dict) -> dict:
        count = total["count"] + new["count"]
        share = new["count"] / count
        blend = {k: total[k] + share * (new[k] - total[k]) for k in ("mean", "var")}
        return blend | {"count": count}

    average = None
    for xs in batches:
        found = _unbiased_statistics(model, params, xs)
        average = found if average is None else _map_layers(add, average, found)
    if average is None:
        raise ValueError("population_statistics needs at least one batch, got none")
    return average


def _check_hashable(model: nn.Module) -> None:
    try:
        hash(model)
    except (TypeError, ValueError):
        raise TypeError(
            f"{type(model).__name__} is compiled once for all its weights, so that its "
            "attributes must be hashable, and some are not; make arrays tuples of "
            "numbers, or parameters"
        ) from None


@partial(jax.jit, static_argnums=0)
def _unbiased_statistics(model: nn.Module, params: PyTree, xs: Array) -> PyTree:
    """Of one batch; compiled once for a model, however often its weights change."""
    _, found = clean_forward(model, params, xs)
    return _map_layers(lambda v: v | {"var": _unbiased(v)}, found)
