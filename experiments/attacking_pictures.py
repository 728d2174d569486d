"""Pictures of an attack: adversarial examples, accuracy against eps, losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.plots import COLORS
from experiments.results import Record, title_of


COLUMNS = 8
DPI = 130
STAGES = ("#1b6ca8", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d")


class Kept(NamedTuple):
    """One adversarial example: images [H, W, C], classes, its distance and index."""

    index: int
    clean: np.ndarray
    adversarial: np.ndarray
    label: int
    becomes: int
    distance: float


def read(path: Path) -> Kept:
    """An adversarial example that a run has kept."""
    with np.load(path) as file:
        clean, adversarial = (_image(file[name]) for name in ("clean", "adversarial"))
        return Kept(
            int(path.stem),
            clean,
            adversarial,
            int(file["label"]),
            int(file["becomes"]),
            float(file["distance"]),
        )


def _image(x: np.ndarray) -> np.ndarray:
    """[H, W, C] with one or three channels; other inputs become a line of pixels."""
    if x.ndim == 3 and x.shape[-1] in (1, 3):
        return x
    return x.reshape(1, -1, 1)


def shown(delta: np.ndarray) -> np.ndarray:
    """A perturbation as an image in [0, 1]: 0.5 where nothing changed."""
    largest = max(float(np.abs(delta).max()), 1e-12)
    return 0.5 + 0.5 * delta / largest


def table(paths: list[Path], rows: list[Record]) -> list[dict[str, Any]]:
    """Rows with pictures (uint8) of clean example, perturbation and result."""
    of_index = {row["index"]: row for row in rows}
    found = []
    for each in map(read, paths):
        row = of_index.get(each.index, {})
        pictures = {
            "clean": each.clean,
            "perturbation": shown(each.adversarial - each.clean),
            "adversarial": each.adversarial,
        }
        found.append(
            {
                "index": each.index,
                "label": each.label,
                "becomes": each.becomes,
                "distance": each.distance,
                "broken_by": row.get("broken_by"),
                **{n: np.uint8(np.rint(255 * p)) for n, p in pictures.items()},
            }
        )
    return found


def draw(
    folder: Path, result: dict[str, Any], rows: list[Record], paths: list[Path]
) -> dict[str, Path]:
    """Write the pictures of a run; their files by name."""
    written = {}
    if paths:
        written["adversarial_examples"] = folder / "adversarial.png"
        examples(written["adversarial_examples"], [*map(read, paths)], result)
    panels = [panel for name, panel in PANELS.items() if _has(result, name)]
    if panels:
        written["attack"] = folder / "attack.png"
        _panels(written["attack"], panels, result, rows)
    return written


def _has(result: dict[str, Any], name: str) -> bool:
    return bool(result.get(name))


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot
    return figure


def heading(result: dict[str, Any]) -> str:
    """The network, the attack, its norm and its radius in two lines."""
    around = result["adversary"].partition(",")[0]  # e.g. L2 eps=0.5
    what = f"attacked by {result['attack']}, {around}: {result['robust']:.1f} % robust"
    return f"{title_of(result)}\n{what}"


def examples(path: Path, kept: list[Kept], result: dict[str, Any]) -> None:
    """Clean, perturbation and adversarial image, one column per example."""
    kept = kept[:COLUMNS]
    figure = _figure(max(1.35 * len(kept) + 1.2, 6.0), 4.9)
    grid = figure.subplots(3, len(kept), squeeze=False)
    for column, each in zip(grid.T, kept, strict=True):
        delta = each.adversarial - each.clean
        _show(column[0], each.clean)
        _show(column[1], shown(delta), signed=True)
        _show(column[2], each.adversarial)
        column[0].set_title(f"test {each.index}\nclass {each.label}", fontsize=9)
        size = f"max {np.abs(delta).max():.3g}\ndistance {each.distance:.3g}"
        column[1].set_xlabel(size, fontsize=8)
        column[2].set_xlabel(f"class {each.becomes}", fontsize=9, color="#b2182b")
    for axes, text in zip(
        grid[:, 0], ("clean", "perturbation", "adversarial"), strict=True
    ):
        axes.set_ylabel(text, fontsize=10)
    figure.suptitle(heading(result), fontsize=10)
    figure.savefig(path, dpi=DPI)


def _show(axes: Any, image: np.ndarray, *, signed: bool = False) -> None:
    gray = image.shape[-1] == 1
    style = {"cmap": "RdBu_r" if signed else "gray"} if gray else {}
    picture = image[..., 0] if gray else np.clip(image, 0, 1)
    axes.imshow(picture, vmin=0, vmax=1, aspect="auto", **style)
    axes.set_box_aspect(1)
    axes.set(xticks=[], yticks=[])


def _panels(
    path: Path, panels: list[Callable], result: dict[str, Any], rows: list[Record]
) -> None:
    figure = _figure(5.2 * len(panels), 4.3)
    (row,) = figure.subplots(1, len(panels), squeeze=False)
    for axes, panel in zip(row, panels, strict=True):
        panel(axes, result, rows)
        axes.spines["top"].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(heading(result), fontsize=10)
    figure.savefig(path, dpi=DPI)


def _against_eps(axes: Any, result: dict[str, Any], rows: list[Record]) -> None:  # noqa: ARG001
    """Clean and attacked accuracy; the radius of the run marked."""
    curve = result["robustness"]
    few = len(curve["eps"]) < 20
    for name, label in (("clean", "clean"), ("robust", result["attack"])):
        style = {"color": COLORS[name], "lw": 1.6, "marker": "o" if few else None}
        axes.plot(curve["eps"], curve[name], label=label, ms=4, **style)
    axes.axvline(result["attack_eps"], color="black", lw=1, ls=":")
    text, at = f"eps = {result['attack_eps']:.4g}", (result["attack_eps"], 50)
    offset = {"textcoords": "offset points", "xytext": (4, 0)}
    axes.annotate(text, at, fontsize=8, **offset)
    axes.set(xlabel="eps (input units)", ylabel="accuracy (%)", ylim=(0, 103))
    axes.set(title=f"accuracy against eps, {curve['examples']} examples")
    axes.title.set_fontsize(10)
    axes.set_xlim(left=0)
    axes.legend(fontsize=8, loc="lower left")
    axes.spines["right"].set_visible(False)


def _losses(axes: Any, result: dict[str, Any], rows: list[Record]) -> None:  # noqa: ARG001
    """The margin at every evaluation, the best so far, and the distance."""
    found = result["losses"]
    at = found["evaluation"]
    axes.plot(at, found["loss"], color="#9a9a9a", lw=1, label="margin at the point")
    axes.plot(at, found["best"], color=COLORS["robust"], lw=1.8, label="best so far")
    axes.axhline(0.0, color="black", lw=0.8, ls=":")
    axes.set(xlabel="evaluation of the network", ylabel="margin (logits), mean")
    axes.set(title=f"what the attack sees, {found['examples']} examples")
    axes.title.set_fontsize(10)
    away = axes.twinx()
    away.plot(at, found["distance"], color=COLORS["certified"], lw=1, label="distance")
    away.set_ylabel("distance (input units), mean", color=COLORS["certified"])
    away.set_ylim(bottom=0)
    away.spines["top"].set_visible(False)
    handles = [*axes.get_lines()[:2], *away.get_lines()]
    axes.legend(handles=handles, fontsize=8, loc="lower right")


def _broken_by(axes: Any, result: dict[str, Any], rows: list[Record]) -> None:  # noqa: ARG001
    """How many examples each attack of a cascade broke, and how many survived."""
    found = dict(result["broken_by"]) | {"robust": result["counts"]["robust"]}
    names = list(found)
    colors = [*STAGES[: len(names) - 1], "#4c4c4c"]
    bars = axes.barh(names, [found[name] for name in names], color=colors)
    axes.bar_label(bars, fontsize=8, padding=2)
    axes.invert_yaxis()
    axes.set(xlabel="examples", title="examples by the attack that broke them")
    axes.title.set_fontsize(10)
    axes.spines["right"].set_visible(False)


def _distances(axes: Any, result: dict[str, Any], rows: list[Record]) -> None:
    """The distances of the misclassified points that were found."""
    away = [row["distance"] for row in rows if row["correct"]]
    found = [each for each in away if each is not None]
    axes.hist(found, bins=30, color=COLORS["certified"], alpha=0.85)
    axes.axvline(result["attack_eps"], color="black", lw=1, ls=":", label="attack eps")
    median = result["distance"]["median"]
    if median is not None and np.isfinite(median):
        style = {"color": COLORS["robust"], "lw": 1.6}
        axes.axvline(median, label=f"median {median:.4g}", **style)
    axes.set(xlabel="distance (input units)", ylabel="examples")
    axes.set(title=f"nearest misclassified points, {len(found)} of {len(away)}")
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8)
    axes.spines["right"].set_visible(False)


PANELS = {
    "robustness": _against_eps,
    "losses": _losses,
    "broken_by": _broken_by,
    "distance": _distances,
}
