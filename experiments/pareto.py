"""The price of robustness: clean against certified accuracy along a weight."""

from pathlib import Path
from typing import Any

from experiments.ctbench import METHODS, Point, WEIGHTS


MARKS = (("o", "-"), ("s", "--"), ("^", ":"))
COLORS = ("#1b6ca8", "#d95f02", "#2f7d32", "#7b3294", "#4c4c4c")


def draw(path: Path, points: list[Point]) -> None:
    """Write the picture: one line for each method, its weight at each point.

    Args:
      path: the picture to write.
      points: from `ctbench.points`; several seeds of one weight are averaged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    methods = sorted({point.method for point in points})
    counts = sorted({point.examples for point in points}, reverse=True)
    for line in _lines(points):
        number, way = methods.index(line[0].method), counts.index(line[0].examples)
        _line(axes, line, COLORS[number % len(COLORS)], MARKS[way % len(MARKS)])
    axes.set(xlabel="clean accuracy (%)", ylabel="certified accuracy (%)")
    axes.set_title("towards the upper right is better", fontsize=10)
    axes.grid(alpha=0.25)
    axes.margins(0.12)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _lines(points: list[Point]) -> list[list[Point]]:
    """The points of each method and number of examples."""
    keys = sorted({(point.method, point.examples) for point in points})
    return [[p for p in points if (p.method, p.examples) == key] for key in keys]


def _line(axes: Any, points: list[Point], color: str, mark: tuple[str, str]) -> None:
    method = points[0].method
    label = f"{METHODS.get(method, method)}, {points[0].examples:,} examples, "
    label += f"{WEIGHTS[method]} at the points"
    seeds = {"color": color, "ls": "", "marker": ".", "ms": 4, "alpha": 0.5}
    axes.plot([p.clean for p in points], [p.certified for p in points], **seeds)
    means = mean_points(points)
    xs, ys = [p.clean for p in means], [p.certified for p in means]
    style = {"color": color, "marker": mark[0], "ls": mark[1], "ms": 5, "lw": 1.4}
    axes.plot(xs, ys, label=label, **style)
    for point in means:
        offset = {"textcoords": "offset points", "xytext": (6, 5)}
        place = (point.clean, point.certified)
        axes.annotate(f"{point.weight:g}", place, fontsize=8, color=color, **offset)


def mean_points(points: list[Point]) -> list[Point]:
    """The mean over runs of the same weight, in the order of the weight."""
    groups: dict[float, list[Point]] = {}
    for point in points:
        groups.setdefault(point.weight, []).append(point)
    return [
        Point(
            group[0].method,
            weight,
            sum(p.clean for p in group) / len(group),
            sum(p.certified for p in group) / len(group),
            group[0].examples,
        )
        for weight, group in sorted(groups.items())
    ]


def markdown(points: list[Point]) -> str:
    """The same points as a table."""
    titles = ["method", "weight", "clean %", "certified %", "examples"]
    lines = [titles, ["---"] + ["---:"] * 4]
    for line in _lines(points):
        for p in mean_points(line):
            numbers = [f"{WEIGHTS[p.method]} = {p.weight:g}", f"{p.clean:.2f}"]
            numbers += [f"{p.certified:.2f}", str(p.examples)]
            lines.append([METHODS.get(p.method, p.method), *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
