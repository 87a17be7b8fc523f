"""What long work tells while it runs; whoever shows it to a person implements `Reporter`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int, str], None]
"""Moves a progress bar on by a number of items and shows a short text beside it."""

logger = logging.getLogger("finetune")


class Reporter(Protocol):
    """Where messages, small tables and progress go."""

    def say(self, text: str) -> None:
        """Show one line."""

    def warn(self, text: str) -> None:
        """Show one line that must not be missed."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show a small table; numbers among the cells are aligned to the right."""

    def progress(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Show how far work on `total` items has come, until the context ends."""


class LoggingReporter:
    """The reporter of Python callers: messages go to the logger "finetune", progress is not shown."""

    def say(self, text: str) -> None:
        """Log one line."""
        logger.info(text)

    def warn(self, text: str) -> None:
        """Log one line as a warning, which Python shows unless told otherwise."""
        logger.warning(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Log a table as tab-separated lines."""
        logger.info("\n".join([title, "\t".join(columns), *("\t".join(map(str, row)) for row in rows)]))

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        """Log the beginning only."""
        logger.info("%s: %d", label, total)
        yield _ignore


class SilentReporter:
    """The reporter of a process whose work another one tells of."""

    def say(self, text: str) -> None:
        """Show nothing."""

    warn = say

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show nothing."""

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        """Show nothing."""
        del label, total
        yield _ignore


def _ignore(_count: int, _text: str) -> None:
    """Stand for a bar that nobody sees."""
