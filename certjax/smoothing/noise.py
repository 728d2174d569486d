"""Noise distributions: how to draw them, and the radius that a probability buys.

A noise is a frozen dataclass (a pytree: sigma may be traced) with

    sample(key, x) -> z             a noisy copy of one example, on the device
    radius(p_lower, size) -> r      host, float64: the certified radius
    norm                            of the radius: "l0", "l1", "l2" or "linf"
    guarantee                       in which arithmetic the theorem holds
    check(x)                        optional: refuse an example it is not for

`p_lower` is a lower bound of the probability of the top class; the radius is 0 unless
it exceeds 1/2, and never above the exact one for this `p_lower`. `sigma` is the
standard deviation per coordinate, in input units, for every distribution, so that
distributions compare at equal strength. `size` is the number of coordinates; only the
linf radii depend on it, and they refuse to guess it. A p_lower of NaN buys nothing, one
above 1 is refused; 1 itself, which no number of samples proves, may buy infinity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import numpy as np
from scipy import special

from certjax.smoothing import generator
from certjax.types import Array, Key, Scalar


REAL = "real arithmetic: float32 sampling is not covered"
FLOAT = "floating point: holds for the program itself on 8-bit inputs"
MARGIN = 1e-9  # relative and absolute cut of a radius; covers float64 in every formula


def check_sigma(sigma: object) -> None:
    """Refuse a Python number that is no standard deviation; tracers pass."""
    if isinstance(sigma, int | float) and not 0 < sigma < math.inf:
        raise ValueError(
            f"sigma must be positive and finite (input units), got {sigma}; "
            "the papers use 0.12, 0.25, 0.5 and 1.0"
        )


def _check_norm(noise: object, norm: str, known: tuple[str, ...]) -> None:
    if norm not in known:
        raise ValueError(
            f"{type(noise).__name__} certifies {' or '.join(known)}, got norm={norm!r}"
        )


def more_than_half(p_lower: float) -> bool:
    """Does the bound prove a majority? NaN does not; a "probability" above 1 raises."""
    if p_lower > 1.0:
        raise ValueError(
            f"p_lower must lie in [0, 1], got {p_lower}; it is a lower bound of the "
            "probability of the top class, see confidence.proportion_lower"
        )
    return bool(p_lower > 0.5)


def _coordinates(size: int | None) -> int:
    if size is None or size < 1:
        raise ValueError(
            f"an linf radius needs the number of coordinates, got size={size}; "
            "pass size=x.size"
        )
    return size


def cut(radius: float) -> float:
    """`radius` rounded down by more than the error of its float64 formula."""
    return max(0.0, float(radius) * (1.0 - MARGIN) - MARGIN)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gaussian:
    """Isotropic Gaussian noise; an l2 ball, hence an l1 and an linf ball as well.

    Args:
      sigma: standard deviation, input units.
      norm: "l2": sigma PhiInv(p); "l1": the same radius, since the l1 ball lies in the
        l2 ball; "linf": divided by sqrt(size).

    Source: Cohen et al. 2019, arXiv:1902.02918, theorem 1.
    """

    sigma: Scalar
    norm: str = field(default="l2", metadata={"static": True})

    guarantee: ClassVar[str] = REAL

    def __post_init__(self) -> None:
        """Refuse a sigma or a norm that means nothing."""
        check_sigma(self.sigma)
        _check_norm(self, self.norm, ("l1", "l2", "linf"))

    def sample(self, key: Key, x: Array) -> Array:
        """X plus noise; not clipped to the domain."""
        return x + self.sigma * generator.standard_normal(key, x.shape)

    def radius(self, p_lower: float, size: int | None = None) -> float:
        """Certified radius in `norm`."""
        if not more_than_half(p_lower):
            return 0.0
        radius = float(self.sigma) * special.ndtri(p_lower)
        if self.norm == "linf":
            radius /= math.sqrt(_coordinates(size))
        return cut(radius)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Laplace:
    """Independent Laplace noise against l1: -scale log(2 (1 - p)).

    Args:
      sigma: standard deviation; the scale is sigma / sqrt(2).

    Source: Teng et al. 2019, "l1 adversarial robustness certificates".
    """

    sigma: Scalar

    norm: ClassVar[str] = "l1"
    guarantee: ClassVar[str] = REAL

    def __post_init__(self) -> None:
        """Refuse a sigma that means nothing."""
        check_sigma(self.sigma)

    @property
    def scale(self) -> Scalar:
        """Mean absolute deviation."""
        return self.sigma / math.sqrt(2.0)

    def sample(self, key: Key, x: Array) -> Array:
        """X plus noise."""
        return x + self.scale * generator.standard_laplace(key, x.shape)

    def radius(self, p_lower: float, size: int | None = None) -> float:  # noqa: ARG002
        """Certified l1 radius."""
        if not more_than_half(p_lower):
            return 0.0
        if p_lower == 1.0:
            return math.inf
        return cut(-float(self.scale) * math.log(2.0 * (1.0 - p_lower)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Uniform:
    """Uniform noise on [-w, w] per coordinate, w = sqrt(3) sigma.

    Args:
      sigma: standard deviation.
      norm: "l1": 2 w (p - 1/2); "linf": 2 w (1 - (3/2 - p)^(1/size)).

    Source: Yang et al. 2020, "Randomized smoothing of all shapes and sizes",
    arXiv:2002.08118, table 1 (l1: Lee et al. 2019).
    """

    sigma: Scalar
    norm: str = field(default="l1", metadata={"static": True})

    guarantee: ClassVar[str] = REAL

    def __post_init__(self) -> None:
        """Refuse a sigma or a norm that means nothing."""
        check_sigma(self.sigma)
        _check_norm(self, self.norm, ("l1", "linf"))

    @property
    def half_width(self) -> Scalar:
        """The largest absolute value."""
        return math.sqrt(3.0) * self.sigma

    def sample(self, key: Key, x: Array) -> Array:
        """X plus noise."""
        return x + self.half_width * generator.symmetric_uniform(key, x.shape)

    def radius(self, p_lower: float, size: int | None = None) -> float:
        """Certified radius in `norm`."""
        if not more_than_half(p_lower):
            return 0.0
        width = 2.0 * float(self.half_width)
        if self.norm == "l1":
            return cut(width * (p_lower - 0.5))
        # 1 - q^(1/d) without cancellation
        return cut(-width * math.expm1(math.log(1.5 - p_lower) / _coordinates(size)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """Any noise whose radii were tabulated: the step function below the table.

    Args:
      sampler: `sampler(key, x) -> z`.
      probabilities: [T] ascending, above 1/2; any sequence.
      radii: [T] ascending; radii[i] is certified whenever p >= probabilities[i].
      norm: of the radii.

    Source: the level-set and differential tables of Yang et al. 2020.
    """

    sampler: Callable[[Key, Array], Array] = field(metadata={"static": True})
    probabilities: tuple[float, ...] = field(metadata={"static": True})
    radii: tuple[float, ...] = field(metadata={"static": True})
    norm: str = field(metadata={"static": True})

    guarantee: ClassVar[str] = REAL

    def __post_init__(self) -> None:
        """Refuse a table that is not a monotone map from (1/2, 1] to radii."""
        _check_norm(self, self.norm, ("l0", "l1", "l2", "linf"))
        p, r = np.asarray(self.probabilities), np.asarray(self.radii)
        for name, column in (("probabilities", p), ("radii", r)):  # a hashable copy
            object.__setattr__(self, name, tuple(column.ravel().tolist()))
        alike = p.shape == r.shape and p.ndim == 1 and p.size > 0
        rising = alike and np.all(np.diff(p) > 0) and np.all(np.diff(r) >= 0)
        if not (rising and p[0] > 0.5 and p[-1] <= 1 and r[0] >= 0 and r[-1] < np.inf):
            raise ValueError(
                "a table needs as many radii as probabilities, both ascending, "
                f"probabilities in (1/2, 1], radii finite; got {p.size} and {r.size} "
                "entries; sort them and drop the rows with p <= 1/2"
            )

    def sample(self, key: Key, x: Array) -> Array:
        """A draw of the tabulated noise."""
        return self.sampler(key, x)

    def radius(self, p_lower: float, size: int | None = None) -> float:  # noqa: ARG002
        """The largest tabulated radius whose probability is reached."""
        if not more_than_half(p_lower):
            return 0.0
        reached = int(np.searchsorted(self.probabilities, p_lower, side="right"))
        return float(self.radii[reached - 1]) if reached else 0.0


Noise = Gaussian | Laplace | Uniform | Table
