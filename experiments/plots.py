"""The two pictures of a run: how it was trained, and how it stands against eps."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.results import title_of


COLORS = {"clean": "#4c4c4c", "robust": "#d95f02", "certified": "#1b6ca8"}
MARKERS = {"clean": "s", "robust": "o", "certified": "D"}


def curves(path: Path, metrics: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Write `curves.png`: training on the left, accuracy against eps on the right.

    Args:
      path: the picture to write.
      metrics: rows of metrics.jsonl, with "step" and "train/..." values.
      result: the run's result; "curve" holds "eps" and percentages by line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot
    training, accuracy = figure.subplots(1, 2)
    _training(training, [row for row in metrics if "train/loss" in row])
    _accuracy(accuracy, result)
    figure.suptitle(title_of(result), fontsize=11)
    figure.savefig(path, dpi=120)


def _training(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The loss (left scale), accuracies of training batches and eps (right scale)."""
    steps = [row["step"] for row in rows]
    loss = _column(rows, "loss")
    axes.plot(steps, loss, color="#d0d0d0", lw=0.8)
    axes.plot(steps, _smooth(loss), color="#7a7a7a", lw=1.2, label="loss")
    axes.set(xlabel="training step", ylabel="loss", title="training batches")
    axes.set_ylim(bottom=0)
    percent = axes.twinx()
    for name, color in COLORS.items():
        if any(f"train/{name}" in row for row in rows):
            values = _smooth(_column(rows, name))
            percent.plot(steps, values, color=color, lw=1.6, label=name)
    radius = _column(rows, "eps")
    if np.nanmax(radius, initial=0.0) > 0:
        share = 100 * radius / np.nanmax(radius)
        style = {"color": "black", "lw": 1, "ls": ":"}
        percent.plot(steps, share, label="eps (% of the last)", **style)
    percent.set(ylabel="accuracy (%)", ylim=(0, 101))
    lines = [line for line in axes.get_lines() if line.get_label()[0] != "_"]
    percent.legend(
        handles=lines + percent.get_lines(),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    for side in (axes, percent):
        side.spines["top"].set_visible(False)


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """One metric as float64; NaN where a row does not hold it."""
    values = [row.get(f"train/{name}") for row in rows]
    return np.array([np.nan if value is None else value for value in values], float)


def _smooth(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Running mean over `share` of the values, shorter at the ends; NaN left out."""
    half = int(share * len(values)) // 2 + 1
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array(
        [np.mean(w[~np.isnan(w)]) if (~np.isnan(w)).any() else np.nan for w in windows]
    )


def _accuracy(axes: Any, result: dict[str, Any]) -> None:
    """Clean, attacked and certified accuracy against eps, the eps of the run marked."""
    curve, labels = result["curve"], _labels(result)
    for name, label in labels.items():
        if name in curve:
            style = {"color": COLORS[name], "marker": MARKERS[name], "ms": 4}
            axes.plot(curve["eps"], curve[name], label=label, **style)
    eps = result.get("test_eps", result.get("attack_eps"))
    axes.axvline(eps, color="black", lw=1, ls=":")
    text, at = f"eps = {eps:.4g}", (eps, 2)
    offset = {"textcoords": "offset points", "xytext": (4, 0)}
    axes.annotate(text, at, fontsize=8, **offset)
    axes.set(xlabel="eps (input units, pixels in [0, 1])", ylabel="accuracy (%)")
    axes.set(ylim=(0, 101), title=f"first {curve['examples']} test examples")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _labels(result: dict[str, Any]) -> dict[str, str]:
    return {
        "clean": "clean",
        "robust": f"robust against {result.get('attack')}",
        "certified": f"certified by {result.get('certifier', 'bounds')}",
    }
