"""The picture of the sanity panel: checks, accuracies, loss surfaces."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.attacks import log_odds, margin_loss
from certjax.threat import Linf, Threat
from certjax.types import Array, Classifier


SHOWN = 3  # examples with a surface
SIDE = 33  # points along each axis of a surface
REACH = 2.0  # ends of the axes, in radii
GOOD, BAD = "#1b7837", "#b2182b"


class Surface(NamedTuple):
    """The margin of misclassification on a plane around an example.

    margin: [SIDE, SIDE], rows along the gradient's direction, columns along a random
    one, both of length eps at 1.  index: of the example among those given.
    """

    margin: np.ndarray
    index: int


def surfaces(f: Classifier, threat: Threat, xs: Array, labels: Array) -> list[Surface]:
    """The surfaces around the first examples that are classified correctly."""

    @jax.jit
    def surface(f: Classifier, key: Array, x: Array, label: Array) -> Array:
        g = jnp.nan_to_num(jax.grad(lambda z: log_odds(f(z), label))(x))
        noise = jax.random.normal(key, x.shape, x.dtype)
        step = jnp.sign if isinstance(threat, Linf) else threat.ascend
        u, v = threat.eps * step(g), threat.eps * step(noise)
        axis = jnp.linspace(-REACH, REACH, SIDE)

        def at(a: Array, b: Array) -> Array:
            z = jnp.clip(x + a * u + b * v, threat.low, threat.high)
            return margin_loss(f(z), label)

        return jax.vmap(lambda a: jax.vmap(lambda b: at(a, b))(axis))(axis)

    right = np.flatnonzero(np.asarray(_predicted(f, xs)) == np.asarray(labels))
    return [
        Surface(np.asarray(surface(f, jax.random.key(i), xs[i], labels[i])), i)
        for i in right[:SHOWN].tolist()
    ]


@jax.jit
def _predicted(f: Classifier, xs: Array) -> Array:
    return jax.vmap(lambda x: jnp.argmax(f(x)))(xs)


def draw(path: Path, result: dict[str, Any], found: list[Surface]) -> None:
    """Write the picture of a panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.2), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot
    halves = figure.subfigures(2, 1, height_ratios=(1.0, 0.95))
    upper, lower = np.asarray(halves)
    left, right = upper.subplots(1, 2, width_ratios=(1.75, 1.0))
    _checks(left, result)
    _accuracies(right, result)
    columns = lower.subplots(1, max(len(found), 1), squeeze=False)[0]
    for axes, each in zip(columns, found, strict=False):
        _surface(lower, axes, each)
    text = "margin of misclassification, in logits; black: the decision boundary"
    lower.suptitle(text, fontsize=10)
    verdict = f"{len(result['failed'])} of {len(result['checks'])} checks failed"
    figure.suptitle(
        f"{result['dataset']} · {result['model']} · {result['objective']}, "
        f"eps = {result['attack_eps']:.4g}, {result['examples']} examples: {verdict}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def _checks(axes: Any, result: dict[str, Any]) -> None:
    """Each check as the two numbers it compares."""
    rows = result["checks"]
    for y, row in enumerate(rows):
        color = GOOD if row["passed"] else BAD
        axes.plot([row["left"], row["right"]], [y, y], color=color, lw=1.2, alpha=0.6)
        axes.plot(row["right"], y, "|", color=color, ms=13, mew=2)
        axes.plot(row["left"], y, "o", color=color, ms=6)
        verdict = "pass" if row["passed"] else "FAIL"
        style = {"fontsize": 9, "color": color, "va": "center", "weight": "bold"}
        axes.annotate(verdict, (1.01, y), xycoords=("axes fraction", "data"), **style)
    axes.set_yticks(range(len(rows)), [row["claim"] for row in rows], fontsize=8)
    axes.set(xlabel="left (dot) must not exceed right (bar), %", xlim=(-3, 103))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)


def _accuracies(axes: Any, result: dict[str, Any]) -> None:
    """PGD against eps, and the other attacks at the radius of the run."""
    accuracy, eps = result["accuracy"], result["attack_eps"]
    prefix = "pgd, eps x "
    curve = {0.0: accuracy["clean"]} | {
        eps * float(name.removeprefix(prefix)): value
        for name, value in accuracy.items()
        if name.startswith(prefix)
    }
    axes.plot(list(curve), list(curve.values()), "-o", color="#d95f02", ms=4)
    axes.annotate("PGD", (eps, accuracy["pgd"]), fontsize=8, **_beside(-1))
    others = ("noise", "fgsm", "square", "noisy pgd", "transfer")
    for name in others:
        if name in accuracy:
            axes.plot(eps, accuracy[name], "_", color="#1b6ca8", ms=12, mew=2)
    text = "\n".join(
        f"{name}: {accuracy[name]:.1f} %"
        for name in ("clean", *others, "pgd", "pgd, restarts", "apgd", "unbounded")
        if name in accuracy
    )
    place = {"xycoords": "axes fraction", "va": "top", "ha": "right", "fontsize": 8}
    place["bbox"] = {"color": "white", "alpha": 0.7, "pad": 1}
    axes.annotate(text, (0.98, 0.97), **place)
    axes.set(xlabel="eps (input units)", ylabel="accuracy (%)", ylim=(-2, 103))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _beside(side: int) -> dict[str, Any]:
    return {"textcoords": "offset points", "xytext": (8 * side, 0), "ha": "right"}


def _surface(figure: Any, axes: Any, surface: Surface) -> None:
    """The margin as colours, 0 in the middle; the set of linf as a frame."""
    reach = max(float(np.abs(surface.margin).max()), 1e-12)
    axis = np.linspace(-REACH, REACH, SIDE)
    style = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach, "shading": "gouraud"}
    mesh = axes.pcolormesh(axis, axis, surface.margin.T, **style)
    if surface.margin.min() < 0 < surface.margin.max():
        axes.contour(axis, axis, surface.margin.T, levels=[0.0], colors="black")
    axes.plot(0, 0, "k+", ms=9)
    axes.set(xlabel="along the gradient (eps)", ylabel="random direction (eps)")
    axes.set_title(f"example {surface.index}", fontsize=9)
    axes.set_box_aspect(1)
    figure.colorbar(mesh, ax=axes, shrink=0.85)
