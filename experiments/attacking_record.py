"""What an attack sees: the loss and the distance at every point that it evaluates.

The network is wrapped so that each evaluation tells the host its margin and its
distance. The attack itself is unchanged, so any attack can be recorded.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.attacks import Expectation, margin_loss
from certjax.attacks.geometry import size
from certjax.threat import Threat
from certjax.types import Array, Attack, Classifier, Key
from experiments import attacking, judging
from experiments.evaluation import as_input, Evaluation, example_keys, Examples, STREAM
from experiments.judging import Plan


KEPT = 400  # points of a recorded curve


class Recorded(NamedTuple):
    """Means over examples at each evaluation of the network, in order.

    loss: the margin by which an example is misclassified, in logits.  best: its
    maximum so far.  distance: of the point, in the norm of the set.
    """

    loss: np.ndarray
    best: np.ndarray
    distance: np.ndarray


def record(
    attack: Attack, threat: Threat, f: Classifier, keys: Key, xs: Array, labels: Array
) -> Recorded:
    """Run an attack on a few examples [N, ...], a key each, and record what it sees.

    An example that has left a loop early is still evaluated with the others, hence
    the means of an attack that stops early are those of the points it would look at.
    """
    seen: list[np.ndarray] = []

    def one(key: Array, x: Array, label: Array) -> Array:
        norm = type(threat)

        def told(z: Array) -> Array:
            logits = f(z)
            look = jnp.stack([margin_loss(logits, label), size(norm, z - x)])
            return logits + _tell(seen, jax.lax.stop_gradient(look))

        return attack(key, told, x, label)

    jax.block_until_ready(jax.jit(jax.vmap(one))(keys, xs, labels))
    margins = np.stack([_per_example(look[..., 0], len(xs)) for look in seen])
    away = np.stack([_per_example(look[..., 1], len(xs)) for look in seen])
    best = np.maximum.accumulate(margins, axis=0)
    return Recorded(margins.mean(axis=1), best.mean(axis=1), away.mean(axis=1))


def _tell(seen: list[np.ndarray], look: Array) -> Array:
    """0, after the host has put the look at the end of the list."""

    def put(look: np.ndarray) -> np.ndarray:
        seen.append(np.array(look, np.float64))
        return np.zeros(look.shape[:-1], np.float32)

    like = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.pure_callback(put, like, look, vmap_method="expand_dims")


def _per_example(values: np.ndarray, count: int) -> np.ndarray:
    """[N]: means over the inner axes, where an attack evaluates several points."""
    return values.reshape(count, -1).mean(axis=1)


def of_task(plan: Plan, task: Evaluation, *, examples: int) -> dict[str, Any]:
    """The recorded curves of a run's attack on its first examples; or {}.

    Nothing is recorded of a cascade and of a shared perturbation, which are not attacks
    on one example, of a transfer attack, which does not look at the network, and of an
    attack on a randomised one.
    """
    threat, adversary = judging.adversary_of(plan)
    f = attacking.attacked(task.model, adversary)(task.weights)
    recordable = not adversary.surrogates and adversary.on_one_example(threat)
    if not examples or not recordable or isinstance(f, Expectation):
        return {}
    few = Examples(*(jnp.asarray(array[:examples]) for array in task.examples))
    key = jax.random.fold_in(jax.random.key(task.seed), STREAM)
    found = record(
        adversary.make(threat=threat),
        threat,
        f,
        example_keys(key, few.index),
        as_input(few.images),
        few.labels,
    )
    chosen = np.unique(np.linspace(0, len(found.loss) - 1, KEPT).round().astype(int))
    lines = {name: line[chosen].tolist() for name, line in found._asdict().items()}
    return {"evaluation": chosen.tolist(), "examples": len(few.labels), **lines}
