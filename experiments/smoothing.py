"""Certify a smoothed classifier: `experiments.certify run=<dir> certifier=smoothing`.

Every chosen example is certified, whatever the base network says of it: the smoothed
classifier is another one. Each becomes a line of `certificates.jsonl` as soon as it is
done, with its counts, so that a run that was killed goes on with the next example. An
example's random key follows from the seed and its index alone.
"""

import contextlib
import datetime
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.certificate import (
    accuracy_interval,
    average_certified_radius,
    radius_curve,
)
from certjax.smoothing import ABSTAIN, generator, sample_mesh
from certjax.smoothing.confidence import check_alpha, check_trials, round_down
from experiments import (
    build,
    checkpoint,
    cohen_logs,
    console,
    judging,
    runs,
    smoothing_plots,
)
from experiments.cli import Launch
from experiments.cohen_logs import RADII
from experiments.evaluation import as_input, Examples, select
from experiments.judging import RECORDS, Trained
from experiments.runs import Run, RunError, Stopped
from experiments.settings import name_of, Node, Selection
from experiments.tracking import Tracker, Tracking, tracking


PREFIX = "certjax.smoothing."
STREAM = zlib.crc32(b"smoothing")
# what all records of a run share and its result repeats
SHARED = ("certifier", "noise", "sigma", "train_sigma", "n0", "n", "alpha", "levels")
SHARED += ("width", "keep", "pixels", "norm", "guarantee", "split", "seed", "dtype")
SHARED += ("block", "generator", "weights")
EVERY = 30.0  # seconds between two lines of progress where there is no terminal

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SmoothingSettings(Selection):
    """The config of `experiments.certify` with a smoothing certifier."""

    run: str
    certifier: Node
    tracking: Tracking = field(default_factory=Tracking)
    seed: int = 0
    fresh: bool = False
    data_dir: str | None = None
    sigma: float | None = None
    n0: int | None = None
    n: int | None = None
    alpha: float | None = None
    indices: tuple[int, ...] | None = None
    split: Literal["test", "train"] = "test"
    batch: int = 1000
    block: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    test_eps: float | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing, and a radius that is not asked for."""
        super().__post_init__()
        for name in ("n0", "n", "batch", "block"):
            if (value := getattr(self, name)) is not None:
                check_trials(name, value)
        if self.alpha is not None:
            check_alpha(self.alpha)
        if self.test_eps is not None:
            raise ValueError(
                f"smoothing finds the radius of each example, got test_eps="
                f"{self.test_eps}; leave it out"
            )


class Task(NamedTuple):
    """What is certified, how, and what every record says about that.

    certify: (index, x) -> a certificate of `certjax.smoothing`.
    """

    certify: Callable[[int, jax.Array], Any]
    examples: Examples
    about: Record


def is_smoothing(certifier: Node) -> bool:
    """Is this a certifier of a smoothed classifier?"""
    return str(certifier.get("_target_")).startswith(PREFIX)


def work(config: dict[str, Any], launched: Launch) -> None:
    """Certify, from wherever that stands to its end."""
    trained = judging.finished_training(config["run"], config["data_dir"])
    config = with_sigma(config, train_sigma(trained))
    settings = build.settings(
        SmoothingSettings,
        config | {"tracking": build.settings(Tracking, config["tracking"])},
    )
    task = task_of(settings, trained)
    named = config | {"name": "certify", "train_run": trained.path.resolve().name}
    run = runs.choose(named, trained.path)
    if runs.finished(run.path) and not settings.fresh:
        console.say(f"finished before (fresh=true does it again): {run.path}")
        show(runs.read_json(run.path / "result.json"))
        return
    _warn_of_other_noise(task.about)
    with (
        runs.opened(run, fresh=settings.fresh, overrides=launched.overrides),
        runs.stop_requests() as stop,
        tracking(run, settings.tracking, job_type="certify") as tracker,
    ):
        began = time.monotonic()
        rows = certify_all(task, run.path / RECORDS, stop)
        result = judging.about_training(trained.settings) | summary(rows)
        result["data_sha256"] = judging.dataset_of(trained.settings.data).sha256
        result["seconds"] = {
            "evaluate": time.monotonic() - began,
            "examples": sum(row["seconds"] for row in rows),
        }
        _finish(run, result | runs.provenance(run), rows, tracker)


def train_sigma(trained: Trained) -> float | None:
    """The noise level that the network was trained at; None: without noise."""
    return trained.settings.objective.loss.get("noise", {}).get("sigma")


def with_sigma(config: dict[str, Any], known: float | None) -> dict[str, Any]:
    """The config with the noise level of the training where none is given."""
    noise = config["certifier"].get("noise", {})
    if "sigma" not in noise or noise["sigma"] is not None:
        return config
    if known is None:
        raise build.ConfigError(
            "sigma is not set, and the network was not trained with noise; give the "
            "standard deviation in input units, e.g. sigma=0.25"
        )
    certifier = config["certifier"] | {"noise": noise | {"sigma": known}}
    return config | {"certifier": certifier, "sigma": known}


def _warn_of_other_noise(about: Record) -> None:
    trained, sigma = about["train_sigma"], about.get("sigma")
    if trained != sigma and sigma is not None:
        how = "without noise" if trained is None else f"at sigma {trained:g}"
        console.warn(
            f"the network was trained {how} and is certified at sigma {sigma:g}; every "
            "record says so"
        )


def task_of(settings: SmoothingSettings, trained: Trained) -> Task:
    """The certifier of the config around the trained network, and the examples."""
    certifier = build.build(settings.certifier, where="certifier")
    variables = {"params": trained.weights.params}
    if trained.weights.statistics:
        variables["batch_stats"] = trained.weights.statistics
    f = jax.tree_util.Partial(trained.model.apply, variables)
    mesh = sample_mesh() if jax.device_count() > 1 else None
    how = {"block": settings.block, "dtype": jnp.dtype(settings.dtype), "mesh": mesh}
    keys = _keys(settings.seed, certifier)

    def certify(index: int, x: jax.Array) -> Any:
        return certifier(f, x=x, batch=settings.batch, **keys(index), **how)

    return Task(certify, _chosen(settings, trained), _about(settings, trained))


def _keys(seed: int, certifier: Callable[..., Any]) -> Callable[[int], dict[str, Any]]:
    """The key of each example as keywords; split noise has one for all of them."""
    key = jax.random.fold_in(jax.random.key(seed), STREAM)
    if not build.accepts(certifier, "key"):
        return lambda _: {}
    if build.accepts(certifier, "noise"):
        return lambda index: {"key": jax.random.fold_in(key, index)}
    return lambda _: {"key": key}


def _chosen(settings: SmoothingSettings, trained: Trained) -> Examples:
    examples = judging.examples_of(trained.settings.data, settings.split)
    if settings.indices is None:
        return select(
            examples,
            subset=settings.subset,
            skip=settings.skip,
            limit=settings.max,
            seed=settings.seed,
        )
    count, asked = len(examples.labels), settings.indices
    if (
        not asked
        or len(set(asked)) < len(asked)
        or not 0 <= min(asked) <= max(asked) < count
    ):
        raise build.ConfigError(
            f"indices must be distinct positions in the {count} examples of the "
            f"split, got {list(asked)}; e.g. indices=[0,20,40]"
        )
    return Examples(*(array[list(asked)] for array in examples))


def _about(settings: SmoothingSettings, trained: Trained) -> Record:
    """What every record says about how it was made; others do not mix with it."""
    noise = settings.certifier.get("noise", {})
    numbers = noise | settings.certifier
    return {
        "certifier": name_of(settings.certifier),
        **({"noise": name_of(noise)} if noise else {}),
        **{k: v for k, v in numbers.items() if k != "noise" and k[0] != "_"},
        "train_sigma": train_sigma(trained),
        "split": settings.split,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "block": settings.block,
        "generator": generator.NAME,
        "weights": checkpoint.digest(trained.weights)[:12],
    }


def certify_all(task: Task, file: Path, stop: Callable[[], int]) -> list[Record]:
    """Records of all examples in order; those already in `file` are not made again.

    Raises:
      Stopped: a signal came; what is finished is in the file.
      RunError: the file holds records that were made in another way.
    """
    found = {row["index"]: row for row in _already(task.about, file)}
    index = [int(i) for i in task.examples.index]
    todo = [at for at, i in enumerate(index) if i not in found]
    with _progress(len(index), found) as advance:
        for at in todo:
            if signum := stop():
                raise Stopped(signum, f"after {len(found)} of {len(index)} examples")
            row = runs.finite(_certified(task, at))
            runs.append_lines(file, [row])
            found[row["index"]] = row
            advance()
    return [found[i] for i in index]


def _already(about: Record, file: Path) -> list[Record]:
    """The whole lines of the file, all made in the same way as ours; no torn ones."""
    if not file.is_file():
        return []
    lines = len(file.read_bytes().splitlines())
    rows = runs.keep_lines(file, lambda row: "index" in row)
    if len(rows) < lines:
        console.warn(f"{lines - len(rows)} torn lines of {file} are made again")
    for row in rows:
        for name, value in about.items():
            if row.get(name) != value:
                raise RunError(
                    f"{file} was written with {name} = {row.get(name)}, now it is "
                    f"{value}: certificates of two kinds must not mix; move the "
                    "file away, or fresh=true"
                )
    return rows


def _certified(task: Task, at: int) -> Record:
    """The record of one example."""
    began = time.monotonic()
    index, label = int(task.examples.index[at]), int(task.examples.labels[at])
    x = as_input(jnp.asarray(task.examples.images[at]))
    certificate = {"norm": "patch"} | task.certify(index, x)._asdict()
    radius = float(certificate.pop("radius", certificate.get("size", 0.0)))
    prediction = int(certificate.pop("prediction"))
    return {
        "index": index,
        "label": label,
        "prediction": prediction,
        "correct": prediction == label,
        "radius": radius,
        "abstain": prediction == ABSTAIN,
        "nan": certificate["invalid"] > 0,
        **{name: _plain(value) for name, value in certificate.items()},
        **task.about,
        "seconds": time.monotonic() - began,
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


@contextlib.contextmanager
def _progress(total: int, found: dict[int, Record]) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, elsewhere a line now and then: how far, ACR, time left."""
    began = said = time.monotonic()
    before = len(found)
    with console.progress("certify", total=total, done=before) as advance:

        def step() -> None:
            nonlocal said
            now, done = time.monotonic(), len(found)
            each = (now - began) / (done - before)
            note = f"ACR {round_down(_acr(found.values()))}"
            advance(1, note)
            if not console.ERR.is_terminal and (now - said > EVERY or done == total):
                said = now
                left = datetime.timedelta(seconds=round(each * (total - done)))
                console.say(f"{done} of {total}, {each:.2f} s each, eta {left}, {note}")

        yield step


def _acr(rows: Iterable[Record]) -> float:
    radius, correct = radii_of(rows)
    return average_certified_radius(radius, correct)


def radii_of(rows: Iterable[Record]) -> tuple[np.ndarray, np.ndarray]:
    """[N] certified radii, and [N] whether the smoothed prediction is the label."""
    rows = list(rows)
    radius = np.asarray([row["radius"] for row in rows], np.float64)
    return radius, np.asarray([row["correct"] for row in rows], bool)


def summary(rows: list[Record]) -> dict[str, Any]:
    """The numbers of a result: how it was made, ACR, certified accuracy at radii."""
    radius, correct = radii_of(rows)
    grid = grid_of(radius)
    shares = radius_curve(radius, correct, grid=grid)
    made = {k: v for k, v in rows[0].items() if k in SHARED}
    return {
        **made,
        "examples": len(rows),
        "acr": average_certified_radius(radius, correct),
        "radii": grid.tolist(),
        "certified_at": shares.tolist(),
        "table": radius_curve(radius, correct, grid=np.asarray(RADII)).tolist(),
        "intervals": [_interval(share, len(rows)) for share in shares],
        "abstained": sum(row["abstain"] for row in rows) / len(rows),
        "nan": sum(row["nan"] for row in rows),
    }


def _interval(share: float, count: int) -> tuple[float, float]:
    return accuracy_interval(round(share * count), count)


def grid_of(radius: np.ndarray) -> np.ndarray:
    """Multiples of 0.25 up to the largest radius (of 1 where it is above 5)."""
    most = float(np.max(radius, initial=0.0))
    step = 0.25 if most <= 5 else max(1.0, math.ceil(most / 16))
    return np.arange(0.0, max(most, step) + 1e-12, step)


def show(result: dict[str, Any]) -> None:
    """Print the table of a result; the ACR rounded down."""
    names = ("radii", "certified_at", "intervals")
    rows = [
        [f"{radius:g}", f"{100 * share:.2f}", f"{100 * low:.1f} to {100 * high:.1f}"]
        for radius, share, (low, high) in zip(*map(result.get, names), strict=True)
    ]
    columns = [f"{result['norm']} radius", "certified %", "95 % interval"]
    console.table(title_of(result), columns, rows)
    console.OUT.print(
        f"ACR {round_down(result['acr'], 4)}, abstained "
        f"{100 * result['abstained']:.2f} %, {result['guarantee']}",
        markup=False,
    )
    if result["nan"]:
        console.warn(
            f"{result['nan']} examples met NaN logits; each counted as a vote against"
        )


def title_of(result: dict[str, Any]) -> str:
    """The network and the certifier in one or two lines."""
    numbers = [
        f"{name} {result[name]:g}"
        for name in ("sigma", "n0", "n", "alpha", "levels", "width", "keep")
        if result.get(name) is not None
    ]
    trained = result.get("train_sigma")
    noise = "no noise" if trained is None else f"sigma {trained:g}"
    network = f"{result['dataset']} · {result['model']} · {result['objective']}"
    how = f"{result.get('noise') or result['certifier']} · {', '.join(numbers)}"
    count = f"{result['examples']} {result.get('split', 'test')} examples"
    return f"{network} (trained with {noise})\n{how} · {count}"


def _finish(
    run: Run, result: dict[str, Any], rows: list[Record], tracker: Tracker
) -> None:
    """The picture, a log as Cohen's, the result; mark the run done, show it."""
    picture = run.path / "curves.png"
    smoothing_plots.radius_curves(picture, [(result, rows)])
    tracker.image(0, "curves", picture)
    cohen_logs.write(run.path / "certificates.tsv", map(log_row, rows))
    tracker.table(0, "examples", [_flat(row) for row in rows[: judging.SAMPLE]])
    tracker.final({"test/acr": result["acr"]} | {"result": result})
    runs.write_json(run.path / "result.json", result)
    runs.write_text(run.path / "done", "")
    show(result)
    console.say(f"results: {run.path}")


def log_row(row: Record) -> cohen_logs.Row:
    """A record as a row of Cohen's logs."""
    numbers = row["index"], row["label"], row["prediction"], row["radius"]
    return cohen_logs.Row(*numbers, row["correct"], row["seconds"])


def _flat(row: Record) -> Record:
    return {k: str(v) if isinstance(v, list) else v for k, v in row.items()}
