"""The table of images, which every later step of the street reads: the file, its label, its side of the split.

It is kept by columns: a million images take about 150 bytes each, and no Python object.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from finetune.runs.records import LabelMap

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
}
"""What people call them."""
HASH_BYTES = 32
FOREIGN_BYTES = "surrogateescape"  # file names need not be UTF-8: their bytes go out as they came in

Array = np.ndarray[Any, Any]

# Shapes: N images of a column, M of them in a table.


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One image and what is known of it.

    `image_path` is POSIX text relative to the table's root. `split` is None until somebody decides it. Images that
    share a `group` (one patient, one film) must stay on one side of a split. The last four fields are known after a
    scan: the SHA-256 of the file in hexadecimal digits, the 256-bit hash of the picture (None where it is flat), the
    size of the upright picture.
    """

    image_path: str
    label: str
    split: Split | None = None
    group: str | None = None
    sha256: str = ""
    perceptual_hash: int | None = None
    width_px: int = 0
    height_px: int = 0


class Texts(Sequence[str]):
    """Texts that lie end to end in one block of bytes, for there may be a million of them."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Put `text` at the end."""
        self._bytes += text.encode(errors=FOREIGN_BYTES)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        """Return one text, or a list of several."""
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._bytes[self._ends[place] : self._ends[place + 1]].decode(errors=FOREIGN_BYTES)


class Coded:
    """A column of few different texts: their names, and for each image the place of its own; -1 is None."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.codes = array("i")
        self._place_of: dict[str, int] = {}

    def append(self, name: str | None) -> None:
        """Put `name` at the end."""
        if name is None:
            self.codes.append(-1)
            return
        place = self._place_of.setdefault(name, len(self.names))
        if place == len(self.names):
            self.names.append(name)
        self.codes.append(place)

    def __getitem__(self, place: int) -> str | None:
        code = self.codes[place]
        return None if code < 0 else self.names[code]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """What a scan found of N images, each an array with a row an image.

    `sha256` and `perceptual` (N, 32) uint8 are hashes, all zero where there is none, `size_px` (N, 2) int32 is width
    and height.
    """

    sha256: Array
    perceptual: Array
    size_px: Array

    @classmethod
    def empty(cls, count: int) -> "Pictures":
        """Return what is known of `count` images before a scan; it takes no memory until it is written to."""
        hashes = (np.zeros((count, HASH_BYTES), np.uint8) for _ in range(2))
        return cls(sha256=next(hashes), perceptual=next(hashes), size_px=np.zeros((count, 2), np.int32))

    def put(self, place: int, sha256: str, perceptual_hash: int | None, size_px: tuple[int, int]) -> None:
        """Take down what is known of one image."""
        self.sha256[place] = np.frombuffer(bytes.fromhex(sha256 or "0" * 2 * HASH_BYTES), np.uint8)
        self.perceptual[place] = np.frombuffer((perceptual_hash or 0).to_bytes(HASH_BYTES, "big"), np.uint8)
        self.size_px[place] = size_px


class Rows(Sequence[ImageRow]):
    """Rows of a table, made of the columns when they are asked for.

    Args:
        rows: What to take down, in order.
    """

    def __init__(self, rows: Iterable[ImageRow] = ()) -> None:
        self.paths, self.label_column, self.group_column, splits = Texts(), Coded(), Coded(), array("b")
        scanned = {}
        for row in rows:
            if row.sha256 or row.perceptual_hash or row.width_px or row.height_px:
                scanned[len(self.paths)] = row
            self.paths.append(row.image_path)
            self.label_column.append(row.label)
            self.group_column.append(row.group)
            splits.append(-1 if row.split is None else SPLITS.index(row.split))
        self._splits: Array = np.array(splits, np.int8)
        self.pictures = Pictures.empty(len(self.paths))
        for place, row in scanned.items():
            self.pictures.put(place, row.sha256, row.perceptual_hash, (row.width_px, row.height_px))
        self.places_M: Array = np.arange(len(self.paths), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.places_M)

    @overload
    def __getitem__(self, index: int) -> ImageRow: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "ImageRow | Rows":
        """Return one row, or a part of them."""
        if isinstance(index, slice):
            return self._with(places_M=self.places_M[index])
        place = int(self.places_M[index])
        split, picture = self._splits[place], self.pictures
        perceptual = int.from_bytes(picture.perceptual[place].tobytes(), "big")
        sha256 = picture.sha256[place].tobytes()
        return ImageRow(
            image_path=self.paths[place],
            label=str(self.label_column[place]),
            split=None if split < 0 else SPLITS[split],
            group=self.group_column[place],
            sha256=sha256.hex() if any(sha256) else "",
            perceptual_hash=perceptual or None,
            width_px=int(picture.size_px[place, 0]),
            height_px=int(picture.size_px[place, 1]),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and len(self) == len(other) and all(map(ImageRow.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def take(self, indices: Array) -> "Rows":
        """Return the rows at `indices`, which may also be a mask; the columns stay where they are."""
        return self._with(places_M=self.places_M[indices])

    def with_splits(self, codes: Array | int) -> "Rows":
        """Return the rows with other splits, given as their places in SPLITS."""
        splits = self._splits.copy()
        splits[self.places_M] = codes
        return self._with(_splits=splits)

    def with_pictures(self, pictures: Pictures) -> "Rows":
        """Return the rows with what a scan found of them, row by row."""
        if self._are_whole():
            return self._with(pictures=pictures)
        whole = Pictures.empty(len(self.paths))
        for name in ("sha256", "perceptual", "size_px"):
            getattr(whole, name)[self.places_M] = getattr(pictures, name)
        return self._with(pictures=whole)

    def own_pictures(self) -> Pictures:
        """Return what a scan found of these rows, row by row; not to be written to."""
        if self._are_whole():
            return self.pictures
        columns = {name: getattr(self.pictures, name)[self.places_M] for name in ("sha256", "perceptual", "size_px")}
        return Pictures(**columns)

    def image_paths(self) -> Iterator[str]:
        """Iterate over the paths."""
        return (self.paths[place] for place in map(int, self.places_M))  # a list of them is large

    @property
    def split_codes(self) -> Array:
        """The split of each row as its place in SPLITS, -1 for None, (M,) int8."""
        return self._splits[self.places_M]

    @property
    def label_codes(self) -> Array:
        """The label of each row as its place in `label_column.names`, (M,) int32."""
        return np.frombuffer(self.label_column.codes, np.int32)[self.places_M]

    @property
    def group_codes(self) -> Array:
        """The group of each row as its place in `group_column.names`, -1 for None, (M,) int32."""
        return np.frombuffer(self.group_column.codes, np.int32)[self.places_M]

    def _are_whole(self) -> bool:
        """Tell whether the columns are of these rows, in this order."""
        return np.array_equal(self.places_M, np.arange(len(self.paths)))

    def _with(self, **changes: Any) -> "Rows":
        changed = object.__new__(Rows)
        changed.__dict__ = {**self.__dict__, **changes}
        return changed


class ImageTable:
    """Images under one `root` folder, in a fixed order."""

    def __init__(self, root: Path, rows: Iterable[ImageRow]) -> None:
        self.root = root
        self.rows = rows if isinstance(rows, Rows) else Rows(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageTable) and self.root == other.root and self.rows == other.rows

    __hash__ = None  # type: ignore[assignment]

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each row, in row order."""
        names = self.rows.label_column.names
        return tuple(names[code] for code in self.rows.label_codes.tolist())

    @property
    def class_names(self) -> tuple[str, ...]:
        """The distinct labels sorted as text, the order of a model's outputs."""
        names = self.rows.label_column.names
        return tuple(sorted(names[code] for code in np.unique(self.rows.label_codes).tolist()))

    def class_indices(self, label_map: LabelMap) -> Array:
        """Return the class index of each row, (M,) int64."""
        names = self.rows.label_column.names
        present = np.unique(self.rows.label_codes)
        index_of = np.zeros(len(names), np.int64)
        index_of[present] = label_map.indices(names[code] for code in present.tolist())
        return index_of[self.rows.label_codes]

    def select(self, split: Split | None) -> "ImageTable":
        """Return the rows of one `split`, or those without a split for None."""
        code = -1 if split is None else SPLITS.index(split)
        return ImageTable(self.root, self.rows.take(self.rows.split_codes == code))

    def path(self, row: ImageRow) -> Path:
        """Return the absolute path of a row's image."""
        return self.root.absolute() / row.image_path

    def fingerprint(self) -> str:
        """Return a SHA-256 over what is learned from: path, label, split and content, whatever the order of rows."""
        digest, separator = hashlib.sha256(b"["), b""
        for row in sort_by_path(self.rows):
            # JSON keeps the fields apart, and its ASCII form also holds file names that are not valid UTF-8.
            fact = json.dumps((row.image_path, row.label, row.split or "", row.sha256))
            digest.update(separator + fact.encode("ascii"))
            separator = b", "
        digest.update(b"]")
        return digest.hexdigest()


def sort_by_path(rows: Rows) -> Rows:
    """Return `rows` in the order of their paths as text, which they usually are in."""
    if all(before <= after for before, after in pairwise(rows.image_paths())):
        return rows
    paths = list(rows.image_paths())
    return rows.take(np.array(sorted(range(len(paths)), key=paths.__getitem__), dtype=np.int64))
