"""Command lines read by tyro: a dataclass in, its filled instance out."""

from collections.abc import Sequence
from typing import TypeVar

import tyro

Options = TypeVar("Options")


def parse(kind: type[Options], words: Sequence[str], *, command: str, default: Options | None = None) -> Options:
    """Fill the dataclass `kind` from `words`; its docstring is the help, and a wrong word ends with exit code 2."""
    if default is None:
        return tyro.cli(kind, prog=f"finetune {command}", args=words)
    return tyro.cli(kind, prog=f"finetune {command}", args=words, default=default)
