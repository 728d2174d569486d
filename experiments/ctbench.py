"""Published results of certified training beside our own runs.

`python -m experiments.report table=ctbench [folders]` prints a line for each published
row and each of our recipes of the same method, data and radius; what was not run is
empty, and runs that were tested on held-out training examples are left out. Published
numbers are those of Mao et al. 2025 (CTBench), arXiv:2406.04848: one wide network, a
complete verifier with 1,000 seconds an example, weights selected on the test set. Ours
name their verifier and the number of examples.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import runs
from experiments.runs import RunError


METHODS = {
    "ibp": "IBP",
    "crown_ibp": "CROWN-IBP",
    "sabr": "SABR",
    "taps": "TAPS",
    "staps": "STAPS",
    "mtl_ibp": "MTL-IBP",
    "cc_ibp": "CC-IBP",
    "exp_ibp": "EXP-IBP",
}
ALIASES = {"crown_ibp_fused": "crown_ibp"}


class Published(NamedTuple):
    """Percentages of a paper; unsure: quoted from memory, to be checked."""

    clean: float
    certified: float
    unsure: bool = False


SETTINGS = {
    ("mnist", 0.1): "MNIST 0.1",
    ("mnist", 0.3): "MNIST 0.3",
    ("cifar10", 2 / 255): "CIFAR-10 2/255",
    ("cifar10", 8 / 255): "CIFAR-10 8/255",
    ("tinyimagenet", 1 / 255): "TinyImageNet 1/255",
}
PUBLISHED: dict[str, dict[str, Published]] = {
    "MNIST 0.1": {
        "ibp": Published(98.87, 98.26, True),
        "crown_ibp": Published(98.94, 98.31, True),
        "sabr": Published(99.08, 98.40, True),
        "taps": Published(99.16, 98.52, True),
        "staps": Published(99.11, 98.47, True),
        "mtl_ibp": Published(99.18, 98.37, True),
    },
    "MNIST 0.3": {
        "ibp": Published(98.54, 93.80),
        "crown_ibp": Published(98.48, 93.90),
        "sabr": Published(98.66, 93.68),
        "taps": Published(98.56, 93.95, True),
        "staps": Published(98.74, 93.64, True),
        "mtl_ibp": Published(98.74, 93.90),
    },
    "CIFAR-10 2/255": {
        "ibp": Published(67.49, 55.99),
        "crown_ibp": Published(67.60, 57.11),
        "sabr": Published(77.86, 63.61),
        "taps": Published(74.44, 61.27, True),
        "staps": Published(77.05, 64.21, True),
        "mtl_ibp": Published(78.82, 64.41),
    },
    "CIFAR-10 8/255": {
        "ibp": Published(48.51, 35.28),
        "crown_ibp": Published(48.25, 32.59),
        "sabr": Published(52.71, 35.34),
        "taps": Published(49.96, 35.25, True),
        "staps": Published(51.49, 35.11, True),
        "mtl_ibp": Published(54.28, 35.41),
    },
    "TinyImageNet 1/255": {
        "ibp": Published(26.77, 19.82),
        "crown_ibp": Published(28.44, 22.14),
        "sabr": Published(30.58, 20.96),
        "taps": Published(28.53, 21.73, True),
        "staps": Published(30.63, 22.31, True),
        "mtl_ibp": Published(35.97, 27.73),
    },
}
HEADER = ("setting", "method", "published clean / certified", "network")
HEADER += ("run", "clean %", "certified %", "verifier", "examples x seeds")


class Ours(NamedTuple):
    """Runs of one recipe and one verifier that differ in their seed only."""

    results: tuple[dict[str, Any], ...]

    def cells(self) -> list[str]:
        """Network, run, clean, certified, verifier and counts."""
        one = self.results[0]
        selected = one.get("selection", {}).get("on") == "test"
        return [
            one["model"],
            f"{one['name']}{' (selected on test)' * selected}",
            _spread([r["clean"] for r in self.results]),
            _spread([r["certified"] for r in self.results]),
            one["certifier"],
            f"{one['examples']} x {len({r['seed'] for r in self.results})}",
        ]


def _spread(values: list[float]) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def table(folders: Iterable[Path]) -> str:
    """GitHub's Markdown; the published numbers alone where there is no finished run."""
    found = _grouped(folders)
    lines = [list(HEADER), ["---"] * 5 + ["---:"] * 2 + ["---", "---:"]]
    for setting in SETTINGS.values():
        for method, name in METHODS.items():
            known = PUBLISHED[setting].get(method)
            left = [setting, name, _published(known)]
            rows = found.get((setting, method), [])
            lines += [left + ours.cells() for ours in rows] or [left + [""] * 6]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\n(*) quoted from memory, not checked against the paper."


def _published(known: Published | None) -> str:
    if known is None:
        return ""
    mark = " (*)" if known.unsure else ""
    return f"{known.clean:.2f} / {known.certified:.2f}{mark}"


def _grouped(folders: Iterable[Path]) -> dict[tuple[str, str], list[Ours]]:
    """(setting, method) -> one entry for each recipe and verifier."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    seen: Counter[tuple] = Counter()  # one network certified twice is not two seeds
    for file in [f for folder in folders for f in sorted(folder.rglob("result.json"))]:
        place = _place(file.parent)
        if place is not None:
            result = runs.read_json(file)
            network = (*place, result["seed"])
            groups[*place, seen[network]].append(result)
            seen[network] += 1
    found: dict[tuple[str, str], list[Ours]] = defaultdict(list)
    for (setting, method, *_), results in sorted(groups.items(), key=str):
        found[setting, method].append(Ours(tuple(results)))
    return found


def _place(folder: Path) -> tuple | None:
    """Where a result belongs: setting, method, verifier, examples, recipe."""
    if not runs.finished(folder):
        return None
    result = runs.read_json(folder / "result.json")
    trained = folder if "objective" in runs.saved_config(folder) else folder.parents[1]
    config = runs.saved_config(trained)
    setting, method = _setting(result, config), method_of(config)
    if setting is None or method not in METHODS or "certified" not in result:
        return None
    verifier = result["certifier"], result["examples"]
    return setting, method, *verifier, runs.recipe(folder)


def _setting(result: dict[str, Any], config: dict[str, Any]) -> str | None:
    """The published setting that a result belongs to; None: to none of them."""
    norm = str(config["threat"]["_target_"]).rpartition(".")[2]
    if norm != "Linf" or config["data"].get("validation") is not None:
        return None
    data, radius = result.get("dataset"), result.get("test_eps") or 0.0
    near = lambda name, eps: name == data and abs(eps - radius) < 1e-9
    return next((text for key, text in SETTINGS.items() if near(*key)), None)


def method_of(config: dict[str, Any]) -> str:
    """The method of a training config, e.g. "staps": `taps` over a small box."""
    loss = config["objective"]["loss"]
    name = str(loss["_target_"]).rpartition(".")[2]
    if name == "taps" and loss.get("box"):
        return "staps"
    return ALIASES.get(name, name)


# ------------------------------------------------------------------------ Pareto front


class Point(NamedTuple):
    """One trained network: what it was asked to trade, and what it got of how many."""

    method: str
    weight: float
    clean: float
    certified: float
    examples: int


WEIGHTS = {
    "mtl_ibp": "alpha",
    "cc_ibp": "alpha",
    "exp_ibp": "alpha",
    "sabr": "ratio",
    "ibp": "kappa",
    "crown_ibp": "kappa",
    "taps": "gradient_scale",
    "staps": "gradient_scale",
}


def points(folders: Iterable[Path]) -> list[Point]:
    """Clean and certified accuracy of the training runs below the folders.

    Of several evaluations of a network on as many examples, the one that proved the
    most counts. Runs that were tested on held-out training examples are left out.

    Raises:
      RunError: no training run with a trade-off weight is there, or they differ in the
        data, the norm, the test radius or the network.
    """
    found: dict[tuple, list[Point]] = defaultdict(list)
    for file in [f for folder in folders for f in sorted(folder.rglob("result.json"))]:
        config = runs.saved_config(file.parent)
        if "objective" in config and runs.finished(file.parent):
            result = runs.read_json(file)
            where = tuple(result.get(key) for key in ("dataset", "test_eps", "model"))
            new = _points(file.parent, config, result)
            if new:
                found[*where, str(config["threat"]["_target_"])] += new
    if not found:
        places = ", ".join(str(folder) for folder in folders)
        raise RunError(f"no finished training with a trade-off weight in {places}")
    if len(found) > 1:
        places = "; ".join(", ".join(map(str, where)) for where in found)
        raise RunError(f"these runs do not compare; give folders of one of: {places}")
    (front,) = found.values()
    return sorted(front, key=lambda p: (p.method, p.examples, p.weight))


def _points(
    folder: Path, config: dict[str, Any], result: dict[str, Any]
) -> list[Point]:
    """One point for each number of examples that the network was judged on."""
    method = method_of(config)
    weight = (config["objective"]["loss"] | config["objective"]).get(
        WEIGHTS.get(method, "")
    )
    if weight is None or config["data"].get("validation") is not None:
        return []
    last = float(weight[-1] if isinstance(weight, list) else weight)
    again = [p.parent for p in folder.glob("certify/*/result.json")]
    judged = [runs.read_json(p / "result.json") for p in again if runs.finished(p)]
    same = [r for r in judged if r.get("test_eps") == result.get("test_eps")]
    best: dict[int, dict[str, Any]] = {}
    for one in (result, *same):
        known = best.get(one["examples"], {"certified": -1.0})
        if one.get("certified", -1.0) > known["certified"]:
            best[one["examples"]] = one
    return [
        Point(method, last, one["clean"], one["certified"], examples)
        for examples, one in best.items()
    ]
