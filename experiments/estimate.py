"""How long would a recipe train here? `scripts/estimate experiment=<name>`.

A few steps of the recipe's own program on random images of the right shape, no data
needed: the median step times the number of steps. Evaluation comes on top.
"""

import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from certjax import training
from experiments import console, data
from experiments.build import ConfigError
from experiments.cli import Launch, launch
from experiments.settings import (
    Clock,
    initializer_of,
    model_of,
    optimizer_of,
    read,
    TrainSettings,
)
from experiments.smoothing_labels import invented_labels
from experiments.train import step_of


STEPS = 5  # timed, after one that compiles
SIZES = {
    "digits": 1433,
    "mnist": 60_000,
    "fashion_mnist": 60_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "svhn": 73_257,
    "tinyimagenet": 100_000,
}


class Estimate(NamedTuple):
    """Seconds of a step, of compiling it, and the number of steps of the training."""

    step: float
    compile: float
    steps: int

    @property
    def hours(self) -> float:
        """Of the whole training."""
        return (self.compile + self.step * self.steps) / 3600


def estimate(settings: TrainSettings) -> Estimate:
    """Time a few steps of a recipe.

    Raises:
      ConfigError: the data set has no published size.
    """
    name = settings.data.name
    if name not in SIZES:
        known = ", ".join(SIZES)
        raise ConfigError(f"the size of {name} is not known; known are {known}")
    shape = (8, 8, 1) if name == "digits" else data.KNOWN[name].shape
    rng, batch = np.random.default_rng(0), settings.schedule.batch
    images = rng.integers(0, 256, (batch, *shape), np.uint8)
    classes = rng.integers(0, settings.data.classes, batch).astype(np.int32)
    labels = invented_labels(settings.objective, classes, settings.data.classes)
    clock = Clock.of(settings.schedule, range(SIZES[name]))
    model, optimizer = model_of(settings.model), optimizer_of(settings.optimizer, clock)
    step = step_of(settings, model, optimizer, clock, images[0])
    initialize = jax.jit(initializer_of(settings.objective, model))
    variables = initialize(jax.random.key(0), np.float32(images[0]) / 255)
    state = training.initial_state(variables, optimizer)
    seconds = []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, images, labels))
        seconds.append(time.perf_counter() - began)
    first, *others = seconds
    middle = statistics.median(others)
    return Estimate(middle, first - middle, clock.total)


def work(config: dict[str, Any], _: Launch) -> None:
    """Estimate and say it in one line."""
    settings = read(TrainSettings, config)
    found = estimate(settings)
    device = jax.devices()[0]
    console.OUT.print(
        f"{settings.name}: {found.hours:.2f} hours = {found.steps} steps of "
        f"{1e3 * found.step:.0f} ms (median of {STEPS}) + {found.compile:.0f} s of "
        f"compilation, on {device.platform} x {jax.device_count()}; without evaluation",
        markup=False,
    )


if __name__ == "__main__":
    launch("train", work)
