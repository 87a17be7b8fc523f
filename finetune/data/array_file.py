"""Arrays kept on disk so that they need not be made again: a damaged file is none, and a disk that refuses no fault."""

import contextlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def each_array(path: Path, names: Iterable[str]) -> Iterator[Array]:
    """Yield the arrays of these `names` kept in `path` one by one, for together they may be large.

    It ends early where the file is absent, damaged or lacks one.
    """
    with (
        contextlib.suppress(
            OSError, ValueError, KeyError, EOFError, AttributeError, RuntimeError, TypeError, zipfile.BadZipFile
        ),
        path.open("rb") as raw,
        np.load(raw, allow_pickle=False) as file,
    ):
        for name in names:
            yield file[name]


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, Array] | None:
    """Return the arrays of these `names` kept in `path`; None where the file is absent, damaged or lacks one."""
    names = list(names)
    arrays = dict(zip(names, each_array(path, names), strict=False))
    return arrays if len(arrays) == len(names) else None


def write_arrays(path: Path, arrays: Iterable[tuple[str, Array]]) -> None:
    """Keep `arrays`, each taken when its turn comes, in `path` in the place of what is there, if the disk has room."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "w") as archive:  # as np.savez does, which wants all of them at once
            for name, array in arrays:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
                del array  # before the next one is made
        temporary.replace(path)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
