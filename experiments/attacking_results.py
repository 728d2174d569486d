"""From the records of attacked examples to distances, curves and warnings."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from certjax.attacks import robust_accuracy_curve
from certjax.attacks.cascade import class_notes
from certjax.models import classifier
from certjax.threat import Linf
from experiments import judging, results
from experiments.attacking import distances_of, Smoothed
from experiments.evaluation import as_input, curve, Evaluation, Examples, Record
from experiments.judging import Plan
from experiments.settings import threat_of


POINTS = 40  # of a curve that one run gives for all radii
MASKED = 0.002  # share of examples; the limit of the reference implementation


def numbers(
    rows: list[Record], *, nearest: bool, stages: tuple[str, ...]
) -> dict[str, Any]:
    """What the records hold beyond accuracies.

    distance: quantiles over all examples for an attack that looks for the nearest
    point: 0 where the example itself is misclassified, infinite (None in the file)
    where nothing was found.  broken_by: examples by attack, in the order of `stages`.
    queries, seconds: means.
    """
    found: dict[str, Any] = {}
    if nearest:
        away = distances_of(rows)
        quantiles = {"median": 0.5, "lower_quartile": 0.25, "upper_quartile": 0.75}
        ranks = {n: np.quantile(away, q, method="lower") for n, q in quantiles.items()}
        found["distance"] = {name: float(value) for name, value in ranks.items()}
        found["distance"]["not_found"] = int(np.isinf(away).sum())
    if stages:
        broken = Counter(row["broken_by"] for row in rows)
        found["broken_by"] = {name: broken[name] for name in ("clean", *stages)}
    attacked = [row for row in rows if row["correct"]]
    for name in ("queries", "seconds"):
        if attacked and name in attacked[0]:
            values = [row[name] for row in attacked]
            found[f"mean_{name}"] = float(np.mean(values))
            if name == "queries":
                found["most_queries"] = max(values)
    return found


def warnings(rows: list[Record], plan: Plan, task: Evaluation) -> list[str]:
    """Reasons to distrust an attacked accuracy, in words.

    Source: the warnings of AutoAttack's reference implementation, Croce & Hein 2020.
    """
    node, total = plan.attack, len(rows)
    nan = sum(row["nan"] for row in rows)
    cascade = "broken_by" in rows[0]
    by_square = sum(row["broken_by"] == "square" for row in rows) if cascade else 0
    randomised = isinstance(task.model, Smoothed)
    found = {
        f"{nan} of {total} examples met NaN logits: counted as not robust": nan > 0,
        "the outputs look like probabilities: attack the logits": (
            not randomised and _probabilities(task)
        ),
        "the classifier is randomised: choose attack=autoattack_rand": (
            cascade and randomised and node.get("version") != "rand"
        ),
        f"Square broke {by_square} of {total} examples that the attacks before it "
        "could not: their gradients may be masked": by_square > MASKED * total,
    }
    more = [text for text, holds in found.items() if holds]
    if cascade:
        threat, adversary = judging.adversary_of(plan)
        more += class_notes(adversary.make(threat=threat), plan.data.classes)
    return results.masked(rows) + more


def _probabilities(task: Evaluation) -> bool:
    """Are the outputs on the first examples nonnegative numbers that sum to 1?"""
    xs = as_input(jnp.asarray(task.examples.images[: task.batch]))
    f = classifier(task.model, *task.weights)  # ty: ignore[not-iterable]
    logits = np.asarray(jax.jit(jax.vmap(f))(xs))
    inside = (logits > -1e-5) & (logits < 1 + 1e-5)
    return bool(inside.all() and (np.abs(logits.sum(axis=1) - 1) < 1e-5).all())


def robustness(
    rows: list[Record], plan: Plan, task: Evaluation, *, points: int, examples: int
) -> dict[str, Any]:
    """Accuracy in percent against eps, {} without points.

    Nearest points give it for every radius and all examples; other attacks are run at
    each radius, on the first examples.
    """
    if not points or plan.attack.get("result") == "free":
        return {}
    clean = 100 * float(np.mean([row["correct"] for row in rows]))
    if plan.attack.get("result") == "nearest":
        away = distances_of(rows)
        far = np.quantile(away[np.isfinite(away)], 0.95, method="lower")
        radii = np.linspace(0.0, max(_widest(plan), float(far)), POINTS + 1)
        robust = 100 * robust_accuracy_curve(away, radii)
        lines = {"clean": [clean] * len(radii), "robust": robust.tolist()}
        return {"eps": radii.tolist(), "examples": len(rows), **lines}
    few = Examples(*(array[:examples] for array in task.examples))
    radii = np.linspace(0.0, _widest(plan), points + 1)
    lines = curve(task._replace(examples=few), radii[1:].tolist())
    lines["clean"] = [lines["clean"][0], *lines["clean"]]
    lines["robust"] = [lines["clean"][0], *lines["robust"]]
    return {"eps": radii.tolist(), "examples": len(few.labels), **lines}


def _widest(plan: Plan) -> float:
    """Twice the radius; for linf no more than the width of the domain."""
    threat = threat_of(plan.threat, plan.attack_eps)
    width = threat.high - threat.low if isinstance(threat, Linf) else np.inf
    return float(min(2 * threat.eps, width))
