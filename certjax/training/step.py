"""One training step as a pure function of (state, images, labels).

The state says everything: parameters, running batch statistics, optimiser state and
the integer step, from which schedules and random streams follow. A killed run that
restores it goes on exactly as if it had never stopped.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from certjax.models.batchnorm import (
    classifier,
    clean_forward,
    EXAMPLES,
    running_average,
)
from certjax.training.losses import cross_entropy
from certjax.training.objectives import Terms, terms_of
from certjax.training.pixels import images
from certjax.training.recipes import Recipe
from certjax.training.regularizers import kernel_l1, Regularizer
from certjax.training.streams import stream
from certjax.types import Array, Classifier, Key, Objective, PyTree


class TrainState(NamedTuple):
    """params; running batch statistics; optimiser state; [] int32 steps done."""

    params: PyTree
    statistics: PyTree
    opt_state: PyTree
    step: Array


Metrics: TypeAlias = dict[str, Array]
Step: TypeAlias = Callable[[TrainState, Array, Array], tuple[TrainState, Metrics]]
Augment: TypeAlias = Callable[[Key, Array], Array]


def initial_state(
    variables: dict, optimizer: optax.GradientTransformation
) -> TrainState:
    """State at step 0 from a module's variables (`model.init`, `ibp_initialize`)."""
    params = variables["params"]
    statistics = variables.get("batch_stats", {})
    return TrainState(params, statistics, optimizer.init(params), jnp.int32(0))


def train_step(  # noqa: PLR0913 - keyword-only options
    model: nn.Module,
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    regularizer: Regularizer | None = None,
    l1: float = 0.0,
    augment: Augment | None = None,
    clean: bool = True,
) -> Step:
    """Build the jitted step.

    The clean batch runs once: it gives the batch-norm statistics that the objective's
    classifier is frozen at (the gradient flows through them), and an objective that
    evaluates `f(x)` gets these logits back at no cost.

    Args:
      model: a Linen module of one example.
      recipe: step -> objective.
      optimizer: an optax transformation.
      seed: of the streams "attack" and "augment".
      regularizer: penalty on the objective's terms of the whole batch.
      l1: weight of the sum of |W| over convolutions and fully connected layers.
      augment: `augment(key, x) -> x` of one example.
      clean: run the clean batch. False saves that pass for a network without batch
        normalisation whose objective never looks at x itself; the metrics natural and
        accuracy are then left to the objective.

    Returns:
      `step(state, xs, labels) -> (state, metrics)`, xs [N, ...] uint8 (or float in
      [0, 1]), labels [N] integers. metrics are scalars: loss, natural, accuracy,
      gradient_norm, finite, and the means of the objective's own metrics. Where the
      loss or the gradient is not finite, `finite` is False and the state is unchanged.
    """

    def loss(params: PyTree, step: Array, xs: Array, labels: Array) -> tuple:
        keys = _keys(seed, "attack", step, len(xs))
        logits, statistics = clean_forward(model, params, xs) if clean else (None, {})
        f = classifier(model, params, statistics)
        terms = _batch_terms(recipe(step), keys, f, xs, labels, logits)
        penalties = {}
        if regularizer is not None:
            penalties["regularizer"] = regularizer(terms, step)
        if l1:
            penalties["l1"] = l1 * kernel_l1(params)
        total = sum(penalties.values(), jnp.mean(terms.loss))
        known = _clean_metrics(logits, labels) if clean else {}
        metrics = known | _means(terms.metrics) | penalties
        return total, (statistics, metrics)

    @jax.jit
    def step(state: TrainState, xs: Array, labels: Array) -> tuple[TrainState, Metrics]:
        xs = images(xs)
        if augment is not None:
            keys = _keys(seed, "augment", state.step, len(xs))
            xs = jax.vmap(augment)(keys, xs)
        (total, (statistics, metrics)), gradient = jax.value_and_grad(
            loss, has_aux=True
        )(state.params, state.step, xs, labels)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        moved = _update(optimizer, state, gradient, statistics)
        # inside the fused update: costs no pass over memory, unlike a cond
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        more = {"loss": total, "gradient_norm": norm, "finite": finite}
        return state, metrics | more

    return step


def _keys(seed: int, name: str, step: Array, n: int) -> Key:
    return jax.random.split(jax.random.fold_in(stream(seed, name), step), n)


def _batch_terms(
    objective: Objective,
    keys: Key,
    f: Classifier,
    xs: Array,
    labels: Array,
    logits: Array | None,
) -> Terms:
    terms = terms_of(objective)

    def one(key: Key, x: Array, label: Array, known: Array | None) -> Terms:
        g = f if known is None else remembering(f, x, known)
        return terms(key, g, x, label)

    return jax.vmap(one, axis_name=EXAMPLES)(keys, xs, labels, logits)


def remembering(f: Classifier, x: Array, logits: Array) -> Classifier:
    """`f`, answering with the known logits when it is asked about `x` itself.

    Saves the second clean pass and, above all, its backward pass, which the compiler
    cannot merge with that of the first.
    """
    return lambda z: logits if z is x else f(z)


def _clean_metrics(logits: Array, labels: Array) -> Metrics:
    return {
        "natural": jnp.mean(jax.vmap(cross_entropy)(logits, labels)),
        "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels),
    }


def _means(metrics: Metrics) -> Metrics:
    return {name: jnp.mean(values) for name, values in metrics.items()}


def _update(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradient: PyTree,
    statistics: PyTree,
) -> TrainState:
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return TrainState(
        optax.apply_updates(state.params, updates),
        running_average(state.statistics, statistics),
        opt_state,
        state.step + 1,
    )
