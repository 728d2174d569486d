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
from certjax.training.diagnostics import of_layers
from certjax.training.losses import cross_entropy
from certjax.training.objectives import adversary, Terms, terms_of
from certjax.training.pixels import images
from certjax.training.recipes import Recipe
from certjax.training.regularizers import kernel_l1, Regularizer
from certjax.training.streams import stream
from certjax.types import Array, Attack, Classifier, Key, Objective, PyTree


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
    statistics_at: Attack | None = None,
    perturb: Callable[[Key, PyTree], PyTree] | None = None,
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
      statistics_at: an attack on the network as the running averages make it; the batch
        of its points decides the batch-norm statistics of the step instead of the clean
        batch (the policy of some papers; CTBench's and ours is the clean batch).
      perturb: `perturb(key, params) -> params`; the loss and its gradient are those of
        the perturbed weights, e.g. `gaussian_weights`. Of the stream "weights".

    Returns:
      `step(state, xs, labels) -> (state, metrics)`, xs [N, ...] uint8 (or float in
      [0, 1]), labels [N] integers. metrics are scalars: loss, natural, accuracy,
      gradient_norm, finite, the means of the objective's own metrics, and what
      `diagnostics.of_layers` says of its bounds. Where the loss or the gradient is not
      finite, `finite` is False and the state is unchanged.
    """

    def loss(params: PyTree, state: TrainState, xs: Array, labels: Array) -> tuple:
        step = state.step
        plain = params
        if perturb is not None:
            params = perturb(_key(seed, "weights", step), params)
        keys = _keys(seed, "attack", step, len(xs))
        logits, statistics = clean_forward(model, params, xs) if clean else (None, {})
        known = logits
        if statistics_at is not None:
            running = classifier(model, params, state.statistics)
            zs = _attacked(statistics_at, keys, running, xs, labels)
            statistics, known = clean_forward(model, params, zs)[1], None
        f = classifier(model, params, statistics)
        terms = _batch_terms(recipe(step), keys, f, xs, labels, known)
        penalties = _penalties(regularizer, l1, terms, plain, step)
        total = sum(penalties.values(), jnp.mean(terms.loss))
        metrics = _clean_metrics(logits, labels) if clean else {}
        metrics |= _means(terms.metrics) | penalties | of_layers(terms)
        return total, (statistics, metrics)

    @jax.jit
    def step(state: TrainState, xs: Array, labels: Array) -> tuple[TrainState, Metrics]:
        xs = _augmented(augment, seed, state.step, images(xs))
        slope = jax.value_and_grad(loss, has_aux=True)
        (total, (statistics, metrics)), gradient = slope(
            state.params, state, xs, labels
        )
        again = lambda params: slope(params, state, xs, labels)[1]
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        moved = _update(optimizer, state, gradient, statistics, again)
        # inside the fused update: costs no pass over memory, unlike a cond
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        more = {"loss": total, "gradient_norm": norm, "finite": finite}
        return state, metrics | more

    return step


def _augmented(augment: Augment | None, seed: int, step: Array, xs: Array) -> Array:
    if augment is None:
        return xs
    return jax.vmap(augment)(_keys(seed, "augment", step, len(xs)), xs)


def _penalties(
    regularizer: Regularizer | None,
    l1: float,
    terms: Terms,
    params: PyTree,
    step: Array,
) -> Metrics:
    penalties = {}
    if regularizer is not None:
        penalties["regularizer"] = regularizer(terms, step)
    if l1:
        penalties["l1"] = l1 * kernel_l1(params)
    return penalties


def _key(seed: int, name: str, step: Array) -> Key:
    return jax.random.fold_in(stream(seed, name), step)


def _keys(seed: int, name: str, step: Array, n: int) -> Key:
    return jax.random.split(_key(seed, name, step), n)


def _attacked(
    attack: Attack, keys: Key, f: Classifier, xs: Array, labels: Array
) -> Array:
    """[N, ...] points that the attack finds, constants of the differentiation."""

    def one(key: Key, x: Array, label: Array) -> Array:
        return adversary(attack, key, f, x, label)

    return jax.vmap(one)(keys, xs, labels)


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
    again: Callable[[PyTree], PyTree],
) -> TrainState:
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(
        gradient, state.opt_state, state.params, gradient_at=again
    )
    return TrainState(
        optax.apply_updates(state.params, updates),
        running_average(state.statistics, statistics),
        opt_state,
        state.step + 1,
    )
