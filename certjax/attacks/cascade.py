"""Attacks one after the other on a batch, broken examples leaving it.

The one host-driven part: after each round the survivors are packed into batches of one
fixed size, so that every round is one compiled program whatever is left, and a result
does not depend on how many examples were given or on the number of devices.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from certjax.attacks.losses import cross_entropy, log_odds, reached
from certjax.attacks.search import at_random, checked_input, Expectation
from certjax.threat import Threat
from certjax.types import Array, Attack, Classifier, Key


# Batches that run at once on a CPU: the serial parts of one (reductions, sorting, small
# matrices) leave cores idle, which the other uses.
AT_ONCE = 2


@dataclass(frozen=True)
class Stage:
    """One attack of a cascade, in `rounds` rounds with compaction in between.

    Args:
      name: for the record.
      attack: `(threat, i) -> attack` of round i, a traced integer; a module-level
        function, so that a second cascade does not compile it again.
      rounds: restarts, or targets.
      ranks: the rounds are targets: never more than there are wrong classes.
    """

    name: str
    attack: Callable[[Threat, Array], Attack]
    rounds: int = 1
    ranks: bool = False


class Broken(NamedTuple):
    """The outcome of a cascade over [N] examples.

    z: like xs, float32: the misclassified point; x where none was found.
    by: [N] int: the stage that broke it, -1 for none, -2 misclassified at x itself.
    round: [N] int: in which round of the stage; 0 where none.
    finite: [N] bool: no NaN in the logits of x; an example with NaN is not attacked.
    names: the stages.
    warnings: reasons to distrust the result, in words.
    """

    z: np.ndarray
    by: np.ndarray
    round: np.ndarray
    finite: np.ndarray
    names: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def robust_accuracy(self) -> float:
        """Share of examples that no stage broke, in [0, 1]; NaN for no example."""
        return float(np.mean((self.by == -1) & self.finite)) if len(self.by) else np.nan


def cascade(
    stages: tuple[Stage, ...],
    threat: Threat,
    *,
    lanes: int = 128,
    progress: Callable[[str, int, int], None] | None = None,
) -> Callable[..., Broken]:
    """Build `run(key, f, xs, labels, first=0) -> Broken`.

    `first` numbers the examples, from it on or, where it is an array [N], one by one: a
    set attacked in pieces, each with its numbers, gives the same result as at once.

    Args:
      stages: in the order in which they run, e.g. `autoattack_stages(threat)`.
      threat: the perturbation set.
      lanes: examples per compiled call and device; the last call is padded. More suits
        a GPU. Results are reproducible to the bit for equal lanes.
      progress: called with (stage, round, examples left) before each round.

    To keep the weights of a large network out of the compiled program, pass f as
    `jax.tree_util.Partial(apply, weights)`.
    """
    if lanes < 1:
        raise ValueError(f"lanes must be at least 1, got {lanes}")

    def run(
        key: Key, f: Classifier, xs: Array, labels: Array, first: int | Array = 0
    ) -> Broken:
        examples = _examples(xs, labels, first)
        f = f if isinstance(f, Partial | Expectation) else Partial(f)
        looks = _look_all(f, key, examples, lanes)
        record = _begin(examples, looks)
        notes = _notes(stages, looks, randomised=isinstance(f, Expectation))
        for number, stage in enumerate(stages):
            for i in range(_rounds(stage, looks.logits.shape[1])):
                alive = np.flatnonzero((record.by == -1) & record.finite)
                if not len(alive):
                    break
                if progress:
                    progress(stage.name, i, len(alive))
                settled = (threat, f, key, number, i)
                attack = partial(_program, _attacked, (stage,), *settled)
                for index, (z, fooled) in _batches(attack, examples, alive, lanes):
                    hit = index[fooled]
                    record.z[hit], record.by[hit] = z[fooled], number
                    record.round[hit] = i
        names = tuple(stage.name for stage in stages)
        notes += _square_notes(names, record.by)
        return record._replace(names=names, warnings=notes)

    return run


class _Examples(NamedTuple):
    """Inputs, labels and the numbers from which the keys are derived; all [N]."""

    xs: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray


def _examples(xs: Array, labels: Array, first: int | Array) -> _Examples:
    xs, labels = np.asarray(checked_input(xs)), np.asarray(labels, np.int32)
    if labels.shape != xs.shape[:1]:
        raise ValueError(
            f"need one label for each input, got {labels.shape} and {xs.shape}; "
            "xs is a batch [N, ...]"
        )
    numbers = first + np.arange(len(xs)) if isinstance(first, int) else first
    numbers = np.asarray(numbers, np.int32)
    if numbers.shape != labels.shape:
        raise ValueError(
            f"`first` is one number or one for each of {len(xs)} inputs, got shape "
            f"{numbers.shape}"
        )
    return _Examples(xs, labels, numbers)


class _Look(NamedTuple):
    """What the clean examples show: logits [N, K], gradients that say nothing [N]."""

    logits: np.ndarray
    flat: np.ndarray


def _rounds(stage: Stage, classes: int) -> int:
    if classes < 2:
        return 0
    return min(stage.rounds, classes - 1) if stage.ranks else stage.rounds


def _batches(
    program: Callable[..., Callable],
    examples: _Examples,
    chosen: np.ndarray,
    lanes: int,
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """(indices, results) of fixed-size batches, spread over the devices in turn."""
    devices = jax.local_devices()
    waiting = []
    with ThreadPoolExecutor(max(len(devices), AT_ONCE)) as pool:
        for number, start in enumerate(range(0, len(chosen), lanes)):
            index = chosen[start : start + lanes]
            padded = np.concatenate([index, np.repeat(index[:1], lanes - len(index))])
            batch = tuple(column[padded] for column in examples)
            batch = jax.device_put(batch, devices[number % len(devices)])
            waiting.append((index, pool.submit(program(*batch))))
        for index, results in waiting:
            yield index, [r[: len(index)] for r in results.result()]


def _program(jitted: jax.stages.Wrapped, static: tuple, *arguments: Any) -> Callable:
    """The call of a jitted function, to be made in any thread.

    Compiled here, because JAX's settings, such as the precision, belong to a thread.
    """
    compiled = jitted.lower(*static, *arguments).compile()
    return lambda: [np.asarray(result) for result in compiled(*arguments)]


@partial(jax.jit, static_argnums=0)
def _attacked(  # noqa: PLR0913, PLR0917
    stage: Stage,
    threat: Threat,
    f: Classifier,
    key: Key,
    number: Array,
    i: Array,
    xs: Array,
    labels: Array,
    numbers: Array,
) -> tuple[Array, Array]:
    def one(n: Array, x: Array, label: Array) -> tuple[Array, Array]:
        own = reduce(jax.random.fold_in, (n, number, i), key)
        z = stage.attack(threat, i)(own, f, x, label)
        return z, reached(at_random(f, own)(z), label)

    return jax.vmap(one)(numbers, xs, labels)


@jax.jit
def _looked(
    f: Classifier, key: Key, xs: Array, labels: Array, numbers: Array
) -> tuple[Array, Array]:
    def one(n: Array, x: Array, label: Array) -> tuple[Array, Array]:
        g = at_random(f, jax.random.fold_in(key, n))
        logits = g(x)
        gradient = jax.grad(lambda z: cross_entropy(g(z), label))(x)
        # where all other probabilities underflow, it is the rounding of large terms
        saturated = log_odds(logits, label) < np.log(np.finfo(np.float32).tiny)
        lost = saturated | ~jnp.all(jnp.isfinite(gradient))
        return logits, lost | jnp.all(gradient == 0)

    return jax.vmap(one)(numbers, xs, labels)


def _look_all(f: Classifier, key: Key, examples: _Examples, lanes: int) -> _Look:
    everything = np.arange(len(examples.labels))
    if not len(everything):
        return _Look(np.zeros((0, 1), np.float32), np.zeros(0, bool))
    batches = _batches(
        partial(_program, _looked, (), f, key), examples, everything, lanes
    )
    logits, flat = zip(*[results for _, results in batches], strict=True)
    return _Look(np.concatenate(logits), np.concatenate(flat))


def _begin(examples: _Examples, looks: _Look) -> Broken:
    finite = ~np.isnan(looks.logits).any(axis=1)
    wrong = looks.logits.argmax(axis=1) != examples.labels
    by = np.where(wrong & finite, -2, -1)
    return Broken(examples.xs.copy(), by, np.zeros_like(by), finite, (), ())


def _notes(
    stages: tuple[Stage, ...], looks: _Look, *, randomised: bool
) -> tuple[str, ...]:
    """The warnings of the reference that the clean examples give."""
    logits, names = looks.logits, [stage.name for stage in stages]
    found = {
        f"{np.isnan(logits).any(axis=1).sum()} examples have NaN logits: not attacked, "
        "counted as not robust": np.isnan(logits).any(),
        f"{looks.flat.sum()} examples have a zero gradient: attacks that follow the "
        "gradient may overestimate robustness": looks.flat.any(),
        "the outputs look like probabilities: attack the logits": _is_simplex(logits),
        "the classifier is randomised: use version='rand'": (
            randomised and "square" in names
        ),
    }
    noted = tuple(text for text, holds in found.items() if holds)
    return noted + (class_notes(stages, logits.shape[1]) if len(logits) else ())


def class_notes(stages: tuple[Stage, ...], classes: int) -> tuple[str, ...]:
    """The warnings of the reference about too few classes."""
    names = {stage.name for stage in stages}
    least = 4 if "apgd-t" in names else 3 if "apgd-dlr" in names else 0
    targets = max((stage.rounds for stage in stages if stage.ranks), default=0)
    found = {
        f"the DLR losses need more than {classes} classes: the margin stands in": (
            classes < least
        ),
        f"{targets} target classes were asked for, {classes - 1} exist": (
            targets > classes - 1
        ),
    }
    return tuple(text for text, holds in found.items() if holds)


def _is_simplex(logits: np.ndarray) -> bool:
    inside = (logits > -1e-5) & (logits < 1 + 1e-5)
    sums = np.abs(logits.sum(axis=1) - 1) < 1e-5
    return bool(len(logits) and inside.all() and sums.all())


def _square_notes(names: tuple[str, ...], by: np.ndarray) -> tuple[str, ...]:
    """The reference's sign of masked gradients: a black-box attack that adds much."""
    if "square" not in names or len(names) < 2:
        return ()
    gained = float(np.mean(by == names.index("square"))) if len(by) else 0.0
    if gained <= 0.002:
        return ()
    return (
        f"Square broke {gained:.1%} of the examples that the attacks before it could "
        "not: their gradients may be masked",
    )
