"""The papers' tables of smoothed classifiers: ACR and certified accuracy at radii.

Lengths, numbers of values (l0), sides of patches and given radii have a table each.

Rows are finished certifications and logs in the format of Cohen et al.; those that
differ in the seed of the training alone become one, mean and standard deviation. The
best entry of a column, among rows of the same examples, noise level, n and alpha, is
bold.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from certjax.smoothing.confidence import round_down
from experiments import cohen_logs, console, runs
from experiments.runs import RunError
from experiments.smoothing_scales import kind_of, NUMBERS, numbers_of, Scale, scale_of


SETTING = ("dataset", "norm", "noise", "sigma", "n", "alpha", "examples", "certifier")
SETTING += ("split", "indices", *NUMBERS)
TRAINED = ("name", "model", "objective", "train_sigma", "recipe")
HEADER = ("data", "noise", "sigma", "n", "alpha", "examples x seeds", "run", "training")

Setting = tuple[Any, ...]


class Row(NamedTuple):
    """Certifications of one recipe: what they share, and the numbers of each seed.

    means: ACR, mean radius, or samples an example; see `headers`.
    shares: certified accuracies, after that of the prediction where radii are counts.
    """

    about: dict[str, Any]
    scale: Scale
    means: list[float]
    shares: list[list[float]]


def is_smoothed(result: dict[str, Any]) -> bool:
    """Is this the result of a certification of a smoothed classifier?"""
    return "acr" in result


def rows_of(results: Iterable[dict[str, Any]]) -> list[Row]:
    """One row for each group of certifications that differ in their training's seed.

    A network that was certified twice, with other noise, makes two rows, not two seeds.
    """
    groups: dict[Setting, list[dict[str, Any]]] = defaultdict(list)
    seen: Counter[Setting] = Counter()
    for result in results:
        key = tuple(result.get(key) for key in SETTING + TRAINED)
        network = (*key, result.get("weights"))
        groups[*key, seen[network]].append(result)
        seen[network] += 1
    ordered = sorted(groups.items(), key=lambda item: tuple(map(str, item[0])))
    return [
        Row(
            dict(zip(SETTING + TRAINED, key, strict=False)),
            scale_of(group[0]),
            [_mean_of(result) for result in group],
            [_shares_of(result) for result in group],
        )
        for key, group in ordered
    ]


def _mean_of(result: dict[str, Any]) -> float:
    fixed = scale_of(result).kind == "fixed"
    return result["samples"] / result["examples"] if fixed else result["acr"]


def _shares_of(result: dict[str, Any]) -> list[float]:
    counts = scale_of(result).kind not in {"fixed", "length"}
    return [result["correct"], *result["table"]] if counts else result["table"]


def by_kind(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each table; lengths first."""
    kinds: dict[str, list[Row]] = {"length": []}
    for row in rows:
        kinds.setdefault(row.scale.kind, []).append(row)
    return [group for group in kinds.values() if group]


def logs_below(paths: Iterable[Path], sigma: float | None) -> list[Row]:
    """A row for every log of certificates in and below the folders, runs left out."""
    files = {
        file
        for path in paths
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file() and _is_log(file)
    }
    return [_log_row(file, sigma) for file in sorted(files)]


def _is_log(file: Path) -> bool:
    if (file.parent / "certificates.jsonl").is_file():  # a run's own copy
        return False
    with file.open("rb") as opened:
        return tuple(opened.readline(200).split()) == tuple(
            name.encode() for name in cohen_logs.HEADER
        )


def _log_row(file: Path, sigma: float | None) -> Row:
    log = cohen_logs.read(file)
    if log.torn:
        console.warn(f"{file}: {log.torn} torn lines left out")
    found = cohen_logs.summary(log.rows)
    told = [] if sigma is None else cohen_logs.consistent(log.rows, sigma)
    only = told[0] if len(told) == 1 else None  # else the radii do not tell
    about = dict.fromkeys(SETTING + TRAINED) | {
        "sigma": sigma,
        "n": only and only.n,
        "alpha": only and only.alpha,
        "examples": found["examples"],
        "indices": cohen_logs.span([row.index for row in log.rows]),
        "name": file.name,
        "objective": "(a log)",
    }
    shares = [list(found["certified"].values())]
    return Row(about, scale_of({"norm": "l2"}), [found["acr"]], shares)


def cells(rows: list[Row], bold: Callable[[str], str], plus: str) -> list[list[str]]:
    """The text of every cell, rows in order."""
    best: dict[tuple, float] = {}
    for row in rows:
        for column, value in enumerate(_means(row)):
            place = (*_setting(row), column)
            best[place] = max(best.get(place, 0.0), value)
    table = []
    for row in rows:
        numbers = [
            bold(text) if mean > 0 and mean == best[*_setting(row), column] else text
            for column, (mean, text) in enumerate(
                zip(_means(row), _texts(row, plus), strict=True)
            )
        ]
        if row.scale.kind == "fixed":  # the number of samples is no merit
            numbers[0] = _texts(row, plus)[0]
        table.append([*_named(row), *numbers])
    return table


def _setting(row: Row) -> Setting:
    return tuple(row.about[key] for key in SETTING)


def _means(row: Row) -> list[float]:
    columns = zip(*row.shares, strict=True)
    return [statistics.mean(row.means), *map(statistics.mean, columns)]


def _texts(row: Row, plus: str) -> list[str]:
    """The mean radius rounded down; accuracies in percent."""
    many = len(row.means) > 1
    spread = f" {plus} {statistics.stdev(row.means):.4f}" if many else ""
    mean, *shares = _means(row)
    first = round_down(mean, 4) + spread
    if row.scale.kind == "fixed":
        first = f"{mean:,.0f}"
    return [first, *(f"{100 * share:.1f}" for share in shares)]


def _named(row: Row) -> list[str]:
    about = row.about
    number = lambda key: "" if about[key] is None else f"{about[key]:g}"
    trials = "" if about["n"] is None else f"{about['n']:,}"
    return [
        (about["dataset"] or "") + (" train" if about["split"] == "train" else ""),
        kind_of(about) + numbers_of(about),
        number("sigma"),
        trials,
        number("alpha"),
        f"{about['examples']} x {len(row.means)}",
        about["name"],
        about["objective"],
    ]


def headers(scale: Scale) -> list[str]:
    """Column titles."""
    if scale.kind == "fixed":
        return [*HEADER, "samples", "certified"]
    first = ["ACR"] if scale.kind == "length" else [scale.mean, "correct"]
    return [*HEADER, *first, *(f"{radius:g}" for radius in scale.columns)]


def drawn(folders: Iterable[Path], picture: Path) -> None:
    """Certified accuracy against the radius of every certification in the folders.

    Raises:
      RunError: there is none, or their radii are in several norms.
    """
    from experiments import smoothing_plots

    found = [
        (result, runs.read_lines(file.parent / "certificates.jsonl"))
        for folder in folders
        for file in sorted(folder.rglob("result.json"))
        if runs.finished(file.parent) and is_smoothed(result := runs.read_json(file))
    ]
    found.sort(key=lambda entry: entry[0].get("sigma") or 0.0)
    norms = {result["norm"] for result, _ in found}
    if len(norms) != 1:
        raise RunError(
            f"a picture needs certifications in one norm, found {len(found)} in "
            f"{', '.join(sorted(norms)) or 'none'}; name their folders"
        )
    smoothing_plots.radius_curves(picture, found)
    console.say(f"written to {picture}")
