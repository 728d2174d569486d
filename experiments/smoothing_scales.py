"""How certified radii are shown: lengths, numbers of pixels, or the one asked for."""

import math
from typing import Any, NamedTuple

import numpy as np

from experiments.cohen_logs import RADII


COUNTS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
COUNTED = {
    "l0": "l0 radius (values that may change)",
    "patch": "side of the patch (pixels)",
}


NUMBERS = ("levels", "width", "threshold", "keep", "fixed_radius")


class Scale(NamedTuple):
    """What radii of one kind mean.

    kind: only rows of the same kind share a table: "length", "l0", "patch" or "fixed".
    axis: of a picture.
    mean: what the mean radius is called; ACR for lengths.
    columns: radii at which the table has certified accuracies.
    """

    kind: str
    axis: str
    mean: str
    columns: tuple[float, ...]


def scale_of(result: dict[str, Any]) -> Scale:
    """The scale of a result or a record, by its norm and what was asked for."""
    norm = result["norm"]
    lengths = f"{norm} radius (input units, pixels in [0, 1])"
    axis, mean = COUNTED.get(norm, lengths), f"mean {norm} radius"
    if (asked := result.get("fixed_radius")) is not None:
        return Scale("fixed", axis, mean, (asked,))
    if norm in COUNTED:
        return Scale(norm, axis, mean, COUNTS)
    return Scale("length", axis, "ACR", RADII)


def kind_of(result: dict[str, Any]) -> str:
    """The noise, or the certifier that has none."""
    soft = ", soft votes" if result.get("certifier") == "certify_soft" else ""
    return (result.get("noise") or result.get("certifier") or "") + soft


def as_given(value: float) -> str:
    """A number that was asked for, in all its digits: not rounded, hence not up."""
    return repr(float(value)).removesuffix(".0")


def numbers_of(result: dict[str, Any]) -> str:
    """The numbers of a noise but sigma, e.g. ", keep 45", and the radius asked for."""
    found = {name.removeprefix("fixed_"): result.get(name) for name in NUMBERS}
    return "".join(
        f", {k} {as_given(value)}" for k, value in found.items() if value is not None
    )


def grid_of(scale: Scale, radius: np.ndarray) -> np.ndarray:
    """Radii for the table of one result, up to the largest that was certified.

    Lengths: multiples of 0.25 (of 1 or more where it is above 5), from 0 on.
    """
    most = float(np.max(radius, initial=0.0))
    if scale.kind == "fixed":
        return np.asarray(scale.columns)
    if scale.kind == "length":
        step = 0.25 if most <= 5 else max(1.0, math.ceil(most / 16))
        return np.arange(0.0, max(most, step) + 1e-12, step)
    step = max(1, math.ceil(most / 16))
    return np.arange(step, max(most, step) + 1, step, dtype=float)
