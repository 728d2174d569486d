"""Speed and memory, side by side: `python -m experiments.benchmark suite=bounds`.

`suite=attack_peers` compares attacks with those of other libraries instead.

The cases of a group take turns, round after round, so that whatever else the machine
does hits all of them alike; the ratio is the median over rounds of case / reference.
Compilation is timed apart. Memory is what the compiled program asks for (arguments
are shared and not counted).
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import build, console, peers_attacks
from experiments.cli import Launch, launch
from experiments.runs import finite
from experiments.suites import Case, Group, SUITES
from experiments.training_suite import training_suite


PEERS = "attack_peers"


SUITES["training"] = training_suite


@dataclass(frozen=True)
class Settings:
    """The config of `experiments.benchmark`."""

    suite: str
    rounds: int
    out: str
    peers: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse unknown suites and empty measurements."""
        if self.suite not in (*SUITES, PEERS):
            known = ", ".join((*SUITES, PEERS))
            raise build.ConfigError(f"suite must be one of {known}, got {self.suite}")
        if self.rounds < 1:
            raise build.ConfigError(f"rounds must be at least 1, got {self.rounds}")


class Row(NamedTuple):
    """One measured case; times in ms, memory in MiB."""

    group: str
    case: str
    median_ms: float
    least_ms: float
    ratio: float
    target: float | None
    compile_s: float
    memory_mib: float


def work(config: dict[str, Any], _: Launch) -> None:
    """Measure a suite, print it, keep it as JSON."""
    settings = build.settings(Settings, config)
    if settings.suite == PEERS:
        plan = build.settings(peers_attacks.Plan, settings.peers, where="peers")
        rows = list(peers_attacks.compare(plan, settings.rounds))
        peers_attacks.show(rows)
    else:
        groups = SUITES[settings.suite]()
        rows = [row for group in groups for row in measure(group, settings.rounds)]
        show(settings.suite, rows)
    out = Path(settings.out) / f"{settings.suite}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "rows": [finite(row._asdict()) for row in rows]}
    out.write_text(json.dumps(record, indent=1) + "\n")
    console.say(f"written to {out}")


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    return {
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def measure(group: Group, rounds: int) -> Iterable[Row]:
    """Time the cases of a group in turns; the first is the reference.

    Beside another library each turn begins with a call that is not timed: a case does
    not pay for the caches, the heap and the spinning threads that the other one left.
    """
    compiled = [compile_case(case) for case in group.cases]
    runs = [run for run, _, _ in compiled]
    for run in runs:
        run()
    settle = any(case.host for case in group.cases)
    times = [[timed(run, settle=settle) for run in runs] for _ in range(rounds)]
    for i, case in enumerate(group.cases):
        ms = [row[i] for row in times]
        ratio = statistics.median(row[i] / least_work(case, row) for row in times)
        _, seconds, memory = compiled[i]
        yield Row(
            group.name,
            case.name,
            statistics.median(ms),
            min(ms),
            ratio,
            case.target,
            seconds,
            memory,
        )


def least_work(case: Case, row: list[float]) -> float:
    """Milliseconds that a case needs at the least, by the others of its round."""
    parts = case.parts or ((0, case.work),)
    return sum(count * row[position] for position, count in parts)


def compile_case(case: Case) -> tuple[Callable[[], Any], float, float]:
    """A function that runs the case to its end; seconds to compile; MiB of memory."""
    start = time.perf_counter()
    if case.host:
        case.function(*case.arguments)
        seconds = time.perf_counter() - start
        return lambda: case.function(*case.arguments), seconds, math.nan
    program = jax.jit(case.function).lower(*case.arguments).compile()
    seconds = time.perf_counter() - start
    analysis = program.memory_analysis()
    size = 0 if analysis is None else analysis.temp_size_in_bytes
    return (
        lambda: jax.block_until_ready(program(*case.arguments)),
        seconds,
        size / 2**20,
    )


def timed(run: Callable[[], Any], *, settle: bool) -> float:
    """Milliseconds of one run, after another one if it is to settle first."""
    if settle:
        run()
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def show(suite: str, rows: list[Row]) -> None:
    """The table."""
    columns = ["case", "median ms", "least ms", "x least work", "target", "compile s"]
    cells = [
        [
            f"{row.group}: {row.case}",
            f"{row.median_ms:.2f}",
            f"{row.least_ms:.2f}",
            f"{row.ratio:.2f}",
            "" if row.target is None else f"<= {row.target:g}",
            f"{row.compile_s:.1f}",
            "" if math.isnan(row.memory_mib) else f"{row.memory_mib:.1f}",
        ]
        for row in rows
    ]
    console.table(f"{suite} on {machine()['device']}", [*columns, "MiB"], cells)


if __name__ == "__main__":
    launch("benchmark", work)
