"""Certified accuracy against the radius, one line for each certified network."""

from pathlib import Path
from typing import Any

import numpy as np

from certjax.certificate import accuracy_interval, envelope, radius_curve
from certjax.smoothing.confidence import round_down
from experiments.smoothing_scales import numbers_of, scale_of


POINTS = 400
COLORS = ("#1b6ca8", "#d95f02", "#2a9d5c", "#7a4fa3", "#b0243f", "#8a6d1d", "#4c4c4c")
ENVELOPE = "best of all lines at each radius (an oracle's choice)"

Entry = tuple[dict[str, Any], list[dict[str, Any]]]


def radius_curves(path: Path, entries: list[Entry]) -> None:
    """Write the picture.

    Args:
      path: of the picture.
      entries: (result, records) of each run; all radii in one norm. Two runs or more
        get their envelope. The bands are pointwise 95 % Clopper-Pearson intervals: how
        far the accuracy on so many test examples may lie from that on all of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot
    axes = figure.subplots()
    most = max(max(row["radius"] for row in rows) for _, rows in entries)
    grid = np.linspace(0.0, 1.02 * (most or 1.0), POINTS)
    shares = [_draw(axes, entry, grid, i) for i, entry in enumerate(entries)]
    if len(entries) > 1:
        style = {"color": "black", "lw": 1, "ls": ":", "label": ENVELOPE}
        axes.plot(grid, 100 * envelope(np.stack(shares)), **style)
    axes.set(xlabel=scale_of(entries[0][0]).axis)
    axes.set(ylabel="certified accuracy (%)", ylim=(0, 101), xlim=(0, grid[-1]))
    axes.set_title(_title(entries), fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _draw(axes: Any, entry: Entry, grid: np.ndarray, number: int) -> np.ndarray:
    """One line and its band; the shares."""
    result, rows = entry
    radius = np.asarray([row["radius"] for row in rows])
    correct = np.asarray([row["correct"] for row in rows])
    shares, count = radius_curve(radius, correct, grid=grid), len(rows)
    ends = {s: accuracy_interval(round(s * count), count) for s in set(shares.tolist())}
    low, high = np.transpose([ends[s] for s in shares.tolist()])
    color = COLORS[number % len(COLORS)]
    style = "-" if number < len(COLORS) else "--"
    axes.fill_between(grid, 100 * low, 100 * high, color=color, alpha=0.15, lw=0)
    label = f"{_name(result)}, {scale_of(result).mean} {round_down(result['acr'])}"
    axes.plot(grid, 100 * shares, color=color, ls=style, lw=1.6, label=label)
    return shares


def _name(result: dict[str, Any]) -> str:
    """What tells one line from another: training, noise, its level."""
    sigma, trained = result.get("sigma"), result.get("train_sigma")
    level = numbers_of(result) if sigma is None else f", sigma {sigma:g}"
    other = "" if trained == sigma else f" (trained at {trained})"
    return f"{result['objective']}{level}{other}"


def _title(entries: list[Entry]) -> str:
    result = entries[0][0]
    counts = sorted({len(rows) for _, rows in entries})
    some = " or ".join(f"{count:,}" for count in counts)
    trials = sorted({r["n"] for r, _ in entries if r.get("n")})
    n = f", n = {' or '.join(f'{n:,}' for n in trials)}" if trials else ""
    return f"{result['dataset']}, {some} test examples{n}; bands: 95 % intervals"
