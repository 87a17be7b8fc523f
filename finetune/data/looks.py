"""What a look at each file of a data folder found: by columns, and kept on disk so that no file is looked at twice."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from finetune.data.array_file import read_arrays, write_arrays
from finetune.data.table import Pictures
from finetune.errors import ImageFault
from finetune.runs.cache_folder import is_inside

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
    def empty(cls, paths: Iterable[str]) -> "Looks":
        """Return room for a look at each of `paths`."""
        keys = b"".join(hashlib.blake2b(os.fsencode(path), digest_size=16).digest() for path in paths)
        count = len(keys) // 16
        return cls(
            keys=np.frombuffer(keys, np.uint64).reshape(count, 2),
            stamps=np.zeros((count, 3), np.int64),
            pictures=Pictures.empty(count),
            faults=np.full(count, -1, np.int8),
        )

    def __len__(self) -> int:
        return len(self.faults)

    def put(self, place: int, look: Look) -> None:
        """Take down a look."""
        self.stamps[place] = look.stamp
        if look.reason is None:
            self.pictures.put(place, look.sha256, look.perceptual_hash, look.size_px)
        else:
            self.faults[place], self.details[place] = FAULTS.index(look.reason), look.detail

    def copy(self, place: int, other: "Looks", there: int) -> None:
        """Take down the look that `other` has `there`."""
        for mine, theirs in zip(self.columns()[1:], other.columns()[1:], strict=True):  # all but the keys
            mine[place] = theirs[there]
        if there in other.details:
            self.details[place] = other.details[there]

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

    def take(self, places: Array) -> "Looks":
        """Return the looks at `places`."""
        new_of = {old: new for new, old in enumerate(places.tolist())} if self.details else {}
        details = {new_of[old]: detail for old, detail in self.details.items() if old in new_of}
        return Looks.of_columns([column[places] for column in self.columns()], details)

    def find(self, keys: Array) -> Array:
        """Return where the look at each of `keys` is, -1 where there is none; these looks are sorted by their keys."""
        if not len(self):
            return np.full(len(keys), -1)
        places = np.searchsorted(self.keys[:, 0], keys[:, 0]).clip(max=len(self) - 1)
        return np.where((self.keys[places] == keys).all(axis=1), places, -1)


def joined(parts: Sequence[Looks]) -> Looks:
    """Return the looks of all `parts`, one part after the other."""
    details, first = {}, 0
    for part in parts:
        details.update({first + place: detail for place, detail in part.details.items()})
        first += len(part)
    columns = zip(*(part.columns() for part in parts), strict=True)
    return Looks.of_columns([np.concatenate(each) for each in columns], details)


def in_turn(shares: Sequence[Looks]) -> Looks:
    """Return the looks of several processes in the order of the files, of which each took every so-manieth."""
    places = [range(rank, sum(map(len, shares)), len(shares)) for rank in range(len(shares))]
    order = np.argsort(np.concatenate([np.asarray(each) for each in places]), kind="stable")
    return joined(shares).take(order)


def looks_file(cache_folder: Path, root: Path) -> Path | None:
    """Return the file for the looks at `root`, or None where writing it would change the user's data."""
    folder = cache_folder / "scans"
    return None if is_inside(folder, root) else folder / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.npz"


def read_looks(path: Path) -> Looks:
    """Return the looks kept in `path`, none where it is absent or corrupt: looking again is all that costs."""
    expected = Looks.empty([])
    names = [f"column{number}" for number in range(len(expected.columns()))]
    kept = read_arrays(path, [*names, "format", "details"])
    if kept is None or kept["format"] != FORMAT_NUMBER:
        return expected
    columns = [kept[name] for name in names]
    try:
        details = {int(place): str(detail) for place, detail in json.loads(kept["details"].tobytes()).items()}
    except (ValueError, AttributeError):
        return expected
    is_alike = (
        column.dtype == own.dtype and column.shape[1:] == own.shape[1:] and len(column) == len(columns[0])
        for column, own in zip(columns, expected.columns(), strict=True)
    )
    return Looks.of_columns(columns, details) if all(is_alike) else expected


def write_looks(path: Path, known: Looks, fresh: Looks) -> None:
    """Keep `known` looks and `fresh` ones in their place; a disk that refuses is no reason to stop."""
    lasting = fresh.take(np.flatnonzero(~np.isin(fresh.faults, [FAULTS.index(fault) for fault in PASSING])))
    if not len(lasting):
        return
    whole = joined([lasting, known]) if len(known) else lasting
    # The first of each key stays, and that is the fresh one.
    _, firsts = np.unique(whole.keys.view("V16").ravel(), return_index=True)
    kept = whole.take(firsts[np.argsort(whole.keys[firsts, 0], kind="stable")])
    details = np.frombuffer(json.dumps(kept.details).encode(), np.uint8)
    columns = {f"column{number}": column for number, column in enumerate(kept.columns())}
    write_arrays(path, {"format": np.array(FORMAT_NUMBER), "details": details, **columns})
