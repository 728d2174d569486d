"""What the user sees: tables, progress bars, and errors in words."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the user; not part of the result, hence on stderr."""
    ERR.print(text, markup=False)


def fail(text: str) -> None:
    """An error in words."""
    ERR.print(f"error: {text}", style="bold red", markup=False)


def warn(text: str) -> None:
    """Something the user should know, though the run goes on."""
    ERR.print(f"warning: {text}", style="yellow", markup=False)


@contextlib.contextmanager
def progress(
    title: str, *, total: int, done: int = 0
) -> Iterator[Callable[[int, str], None]]:
    """A bar with the time remaining, on a terminal only; yields `advance(n, note)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bar = Progress(
        *columns, console=ERR, disable=not ERR.is_terminal, refresh_per_second=4
    )
    with bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(count: int, note: str = "") -> None:
            bar.update(task, advance=count, note=note)

        yield advance


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column is text, the others numbers."""
    grid = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        grid.add_column(column, justify="right" if position else "left")
    for row in rows:
        grid.add_row(*row)
    OUT.print(grid)
