"""Metrics: `metrics.jsonl` is the truth, Weights & Biases mirrors it.

The default mode is offline: no key and no network are needed, and `wandb sync` sends
the run later. In mode "disabled" wandb is not even imported.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.runs import append_lines, keep_lines, Run


@dataclass(frozen=True)
class Tracking:
    """The `tracking` group of the config."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "certjax"
    entity: str | None = None
    tags: tuple[str, ...] = ()


class Tracker(NamedTuple):
    """Where numbers go.

    log(step, metrics): one row of metrics.jsonl, and of the W&B history.
    table(step, name, rows): a table of per-example records; arrays are pictures.
    image(step, name, path): a picture.
    final(numbers): the last word, nested dicts of numbers.
    """

    log: Callable[[int, dict[str, float]], None]
    table: Callable[[int, str, list[dict[str, Any]]], None]
    image: Callable[[int, str, Path], None]
    final: Callable[[dict[str, Any]], None]


def rewind(run: Run, step: int) -> None:
    """Drop the metrics of steps after `step`, which will be made again."""
    file = run.path / "metrics.jsonl"
    if file.is_file():
        keep_lines(file, lambda row: row.get("step", 0) <= step)


@contextlib.contextmanager
def tracking(run: Run, how: Tracking, *, job_type: str) -> Iterator[Tracker]:
    """A `Tracker` for the run; W&B is always finished, also on an exception."""
    file = run.path / "metrics.jsonl"
    with contextlib.ExitStack() as stack:
        mirror = _silent()
        if how.mode != "disabled":
            mirror = stack.enter_context(_wandb(run, how, job_type))

        def log(step: int, metrics: dict[str, float]) -> None:
            append_lines(file, [{"step": step, **metrics}])
            mirror.log(step, metrics)

        yield mirror._replace(log=log)


def _silent() -> Tracker:
    def nothing(*_: Any) -> None:
        pass

    return Tracker(nothing, nothing, nothing, nothing)


def _variables(run: Run) -> dict[str, str]:
    """W&B keeps everything, also what it stages for later, inside the run."""
    folder = run.path / "wandb"
    names = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
    folders = dict.fromkeys(names, str(folder))
    return {"WANDB_SILENT": "true", **folders}


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _wandb(run: Run, how: Tracking, job_type: str) -> Iterator[Tracker]:
    (run.path / "wandb").mkdir(exist_ok=True)
    with _environment(_variables(run)):
        import wandb

        session = wandb.init(
            project=how.project,
            entity=how.entity,
            mode=how.mode,
            id=run.id,
            resume="allow" if how.mode == "online" else None,
            name=f"{run.name}/{run.id}",
            group=run.sweep or run.name,
            job_type=job_type,
            tags=list(how.tags) or None,
            config=run.config,
            dir=str(run.path),
            reinit="finish_previous",
        )
        code = 1
        try:
            yield _mirror(wandb, session)
            code = 0
        finally:
            session.finish(exit_code=code)


def _cell(wandb: Any, value: Any) -> Any:
    """A number or word as it is; an array [H, W, C] as a picture."""
    return wandb.Image(value) if isinstance(value, np.ndarray) else value


def _mirror(wandb: Any, session: Any) -> Tracker:
    def log(step: int, metrics: dict[str, float]) -> None:
        session.log(metrics, step=step)

    def table(step: int, name: str, rows: list[dict[str, Any]]) -> None:
        columns = sorted({key for row in rows for key in row})
        data = [[_cell(wandb, row.get(column)) for column in columns] for row in rows]
        session.log({name: wandb.Table(columns=columns, data=data)}, step=step)

    def image(step: int, name: str, path: Path) -> None:
        session.log({name: wandb.Image(str(path))}, step=step)

    return Tracker(log, table, image, session.summary.update)
