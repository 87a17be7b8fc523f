"""Arrays kept on disk so that they need not be made again: a damaged file is none, and a disk that refuses no fault."""

import contextlib
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, Array] | None:
    """Return the arrays of these `names` kept in `path`; None where the file is absent, damaged or lacks one."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, AttributeError, RuntimeError, TypeError, zipfile.BadZipFile):
        return None


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Keep `arrays` in `path`, in the place of what is there, if the disk has room."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
