"""Certify a smoothed classifier: `experiments.certify run=<dir> certifier=smoothing`.

Every chosen example is certified, whatever the base network says of it: the smoothed
classifier is another one. Each becomes a line of `certificates.jsonl` as soon as it is
done, with its counts, so that a run that was killed goes on with the next example. An
example's random key follows from the seed and its index alone.
"""

import contextlib
import datetime
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
from certjax.smoothing import (
    ABSTAIN,
    Band,
    Block,
    generator,
    sample_mesh,
)
from certjax.smoothing.confidence import (
    Budget,
    check_alpha,
    check_trials,
    round_down,
)
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
from experiments.evaluation import as_input, Examples, select
from experiments.judging import RECORDS, Trained
from experiments.runs import Run, RunError, Stopped
from experiments.settings import check_shown, name_of, Node, Selection
from experiments.smoothing_scales import as_given, grid_of, kind_of, NUMBERS, scale_of
from experiments.tracking import Tracker, Tracking, tracking


PREFIX = "certjax.smoothing."
STREAM = zlib.crc32(b"smoothing")
# what all records of a run share and its result repeats
SHARED = ("certifier", "noise", "sigma", "train_sigma", "n0", "n", "alpha", "levels")
SHARED += ("width", "keep", "pixels", "norm", "guarantee", "split", "seed", "dtype")
SHARED += ("block", "generator", "weights", "train_noise", "rounds", "give_up")
SHARED += ("fixed_radius", "threshold", "budget")
EXAMPLES = {
    "sigma": "sigma=0.25 (a standard deviation in input units)",
    "keep": "certifier.noise.keep=45",
    "pixels": "certifier.noise.pixels=784",
    "levels": "certifier.noise.levels=256",
    "width": "certifier.width=4",
}
HIDING = {"certify_band": Band, "certify_block": Block}  # what they show of an image
EVERY = 30.0  # seconds between two lines of progress where there is no terminal

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SmoothingSettings(Selection):
    """The config of `experiments.certify` with a smoothing certifier.

    indices: positions in the split, or a slice of them, e.g. 0:60000:2.
    parts: directories of other certifications, whose records are taken over.
    """

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
    radius: float | None = None
    indices: tuple[int, ...] | str | None = None
    parts: tuple[str, ...] = ()
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
    config = completed(config, trained.settings.objective.loss.get("noise", {}))
    settings = build.settings(
        SmoothingSettings,
        config | {"tracking": build.settings(Tracking, config["tracking"])},
    )
    task = task_of(settings, trained)
    named = config | {"name": "certify", "train_run": trained.path.resolve().name}
    named.pop("parts", None)  # where records come from changes none of them
    run = runs.choose(named, trained.path)
    if runs.finished(run.path) and not settings.fresh:
        judging.show_finished(run, trained.settings.data, show)
        return
    _warn_of_other_noise(task.about)
    with (
        runs.opened(run, fresh=settings.fresh, overrides=launched.overrides),
        runs.stop_requests() as stop,
        tracking(run, settings.tracking, job_type="certify") as tracker,
    ):
        began = time.monotonic()
        take_over(task, settings.parts, run.path / RECORDS)
        rows = certify_all(task, run.path / RECORDS, stop)
        result = judging.about_training(trained.settings) | summary(rows)
        result["train_seed"] = trained.settings.seed  # `seed` is that of the noise
        result["data_sha256"] = judging.dataset_of(trained.settings.data).sha256
        result["seconds"] = {
            "evaluate": time.monotonic() - began,
            "examples": sum(row["seconds"] for row in rows),
        }
        _finish(run, result | runs.provenance(run), rows, tracker)


def train_sigma(trained: Trained) -> float | None:
    """The noise level that the network was trained at; None: without noise."""
    return trained.settings.objective.loss.get("noise", {}).get("sigma")


def completed(config: dict[str, Any], trained: Node) -> dict[str, Any]:
    """The config with the numbers of the training noise where none are given.

    Raises:
      ConfigError: the network was not trained with such a noise.
    """
    certifier = config["certifier"]
    own = certifier.get("noise", certifier)
    empty = [name for name in EXAMPLES if name in own and own[name] is None]
    found = {name: trained.get(name) for name in empty}
    for name, value in found.items():
        if value is None:
            raise build.ConfigError(
                f"{name} is not set, and the network was not trained with noise that "
                f"has one; give it, e.g. {EXAMPLES[name]}"
            )
    noisy = "noise" in certifier
    filled = {"noise": own | found} if noisy else found
    known = {name: value for name, value in found.items() if name in config}
    return config | {"certifier": certifier | filled} | known


def _warn_of_other_noise(about: Record) -> None:
    if "train_noise" in about:
        trained, words = about["train_noise"] or "no noise", _words_of(about)
        if not set(words) <= set(trained.split(", ")):
            console.warn(
                f"the network was trained with {trained} and is certified with "
                f"{', '.join(words)}; every record says so"
            )
        return
    trained, sigma = about["train_sigma"], about["sigma"]
    if trained != sigma:
        how = "without noise" if trained is None else f"at sigma {trained:g}"
        console.warn(
            f"the network was trained {how} and is certified at sigma {sigma:g}; every "
            "record says so"
        )


def _words_of(about: Record) -> list[str]:
    """What a network sees of an image, e.g. ["Band", "width 4"]."""
    hiding = HIDING.get(about["certifier"])
    kind = about.get("noise") or (hiding and hiding.__name__)
    numbers = [f"{name} {about[name]}" for name in EXAMPLES if name in about]
    return [kind, *numbers] if kind else numbers


def task_of(settings: SmoothingSettings, trained: Trained) -> Task:
    """The certifier of the config around the trained network, and the examples."""
    certifier = build.build(settings.certifier, where="certifier")
    examples = _chosen(settings, trained)
    show = _shown(name_of(settings.certifier), certifier.keywords)
    check_shown(trained.model, show, examples.images[0], where="certifier")
    variables = {"params": trained.weights.params}
    if trained.weights.statistics:
        variables["batch_stats"] = trained.weights.statistics
    f = jax.tree_util.Partial(trained.model.apply, variables)
    mesh = sample_mesh() if jax.device_count() > 1 else None
    how = {"block": settings.block, "dtype": jnp.dtype(settings.dtype), "mesh": mesh}
    keys = _keys(settings.seed, certifier)

    def certify(index: int, x: jax.Array) -> Any:
        with build.blamed("certifier"):
            return certifier(f, x=x, batch=settings.batch, **keys(index), **how)

    norm = getattr(certifier.keywords.get("noise"), "norm", None)
    about = _about(settings, trained) | ({"norm": norm} if norm else {})
    return Task(certify, examples, about)


def _shown(certifier: str, numbers: dict[str, Any]) -> Callable[..., jax.Array]:
    """`show(key, x)`: something that the network sees instead of x."""
    if certifier in HIDING:
        return HIDING[certifier](numbers["width"]).sample
    return numbers["noise"].sample if "noise" in numbers else lambda _, x: x


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
    count = len(examples.labels)
    asked = _positions(settings.indices, count)
    if (
        not asked
        or len(set(asked)) < len(asked)
        or not 0 <= min(asked) <= max(asked) < count
    ):
        raise build.ConfigError(
            f"indices must be distinct positions in the {count} examples of the "
            f"split, got {settings.indices}; e.g. indices=[0,20,40] or indices=0:100:2"
        )
    return Examples(*(array[asked] for array in examples))


def _positions(indices: tuple[int, ...] | str, count: int) -> list[int]:
    """The positions as they are; of a slice such as 0:60000:2; [] of other words."""
    if not isinstance(indices, str):
        return list(indices)
    with contextlib.suppress(ValueError):
        ends = [int(end) if end else None for end in indices.split(":")]
        if 2 <= len(ends) <= 3:
            return list(range(count)[slice(*ends)])
    return []


def _about(settings: SmoothingSettings, trained: Trained) -> Record:
    """What every record says about how it was made; others do not mix with it."""
    noise = settings.certifier.get("noise", {})
    numbers = noise | settings.certifier
    if "radius" in numbers:  # of a record: what was certified
        numbers["fixed_radius"] = numbers.pop("radius")
    known = trained.settings.objective.loss.get("noise", {})
    return {
        "certifier": name_of(settings.certifier),
        **({"noise": name_of(noise)} if noise else {}),
        **{k: v for k, v in numbers.items() if k != "noise" and k[0] != "_"},
        "train_sigma": train_sigma(trained),
        **({} if "sigma" in noise else {"train_noise": _words(known)}),
        "split": settings.split,
        "data": judging.dataset_of(trained.settings.data).sha256[:12],
        "seed": settings.seed,
        "dtype": settings.dtype,
        "block": settings.block,
        "generator": generator.NAME,
        "weights": checkpoint.digest(trained.weights)[:12],
    }


def _words(noise: Node) -> str | None:
    """A noise in words, e.g. "Ablation, keep 45, pixels 784"."""
    numbers = [f"{name} {value}" for name, value in noise.items() if name[0] != "_"]
    return ", ".join([name_of(noise), *numbers]) if noise else None


def take_over(task: Task, parts: Iterable[str], file: Path) -> None:
    """Append to `file` the records of the task's examples that other runs made.

    Raises:
      RunError: a directory has no records, or some that were made in another way.
    """
    known = {row["index"] for row in _already(task, file)}
    missing = {int(i) for i in task.examples.index} - known
    for folder in parts:
        source = Path(folder) / RECORDS
        if not source.is_file():
            raise RunError(f"no {source}; parts= are directories of certifications")
        rows = runs.read_lines(source)
        _check_alike(task, rows, source)
        found = {row["index"]: row for row in rows if row["index"] in missing}
        runs.append_lines(file, list(found.values()))
        missing -= found.keys()
        console.say(f"{len(found)} records taken over from {folder}")


def certify_all(task: Task, file: Path, stop: Callable[[], int]) -> list[Record]:
    """Records of all examples in order; those already in `file` are not made again.

    Raises:
      Stopped: a signal came; what is finished is in the file.
      RunError: the file holds records that were made in another way.
    """
    found = {row["index"]: row for row in _already(task, file)}
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


def _already(task: Task, file: Path) -> list[Record]:
    """The whole lines of the file, all made in the same way as ours; no torn ones."""
    if not file.is_file():
        return []
    lines = len(file.read_bytes().splitlines())
    rows = runs.keep_lines(file, lambda row: "index" in row)
    if len(rows) < lines:
        console.warn(f"{lines - len(rows)} torn lines of {file} are made again")
    _check_alike(task, rows, file)
    return rows


def _check_alike(task: Task, rows: list[Record], file: Path) -> None:
    """Refuse records that were made in another way, or of other data."""
    pairs = zip(task.examples.index, task.examples.labels, strict=True)
    labels = {int(i): int(label) for i, label in pairs}
    for row in rows:
        label = labels.get(row.get("index"), row.get("label"))  # of ours, if it is one
        for name, value in (task.about | {"label": label}).items():
            if row.get(name) != value:
                raise RunError(
                    f"{file} was written with {name} = {row.get(name)}, now it is "
                    f"{value}: certificates of two kinds must not mix; move the "
                    "file away, or fresh=true"
                )


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
    if isinstance(value, Budget):
        return value._asdict()
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
            mean = scale_of(next(iter(found.values()))).mean
            note = f"{mean} {round_down(_acr(found.values()))}"
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
    scale = scale_of(rows[0])
    grid = grid_of(scale, radius)
    shares = radius_curve(radius, correct, grid=grid)
    drawn = "n" if scale.kind == "fixed" else None  # differs between the examples
    made = {k: v for k, v in rows[0].items() if k in SHARED and k != drawn}
    return {
        **made,
        **({"samples": sum(row["n"] for row in rows)} if drawn else {}),
        "examples": len(rows),
        "indices": cohen_logs.span([row["index"] for row in rows]),
        "correct": float(np.mean(correct)),
        "acr": average_certified_radius(radius, correct),
        "radii": grid.tolist(),
        "certified_at": shares.tolist(),
        "table": radius_curve(radius, correct, grid=np.asarray(scale.columns)).tolist(),
        "intervals": [_interval(share, len(rows)) for share in shares],
        "abstained": sum(row["abstain"] for row in rows) / len(rows),
        "nan": sum(row["nan"] for row in rows),
    }


def _interval(share: float, count: int) -> tuple[float, float]:
    return accuracy_interval(round(share * count), count)


def show(result: dict[str, Any]) -> None:
    """Print the table of a result; the ACR rounded down."""
    names = ("radii", "certified_at", "intervals")
    rows = [
        [as_given(radius), f"{100 * share:.2f}", f"{100 * low:.1f} to {100 * high:.1f}"]
        for radius, share, (low, high) in zip(*map(result.get, names), strict=True)
    ]
    columns = [f"{result['norm']} radius", "certified %", "95 % interval"]
    console.table(title_of(result), columns, rows)
    console.OUT.print(_below(result), markup=False)
    if result["nan"]:
        console.warn(
            f"{result['nan']} examples met NaN logits; each counted as a vote against"
        )


def _below(result: dict[str, Any]) -> str:
    """The line under the table."""
    mean = f"{scale_of(result).mean} {round_down(result['acr'], 4)}"
    if "samples" in result:
        mean = f"{result['samples'] / result['examples']:,.0f} samples an example"
    shares = {"correct": result.get("correct"), "abstained": result["abstained"]}
    words = [f"{k} {100 * v:.2f} %" for k, v in shares.items() if v is not None]
    if split := result.get("budget"):
        words.append(f"alpha {Budget(split['alpha'], split['parts']).describe()}")
    return ", ".join([mean, *words, result["guarantee"]])


def title_of(result: dict[str, Any]) -> str:
    """The network and the certifier in one or two lines."""
    numbers = [
        f"{name} {as_given(result[name])}"
        for name in ("sigma", "n0", "n", "alpha", *NUMBERS)
        if result.get(name) is not None
    ]
    trained = result.get("train_sigma")
    noise = result.get("train_noise") or "no noise"
    noise = noise if trained is None else f"sigma {trained:g}"
    network = f"{result['dataset']} · {result['model']} · {result['objective']}"
    how = f"{kind_of(result)} · {', '.join(numbers)}"
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
