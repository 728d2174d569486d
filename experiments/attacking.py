"""How a network is attacked, from the config, and the record of every example.

A node of the group `attack` names a factory of `certjax.attacks` and holds its numbers.
Three keys beside them say what the factory cannot know:

    result: what the attack returns (see `Result`); "inside" where it is left out
    through: a transform `f -> g`; g is attacked in place of f
    surrogates: finished training runs whose networks are attacked in place of f

Attacks run in lanes: batches of one fixed size, the last one padded, each on one
device. Hence a record does not depend on the batch or on the number of devices.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from certjax import attacks
from certjax.attacks import Stage
from certjax.attacks.geometry import size
from certjax.attacks.losses import cross_entropy, log_odds, reached
from certjax.models import classifier
from certjax.threat import L1, L2, Linf, Threat, ThreatModel
from certjax.types import Array, Attack, Classifier, Key
from experiments import build
from experiments.build import ConfigError
from experiments.evaluation import as_input, Examples, Method, padded, Record, Weights
from experiments.settings import Node


Result: TypeAlias = Literal["inside", "nearest", "free", "shared"]
"""A point of the threat set; the nearest misclassified point, whose distance decides; a
point of the domain at any distance; one perturbation for all, found on training images.
"""

Fields: TypeAlias = dict[str, np.ndarray]
Finder: TypeAlias = Callable[
    [Weights, float, Key, Examples], tuple[np.ndarray, dict[str, np.ndarray]]
]
OWN_KEYS = ("result", "through", "surrogates")
KEPT = "adversarial"  # the folder of adversarial examples in a run
# A point on the very boundary may fall on either side of it in another program; the
# distances that are reported are those of a point that is still misclassified there.
STRETCHES = (1.0, 1.00001, 1.0001, 1.001)
# the attack of a smoothed network sees other draws of noise than those that vote
SMOOTHED_STRETCHES = (1.0, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5)


def lanes() -> int:
    """Examples in one compiled call."""
    return 128 if jax.default_backend() == "cpu" else 512


class Network(NamedTuple):
    """A frozen network: the model and its weights."""

    model: Any
    weights: Weights


class Smoothed(NamedTuple):
    """The smoothed classifier of a network, as a model: logits are shares of votes.

    Args:
      model: the base network.
      sigma: standard deviation of the noise, input units.
      votes: noisy copies that vote; the same draws at every point.
      draws: noisy copies per gradient of an attack, fresh at each step.
    """

    model: Any
    sigma: float
    votes: int
    draws: int

    def apply(self, variables: Any, x: Array) -> Array:
        """[K]: the share of each class; NaN if the logits of any copy hold one."""

        def vote(key: Key) -> Array:
            noise = jax.random.normal(key, x.shape, x.dtype)
            logits = self.model.apply(variables, x + self.sigma * noise)
            one = jax.nn.one_hot(jnp.argmax(logits), logits.shape[0])
            return jnp.where(jnp.any(jnp.isnan(logits)), jnp.nan, one)

        keys = jax.random.split(jax.random.key(0), self.votes)
        return jnp.mean(jax.lax.map(vote, keys, batch_size=32), axis=0)


class Adversary(NamedTuple):
    """An attack as the config asks for it.

    make(threat=...): an attack, the stages of a cascade, or (result "shared") a search
    of one perturbation.  through: None, or `f -> g`.
    """

    make: Callable[..., Any]
    result: Result = "inside"
    through: Callable[[Classifier], Classifier] | None = None
    surrogates: tuple[Network, ...] = ()

    @property
    def weights(self) -> tuple[Weights, ...]:
        """The weights of the surrogates."""
        return tuple(network.weights for network in self.surrogates)

    def stages(self, threat: Threat) -> tuple[str, ...]:
        """The names of the attacks of a cascade; of other attacks none."""
        made = self.make(threat=threat)
        return tuple(each.name for each in made) if _stages(made) else ()

    def on_one_example(self, threat: Threat) -> bool:
        """Is it neither a cascade nor one perturbation for all?"""
        return self.result != "shared" and not _stages(self.make(threat=threat))

    def attack(self, threat: Threat, others: Sequence[Weights]) -> Attack:
        """The attack on one example; of the surrogates, where there are any."""
        made = self.make(threat=threat)
        if not self.surrogates:
            return made
        models = [network.model for network in self.surrogates]
        pairs = zip(models, others, strict=True)
        return attacks.transfer(made, [classifier(model, *own) for model, own in pairs])


def adversary_of(
    node: Node, *, load: Callable[[str], Network], where: str = "attack"
) -> Adversary:
    """The adversary of a config node.

    Args:
      node: plain config with `_target_`.
      load: the network of a run directory, for `surrogates`.
      where: the config key, for messages.

    Raises:
      ConfigError: anything in the node that cannot be.
    """
    result = node.get("result", "inside")
    if result not in get_args(Result):
        kinds = ", ".join(get_args(Result))
        raise ConfigError(f"`{where}.result` must be one of {kinds}, got {result!r}")
    if node.get("goal", "untargeted") != "untargeted":
        raise ConfigError(
            f"`{where}.goal` must be untargeted here: accuracy counts any wrong class; "
            "apgd_targeted and fab_targeted go towards each class in turn"
        )
    own = {key: value for key, value in node.items() if key not in OWN_KEYS}
    make = build.build({"_partial_": True, **own}, where=where)
    through = node.get("through")
    if through is not None:
        partial = {"_partial_": True, **through}
        through = build.build(partial, where=f"{where}.through")
    return Adversary(make, result, through, _surrogates(node, load, where))


def _surrogates(
    node: Node, load: Callable[[str], Network], where: str
) -> tuple[Network, ...]:
    if "surrogates" not in node:
        return ()
    paths = node["surrogates"]
    if not isinstance(paths, list | tuple) or not paths:
        raise ConfigError(
            f"`{where}.surrogates` must list finished training runs, got {paths!r}; "
            f"write {where}.surrogates=[runs/<name>/<hash>,..]"
        )
    return tuple(load(str(path)) for path in paths)


def describe(node: Node, threat: Threat) -> str:
    """The adversary in one line: goal, knowledge, budget."""
    knowledge = "black-box" if "queries" in node else "white-box"
    return ThreatModel(
        threat,
        knowledge="transfer" if "surrogates" in node else knowledge,
        steps=node.get("steps"),
        restarts=node.get("restarts", 1),
        queries=node.get("queries"),
    ).describe()


def check(
    adversary: Adversary,
    model: Any,
    threat: Threat,
    image: np.ndarray,
    *,
    where: str = "attack",
) -> None:
    """Refuse an attack that cannot run, before any work is done.

    Args:
      adversary: the attack.
      model: a network, or a `Smoothed` one.
      threat: the perturbation set.
      image: an example, for its shape.
      where: the config key, for messages.

    Raises:
      ConfigError: of the norm, the numbers, or the shape of the images.
    """
    with build.blamed(where):
        if not adversary.on_one_example(threat):
            return
        base = _base(model)
        key, x = jax.random.key(0), as_input(jnp.asarray(image))
        shapes = jax.eval_shape(base.init, key, x)
        weights = Weights(shapes["params"], shapes.get("batch_stats", {}))
        one = functools.partial(_one, adversary, threat, attacked(model, adversary))
        jax.eval_shape(one, key, weights, adversary.weights, x, 0, 0)


def attack_method(
    model: Any,
    adversary: Adversary,
    threat: Threat,
    *,
    training: Callable[[], Examples] | None = None,
    keep: "Keep | None" = None,
) -> Method:
    """Does the prediction survive the attack?

    The fields of a record:
      robust: no misclassified point of the threat set was found, and no NaN.
      outside: the point is not where `result` says it is; an error of the attack.
      nan: logits that are NaN, at the point or at the example itself.
      distance: of the misclassified point from the example, in the norm of the set;
        None where none was found.  changed: in how many coordinates they differ.
      becomes: the class predicted at the point.
      zero_gradient: does the gradient of the cross-entropy vanish at the example?
      broken_by, round: of a cascade, the attack that found the point.
      queries: forward passes until it was found, of attacks that count them.

    Args:
      model: a network, or a `Smoothed` one.
      adversary: the attack.
      threat: the perturbation set.
      training: the examples on which a shared perturbation is found.
      keep: where adversarial examples are kept; the records then hold the seconds.
    """
    find = _finder(model, adversary, threat, training)
    look = _look(model, adversary, threat)

    def judge(weights: Weights, eps: float, key: Key, examples: Examples) -> Fields:
        began = time.monotonic()
        # converted here once: inside a program the division may be contracted with
        # what follows, and two programs would disagree on x in the last bit
        xs = np.asarray(as_input(jnp.asarray(examples.images)))
        examples = examples._replace(images=xs)
        zs, more = find(weights, eps, key, examples)
        columns = xs, zs, examples.labels
        zs, fields = in_lanes(functools.partial(look, weights, eps), *columns)
        fields = fields | more
        if keep is not None:
            share = (time.monotonic() - began) / len(zs)
            fields["seconds"] = np.full(len(zs), round(share, 6))
            if eps == threat.eps:
                keep(examples, zs, fields)
        return fields

    return Method(judge, threat.eps, _failed(adversary, threat, keep), own_batches=True)


def _failed(adversary: Adversary, threat: Threat, keep: "Keep | None") -> Record:
    """The record of an example that is misclassified as it is."""
    fields: Record = {"robust": False, "outside": False, "distance": 0.0, "changed": 0}
    fields |= {"becomes": None, "zero_gradient": False}
    made = adversary.make(threat=threat)
    if _stages(made):
        fields |= {"broken_by": "clean", "round": 0}
    if hasattr(made, "counted") and not adversary.surrogates:
        fields["queries"] = 0
    return fields if keep is None else fields | {"seconds": 0.0}


def in_lanes(program: Callable[..., Any], *columns: np.ndarray) -> Any:
    """`program(*rows)` on lanes of the columns [N, ...], gathered to [N, ...] again.

    The devices take turns.
    """
    count, width, places = len(columns[0]), lanes(), jax.local_devices()
    waiting = []
    for number, start in enumerate(range(0, count, width)):
        rows = [padded(column[start : start + width], width) for column in columns]
        waiting.append(program(*jax.device_put(rows, places[number % len(places)])))
    parts = [jax.tree.map(np.asarray, part) for part in waiting]
    return jax.tree.map(lambda *part: np.concatenate(part)[:count], *parts)


def _movable(weights: Any) -> Any:
    """Weights that follow a batch to its device."""
    return weights if jax.local_device_count() == 1 else jax.device_get(weights)


def _stages(made: Any) -> bool:
    return isinstance(made, tuple) and all(isinstance(each, Stage) for each in made)


def _base(model: Any) -> Any:
    return model.model if isinstance(model, Smoothed) else model


def attacked(model: Any, adversary: Adversary) -> Callable[[Weights], Classifier]:
    """What is attacked: the network, or of a smoothed one its average over noise."""
    through = adversary.through
    if through is None and isinstance(model, Smoothed):
        through = lambda f: attacks.noisy(f, model.sigma, model.draws)
    base = _base(model)
    if through is None:
        return lambda weights: classifier(base, *weights)
    return lambda weights: through(classifier(base, *weights))


def _finder(
    model: Any,
    adversary: Adversary,
    threat: Threat,
    training: Callable[[], Examples] | None,
) -> Finder:
    victim = attacked(model, adversary)
    if adversary.on_one_example(threat):
        return _find_each(adversary, threat, victim)
    if adversary.result != "shared":
        return _find_in_turn(adversary, threat, victim)
    if training is None:
        raise ValueError("a shared perturbation needs training examples")
    return _find_shared(adversary, threat, victim, training)


def _one(  # noqa: PLR0913, PLR0917
    adversary: Adversary,
    threat: Threat,
    victim: Callable[[Weights], Classifier],
    key: Key,
    weights: Weights,
    others: tuple[Weights, ...],
    x: Array,
    label: Array,
    index: Array,
) -> tuple[Array, dict[str, Array]]:
    """The attacked point of one example, and its queries if they are counted."""
    attack = adversary.attack(threat, others)
    asked = jax.random.fold_in(key, index), victim(weights), x, jnp.int32(label)
    counted = getattr(attack, "counted", None)
    if counted is None:
        return attack(*asked), {}
    z, queries = counted(*asked)
    return z, {"queries": queries}


def _find_each(adversary: Adversary, threat: Threat, victim: Callable) -> Finder:
    """An attack on one example, mapped over the lanes."""

    @jax.jit
    def program(
        weights: Weights,
        others: tuple[Weights, ...],
        eps: Array,
        key: Key,
        xs: Array,
        labels: Array,
        index: Array,
    ) -> tuple[Array, dict[str, Array]]:
        around = dataclasses.replace(threat, eps=eps)
        one = functools.partial(_one, adversary, around, victim, key, weights, others)
        return jax.vmap(one)(xs, labels, index)

    def find(weights: Weights, eps: float, key: Key, examples: Examples) -> tuple:
        every = _movable((weights, adversary.weights))
        run = functools.partial(program, *every, jnp.float32(eps), key)
        return in_lanes(run, *examples)

    return find


def _find_in_turn(adversary: Adversary, threat: Threat, victim: Callable) -> Finder:
    """A cascade: the examples that an attack broke are not attacked by the next one."""
    apply = lambda weights, x: victim(weights)(x)
    known: dict[str, Any] = {}

    def function(weights: Weights) -> Classifier:
        """The same object for the same weights: an `Expectation` is compiled once."""
        if known.get("weights") is not weights:
            f = victim(weights)
            randomised = isinstance(f, attacks.Expectation)
            known["f"] = f if randomised else Partial(apply, _movable(weights))
            known["weights"] = weights
        return known["f"]

    def find(weights: Weights, eps: float, key: Key, examples: Examples) -> tuple:
        around = dataclasses.replace(threat, eps=eps)
        stages = adversary.make(threat=around)
        run = attacks.cascade(stages, around, lanes=lanes())
        rows = examples.images, examples.labels
        found = run(key, function(weights), *rows, first=examples.index)
        names = np.array([*found.names, "clean", None], object)  # by: -2 and -1
        return found.z, {"broken_by": names[found.by], "round": found.round}

    return find


def _find_shared(
    adversary: Adversary,
    threat: Threat,
    victim: Callable,
    training: Callable[[], Examples],
) -> Finder:
    """One perturbation for all examples, found on training images."""

    @jax.jit
    def search(weights: Weights, eps: Array, key: Key, xs: Array, ys: Array) -> Array:
        around = dataclasses.replace(threat, eps=eps)
        return adversary.make(threat=around)(key, victim(weights), as_input(xs), ys)

    @jax.jit
    def shifted(eps: Array, delta: Array, xs: Array) -> Array:
        around = dataclasses.replace(threat, eps=eps)
        move = lambda x: around.project(x, x + delta)
        return jax.vmap(move)(xs)

    known: dict[float, tuple[Weights, np.ndarray]] = {}

    def find(weights: Weights, eps: float, key: Key, examples: Examples) -> tuple:
        if eps not in known or known[eps][0] is not weights:
            few = training()
            found = search(weights, jnp.float32(eps), key, few.images, few.labels)
            known[eps] = weights, np.asarray(found)
        move = functools.partial(shifted, jnp.float32(eps), known[eps][1])
        return in_lanes(move, examples.images), {}

    return find


def _look(model: Any, adversary: Adversary, threat: Threat) -> Callable:
    """`look(weights, eps, xs, zs, labels) -> (zs, fields)` of a lane, compiled."""
    norm = type(threat) if isinstance(threat, Linf | L2 | L1) else Linf
    wider = SMOOTHED_STRETCHES if isinstance(model, Smoothed) else STRETCHES
    stretches = wider if adversary.result == "nearest" else (1.0,)

    def one(weights: Weights, eps: Array, x: Array, z: Array, label: Array) -> tuple:
        around = dataclasses.replace(threat, eps=eps)
        decide = classifier(model, *weights)
        z, logits = _still_misclassified(decide, threat, stretches, x, z, label)
        f = classifier(_base(model), *weights)
        nan = jnp.any(jnp.isnan(logits)) | jnp.any(jnp.isnan(f(x)))
        fooled, within = reached(logits, label), around.contains(x, z)
        anywhere = adversary.result in ("nearest", "free")
        inside = jnp.all((z >= threat.low) & (z <= threat.high)) if anywhere else within
        harmless = ~within if adversary.result == "nearest" else False
        return z, {
            "robust": (~fooled | harmless) & ~nan,
            "outside": ~inside,
            "nan": nan,
            "distance": jnp.where(fooled, size(norm, z - x), jnp.nan),
            "changed": jnp.sum(z != x),
            "becomes": jnp.argmax(logits),
            "zero_gradient": vanishes(f, x, label),
        }

    @jax.jit
    def look(
        weights: Weights, eps: Array, xs: Array, zs: Array, labels: Array
    ) -> tuple[Array, dict[str, Array]]:
        apart = functools.partial(one, weights, eps)
        return jax.vmap(apart)(xs, zs, labels)

    return lambda weights, eps, *rows: look(_movable(weights), jnp.float32(eps), *rows)


def vanishes(f: Classifier, x: Array, label: Array) -> Array:
    """[] bool: is the gradient of the cross-entropy 0, or not finite?

    It counts as 0 also where the probabilities of all other classes underflow: what is
    computed then is the rounding of large terms that cancel.
    """
    underflow = log_odds(f(x), label) < np.log(np.finfo(np.float32).tiny)
    g = jax.grad(lambda z: cross_entropy(f(z), label))(x)
    return underflow | jnp.all(g == 0) | ~jnp.all(jnp.isfinite(g))


def _still_misclassified(
    decide: Classifier,
    threat: Threat,
    stretches: tuple[float, ...],
    x: Array,
    z: Array,
    label: Array,
) -> tuple[Array, Array]:
    """The least stretched perturbation that is misclassified, and its logits."""
    points = [z] + [
        jnp.clip(x + stretch * (z - x), threat.low, threat.high)
        for stretch in stretches[1:]
    ]
    logits = [decide(point) for point in points]
    fooled = jnp.stack([reached(each, label) for each in logits])
    chosen = jnp.argmax(fooled)  # the first; the point itself where none is
    return jnp.stack(points)[chosen], jnp.stack(logits)[chosen]


class Keep(NamedTuple):
    """Keeps the first `count` adversarial examples of a run, as `<index>.npz`."""

    folder: Path
    count: int

    def __call__(self, examples: Examples, zs: np.ndarray, fields: Fields) -> None:
        """Write those of a batch that broke a correct prediction."""
        broken = np.flatnonzero(~np.isnan(fields["distance"]) & ~fields["robust"])
        for i in broken.tolist():
            path = self.folder / f"{examples.index[i]}.npz"
            if len(self.found()) >= self.count and not path.exists():
                return
            self.folder.mkdir(exist_ok=True)
            beside = path.with_suffix(".partial")
            with beside.open("wb") as file:
                np.savez(
                    file,
                    clean=examples.images[i],
                    adversarial=zs[i],
                    label=examples.labels[i],
                    becomes=fields["becomes"][i],
                    distance=fields["distance"][i],
                )
            beside.replace(path)

    def found(self) -> list[Path]:
        """The files, by index."""
        return sorted(self.folder.glob("*.npz"), key=lambda path: int(path.stem))


def distances_of(rows: list[Record]) -> np.ndarray:
    """[N]: the distance of every record, infinite where no point was found."""
    found = [row["distance"] for row in rows]
    return np.array([math.inf if each is None else each for each in found])
