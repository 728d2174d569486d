"""Is an attacked accuracy to be believed? Measurements of a network, and checks.

A network whose gradients say nothing looks robust to every attack that follows them.
Each check is an inequality between two percentages that holds for any honest network
up to a small slack, and that such a network violates.

Source: Carlini et al. 2019, arXiv:1902.06705, section 5; Athalye et al. 2018,
arXiv:1802.00420, section 3.1.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from certjax import attacks
from certjax.attacks.losses import reached
from certjax.threat import L1, L2, Linf, Threat
from certjax.types import Array, Attack, Classifier, Key, Scalar
from experiments.attacking import vanishes


FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0)  # radii of the monotone curve, in units of eps
DRAWS = 8  # noisy copies per gradient
FLAT = "zero gradient"
# check, claim, and the two measurements whose accuracies are compared
COMPARED = (
    ("steps", "more steps never help: PGD, with few", "pgd", "pgd, few steps"),
    ("restarts", "more restarts never help: PGD, with one", "pgd, restarts", "pgd"),
    ("one step", "many steps beat one: PGD, FGSM", "pgd", "fgsm"),
    ("noise", "gradients beat noise: PGD and APGD, noise", "gradients", "noise"),
    ("average", "and gradients of a noisy average", "gradients", "noisy pgd"),
    ("transfer", "direct beats transfer", "gradients", "transfer"),
    ("black box", "Square adds nothing to gradients", "gradients", "with square"),
)


class Effort(NamedTuple):
    """What the attacks of the panel may spend: gradients, restarts, queries, draws."""

    steps: int = 100
    few_steps: int = 10
    restarts: int = 5
    queries: int = 2000
    noise: int = 200


class Check(NamedTuple):
    """`left <= right + slack`, percentages; `claim` says it in words."""

    name: str
    claim: str
    left: float
    right: float
    passed: bool


Broken = Callable[[], np.ndarray]


def measurements(
    f: Classifier,
    threat: Linf | L2 | L1,
    key: Key,
    xs: Array,
    labels: Array,
    *,
    effort: Effort | None = None,
    surrogates: Sequence[Classifier] = (),
) -> dict[str, Broken]:
    """What the checks compare: by name, a function that gives [N] bool.

    The values are True where an example is misclassified under an attack (already
    misclassified ones included), and for "zero gradient" where there is none.

    Args:
      f: the network; `jax.tree_util.Partial(apply, weights)` keeps the weights out of
        the compiled programs.
      threat: the perturbation set.
      key: of all random numbers.
      xs: [N, ...] examples in [low, high].
      labels: [N].
      effort: budgets; None: the usual ones.
      surrogates: other networks of the same classes.
    """
    spend = effort or Effort()
    f = f if isinstance(f, Partial) else Partial(f)
    at = functools.partial(_broken, f, key, jnp.asarray(xs), jnp.asarray(labels))
    climb = lambda eps, steps, restarts: at(
        _pgd, with_eps(threat, eps), jnp.int32(steps), jnp.int32(restarts)
    )
    eps, steps = threat.eps, spend.steps
    found: dict[str, Broken] = {
        "clean": lambda: at(_nothing, threat),
        FLAT: lambda: np.asarray(_flat(f, xs, labels)),
        "noise": lambda: at(_noise, threat, jnp.int32(spend.noise)),
        "fgsm": lambda: at(_fgsm, threat),
        "pgd": lambda: climb(eps, steps, 1),
        "pgd, few steps": lambda: climb(eps, spend.few_steps, 1),
        "pgd, restarts": lambda: climb(eps, steps, spend.restarts),
        "apgd": lambda: at(functools.partial(_apgd, steps), threat),
        "square": lambda: at(functools.partial(_square, spend.queries), threat),
        "unbounded": lambda: at(
            _bim, with_eps(threat, unbounded(threat, xs[0])), jnp.int32(steps)
        ),
        "noisy pgd": lambda: at(_through_noise, threat, jnp.int32(steps)),
    }
    for factor in FACTORS:
        radius = min(factor * eps, unbounded(threat, xs[0]))
        found[f"pgd, eps x {factor:g}"] = functools.partial(climb, radius, steps, 1)
    if surrogates:
        others = tuple(
            each if isinstance(each, Partial) else Partial(each) for each in surrogates
        )
        found["transfer"] = lambda: at(_transferred, threat, others)
    return found


def checks(broken: Mapping[str, np.ndarray], *, slack: float) -> tuple[Check, ...]:
    """The panel, from what was measured.

    Args:
      broken: the values of `measurements`, by name.
      slack: percentage points that an inequality may be violated by; one example
        always may.
    """
    gradients = broken["pgd, restarts"] | broken["apgd"]
    unions = {"gradients": gradients, "with square": gradients | broken["square"]}
    accuracy = {name: _percent(~hit) for name, hit in {**broken, **unions}.items()}
    tolerance = max(slack, 100.0 / len(gradients))
    rise = _largest_rise(accuracy)
    found = [
        Check(name, claim, accuracy[left], accuracy[right], passed=False)
        for name, claim, left, right in COMPARED
        if right in accuracy
    ]
    others = {
        "eps": (f"accuracy falls in eps: at {rise.where}", *rise.values),
        "unbounded": ("an unbounded attack leaves none", accuracy["unbounded"], 0.0),
        "gradients": ("no gradient is 0 or not finite", _percent(broken[FLAT]), 0.0),
    }
    found += [Check(name, *row, passed=False) for name, row in others.items()]
    return tuple(
        row._replace(passed=row.left <= row.right + tolerance) for row in found
    )


class _Rise(NamedTuple):
    """Accuracies at two neighbouring radii, that at the larger one first."""

    where: str
    values: tuple[float, float]


def _largest_rise(accuracy: Mapping[str, float]) -> _Rise:
    names = {0.0: "clean"} | {factor: f"pgd, eps x {factor:g}" for factor in FACTORS}
    steps = [*itertools.pairwise(names)]
    rises = [accuracy[names[b]] - accuracy[names[a]] for a, b in steps]
    small, large = steps[int(np.argmax(rises))]
    values = accuracy[names[large]], accuracy[names[small]]
    return _Rise(f"{large:g} eps, at {small:g} eps", values)


def _percent(hits: np.ndarray) -> float:
    return 100.0 * float(np.mean(hits))


def with_eps(threat: Threat, eps: Scalar) -> Threat:
    """The same set with another radius."""
    return dataclasses.replace(threat, eps=eps)  # type: ignore[type-var]


def unbounded(threat: Linf | L2 | L1, x: Array) -> float:
    """The radius at which the set is the whole domain, whatever the example."""
    width = float(threat.high - threat.low)
    scale = {Linf: 1.0, L2: math.sqrt(x.size), L1: float(x.size)}
    return width * scale[type(threat)]


@functools.partial(jax.jit, static_argnums=4)
def _points(
    f: Classifier,
    key: Key,
    xs: Array,
    labels: Array,
    make: Callable[..., Attack],
    threat: Threat,
    *numbers: Array,
) -> Array:
    attack = make(threat, *numbers)

    def one(i: Array, x: Array, label: Array) -> Array:
        z = attack(jax.random.fold_in(key, i), f, x, label)
        return reached(f(z), label) | reached(f(x), label) | jnp.any(jnp.isnan(f(z)))

    return jax.vmap(one)(jnp.arange(len(xs)), xs, labels)


def _broken(
    f: Classifier, key: Key, xs: Array, labels: Array, make: Callable, *about: object
) -> np.ndarray:
    return np.asarray(_points(f, key, xs, labels, make, *about))


@jax.jit
def _flat(f: Classifier, xs: Array, labels: Array) -> Array:
    """[N] bool: is the gradient of the cross-entropy 0, or not finite?"""
    one = functools.partial(vanishes, f)
    return jax.vmap(one)(xs, labels)


# Module-level functions, so that each is compiled once for all radii and budgets.


def _nothing(threat: Threat) -> Attack:  # noqa: ARG001
    return lambda key, f, x, label: x  # noqa: ARG005


def _fgsm(threat: Threat) -> Attack:
    return attacks.fgsm(threat)


def _pgd(threat: Threat, steps: Array, restarts: Array) -> Attack:
    return attacks.pgd(threat, steps=steps, restarts=restarts)


def _bim(threat: Threat, steps: Array) -> Attack:
    return attacks.bim(threat, steps=steps)


def _apgd(steps: int, threat: Threat) -> Attack:
    return attacks.apgd(threat, steps=steps)


def _square(queries: int, threat: Threat) -> Attack:
    return attacks.square(threat, queries=queries)


def _noise(threat: Threat, draws: Array) -> Attack:
    """The first of several random points of the set that is misclassified."""

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        def draw(i: Array, z: Array) -> Array:
            new = threat.sample(jax.random.fold_in(key, i), x)
            return jnp.where(reached(f(z), label), z, new)

        return jax.lax.fori_loop(0, draws, draw, x)

    return attack


def _through_noise(threat: Threat, steps: Array) -> Attack:
    """PGD on the network's average over noise as large as the set."""

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        sigma = threat.eps / (1.0 if isinstance(threat, Linf) else math.sqrt(x.size))
        average = attacks.noisy(f, sigma, DRAWS)
        return attacks.pgd(threat, steps=steps)(key, average, x, label)

    return attack


def _transferred(threat: Threat, surrogates: tuple[Classifier, ...]) -> Attack:
    return attacks.transfer(attacks.mi_fgsm(threat, steps=20), surrogates)
