"""Which images are learned from and which are held back: decided once, written to `split.csv`, read back ever after."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, cast

from finetune.data.csv_files import read_csv, write_csv
from finetune.data.table import SPLITS, ImageRow, ImageTable, Split
from finetune.errors import ConfigError, DataError, RunError, first_ten

_COLUMNS = ("image_path", "label", "split", "group")


class SplitEntry(NamedTuple):
    """What `split.csv` holds of one image."""

    label: str
    split: Split | None
    group: str | None


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
    rows = sorted(table.rows, key=lambda row: row.image_path)
    pool = _rows_to_split(rows)
    valid = _choose_valid(pool, seed, valid_fraction) if pool else set()
    split_of: dict[str, Split] = {row.image_path: "valid" if row.image_path in valid else "train" for row in pool}
    return ImageTable(table.root, tuple(replace(row, split=split_of.get(row.image_path, row.split)) for row in rows))


def write_split_csv(table: ImageTable, path: Path) -> None:
    """Write `image_path,label,split,group` for every image.

    Raises:
        StorageError: if it cannot be written.
    """
    rows = ((row.image_path, row.label, row.split or "", row.group or "") for row in table.rows)
    write_csv(path, columns=_COLUMNS, rows=rows)


def read_split_csv(path: Path) -> dict[str, SplitEntry]:
    """Read what `write_split_csv` wrote, by image path.

    Raises:
        RunError: if there is no such file.
        DataError: if it is damaged.
    """
    if not path.is_file():
        raise RunError(f"{path} does not exist", hint="the run folder is incomplete; train again")
    entries = {}
    for number, values in read_csv(path, required=_COLUMNS):
        if values["split"] not in ("", *SPLITS):
            raise DataError(f"{path}, row {number}: unknown split {values['split']!r}, expected {', '.join(SPLITS)}")
        split = cast(Split, values["split"]) if values["split"] else None
        entries[values["image_path"]] = SplitEntry(values["label"], split, values["group"] or None)
    return entries


def apply_split(table: ImageTable, path: Path) -> ImageTable:
    """Give the images of `table` the splits and groups written in `path`.

    Raises:
        RunError: if there is no such file.
        DataError: if it is damaged, or images are new, gone or have another label; each is listed.
    """
    entries = read_split_csv(path)
    paths = {row.image_path for row in table.rows}
    differences = {
        "new": [row.image_path for row in table.rows if row.image_path not in entries],
        "gone": [image_path for image_path in entries if image_path not in paths],
        "of another label": [
            row.image_path
            for row in table.rows
            if row.image_path in entries and entries[row.image_path].label != row.label
        ],
    }
    found = [f"{len(names)} {what}: {first_ten(map(repr, names))}" for what, names in differences.items() if names]
    if found:
        raise DataError(
            f"the images of {table.root} are not those of {path}; {'; '.join(found)}",
            hint="restore the images, or train into a new run folder",
        )
    rows = (
        replace(row, split=entries[row.image_path].split, group=entries[row.image_path].group) for row in table.rows
    )
    return ImageTable(table.root, tuple(rows))


def _rows_to_split(rows: Sequence[ImageRow]) -> list[ImageRow]:
    """Return the rows to be divided into train and valid, none if they are divided already."""
    splits = {row.split for row in rows}
    if splits == {None}:
        return list(rows)
    if without := [row.image_path for row in rows if row.split is None]:
        raise DataError(
            f"{len(without)} of {len(rows)} images have no split, others have one: {first_ten(map(repr, without))}",
            hint="fill the split column in every row, or in none",
        )
    if "train" not in splits:
        raise DataError("there are no training images", hint="put images in train/CLASS, or leave the split out")
    return [] if "valid" in splits else [row for row in rows if row.split == "train"]


class _Component(NamedTuple):
    """Images that must stay together: how many of each label, and their paths."""

    images: Counter[str]
    paths: tuple[str, ...]


def _components(rows: Iterable[ImageRow]) -> list[_Component]:
    """Join the rows that share a group, their bytes or their picture, directly or through others."""
    leader: dict[object, object] = {}

    def find(key: object) -> object:
        while leader.setdefault(key, key) != key:
            leader[key] = key = leader[leader[key]]
        return key

    rows = list(rows)
    for row in rows:
        for kind, value in (("group", row.group), ("bytes", row.sha256 or None), ("picture", row.perceptual_hash)):
            if value is not None:
                leader[find((kind, value))] = find(row.image_path)
    members = defaultdict(list)
    for row in rows:
        members[find(row.image_path)].append(row)
    return [
        _Component(Counter(row.label for row in together), tuple(sorted(row.image_path for row in together)))
        for together in members.values()
    ]


def _choose_valid(rows: Sequence[ImageRow], seed: int, valid_fraction: float) -> set[str]:
    """Return the paths of the images to hold back."""
    totals = Counter(row.label for row in rows)
    targets = {label: min(max(round(total * valid_fraction), 1), total - 1) for label, total in totals.items()}
    # A hash gives the order, not a generator: so it depends neither on the order of rows nor on a library's version.
    components = sorted(_components(rows), key=lambda component: _digest(seed, component.paths[0]))
    _check_separable(components, totals)
    division = _Division(components, totals, targets)
    for index in range(len(components)):
        if division.change(index).distance < 0:
            division.flip(index)
    division.cover_every_class()
    return {path for index in division.valid for path in components[index].paths}


def _digest(seed: int, image_path: str) -> bytes:
    return hashlib.sha256(f"{seed}:{image_path}".encode(errors="surrogateescape")).digest()


def _check_separable(components: Sequence[_Component], totals: Counter[str]) -> None:
    parts = Counter(label for component in components for label in component.images)
    alone = [f"{label!r} ({totals[label]} images)" for label in sorted(parts) if parts[label] < 2]
    if alone:
        raise DataError(
            f"{len(alone)} classes cannot be on both sides of a split, because they have one image, or images that are "
            f"copies of one another or of one group: {first_ten(alone)}",
            hint="add images to these classes, leave them out, or give a split yourself in folders train and valid",
        )


class _Change(NamedTuple):
    """What moving a component would do to the number of classes missing on a side, and to the distance from targets."""

    uncovered: int
    distance: int


@dataclass
class _Division:
    """Components on two sides, those in `valid` and the rest, with the images of each label held back so far."""

    components: Sequence[_Component]
    totals: Counter[str]
    targets: dict[str, int]
    valid: set[int] = field(default_factory=set)
    held: Counter[str] = field(default_factory=Counter)

    def flip(self, index: int) -> None:
        """Move a component to the other side."""
        if index in self.valid:
            self.held.subtract(self.components[index].images)
        else:
            self.held.update(self.components[index].images)
        self.valid ^= {index}

    def change(self, index: int) -> _Change:
        """Say what `flip` would change; below zero is better."""
        sign = -1 if index in self.valid else 1
        uncovered = distance = 0
        for label, count in self.components[index].images.items():
            before, after = self.held[label], self.held[label] + sign * count
            uncovered += (after in (0, self.totals[label])) - (before in (0, self.totals[label]))
            distance += abs(after - self.targets[label]) - abs(before - self.targets[label])
        return _Change(uncovered, distance)

    def cover_every_class(self) -> None:
        """Move components until every class is on both sides.

        Where groups span classes one move may undo another; preferring the components moved least often leads out.
        """
        moves: Counter[int] = Counter()
        holders = defaultdict(list)
        for index, component in enumerate(self.components):
            for label in component.images:
                holders[label].append(index)
        for _ in range(20 * len(self.totals)):
            uncovered = sorted(label for label, total in self.totals.items() if self.held[label] in (0, total))
            if not uncovered:
                return
            index = min(
                holders[uncovered[0]],
                key=lambda index: (self.change(index).uncovered, moves[index], self.change(index).distance),
            )
            self.flip(index)
            moves[index] += 1
        raise DataError(
            f"groups and copies tie classes together so that some stay on one side: {first_ten(map(repr, uncovered))}",
            hint="loosen the groups, or give a split yourself in folders train and valid",
        )
