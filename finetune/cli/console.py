"""All printing: results to standard output, everything else to standard error."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from finetune.runs.reporting import Advance

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_EVERY_SECONDS = 10.0


class ConsoleReporter:
    """Shows messages, tables and progress on standard error: bars on a terminal, plain lines elsewhere."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self.is_quiet = is_quiet

    def say(self, text: str) -> None:
        """Print one message."""
        if not self.is_quiet:
            _stderr().print(text, highlight=False, markup=False, soft_wrap=not sys.stderr.isatty())

    def warn(self, text: str) -> None:
        """Print one warning."""
        self.say(f"warning: {text}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table."""
        if not self.is_quiet:
            print_table(columns, rows, title=title, console=_stderr())

    def progress(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Show a bar on a terminal; elsewhere a line now and then, for work that takes long."""
        if self.is_quiet or not sys.stderr.isatty():
            return _plain_progress(label, total, is_quiet=self.is_quiet)
        return _bar(label, total)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", console: "Console | None" = None
) -> None:
    """Print `rows` under `columns`, on standard output unless a console is given; numbers go to the right."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        is_number = bool(rows) and all(str(row[index])[:1].isdigit() for row in rows)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    (console or _stdout()).print(table)


def print_error(message: str, hint: str) -> None:
    """Print what went wrong and what to do about it, a line each, on standard error."""
    print(f"error: {_one_line(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {_one_line(hint)}", file=sys.stderr)


def plain(text: str) -> str:
    """Make line breaks and control characters in a name visible, so that a line stays a line."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _stdout() -> "Console":
    from rich.console import Console

    # A pipe has no width: lines must not be cut for a program that reads them.
    return Console() if sys.stdout.isatty() else Console(width=200, soft_wrap=True)


def _stderr() -> "Console":
    from rich.console import Console

    return Console(stderr=True) if sys.stderr.isatty() else Console(stderr=True, width=200)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=_stderr(), transient=True) as progress:
        task = progress.add_task(label, total=total, detail="")
        yield lambda count, detail: progress.update(task, advance=count, detail=detail)


@contextmanager
def _plain_progress(label: str, total: int, *, is_quiet: bool) -> Iterator[Advance]:
    done, told = 0, time.monotonic()

    def advance(count: int, detail: str) -> None:
        nonlocal done, told
        done += count
        if not is_quiet and time.monotonic() - told > PLAIN_EVERY_SECONDS:
            told = time.monotonic()
            print(f"{label}: {done} of {total}  {detail}".rstrip(), file=sys.stderr)

    yield advance
