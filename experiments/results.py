"""From the records of the examples to the numbers, the table and the checks."""

from collections.abc import Iterable
from typing import Any

from certjax.certificate import accuracy_interval
from experiments import console


Record = dict[str, Any]
NAMES = {"correct": "clean", "robust": "robust", "certified": "certified"}


def summary(rows: list[Record]) -> dict[str, Any]:
    """Percentages, counts and 95 % intervals of what the records hold."""
    fields = [field for field in NAMES if field in rows[0]]
    counts = {NAMES[f]: sum(bool(row[f]) for row in rows) for f in fields}
    return {
        **{name: 100 * count / len(rows) for name, count in counts.items()},
        "counts": counts,
        "intervals": {name: _interval(c, len(rows)) for name, c in counts.items()},
        "examples": len(rows),
        "nan": sum(row["nan"] for row in rows),
    }


def _interval(count: int, total: int) -> list[float]:
    return [100 * end for end in accuracy_interval(count, total)]


def consistency(rows: Iterable[Record], *, comparable: bool) -> dict[str, Any]:
    """Does certified <= attacked <= clean hold, and did every attack keep to its set?

    Args:
      rows: records.
      comparable: the certified set contains the attacked one, so that an attack that
        succeeds refutes a certificate.
    """
    wrong = [row["index"] for row in rows if _contradicts(row, comparable)]
    return {"consistent": not wrong, "contradictions": wrong}


def _contradicts(row: Record, comparable: bool) -> bool:
    certified, robust = row.get("certified", False), row.get("robust", True)
    beyond_clean = (certified or row.get("robust", False)) and not row["correct"]
    refuted = comparable and certified and not robust
    return beyond_clean or refuted or row.get("outside", False)


def masked(rows: list[Record]) -> list[str]:
    """A warning if gradients vanish at examples, else none.

    Source: the warnings of AutoAttack's reference implementation, Croce & Hein 2020.
    """
    flat = sum(row.get("zero_gradient", False) for row in rows)
    if not flat:
        return []
    return [
        f"{flat} of {len(rows)} examples have a zero gradient: attacks that follow the "
        "gradient may overestimate robustness"
    ]


def joined(rows: Iterable[Record], others: Iterable[Record]) -> list[Record]:
    """The records with the fields that another evaluation of the same network adds.

    What either of two attacks broke is broken. Records that name another image are left
    out; those of earlier versions name none.
    """
    known = {(row["index"], row["weights"]): row for row in others}
    return [_both(known.get((row["index"], row["weights"]), {}), row) for row in rows]


def _both(old: Record, row: Record) -> Record:
    if old.get("image") not in (None, row.get("image")):
        return row
    both = old | row
    if "robust" in both:
        both["robust"] = old.get("robust", True) and row.get("robust", True)
    return both


def show(result: dict[str, Any]) -> None:
    """Print the table of a result, and what is wrong with it if anything is."""
    lines = {
        "clean": ("clean", ""),
        "robust": (f"attacked by {result.get('attack')}", "attack_eps"),
        "certified": (f"certified by {result.get('certifier')}", "test_eps"),
    }
    grid = [
        [text, _radius(result.get(eps)), *_cells(result, name)]
        for name, (text, eps) in lines.items()
        if name in result
    ]
    console.table(
        title_of(result), ["accuracy", "eps", "%", "examples", "95 % interval"], grid
    )
    if "stages" in result:
        columns = ["stage", "examples", "answered", "seconds"]
        console.table("certified by stages", columns, _stages(result["stages"]))
    _attack(result)
    _caveats(result)


def _stages(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    keys = ("examples", "answered", "seconds")
    return [
        [name, *(f"{stage[key]:g}" if key in stage else "" for key in keys)]
        for name, stage in found.items()
    ]


def _attack(result: dict[str, Any]) -> None:
    """What an attack found beyond an accuracy."""
    if "distance" in result:
        away = {k: "inf" if v is None else v for k, v in result["distance"].items()}
        text = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}"
            if isinstance(value, float)
            else f"{name.replace('_', ' ')} {value}"
            for name, value in away.items()
        )
        console.say(f"distance to the nearest misclassified point: {text}")
    if "broken_by" in result:
        found = ", ".join(f"{k} {v}" for k, v in result["broken_by"].items())
        console.say(f"examples broken by: {found or 'none'}")
    for text in result.get("warnings", ()):
        console.warn(text)


def title_of(result: dict[str, Any]) -> str:
    """The network and the data in one line."""
    how = f"train eps {result['train_eps']:.4g}"
    if "train_sigma" in result:
        how = f"train sigma {result['train_sigma']:.4g}"
    return (
        f"{result['dataset']} · {result['model']} · {result['objective']} ({how}) · "
        f"{result['examples']} {_kind_of_examples(result)}"
    )


def _kind_of_examples(result: dict[str, Any]) -> str:
    """Of which split the examples are, and whether they chose the weights."""
    held_out = result.get("validation") is not None
    chosen = result.get("selection", {}).get("on") == "test"
    split = "held-out training examples" if held_out else "test examples"
    return split + " (the weights were selected on them)" * chosen


def _radius(eps: float | None) -> str:
    return "" if eps is None else f"{eps:.6g}"


def _cells(result: dict[str, Any], name: str) -> list[str]:
    low, high = result["intervals"][name]
    count = f"{result['counts'][name]}/{result['examples']}"
    return [f"{result[name]:.2f}", count, f"{low:.1f} to {high:.1f}"]


def _caveats(result: dict[str, Any]) -> None:
    if result["nan"]:
        console.fail(
            f"{result['nan']} examples met a NaN. In the logits or under the attack it "
            "makes an example neither certified nor robust; in a bound it proves "
            "nothing, and only another bound, of a cascade, may still certify it"
        )
    if not result["consistent"]:
        console.fail(
            "certified <= attacked <= clean does not hold for the examples "
            f"{result['contradictions'][:10]}: do not use this result, report it"
        )
