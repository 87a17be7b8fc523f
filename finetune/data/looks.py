"""What a look at each file of a data folder found: by columns, and kept on disk so that no file is looked at twice."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from finetune.data.array_file import each_array, write_arrays
from finetune.data.table import Pictures
from finetune.errors import ImageFault
from finetune.runs.cache_folder import is_inside
from finetune.runs.processes import Processes

FORMAT_NUMBER = 3  # raise it when decoding or hashing changes
FAULTS: tuple[ImageFault, ...] = get_args(ImageFault)
PASSING: frozenset[ImageFault] = frozenset({"missing", "permission"})
"""Faults of a file that could not be opened: it may be mended without a new size or time."""

Array = np.ndarray[Any, Any]


class Stamp(NamedTuple):
    """By what a file is known again; a picture that may be reduced to another short side is another one."""

    size_bytes: int = 0
    mtime_ns: int = 0
    short_side_px: int = 0


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one file turned out to be; `reason` is None for a good image."""

    stamp: Stamp
    sha256: str = ""
    perceptual_hash: int | None = None
    size_px: tuple[int, int] = (0, 0)
    reason: ImageFault | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Looks:
    """The looks at N files, an array a column.

    `keys` (N, 2) uint64 are hashes of their paths, `stamps` (N, 3) int64, `pictures` what the good ones are, `faults`
    (N,) int8 the places of their reasons in FAULTS, -1 for a good one, and `details` the words to these by place.
    """

    keys: Array
    stamps: Array
    pictures: Pictures
    faults: Array
    details: dict[int, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, keys: Array) -> "Looks":
        """Return room for a look at each of `keys`."""
        count = len(keys)
        return cls(
            keys=keys,
            stamps=np.zeros((count, 3), np.int64),
            pictures=Pictures.empty(count),
            faults=np.full(count, -1, np.int8),
        )

    def __len__(self) -> int:
        return len(self.faults)

    def put(self, place: int, look: Look) -> None:
        """Take down a look, in the place of the one before."""
        self.stamps[place] = look.stamp
        self.pictures.put(place, look.sha256, look.perceptual_hash, look.size_px)
        if look.reason is None:
            self.faults[place] = -1
            self.details.pop(place, None)
        else:
            self.faults[place], self.details[place] = FAULTS.index(look.reason), look.detail

    def columns(self) -> tuple[Array, ...]:
        """Return every array, in the order in which `of_columns` takes them."""
        pictures = self.pictures
        return (self.keys, self.stamps, pictures.sha256, pictures.perceptual, pictures.size_px, self.faults)

    @classmethod
    def of_columns(cls, columns: Sequence[Array], details: dict[int, str]) -> "Looks":
        """Return the looks that `columns` are of."""
        keys, stamps, sha256, perceptual, size_px, faults = columns
        pictures = Pictures(sha256=sha256, perceptual=perceptual, size_px=size_px)
        return cls(keys=keys, stamps=stamps, pictures=pictures, faults=faults, details=details)


def path_keys(paths: Iterable[str], count: int) -> Array:
    """Return the keys of `count` paths."""
    digests = (hashlib.blake2b(os.fsencode(path), digest_size=16).digest() for path in paths)
    return np.fromiter(digests, "V16", count).view(np.uint64).reshape(count, 2)


def gather_looks(share: Looks, processes: Processes) -> Looks:
    """Return the looks of all processes in the order of the files, of which each took every so-manieth."""
    columns: list[Array] = []
    for column in share.columns():  # one by one, for each takes its memory several times on its way
        parts = processes.gather(column)
        columns.append(np.empty((sum(map(len, parts)), *column.shape[1:]), column.dtype))
        for rank, part in enumerate(parts):
            columns[-1][rank :: processes.count] = part
    all_details = enumerate(processes.gather(share.details))
    details = {rank + place * processes.count: detail for rank, part in all_details for place, detail in part.items()}
    return Looks.of_columns(columns, details)


def looks_file(cache_folder: Path, root: Path) -> Path | None:
    """Return the file for the looks at `root`, or None where writing it would change the user's data."""
    folder = cache_folder / "scans"
    return None if is_inside(folder, root) else folder / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.npz"


def read_looks(path: Path, choose: Callable[[Array], Array]) -> Looks:
    """Return some of the looks kept in `path`, none if it is absent or corrupt: looking again is all that costs.

    Args:
        path: The file.
        choose: Gets all their keys, sorted by the first half, and returns the places of those wanted.
    """
    none = Looks.empty(np.empty((0, 2), np.uint64))
    arrays = each_array(path, ["format", "details", *_column_names()])
    header = list(islice(arrays, 2))
    if len(header) < 2 or header[0] != FORMAT_NUMBER:
        return none
    try:
        all_details = {int(place): str(detail) for place, detail in json.loads(header[1].tobytes()).items()}
    except (ValueError, AttributeError):
        return none
    columns: list[Array] = []
    lengths, places = set(), np.empty(0, np.int64)
    for own, column in zip(none.columns(), arrays, strict=False):
        lengths.add(column.shape[:1])
        if column.dtype != own.dtype or column.shape[1:] != own.shape[1:] or len(lengths) > 1 or not column.size:
            return none
        if not columns:
            places = choose(column)
        columns.append(column[places])
    return Looks.of_columns(columns, _at_places(all_details, places)) if len(columns) == len(none.columns()) else none


def known_looks(path: Path, keys: Array) -> Looks:
    """Return a look at each of `keys`: what is kept in `path` of it, else an empty one."""
    looks = read_looks(path, lambda kept: _likely_places(kept, keys))
    if not len(looks):
        return Looks.empty(keys)
    unknown = np.flatnonzero((looks.keys != keys).any(axis=1))
    for column, blank in zip(looks.columns(), Looks.empty(keys[:1]).columns(), strict=True):
        column[unknown] = blank
    details = {place: detail for place, detail in looks.details.items() if looks.faults[place] >= 0}
    return replace(looks, keys=keys, details=details)


def write_looks(path: Path, fresh: Looks) -> None:
    """Keep `fresh` looks among those kept, in the place of theirs; a disk that refuses is no reason to stop."""
    lasting = np.flatnonzero(~np.isin(fresh.faults, [FAULTS.index(fault) for fault in PASSING]))
    if not len(lasting):
        return
    lasting = lasting[np.unique(fresh.keys[lasting, 0], return_index=True)[1]]
    keys = fresh.keys[lasting]
    others = read_looks(path, lambda kept: np.flatnonzero((keys[_likely_places(keys, kept)] != kept).any(axis=1)))
    gaps = np.searchsorted(keys[:, 0], others.keys[:, 0])
    details = fresh.details | {len(fresh) + place: detail for place, detail in others.details.items()}
    details = _at_places(details, np.insert(lasting, gaps, np.arange(len(others)) + len(fresh)))

    def arrays() -> Iterator[tuple[str, Array]]:
        yield "format", np.array(FORMAT_NUMBER)
        yield "details", np.frombuffer(json.dumps(details).encode(), np.uint8)
        for name, mine, theirs in zip(_column_names(), fresh.columns(), others.columns(), strict=True):
            yield name, np.insert(mine[lasting], gaps, theirs, axis=0) if len(others) else mine[lasting]

    write_arrays(path, arrays())


def _column_names() -> list[str]:
    return [f"column{number}" for number in range(6)]


def _likely_places(sorted_keys: Array, keys: Array) -> Array:
    """Return where each of `keys` is among the `sorted_keys`, if it is there."""
    return np.searchsorted(sorted_keys[:, 0], keys[:, 0]).clip(max=len(sorted_keys) - 1)


def _at_places(details: dict[int, str], places: Array) -> dict[int, str]:
    """Return the `details` of what is now at each of `places`, by its place among them."""
    if not details:
        return {}
    found = np.flatnonzero(np.isin(places, list(details)))
    return {place: details[there] for place, there in zip(found.tolist(), places[found].tolist(), strict=True)}
