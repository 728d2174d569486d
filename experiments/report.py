"""Merge runs into one table: `python -m experiments.report runs/... [--latex]`.

Runs that differ in the seed alone become one row, mean and standard deviation; the best
entry of a column, among rows of the same data set and test radius, is bold. Smoothed
classifiers, whose radii differ between examples, have a table of their own, which takes
logs in the format of Cohen et al. as well.

`table=ctbench [folders]` prints published results of certified training beside ours,
`table=pareto [folders] [--plot FILE]` clean against certified accuracy.
"""

import argparse
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import console, ctbench, pareto, runs, smoothing_report
from experiments.runs import RunError


KEYS = ("dataset", "test_eps", "attack_eps", "name", "model", "objective", "train_eps")
KEYS += ("attack", "certifier", "examples", "threat", "validation", "recipe")
METHODS = {"robust": "attack", "certified": "certifier"}
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
    folders = _finished_below(paths)
    results = [
        runs.read_json(folder / "result.json") | {"recipe": runs.recipe(folder)}
        for folder in folders
    ]
    if not results:
        places = ", ".join(str(path) for path in paths)
        raise RunError(f"no finished run in {places}; give folders such as runs/<name>")
    return results


def _finished_below(paths: Iterable[Path]) -> list[Path]:
    """Directories of finished runs."""
    found = sorted({file for path in paths for file in path.rglob("result.json")})
    return [file.parent for file in found if runs.finished(file.parent)]


def merged(results: Iterable[dict[str, Any]]) -> list[Row]:
    """One row for each group of runs that differ in their training's seed only.

    A network that was evaluated twice, with other draws, makes two rows, not two seeds.
    """
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    seen: Counter[tuple] = Counter()
    for result in results:
        key = tuple(result.get(key) for key in KEYS)
        network = (*key, result.get("seed"))
        groups[*key, seen[network]].append(result)
        seen[network] += 1
    ordered = sorted(groups.items(), key=lambda item: tuple(map(str, item[0])))
    return [_row(key, group) for key, group in ordered]


def _row(key: tuple, group: list[dict[str, Any]]) -> Row:
    values = {
        name: [result[name] for result in group if name in result] for name in NUMBERS
    }
    about = dict(zip(KEYS, key, strict=False))
    about |= {"seeds": len(group), "selection": group[0].get("selection")}
    return Row(about, values)


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
    """What rows must share to compete: data, held out or not, norm and radius."""
    about = row.about
    data = (about["dataset"], about["validation"] is not None)
    return *data, about["threat"], about["test_eps"] or about["attack_eps"]


def cells(rows: list[Row], bold: Callable[[str], str], plus: str) -> list[list[str]]:
    """The text of every cell, rows in order."""
    best = _best(rows)
    named = {n for n, key in METHODS.items() if len({r.about[key] for r in rows}) > 1}
    table = []
    for row in rows:
        about = row.about
        texts = [
            _data(about),
            " ".join(filter(None, [about["threat"], _radius(_setting(row)[-1])])),
            about["name"],
            about["model"],
            about["objective"],
            _radius(about["train_eps"]),
            f"{about['examples']} x {about['seeds']}",
        ]
        for name, values in row.values.items():
            text = _number(values, plus)
            if values and name in named:
                text += f" ({about[METHODS[name]]})"
            is_best = values and statistics.mean(values) == best[*_setting(row), name]
            texts.append(bold(text) if is_best else text)
        table.append(texts)
    return table


def _data(about: dict[str, Any]) -> str:
    """The data set; the split if it is not the test set, and a choice made on it."""
    held_out = " (held out)" * (about["validation"] is not None)
    chosen = (about["selection"] or {}).get("on") == "test"
    return about["dataset"] + held_out + " (weights selected on it)" * chosen


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
    """Column titles; methods that differ between rows are named in the cells."""
    methods = [{row.about[key] for row in rows} for key in ("attack", "certifier")]
    attack, certifier = (str(m.pop() or "") if len(m) == 1 else "" for m in methods)
    named = ("clean %", f"robust % {attack}", f"certified % {certifier}")
    return [*HEADER, *(title.strip() for title in named)]


def markdown(rows: list[Row]) -> str:
    """A table of GitHub's Markdown."""
    body = cells(rows, bold=lambda text: f"**{text}**", plus="±")
    return _markdown(headers(rows), body, words=7)


def _markdown(titles: list[str], body: list[list[str]], words: int) -> str:
    marks = ["---"] * words + ["---:"] * (len(titles) - words)
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, marks, *body])


def latex(rows: list[Row]) -> str:
    """A booktabs table of LaTeX."""
    body = cells(rows, bold=lambda text: rf"\textbf{{{text}}}", plus=r"$\pm$")
    return _latex(headers(rows), body, words=7)


def _latex(titles: list[str], body: list[list[str]], words: int) -> str:
    lines = [" & ".join(map(_escaped, line)) + r" \\" for line in [titles, *body]]
    lines.insert(1, r"\midrule")
    columns = "l" * words + "r" * (len(titles) - words)
    above = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    return "\n".join([*above, *lines, r"\bottomrule", r"\end{tabular}"])


def smoothed(rows: list[smoothing_report.Row], *, as_latex: bool) -> str:
    """A table of smoothed classifiers with radii of one kind, LaTeX or Markdown."""
    bold = (lambda t: rf"\textbf{{{t}}}") if as_latex else (lambda t: f"**{t}**")
    body = smoothing_report.cells(rows, bold, r"$\pm$" if as_latex else "±")
    table = _latex if as_latex else _markdown
    return table(smoothing_report.headers(rows[0].scale), body, words=8)


def _escaped(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%")


def tables(folders: list[Path], *, sigma: float | None, as_latex: bool) -> list[str]:
    """The table of bounds and attacks, and that of smoothed classifiers.

    Raises:
      RunError: the folders hold neither a finished run nor a log.
    """
    logs = smoothing_report.logs_below(folders, sigma)
    results = [] if logs and not _finished_below(folders) else results_below(folders)
    plain = merged(r for r in results if not smoothing_report.is_smoothed(r))
    rows = smoothing_report.rows_of(filter(smoothing_report.is_smoothed, results))
    found = []
    if plain:
        found.append(latex(plain) if as_latex else markdown(plain))
    for group in smoothing_report.by_kind(rows + logs):
        found.append(smoothed(group, as_latex=as_latex))
    return found


def _ctbench(folders: list[Path], plot: Path | None) -> str:
    if plot is not None:
        raise RunError("table=ctbench draws nothing; leave --plot out")
    return ctbench.table(folders)


def _pareto(folders: list[Path], plot: Path | None) -> str:
    points = ctbench.points(folders)
    if plot is not None:
        pareto.draw(plot, points)
    return pareto.markdown(points)


TABLES = {"table=ctbench": _ctbench, "table=pareto": _pareto}


def main(words: list[str] | None = None) -> None:
    """Print the tables of the runs in the folders given."""
    parser = argparse.ArgumentParser(prog="experiments.report", description=__doc__)
    help_folders = "table=ctbench or table=pareto, then runs or folders of runs"
    parser.add_argument("folders", nargs="+", type=Path, help=help_folders)
    parser.add_argument("--latex", action="store_true", help="LaTeX, not Markdown")
    parser.add_argument("--sigma", type=float, help="noise of the logs")
    parser.add_argument("--plot", type=Path, help="draw accuracy against radius here")
    chosen = parser.parse_args(words)
    first, *others = chosen.folders
    try:
        if str(first) in TABLES:
            places = others or [Path("runs")]
            print(TABLES[str(first)](places, chosen.plot))
            return
        found = tables(chosen.folders, sigma=chosen.sigma, as_latex=chosen.latex)
        if chosen.plot is not None:
            smoothing_report.drawn(chosen.folders, chosen.plot)
    except RunError as error:
        console.fail(str(error))
        raise SystemExit(1) from None
    print("\n\n".join(found))


if __name__ == "__main__":
    main()
