"""A run and the files it leaves behind.

The directory of a run is chosen by the hash of its resolved config, so the same
config is the same run: started again it continues, and once finished it is shown.

    config.json   metrics.jsonl   certificates.jsonl   checkpoint/   curves.png
    result.json   done            .hydra/{config,overrides}.yaml     lock

Every whole file is written beside its place and renamed; every line of a .jsonl file
is flushed as it is made, and a torn last line is dropped when it is read again.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, IO, NamedTuple

import yaml


# where things are and how they are shown, not what is done
UNHASHED = ("tracking", "paths", "fresh", "checkpoint_seconds", "run", "data_dir")
DISTRIBUTIONS = ("certjax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")
REFUSALS = {  # of a place that cannot be written
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


class RunError(RuntimeError):
    """Something outside the config stops the run; the message says what to do."""


class Stopped(SystemExit):
    """A signal ended the run in good order; the exit code is 128 + the signal."""

    def __init__(self, signum: int, where: str) -> None:
        super().__init__(128 + signum)
        self.where = where


class Run(NamedTuple):
    """One run: its directory, plain config, hash (also the W&B id), name and sweep."""

    path: Path
    config: dict[str, Any]
    id: str
    name: str
    sweep: str | None


def config_hash(config: dict[str, Any]) -> str:
    """12 hex digits of what a config asks to be done, whatever the place.

    The order of `stages`, of a cascade, is part of it; that of other keys is not.
    """
    kept = {key: value for key, value in config.items() if key not in UNHASHED}
    if isinstance(kept.get("data"), dict):
        kept["data"] = {k: v for k, v in kept["data"].items() if k != "dir"}
    text = json.dumps(_in_order(kept), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2s(text.encode(), digest_size=6).hexdigest()


def _in_order(node: Any) -> Any:
    """The same tree with every mapping of `stages` as a list of pairs."""
    if isinstance(node, list | tuple):
        return [_in_order(child) for child in node]
    if not isinstance(node, dict):
        return node
    inner = {key: _in_order(child) for key, child in node.items()}
    stages = inner.get("stages")
    if isinstance(stages, dict):
        inner["stages"] = [[key, child] for key, child in stages.items()]
    return inner


def choose(config: dict[str, Any], root: Path, sweep: str | None = None) -> Run:
    """The run of a config: `<root>/<name>/[<sweep>/]<hash>`."""
    name, identity = config["name"], config_hash(config)
    parts = [part for part in (name, sweep) if part]
    return Run(root.joinpath(*parts, identity), config, identity, name, sweep)


@contextlib.contextmanager
def opened(run: Run, *, fresh: bool, overrides: Iterable[str] = ()) -> Iterator[Run]:
    """Create the directory (empty it if `fresh`) and hold its lock.

    The lock is released by the kernel however the process ends.

    Raises:
      RunError: the directory cannot be written, or another process works in it.
    """
    with writable(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        with (run.path / "lock").open("w") as lock:
            _lock(lock, run)
            if fresh:
                _empty(run.path)
            _write_config(run, list(overrides))
            yield run


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into words; pass other errors on."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise RunError(
            f"cannot write to {error.filename or path}: {error.strerror or error}; "
            "free some space or choose another place with paths.runs=<folder> (or "
            "CERTJAX_RUNS)"
        ) from error


def _lock(lock: IO[str], run: Run) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(
            f"another process works in {run.path}; wait for it, or change the config"
        ) from error
    except OSError as error:
        raise RunError(
            f"the file system of {run.path} cannot lock files ({error.strerror}), and "
            "without locks two processes could share a run; choose another place with "
            "paths.runs=<folder> (or CERTJAX_RUNS)"
        ) from error


def _empty(path: Path) -> None:
    (path / "done").unlink(missing_ok=True)  # first: killed here, it is not finished
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def _write_config(run: Run, overrides: list[str]) -> None:
    folder = run.path / ".hydra"
    folder.mkdir(exist_ok=True)
    write_text(folder / "config.yaml", yaml.safe_dump(run.config, sort_keys=False))
    write_text(folder / "overrides.yaml", yaml.safe_dump(overrides))


def saved_config(path: Path) -> dict[str, Any]:
    """The config of the run in a directory."""
    file = path / ".hydra" / "config.yaml"
    if not file.is_file():
        raise RunError(
            f"{path} is not a run: {file} is missing; give the directory of a finished "
            "`python -m experiments.train`, e.g. run=runs/<name>/<hash>"
        )
    return yaml.safe_load(file.read_text())


def recipe(path: Path) -> str:
    """A hash of all that a run was asked to do but its seed."""
    config = saved_config(path) | {"seed": None, "train_run": None}
    if "run" in config:  # an evaluation of the training run two folders up
        config["trained"] = recipe(path.parents[1])
    return config_hash(config)


def finished(path: Path) -> bool:
    """Is the run in this directory complete?"""
    return (path / "done").is_file() and (path / "result.json").is_file()


def write_text(path: Path, text: str) -> None:
    """Write a whole file, or leave the old one: never a torn one."""
    beside = path.with_name(f"{path.name}.partial")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def finite(value: Any) -> Any:
    """A tree that JSON can hold: numbers that are NaN or infinite become None."""
    if isinstance(value, dict):
        return {key: finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [finite(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one piece, floats in full precision."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; torn or damaged ones are left out."""
    if not path.is_file():
        return []
    rows = (_parsed(line) for line in path.read_bytes().splitlines(keepends=True))
    return [row for row in rows if row is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # also a UnicodeDecodeError
        return None
    return row if isinstance(row, dict) else None


def keep_lines(path: Path, keep: Callable[[dict], bool]) -> list[dict[str, Any]]:
    """Rewrite a .jsonl file with its whole lines that `keep` accepts; return them."""
    rows = [row for row in read_lines(path) if keep(row)]
    write_text(path, "".join(_line(row) for row in rows))
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row)) + "\n"


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a .jsonl file and bring them to the disk."""
    with path.open("a") as file:
        file.write("".join(_line(row) for row in rows))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Within, SIGINT and SIGTERM only set a number: the signal, 0 if there was none.

    The loop asks between steps, saves, and raises `Stopped`. A second signal acts at
    once, for a user who cannot wait.
    """
    received: list[int] = []

    def handle(signum: int, frame: Any) -> None:  # noqa: ARG001
        if received:
            raise Stopped(signum, "at once")
        received.append(signum)

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def git_commit() -> str | None:
    """The commit of this checkout, "+changes" if files differ from it; None outside."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changes = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def provenance(run: Run) -> dict[str, Any]:
    """What a reader needs to judge and repeat a result."""
    import jax

    device = jax.devices()[0]
    return {
        "config_hash": run.id,
        "git_commit": git_commit(),
        "versions": versions(),
        "device": f"{device.platform}: {device.device_kind} x {jax.device_count()}",
    }
