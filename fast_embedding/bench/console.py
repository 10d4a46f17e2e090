"""What a person sees while the benchmark runs and when it ends: rich where it is installed, plain text where not."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

# Where the output is no terminal (a log, a pipe).
_LOG_WIDTH = 120


@dataclass(frozen=True)
class Table:
    """Cells are text already; the columns after ``left`` hold numbers and are aligned to the right."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def markdown(self) -> str:
        """A GitHub table without the title."""
        rule = [("---" if i < self.left else "--:") for i in range(len(self.columns))]
        lines = [self.columns, rule, *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def plain(self) -> str:
        """Columns padded with blanks, the title above."""
        lines = [self.columns, *self.rows]
        widths = [max(len(cells[i]) for cells in lines) for i in range(len(self.columns))]

        def line(cells: Sequence[str]) -> str:
            padded = (
                c.ljust(w) if i < self.left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join(padded).rstrip()

        return "\n".join([self.title, line(self.columns), *map(line, self.rows)])


def show(table: Table) -> None:
    """Prints a table on standard output."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        print(table.plain(), end="\n\n")
        return
    wide = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(table.columns):
        wide.add_column(Text(column), justify="left" if i < table.left else "right", no_wrap=i < table.left)
    for row in table.rows:
        wide.add_row(*map(Text, row))  # as Text, so that brackets are not markup
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _LOG_WIDTH
    console = Console(width=width)
    console.print(wide)
    console.print()


class Progress(Protocol):
    """Where a run stands, in steps of about equal length."""

    def describe(self, text: str) -> None:
        """Says what is being done."""

    def advance(self, steps: float = 1) -> None:
        """Counts steps as done."""

    def print(self, text: str) -> None:
        """A line that stays."""


class _PlainProgress:
    def __init__(self, total: float) -> None:
        self._total = total
        self._done = 0.0

    def describe(self, text: str) -> None:
        print(f"[{self._done / self._total:4.0%}] {text}", flush=True)

    def advance(self, steps: float = 1) -> None:
        self._done += steps

    def print(self, text: str) -> None:
        print(text, flush=True)


@contextmanager
def progress(total: float) -> Iterator[Progress]:
    """A bar on a terminal with rich, a line for each description otherwise."""
    try:
        from rich import progress as rich_progress
    except ImportError:
        yield _PlainProgress(total)
        return
    if not sys.stdout.isatty():
        yield _PlainProgress(total)
        return

    bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeElapsedColumn(),
    )
    task = bar.add_task("", total=total)

    class RichProgress:
        def describe(self, text: str) -> None:
            bar.update(task, description=text)

        def advance(self, steps: float = 1) -> None:
            bar.advance(task, steps)

        def print(self, text: str) -> None:
            bar.console.print(text, markup=False, highlight=False)

    with bar:
        yield RichProgress()
