"""What a config says, as frozen dataclasses, and the certjax objects made from it."""

import dataclasses
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.errors import FlaxError

from certjax import training
from certjax.threat import Threat
from certjax.types import Array, Objective as CertjaxObjective, Scalar
from experiments import build
from experiments.build import ConfigError
from experiments.tracking import Tracking


Node = dict[str, Any]


@dataclass(frozen=True)
class Selection:
    """Which test examples, and how many at once."""

    subset: int | None = None
    skip: int = 1
    max: int | None = None
    eval_batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse selections of nothing."""
        for name in ("subset", "skip", "max", "eval_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class DataSettings:
    """Which data, where they are, and how training images are changed."""

    name: str
    classes: int
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    dir: str | None = None
    sha256: str | None = None
    validation: float | None = None
    augment: Node | None = None


@dataclass(frozen=True)
class Schedule:
    """Times of a training run, in epochs, and its batch size.

    average: epoch from which the weights of every `average_every`-th step are averaged.
    """

    epochs: float
    batch: int
    warm: float = 0
    ramp: float = 0
    shape: Literal["smoothed", "linear"] = "smoothed"
    decay: Literal["steps", "cosine", "none"] = "steps"
    drops: tuple[float, ...] = ()
    drop: float = 0.2
    average: float | None = None
    average_every: int = 10

    def __post_init__(self) -> None:
        """Refuse times that cannot be."""
        if self.epochs <= 0 or self.batch < 1:
            raise ConfigError(
                "schedule.epochs and schedule.batch must be positive, got "
                f"{self.epochs} and {self.batch}"
            )
        if self.warm < 0 or self.ramp < 0 or self.warm + self.ramp > self.epochs:
            raise ConfigError(
                f"schedule.warm + schedule.ramp must lie within schedule.epochs "
                f"= {self.epochs}, got {self.warm} + {self.ramp}: eps would never "
                "reach train_eps"
            )


@dataclass(frozen=True)
class Objective:
    """The loss and what is added to it; kappa may follow eps from first to last.

    tied: further numbers of the loss, each constant or [first, last] like kappa.

    ramps: {number of the loss, e.g. attack.eps: [start, end]}: it grows from 0 to its
    value between these epochs, in a line; a jump where they are equal.

    votes: directory of a certification of the training split, for objectives that need
    the smoothed prediction of every training image (CAT-RS).
    """

    loss: Node
    kappa: float | tuple[float, ...] | None = None
    tied: Node = field(default_factory=dict)
    reg: float = 0.0
    l1: float = 0.0
    initialize: Node | None = None
    ramps: Node = field(default_factory=dict)
    statistics_at: Node | None = None
    perturb: Node | None = None
    votes: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Selection):
    """The config of `experiments.train`."""

    name: str
    data: DataSettings
    model: Node
    threat: Node
    objective: Objective
    optimizer: Node
    schedule: Schedule
    tracking: Tracking
    attack: Node | None = None
    certifier: Node | None = None
    test_eps: float
    train_eps: float
    attack_eps: float
    seed: int = 0
    curve_points: int = 0
    curve_examples: int = 256
    fresh: bool = False
    checkpoint_seconds: float = 60.0
    selection: Literal["last", "split", "test"] = "last"
    selection_share: float = 0.05
    paths: Node = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a split of nothing, or of everything."""
        super().__post_init__()
        if not 0 < self.selection_share < 1:
            raise ConfigError(
                f"selection_share must lie between 0 and 1, got {self.selection_share}"
            )


NESTED = {
    "data": DataSettings,
    "objective": Objective,
    "schedule": Schedule,
    "tracking": Tracking,
}


def read(cls: type, config: Node) -> Any:
    """Settings of an entry point from plain config, every key and type checked."""
    parts = {
        key: build.settings(NESTED[key], value, where=key)
        if key in NESTED and isinstance(value, dict)
        else value
        for key, value in config.items()
    }
    return build.settings(cls, parts)


def threat_of(node: Node, eps: float) -> Threat:
    """The perturbation set of the config, with one of the three radii."""
    if "eps" in node:
        raise ConfigError(
            "`threat.eps` is not a key: set test_eps, train_eps and attack_eps"
        )
    return build.build(node, where="threat", eps=eps)


def model_of(node: Node) -> nn.Module:
    """The network of the config."""
    return build.build(node, where="model")


def check_fits(model: nn.Module, image: np.ndarray) -> None:
    """Refuse a network that cannot take the images of the data set.

    Raises:
      ConfigError: the network's own complaint.
    """
    like = jax.ShapeDtypeStruct(image.shape, np.float32)
    try:
        jax.eval_shape(model.init, jax.random.key(0), like)
    except (ArithmeticError, TypeError, ValueError, FlaxError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the network of `model` does not take images of shape {image.shape}: "
            f"{reason}; choose another model= or data="
        ) from error


def check_shown(
    model: nn.Module, show: Callable[..., Array], image: np.ndarray, *, where: str
) -> None:
    """Refuse a network that cannot take what `show(key, x)` makes of an image.

    Raises:
      ConfigError: the complaint of the network, or of `show` about the image.
    """
    like = jax.ShapeDtypeStruct(image.shape, np.float32)
    key = jax.random.key(0)
    with build.blamed(where):
        shown = jax.eval_shape(show, key, like)
    if shown.shape == like.shape:
        return
    try:
        jax.eval_shape(model.apply, jax.eval_shape(model.init, key, like), shown)
    except (ArithmeticError, TypeError, ValueError, FlaxError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the network of `model` does not take what `{where}` makes of an image, "
            f"shape {shown.shape}: {reason}; train one with model=ablated_cnn"
        ) from error


def initializer_of(
    objective: Objective, model: nn.Module
) -> Callable[[jax.Array, jax.Array], dict]:
    """`initialize(key, x) -> variables`."""
    if objective.initialize is None:
        return model.init
    node = build.build(objective.initialize, where="objective.initialize")
    return lambda key, x: node(model, key, x)


def name_of(node: Node) -> str:
    """The last word of a target, e.g. cnn4_bn."""
    return str(node.get("_target_")).rpartition(".")[2]


def label_of(node: Node) -> str:
    """A method's name for tables: PGD-40, PGD-40x5, IBP, CROWN-IBP, IBP in float32."""
    if "stages" in node:
        return f"CASCADE to {label_of(list(node['stages'].values())[-1])}"
    name = name_of(node).removesuffix("_stages").upper().replace("_", "-")
    restarts = node.get("restarts", 1)
    parts = [name, node.get("version"), node.get("steps"), node.get("queries")]
    if node.get("intermediate", "crown") != "crown":
        parts.append(str(node["intermediate"]).upper())
    text = "-".join(str(part) for part in parts if part is not None)
    text = text if restarts == 1 else f"{text}x{restarts}"
    for key, word in (("attack", "with"), ("through", "through")):
        text += f" {word} {label_of(node[key])}" if node.get(key) else ""
    text += " by transfer" if "surrogates" in node else ""
    return f"{text} in float32" if node.get("sound") else text


@dataclass(frozen=True)
class Clock:
    """Converts epochs to steps."""

    schedule: Schedule
    steps_per_epoch: int

    @classmethod
    def of(cls, schedule: Schedule, labels: Sized) -> "Clock":
        """The clock of a training set; a last, smaller batch is left out."""
        if schedule.batch > len(labels):
            raise ConfigError(
                f"schedule.batch = {schedule.batch} is more than the {len(labels)} "
                "training examples; choose a smaller one"
            )
        return cls(schedule, len(labels) // schedule.batch)

    def steps(self, epochs: float) -> int:
        """The step at which `epochs` are over."""
        return round(epochs * self.steps_per_epoch)

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return max(1, self.steps(self.schedule.epochs))

    def eps(self, final: float) -> training.Schedule:
        """The radius at each step."""
        start = self.steps(self.schedule.warm)
        end = self.steps(self.schedule.warm + self.schedule.ramp)
        if end == 0:
            return training.constant(value=final)
        if self.schedule.shape == "linear":
            return training.linear_ramp(start=start, end=end, first=0.0, final=final)
        return training.smoothed_ramp(start=start, end=end, final=final)

    def learning_rate(self, value: float) -> training.Schedule:
        """The learning rate at each step."""
        if self.schedule.decay == "cosine":
            return training.cosine(value=value, steps=self.total)
        drops = self.schedule.drops if self.schedule.decay == "steps" else ()
        boundaries = [self.steps(epoch) for epoch in drops]
        return training.piecewise(
            value=value, boundaries=boundaries, factor=self.schedule.drop
        )


def optimizer_of(node: Node, clock: Clock) -> optax.GradientTransformation:
    """The optimiser of the config, its learning rate on the clock."""
    rate = node.get("learning_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise ConfigError(f"`optimizer.learning_rate` must be a number, got {rate!r}")
    schedule = clock.learning_rate(float(rate))
    optimizer = build.build(node, where="optimizer", learning_rate=schedule)
    since, every = clock.schedule.average, clock.schedule.average_every
    if since is None:
        return optimizer
    with build.blamed("schedule.average"):
        return training.averaged(optimizer, start=clock.steps(since), every=every)


def recipe_of(settings: TrainSettings, clock: Clock) -> training.Recipe:
    """The objective at each step: eps and kappa follow their schedules."""
    factory = build.build(settings.objective.loss, where="objective.loss")
    if not build.accepts(factory, "threat"):
        return _ramped(settings.objective, clock)
    threat = threat_of(settings.threat, settings.train_eps)
    eps = clock.eps(settings.train_eps)
    numbers = _numbers(settings, factory, eps)
    return training.scheduled(factory, threat, eps=eps, **numbers)


def _ramped(objective: Objective, clock: Clock) -> training.Recipe:
    """An objective without a threat set; the numbers of `ramps` grow."""

    def recipe(step: Scalar) -> CertjaxObjective:
        loss = objective.loss
        for path, span in objective.ramps.items():
            start, end = (clock.steps(epoch) for epoch in span)
            share = training.linear_ramp(start=start, end=end, first=0.0, final=1.0)
            loss = _scaled(loss, path.split("."), share(step), path)
        return build.build(loss, where="objective.loss")()

    return recipe


def _scaled(node: Node, keys: list[str], factor: Array, path: str) -> Node:
    """The node with the number at `keys` multiplied."""
    first, *rest = keys
    if first not in node:
        raise ConfigError(
            f"`objective.ramps` names {path}, but `objective.loss` has no such number; "
            "write e.g. weight or attack.eps"
        )
    value = _scaled(node[first], rest, factor, path) if rest else node[first] * factor
    return node | {first: value}


def _numbers(
    settings: TrainSettings, factory: Callable, eps: training.Schedule
) -> dict[str, training.Schedule]:
    """The schedules of kappa and of whatever else is tied to eps."""
    given = {"kappa": settings.objective.kappa, **settings.objective.tied}
    numbers = {
        name: _tied(f"objective.{name}", value, eps, settings.train_eps)
        for name, value in given.items()
        if value is not None
    }
    known = list(build.parameters(factory))
    build.check_known("`objective.tied`", numbers, known)
    return numbers


def _tied(
    where: str, value: Any, eps: training.Schedule, at: float
) -> training.Schedule:
    """A number of the loss at each step: constant, or following eps."""
    if isinstance(value, int | float):
        return training.constant(value=float(value))
    if len(value) != 2:
        raise ConfigError(f"`{where}` is a number or [first, last], got {list(value)}")
    first, final = value
    _check_grows(where, at)
    return training.tied(eps, at=at, first=first, final=final)


def _check_grows(where: str, train_eps: float) -> None:
    if train_eps <= 0:
        raise ConfigError(
            f"`{where}` follows eps on its way to train_eps, which is {train_eps:g}; "
            f"train with a positive train_eps, or make `{where}` "
            f"{0 if where == 'objective.reg' else 'one number'}"
        )


def regularizer_of(settings: TrainSettings, clock: Clock) -> Callable | None:
    """The regularisers of Shi et al., or None where their weight is 0."""
    if not settings.objective.reg:
        return None
    _check_grows("objective.reg", settings.train_eps)
    return training.shi(
        eps=clock.eps(settings.train_eps),
        final=settings.train_eps,
        weight=settings.objective.reg,
        std=settings.data.std,
    )


def with_eps(threat: Threat, eps: float) -> Threat:
    """The same set with another radius."""
    return dataclasses.replace(threat, eps=eps)  # type: ignore[type-var]
