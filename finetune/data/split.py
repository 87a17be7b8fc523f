"""Which images are learned from and which are held back: decided once, written to `split.csv`, read back ever after."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from finetune.data.copies import find_copies
from finetune.data.csv_files import read_csv, write_csv
from finetune.data.table import SPLITS, Array, ImageRow, ImageTable, Rows, Split, sort_by_path
from finetune.errors import ConfigError, DataError, RunError, first_ten

TRAIN, VALID = SPLITS.index("train"), SPLITS.index("valid")
_COLUMNS = ("image_path", "label", "split", "group", "sha256")
_SHA256 = re.compile("[0-9a-f]{64}|")


def split_table(table: ImageTable, *, seed: int, valid_fraction: float = 0.2) -> ImageTable:
    """Give every image a split: one that has training and validation images stays as it is, else validation is carved.

    Images of one group, of identical bytes or of equal perceptual hash go to the same side. Each class gives about
    `valid_fraction` of its images, at least one and never all. The choice depends on the seed and on the images, not on
    the order of rows, and adding images hardly changes it for the others. Test images are never touched.

    Args:
        table: a scanned table; either every row or no row has a split.
        seed: another seed, another choice.
        valid_fraction: share of each class to hold back, between 0 and 1.

    Returns:
        The table, sorted by image path, with a split in every row.

    Raises:
        ConfigError: if `valid_fraction` is out of range.
        DataError: if only some rows have a split, none is for training, or a class cannot be on both sides.
    """
    if not 0 < valid_fraction < 1:
        raise ConfigError(f"valid_fraction must lie between 0 and 1, got {valid_fraction}")
    rows = sort_by_path(table.rows)
    pool = _places_to_split(rows)
    if not len(pool):
        return ImageTable(table.root, rows)
    is_valid = _choose_valid(rows.take(pool), seed, valid_fraction)
    codes_M = rows.split_codes
    codes_M[pool] = np.where(is_valid, VALID, TRAIN)
    return ImageTable(table.root, rows.with_splits(codes_M))


def write_split_csv(table: ImageTable, path: Path) -> None:
    """Write `image_path,label,split,group,sha256` for every image.

    Raises:
        StorageError: if it cannot be written.
    """
    rows = ((row.image_path, row.label, row.split or "", row.group or "", row.sha256) for row in table.rows)
    write_csv(path, columns=_COLUMNS, rows=rows)


def read_split_csv(path: Path) -> Rows:
    """Read what `write_split_csv` wrote, sorted by image path.

    Raises:
        RunError: if there is no such file.
        DataError: if it is damaged.
    """
    if not path.is_file():
        raise RunError(f"{path} does not exist", hint="the run folder is incomplete; train again")
    return sort_by_path(Rows(_split_rows(path)))


def _split_rows(path: Path) -> Iterator[ImageRow]:
    for number, values in read_csv(path, required=_COLUMNS[:-1]):
        if values["split"] not in ("", *SPLITS):
            raise DataError(f"{path}, row {number}: unknown split {values['split']!r}, expected {', '.join(SPLITS)}")
        sha256 = values.get("sha256", "")
        if not _SHA256.fullmatch(sha256):
            raise DataError(f"{path}, row {number}: {sha256!r} is no SHA-256 in hexadecimal digits")
        split = cast(Split, values["split"]) if values["split"] else None
        group = values["group"] or None
        yield ImageRow(image_path=values["image_path"], label=values["label"], split=split, group=group, sha256=sha256)


def apply_split(table: ImageTable, path: Path) -> ImageTable:
    """Give the images of `table`, in the order of their paths, the splits and groups written in `path`.

    Raises:
        RunError: if there is no such file.
        DataError: if it is damaged, or images are new, gone, changed or have another label; each is listed.
    """
    rows, recorded = sort_by_path(table.rows), read_split_csv(path)
    _refuse_differences(rows, recorded, f"the images of {table.root} are not those of {path}")
    return ImageTable(table.root, recorded.with_pictures(rows.own_pictures()))


def _refuse_differences(rows: Rows, recorded: Rows, message: str) -> None:
    if len(rows) == len(recorded) and all(map(_is_recorded, rows, recorded)):
        return
    here, there = ({row.image_path: row for row in each} for each in (rows, recorded))
    both = [(row, there[image_path]) for image_path, row in here.items() if image_path in there]
    differences = {
        "new": [image_path for image_path in here if image_path not in there],
        "gone": [image_path for image_path in there if image_path not in here],
        "of another label": [row.image_path for row, before in both if row.label != before.label],
        "changed": [row.image_path for row, before in both if before.sha256 not in ("", row.sha256)],
    }
    found = [f"{len(names)} {what}: {first_ten(map(repr, names))}" for what, names in differences.items() if names]
    found = found or ["some stand in it more than once"]
    raise DataError(f"{message}; {'; '.join(found)}", hint="restore the images, or train into a new run folder")


def _is_recorded(row: ImageRow, recorded: ImageRow) -> bool:
    is_same = (row.image_path, row.label) == (recorded.image_path, recorded.label)
    return is_same and recorded.sha256 in ("", row.sha256)  # a split.csv of one's own may have none


def _places_to_split(rows: Rows) -> Array:
    """Return the places of the rows to be divided into train and valid, none if they are divided already."""
    codes_M = rows.split_codes
    splits = set(np.unique(codes_M).tolist())
    if splits == {-1}:
        return np.arange(len(rows))
    if -1 in splits:
        without = [row.image_path for row in rows.take(codes_M == -1)]
        raise DataError(
            f"{len(without)} of {len(rows)} images have no split, others have one: {first_ten(map(repr, without))}",
            hint="fill the split column in every row, or in none",
        )
    if TRAIN not in splits:
        raise DataError("there are no training images", hint="put images in train/CLASS, or leave the split out")
    return np.flatnonzero(codes_M == TRAIN) if VALID not in splits else np.array([], np.int64)


def components(rows: Rows) -> Array:
    """Number the rows so that those which share a group, their bytes or their picture, also through others, are one."""
    pictures = rows.own_pictures()
    edges = []
    first = len(rows)
    for places, numbers in (_members(rows.group_codes), find_copies(pictures.sha256), find_copies(pictures.perceptual)):
        edges.append(np.stack([places, first + numbers]).astype(np.int32))
        first += int(numbers.max(initial=-1)) + 1
    ends = np.concatenate(edges, axis=1)
    graph = coo_matrix((np.ones(ends.shape[1], np.int8), ends), shape=(first, first))
    component_M: Array = connected_components(graph, directed=False)[1][: len(rows)]
    return component_M


def _members(group_codes_M: Array) -> tuple[Array, Array]:
    """Return the places of the rows that have a group, and its number."""
    places = np.flatnonzero(group_codes_M >= 0)
    return places, group_codes_M[places]


def _choose_valid(rows: Rows, seed: int, valid_fraction: float) -> Array:
    """Return which of the rows, sorted by path, to hold back."""
    component_M = _shuffled_components(rows, seed)
    division = _Division(rows.label_column.names, component_M, rows.label_codes, valid_fraction)
    division.check_separable()
    for index in range(len(division.is_valid)):
        if division.change(index).distance < 0:
            division.flip(index)
    division.cover_every_class()
    return division.is_valid[component_M]


def _shuffled_components(rows: Rows, seed: int) -> Array:
    """Return the component of each of the rows, sorted by path, numbered in the order in which they may be held back.

    A hash gives the order, not a generator: so it depends neither on the order of rows nor on a library's version.
    """
    _, firsts, component_M = np.unique(components(rows), return_index=True, return_inverse=True)
    hashes = (_hash(seed, rows.paths[place]) for place in rows.places_M[firsts])
    order = np.argsort(np.fromiter(hashes, np.uint64, len(firsts)), kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    return rank[component_M]


def _hash(seed: int, image_path: str) -> int:
    digest = hashlib.sha256(f"{seed}:{image_path}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")


class _Change(NamedTuple):
    """What moving a component would do to the number of classes missing on a side, and to the distance from targets."""

    uncovered: int
    distance: int


class _Division:
    """Components, images that must stay together, on two sides: those held back and the rest.

    Args:
        names: Of the labels.
        component_M: The number of each image's component.
        label_M: The place of each image's label in `names`.
        valid_fraction: Share of each label to hold back.
    """

    def __init__(self, names: Sequence[str], component_M: Array, label_M: Array, valid_fraction: float) -> None:
        self.names = names
        pairs, self.counts = np.unique(component_M.astype(np.int64) * len(names) + label_M, return_counts=True)
        self.holders, self.labels = np.divmod(pairs, len(names))
        components = int(component_M.max()) + 1
        self.first_pair = np.searchsorted(self.holders, np.arange(components + 1))
        self.is_valid = np.zeros(components, bool)
        self.totals = np.bincount(label_M, minlength=len(names)).tolist()
        self.targets = [min(max(round(total * valid_fraction), 1), total - 1) for total in self.totals]
        self.held = [0] * len(names)  # images of each label held back so far

    def check_separable(self) -> None:
        """Refuse labels that no choice of components could put on both sides.

        Raises:
            DataError: naming them.
        """
        parts = np.bincount(self.labels, minlength=len(self.names))
        alone = sorted(self.names[label] for label in np.flatnonzero(parts == 1).tolist())
        if alone:
            listed = [f"{name!r} ({self.totals[self.names.index(name)]} images)" for name in alone]
            raise DataError(
                f"{len(alone)} classes cannot be on both sides of a split, because they have one image, or images that "
                f"are copies of one another or of one group: {first_ten(listed)}",
                hint="add images to these classes, leave them out, or give a split yourself in folders train and valid",
            )

    def flip(self, index: int) -> None:
        """Move a component to the other side."""
        sign = -1 if self.is_valid[index] else 1
        for label, count in self._pairs(index):
            self.held[label] += sign * count
        self.is_valid[index] ^= True

    def change(self, index: int) -> _Change:
        """Say what `flip` would change; below zero is better."""
        sign = -1 if self.is_valid[index] else 1
        uncovered = distance = 0
        for label, count in self._pairs(index):
            before, after = self.held[label], self.held[label] + sign * count
            uncovered += (after in (0, self.totals[label])) - (before in (0, self.totals[label]))
            distance += abs(after - self.targets[label]) - abs(before - self.targets[label])
        return _Change(uncovered, distance)

    def cover_every_class(self) -> None:
        """Move components until every class is on both sides.

        Where groups span classes one move may undo another; preferring the components moved least often leads out.
        """
        moves: Counter[int] = Counter()
        present = [label for label, total in enumerate(self.totals) if total]
        for _ in range(20 * len(present)):
            uncovered = [label for label in present if self.held[label] in (0, self.totals[label])]
            if not uncovered:
                return
            worst = min(uncovered, key=self.names.__getitem__)
            index = min(
                self.holders[self.labels == worst].tolist(),
                key=lambda index: (self.change(index).uncovered, moves[index], self.change(index).distance),
            )
            self.flip(index)
            moves[index] += 1
        names = sorted(self.names[label] for label in uncovered)
        raise DataError(
            f"groups and copies tie classes together so that some stay on one side: {first_ten(map(repr, names))}",
            hint="loosen the groups, or give a split yourself in folders train and valid",
        )

    def _pairs(self, index: int) -> Iterator[tuple[int, int]]:
        """Iterate over the labels of a component, each with its number of images."""
        pairs = slice(self.first_pair[index], self.first_pair[index + 1])
        return zip(self.labels[pairs].tolist(), self.counts[pairs].tolist(), strict=True)
