"""The tab-separated logs of Cohen et al.: `python -m experiments.cohen_logs LOG...`.

Columns: idx, label, predict, radius, correct, time. Prints the ACR, certified accuracy
at radii, and with `--sigma` the (alpha, n) that the radii are consistent with: every
radius must be sigma PhiInv(Clopper-Pearson(k, n, alpha)) of an integer k, rounded to
the digits of the log, and for the wrong alpha many are not. (The published logs of
locuslab/smoothing say alpha = 0.01, their paper 0.001.)
"""

import argparse
import math
import zlib
from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from certjax.certificate import average_certified_radius, radius_curve
from certjax.smoothing.confidence import proportion_lower, round_down
from experiments import console, runs
from experiments.runs import RunError


HEADER = ("idx", "label", "predict", "radius", "correct", "time")
ALPHAS = (0.05, 0.01, 0.005, 0.001, 0.0005, 1e-4, 1e-6)
TRIALS = (1_000, 10_000, 100_000)
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
CUT = 4e-9  # how far below the exact radius ours may lie


class Row(NamedTuple):
    """One certified example; prediction -1 is an abstention.

    text: the radius as printed; its digits say how it was rounded.
    """

    index: int
    label: int
    prediction: int
    radius: float
    correct: bool
    seconds: float
    text: str = ""


class Log(NamedTuple):
    """What a log holds.

    rows: one per example, in the order of the file.
    torn: lines that could not be read, left out.
    disagreeing: rows whose column `correct` is not "predict equals label" (some logs
      print a running total there). `Row.correct` is what predict and label say.
    """

    rows: tuple[Row, ...]
    torn: int
    disagreeing: int


class Match(NamedTuple):
    """How well (alpha, n) explains a log: the share of its radii that they attain."""

    alpha: float
    n: int
    attained: float


def read(path: Path) -> Log:
    """Read a log, killed or complete.

    Raises:
      RunError: no such log, other columns, no whole line, or an example twice.
    """
    if not path.is_file():
        raise RunError(f"no log {path}")
    head, *lines = path.read_text(errors="replace").splitlines(keepends=True) or [""]
    if tuple(head.split()) != HEADER:
        raise RunError(
            f"{path} is no log of certificates: expected the columns "
            f"{', '.join(HEADER)}, got {head.strip()!r}"
        )
    lines = [line for line in lines if line.strip()]
    parsed = [_parsed(line) for line in lines]
    found = [row for row in parsed if row is not None]
    if not found:
        raise RunError(f"{path} holds no whole line")
    rows = tuple(row for row, _ in found)
    _check_distinct(path, rows)
    return Log(rows, len(lines) - len(found), sum(not agrees for _, agrees in found))


def _parsed(line: str) -> tuple[Row, bool] | None:
    """The row and whether its `correct` agrees; None for a torn line."""
    try:
        index, label, prediction, radius, correct, time = line.split("\t")
        wins = int(prediction) == int(label) and int(prediction) >= 0
        numbers = int(index), int(label), int(prediction), float(radius)
        row = Row(*numbers, wins, _seconds(time.strip()), radius)
        agrees = int(correct) == int(wins)
    except ValueError:
        return None
    whole = line.endswith("\n") and 0 <= row.radius < math.inf
    return (row, agrees) if whole else None


def _seconds(time: str) -> float:
    """Of "0:00:14.5", or of a number."""
    total = 0.0
    for part in time.split(":"):
        total = 60.0 * total + float(part)
    return total


def _check_distinct(path: Path, rows: Sequence[Row]) -> None:
    seen: set[int] = set()
    for row in rows:
        if row.index in seen:
            raise RunError(
                f"{path} has example {row.index} twice: two runs were mixed; "
                "keep the rows of one"
            )
        seen.add(row.index)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a log in one piece, radii in full precision: nothing is rounded up."""
    lines = ["\t".join(HEADER), *map(_line, rows)]
    runs.write_text(path, "".join(f"{line}\n" for line in lines))


def _line(row: Row) -> str:
    hours, rest = divmod(row.seconds, 3600)
    time = f"{hours:.0f}:{int(rest // 60):02d}:{rest % 60:09.6f}"
    numbers = row.index, row.label, row.prediction, float(row.radius), int(row.correct)
    return "\t".join([*map(str, numbers), time])


def summary(rows: Sequence[Row], radii: Sequence[float] = RADII) -> dict[str, Any]:
    """ACR, certified accuracy at each radius, shares in [0, 1]."""
    radius = np.asarray([row.radius for row in rows])
    correct = np.asarray([row.correct for row in rows])
    curve = radius_curve(radius, correct, grid=np.asarray(radii))
    return {
        "examples": len(rows),
        "acr": average_certified_radius(radius, correct),
        "certified": dict(zip(radii, curve.tolist(), strict=True)),
        "abstained": sum(row.prediction < 0 for row in rows) / len(rows),
    }


def attained(rows: Sequence[Row], sigma: float, alpha: float, n: int) -> float:
    """Share of the positive radii that n samples at alpha can give; nan if none."""
    positive = [row for row in rows if row.prediction >= 0 and row.radius > 0]
    if not positive:
        return math.nan
    p = proportion_lower(np.arange(n // 2, n + 1), n, alpha)
    possible = sigma * special.ndtri(p[p > 0.5])
    half = _half_units([row.text or repr(row.radius) for row in positive])
    printed = np.asarray([row.radius for row in positive])
    slack = half * (1 + 1e-6) + CUT * (1 + printed)
    nearest = np.searchsorted(possible, printed - slack)  # the first not below
    reached = np.append(possible, math.inf)[nearest] <= printed + slack
    return float(np.mean(reached))


def _half_units(texts: Sequence[str]) -> np.ndarray:
    """Half a unit of the last significant digit, as many as the longest text has."""
    values = np.asarray([float(text) for text in texts])
    digits = max(len(f"{t.split('e')[0].replace('.', '').lstrip('0')}") for t in texts)
    return 0.5 * 10.0 ** (np.floor(np.log10(values)) + 1 - digits)


def identify(
    rows: Sequence[Row],
    sigma: float,
    alphas: Sequence[float] = ALPHAS,
    trials: Sequence[int] = TRIALS,
) -> list[Match]:
    """Every (alpha, n), the best explanation of the radii first."""
    found = [
        Match(a, n, attained(rows, sigma, a, n)) for a, n in product(alphas, trials)
    ]
    return sorted(found, key=lambda match: -match.attained)


def span(indices: Sequence[int]) -> str:
    """Which examples: a slice such as 0:10000:20 as far as that says it, or a hash.

    Numbers measured on other examples must not compete: the choice of 500 images moves
    the ACR more than the training's seed does.
    """
    ordered = sorted(indices)
    steps = {after - before for before, after in pairwise(ordered)}
    if len(steps) <= 1:
        return f"{ordered[0]}:{ordered[-1] + 1}:{max(steps, default=1)}"
    return f"crc {zlib.crc32(np.asarray(ordered, np.int64).tobytes()):08x}"


def consistent(rows: Sequence[Row], sigma: float) -> list[Match]:
    """Every (alpha, n) that explains all the radii; several where these are few."""
    return [match for match in identify(rows, sigma) if match.attained >= 1.0]


def describe(path: Path, sigma: float | None) -> list[str]:
    """The line of a log in the table: name, examples, ACR, accuracies, (alpha, n)."""
    log = read(path)
    if log.torn:
        console.warn(f"{path}: {log.torn} torn lines left out")
    if log.disagreeing:
        console.warn(
            f"{path}: the column `correct` of {log.disagreeing} rows is not "
            "predict == label; the latter is used"
        )
    found = summary(log.rows)
    accuracy = " ".join(round_down(share) for share in found["certified"].values())
    cells = [path.name, str(found["examples"]), round_down(found["acr"], 4), accuracy]
    return [*cells, _explained(log.rows, sigma)]


def _explained(rows: Sequence[Row], sigma: float | None) -> str:
    if sigma is None:
        return ""
    found = consistent(rows, sigma)
    if not found:
        best = identify(rows, sigma)[0]
        return f"none (best {round_down(100 * best.attained, 1)} %)"
    return " or ".join(f"{match.alpha:g}, {match.n}" for match in found)


def main(words: list[str] | None = None) -> None:
    """Print the table of the logs given."""
    parser = argparse.ArgumentParser(prog="experiments.cohen_logs", description=__doc__)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--sigma", type=float, help="noise of the logs, to find alpha")
    chosen = parser.parse_args(words)
    try:
        rows = [describe(path, chosen.sigma) for path in chosen.logs]
    except RunError as error:
        console.fail(str(error))
        raise SystemExit(1) from None
    at = "certified at " + " ".join(f"{radius:g}" for radius in RADII)
    console.table("", ["log", "examples", "ACR", at, "alpha, n"], rows)


if __name__ == "__main__":
    main()
