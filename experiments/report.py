"""Merge runs into one table: `python -m experiments.report runs/... [--latex]`.

Runs that differ in the seed alone become one row, mean and standard deviation; the best
entry of a column, among rows of the same data set and test radius, is bold.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import console, runs
from experiments.runs import RunError


KEYS = ("dataset", "test_eps", "attack_eps", "name", "model", "objective", "train_eps")
KEYS += ("attack", "certifier", "examples", "recipe")
NUMBERS = ("clean", "robust", "certified")
HEADER = ("data", "test eps", "run", "network", "training", "train eps")
HEADER += ("examples x seeds",)


class Row(NamedTuple):
    """Runs that differ in their seed only: what they share, and their percentages."""

    about: dict[str, Any]
    values: dict[str, list[float]]


def results_below(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Results of all finished runs in and below the folders.

    Raises:
      RunError: there is none.
    """
    paths = list(paths)
    found = sorted({file for path in paths for file in path.rglob("result.json")})
    folders = [file.parent for file in found if runs.finished(file.parent)]
    results = [
        runs.read_json(folder / "result.json") | {"recipe": recipe(folder)}
        for folder in folders
    ]
    if not results:
        places = ", ".join(str(path) for path in paths)
        raise RunError(f"no finished run in {places}; give folders such as runs/<name>")
    return results


def recipe(folder: Path) -> str:
    """A hash of all that a run was asked to do but its seed."""
    config = runs.saved_config(folder) | {"seed": None, "train_run": None}
    if "run" in config:  # an evaluation of the training run two folders up
        config["trained"] = recipe(folder.parents[1])
    return runs.config_hash(config)


def merged(results: Iterable[dict[str, Any]]) -> list[Row]:
    """One row for each group of runs that differ in their seed only."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[tuple(result.get(key) for key in KEYS)].append(result)
    ordered = sorted(groups.items(), key=lambda item: tuple(map(str, item[0])))
    return [_row(key, group) for key, group in ordered]


def _row(key: tuple, group: list[dict[str, Any]]) -> Row:
    values = {
        name: [result[name] for result in group if name in result] for name in NUMBERS
    }
    return Row(dict(zip(KEYS, key, strict=True)) | {"seeds": len(group)}, values)


def _best(rows: list[Row]) -> dict[tuple, float]:
    """The highest mean of each (data set, test radius, column)."""
    best: dict[tuple, float] = {}
    for row in rows:
        for name, values in row.values.items():
            if values:
                place = (*_setting(row), name)
                best[place] = max(best.get(place, 0.0), statistics.mean(values))
    return best


def _setting(row: Row) -> tuple:
    return row.about["dataset"], row.about["test_eps"] or row.about["attack_eps"]


def cells(rows: list[Row], bold: Callable[[str], str], plus: str) -> list[list[str]]:
    """The text of every cell, rows in order."""
    best = _best(rows)
    table = []
    for row in rows:
        about = row.about
        texts = [
            about["dataset"],
            _radius(_setting(row)[1]),
            about["name"],
            about["model"],
            about["objective"],
            _radius(about["train_eps"]),
            f"{about['examples']} x {about['seeds']}",
        ]
        for name, values in row.values.items():
            text = _number(values, plus)
            is_best = values and statistics.mean(values) == best[*_setting(row), name]
            texts.append(bold(text) if is_best else text)
        table.append(texts)
    return table


def _radius(eps: float | None) -> str:
    """8/255 where that is what it is, else the decimal."""
    if eps is None:
        return ""
    pixels = eps * 255
    whole = abs(pixels - round(pixels)) < 1e-6 and eps > 0
    return f"{round(pixels)}/255" if whole else f"{eps:.4g}"


def _number(values: list[float], plus: str) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    spread = f" {plus} {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return mean + spread


def headers(rows: list[Row]) -> list[str]:
    """Column titles; the methods are named where all rows share them."""
    methods = [{row.about[key] for row in rows} for key in ("attack", "certifier")]
    attack, certifier = (str(m.pop()) if len(m) == 1 else "" for m in methods)
    named = ("clean %", f"robust % {attack}", f"certified % {certifier}")
    return [*HEADER, *(title.strip() for title in named)]


def markdown(rows: list[Row]) -> str:
    """A table of GitHub's Markdown."""
    lines = [headers(rows), ["---"] * 7 + ["---:"] * 3]
    lines += cells(rows, bold=lambda text: f"**{text}**", plus="±")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex(rows: list[Row]) -> str:
    """A booktabs table of LaTeX."""
    body = cells(rows, bold=lambda text: rf"\textbf{{{text}}}", plus=r"$\pm$")
    lines = [
        " & ".join(map(_escaped, line)) + r" \\" for line in [headers(rows), *body]
    ]
    lines.insert(1, r"\midrule")
    above = [r"\begin{tabular}{lllllllrrr}", r"\toprule"]
    return "\n".join([*above, *lines, r"\bottomrule", r"\end{tabular}"])


def _escaped(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%")


def main(words: list[str] | None = None) -> None:
    """Print the table of the runs in the folders given."""
    parser = argparse.ArgumentParser(prog="experiments.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="runs or folders of runs")
    parser.add_argument("--latex", action="store_true", help="LaTeX, not Markdown")
    chosen = parser.parse_args(words)
    try:
        rows = merged(results_below(chosen.folders))
    except RunError as error:
        console.fail(str(error))
        raise SystemExit(1) from None
    print(latex(rows) if chosen.latex else markdown(rows))


if __name__ == "__main__":
    main()
