"""What the benchmark measures: groups of cases around one reference each."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax

from certjax import attacks, bounds, models, training
from certjax.threat import Linf
from certjax.training.losses import cross_entropy
from certjax.training.objectives import terms_of
from certjax.types import Array, PyTree


class Case(NamedTuple):
    """A program to time.

    work: how many times the reference's work it has to do at the least.
    target: what time / (time of the least work) should stay below.
    parts: (position of a case in the group, how often), whose sum is the least work
      instead of `work` times the reference.
    host: called as it is, since it compiles its own programs.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple
    work: float = 1.0
    target: float | None = None
    host: bool = False
    parts: tuple[tuple[int, float], ...] = ()


class Group(NamedTuple):
    """Cases that are timed in turns; the first one is the reference."""

    name: str
    cases: list[Case]


class Network(NamedTuple):
    """A network with random weights and a batch for it."""

    model: nn.Module
    variables: PyTree
    xs: Array
    labels: Array

    def f(self, variables: PyTree) -> Callable[[Array], Array]:
        """The classifier of one example."""
        return lambda x: self.model.apply(variables, x)


MNIST, CIFAR = (28, 28, 1), (32, 32, 3)


def network(name: str, batch: int, shape: tuple[int, ...] = MNIST) -> Network:
    """A network of `certjax.models` on random images."""
    model = getattr(models, name)(classes=10)
    image, weight, label = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.uniform(image, (batch, *shape))
    labels = jax.random.randint(label, (batch,), 0, 10)
    return Network(model, model.init(weight, xs[0]), xs, labels)


def bounds_suite() -> list[Group]:
    """Intervals beside the forward pass, IBP training beside plain; linear bounds."""
    from experiments import suites_linear  # which imports this module

    return [
        *(
            forward_group(*case)
            for case in (
                ("dm_small", 512),
                ("dm_medium", 128),
                ("cnn7_bn", 32, CIFAR),
            )
        ),
        *(
            training_group(*case)
            for case in (
                ("dm_small", 256),
                ("dm_medium", 100),
                ("cnn7_bn", 32, CIFAR),
            )
        ),
        *suites_linear.linear_groups(),
    ]


def forward_group(name: str, batch: int, shape: tuple[int, ...] = MNIST) -> Group:
    """Plain forward pass; IBP: one pass for the centre, one for the radius."""
    net = network(name, batch, shape)

    def forward(variables: PyTree, xs: Array) -> Array:
        return jax.vmap(net.f(variables))(xs)

    def ibp(variables: PyTree, xs: Array, *, sound: bool = False) -> bounds.Interval:
        bound = bounds.ibp(net.f(variables), sound=sound)
        return jax.vmap(lambda x: bound(Linf(0.01), x))(xs)

    sound = partial(ibp, sound=True)
    arguments = (net.variables, net.xs)
    return Group(
        f"{name} batch {batch}",
        [
            Case("forward", forward, arguments),
            Case("ibp", ibp, arguments, work=2.0, target=1.3),
            Case("ibp, sound=True", sound, arguments, target=2.0, parts=((1, 1.0),)),
        ],
    )


def training_group(name: str, batch: int, shape: tuple[int, ...] = MNIST) -> Group:
    """Loss, gradient and Adam: of the plain cross-entropy, and of IBP's worst case."""
    net = network(name, batch, shape)
    optimizer = optax.adam(1e-3)
    opt_state = optimizer.init(net.variables["params"])

    def stepper(loss: Callable[[Callable, Array, Array], Array]) -> Callable:
        def step(variables: PyTree, opt_state: PyTree, xs: Array, labels: Array) -> Any:
            def mean_loss(params: PyTree) -> Array:
                f = net.f({**variables, "params": params})
                return jax.vmap(lambda x, y: loss(f, x, y))(xs, labels).mean()

            value, gradient = jax.value_and_grad(mean_loss)(variables["params"])
            updates, state = optimizer.update(gradient, opt_state)
            return value, optax.apply_updates(variables["params"], updates), state

        return step

    def plain(f: Callable, x: Array, label: Array) -> Array:
        return cross_entropy(f(x), label)

    def robust(f: Callable, x: Array, label: Array) -> Array:
        terms = terms_of(training.ibp(Linf(0.01), kappa=0.0))
        return terms(jax.random.key(0), f, x, label).metrics["robust"]

    arguments = (net.variables, opt_state, net.xs, net.labels)
    return Group(
        f"{name} batch {batch}",
        [
            Case("training step", stepper(plain), arguments),
            Case("ibp training step", stepper(robust), arguments, 2.0, 1.05),
        ],
    )


def attacks_suite() -> list[Group]:
    """PGD beside as many forward passes with an input gradient."""
    return [
        attack_group("dm_small", 500, steps=40),
        attack_group("cnn4_bn", 500, steps=40),
    ]


def attack_group(name: str, batch: int, *, steps: int) -> Group:
    """One forward pass with its input gradient; PGD: `steps` of them."""
    net = network(name, batch)

    def gradient(variables: PyTree, xs: Array, labels: Array) -> Array:
        def loss(x: Array, y: Array) -> Array:
            return cross_entropy(net.f(variables)(x), y)

        return jax.vmap(jax.value_and_grad(loss))(xs, labels)

    def pgd(variables: PyTree, xs: Array, labels: Array) -> Array:
        attack = attacks.pgd(Linf(0.1), steps=steps, step_size=0.01)
        keys = jax.random.split(jax.random.key(0), batch)
        f = net.f(variables)
        return jax.vmap(lambda k, x, y: attack(k, f, x, y))(keys, xs, labels)

    arguments = (net.variables, net.xs, net.labels)
    return Group(
        f"{name} batch {batch}",
        [
            Case("forward and input gradient", gradient, arguments),
            Case(f"pgd-{steps}", pgd, arguments, float(steps), 1.15),
        ],
    )


def smoothing_suite() -> list[Group]:
    """Votes of smoothed classifiers beside forward passes."""
    from experiments import suites_smoothing  # which imports this module

    return suites_smoothing.smoothing_suite()


SUITES: dict[str, Callable[[], list[Group]]] = {
    "bounds": bounds_suite,
    "attacks": attacks_suite,
    "smoothing": smoothing_suite,
}
