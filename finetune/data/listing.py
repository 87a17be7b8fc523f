"""Which images there are, by folder layout or CSV, before any is decoded: the first step on the street."""

import os
import stat
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from finetune.data.csv_files import read_csv
from finetune.data.formats import looks_like_image
from finetune.data.shards import compressed_shards, find_shards, list_shards, missing_shards
from finetune.data.table import SPLIT_NAMES, ImageRow, ImageTable, Rows, Split, sort_by_path
from finetune.errors import DataError, first_ten, nearest

LAYOUTS_HINT = (
    "give a folder DATA/CLASS/image.jpg, a folder DATA/{train,valid,test}/CLASS/image.jpg, a CSV file with the columns "
    "image_path,label[,split][,group], or a folder of shards DATA/{train,valid,test}-000000.tar"
)
_CLUTTER = frozenset({"__macosx", "thumbs.db", "desktop.ini"})


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies in DATA: candidate images with their labels, none of them read further than its first bytes.

    `root` is the folder that image paths are relative to. `empty_classes` holds (split, class name) of the folders
    without an image, `ignored_files` what was passed over as no image or as standing outside every class folder, and
    `problems` a sentence for each part of DATA that was not entered.
    """

    root: Path
    rows: Rows
    empty_classes: tuple[tuple[Split | None, str], ...] = ()
    ignored_files: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The distinct labels sorted as text."""
        return ImageTable(self.root, self.rows).class_names


def list_images(data: Path) -> Listing:
    """List the images of a folder or CSV file with the label, split and group each is given.

    Hidden files and the clutter of operating systems are skipped without a word. A file whose extension is no image's
    counts as an image only if its first bytes say so. Links are followed, also out of `data`, but no folder is entered
    twice within a class.

    Args:
        data: a folder of class folders, a folder of split folders of class folders, a folder of shards, or a CSV file.

    Returns:
        The listing, its rows sorted by image path.

    Raises:
        DataError: if `data` is absent, has none of the layouts, holds no image, or is a CSV with faults (all named).
    """
    try:
        mode = data.stat().st_mode
    except (OSError, ValueError) as error:
        raise DataError(f"{data} cannot be read: {error}", hint=LAYOUTS_HINT) from error
    if stat.S_ISDIR(mode):
        return _list_folder(data.absolute())
    if stat.S_ISREG(mode) and data.suffix.lower() == ".csv":
        return _list_csv(data.absolute())
    raise DataError(f"{data} is neither a folder nor a CSV file", hint=LAYOUTS_HINT)


def _list_folder(root: Path) -> Listing:
    walk = _Walk(root)
    folders, loose = walk.children(root)
    shards = find_shards(loose)
    if shards and not _hold_images(root, folders):
        return _list_shards(root, shards, folders, loose)
    splits = {folder: SPLIT_NAMES[folder.name.lower()] for folder in folders if folder.name.lower() in SPLIT_NAMES}
    # A class may be called "train"; a split is told by the class folders inside it.
    if any(walk.children(folder)[0] for folder in splits):
        _check_one_folder_a_split(root, splits)
        rows = Rows(row for folder, split in splits.items() for row in walk.split_rows(folder, split))
        if beside := [folder.name for folder in folders if folder not in splits]:
            walk.problems.append(f"not entered, because they lie beside the splits: {first_ten(beside)}")
    elif len(splits) > 1 or 0 < len(splits) == len(folders):
        raise DataError(f"{root} has no class folders in {first_ten(f.name for f in splits)}", hint=LAYOUTS_HINT)
    else:
        rows = Rows(row for folder in folders for row in walk.class_rows(folder, split=None))
    if not rows:
        if compressed := compressed_shards(loose):
            raise DataError(
                f"the shards in {root} are compressed: {first_ten(compressed)}",
                "unpack them to .tar, as with gunzip: the images in them are compressed already",
            )
        images = [file.name for file in loose if looks_like_image(file)]
        found = f"images but no class folders: {first_ten(images)}" if images else "no images"
        raise DataError("; ".join([f"{root} holds {found}", *walk.problems[:1]]), hint=LAYOUTS_HINT)
    if shards:
        walk.problems.append(f"not read, because they lie beside folders: {first_ten(each.name for each in shards)}")
    return Listing(
        root=root,
        rows=sort_by_path(rows),
        empty_classes=tuple(walk.empty_classes),
        ignored_files=tuple(sorted(walk.ignored_files + loose)),
        problems=tuple(dict.fromkeys(walk.problems)),
    )


def _hold_images(root: Path, folders: list[Path]) -> bool:
    walk = _Walk(root)
    return any(True for folder in folders for _ in walk.class_rows(folder, split=None))


def _list_shards(root: Path, shards: Mapping[Path, Split], folders: list[Path], loose: list[Path]) -> Listing:
    rows, problems = list_shards(shards), []
    if not rows:
        raise DataError(f"the shards in {root} hold no images", hint=LAYOUTS_HINT)
    if folders:
        problems.append(f"no images are in these, beside shards: {first_ten(folder.name for folder in folders)}")
    if missing := missing_shards(shards):
        problems.append(f"shards are missing from the sequence: {first_ten(missing)}")
    ignored = tuple(file for file in loose if file not in shards)
    return Listing(root=root, rows=sort_by_path(rows), ignored_files=ignored, problems=tuple(problems))


def _check_one_folder_a_split(root: Path, splits: dict[Path, Split]) -> None:
    if len(set(splits.values())) < len(splits):
        names = ", ".join(folder.name for folder in splits)
        raise DataError(f"{root} has several folders for one split: {names}", hint="keep one of valid, val, validation")


@dataclass
class _Walk:
    """Goes through the folders below `root` and notes down whatever is not an image of a class."""

    root: Path
    empty_classes: list[tuple[Split | None, str]] = field(default_factory=list)
    ignored_files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def children(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Return the visible sub-folders and the visible other entries of `folder`, each sorted."""
        folders: list[Path] = []
        others: list[Path] = []
        for name, is_folder in self._entries(folder):
            (folders if is_folder else others).append(folder / name)
        return folders, others

    def _entries(self, folder: Path) -> list[tuple[str, bool]]:
        """Return the names of the visible entries of `folder`, sorted, and whether each is a folder."""
        try:
            with os.scandir(folder) as scan:
                entries = [(entry.name, _is_folder(entry)) for entry in scan]
        except OSError as error:
            self.problems.append(f"{folder} cannot be read: {error.strerror}")
            return []
        visible = [entry for entry in entries if not entry[0].startswith(".") and entry[0].lower() not in _CLUTTER]
        return sorted(visible)

    def split_rows(self, folder: Path, split: Split) -> Iterator[ImageRow]:
        """Yield the images of every class in the folder of one split."""
        classes, loose = self.children(folder)
        self.ignored_files.extend(loose)
        for class_folder in classes:
            yield from self.class_rows(class_folder, split=split)

    def class_rows(self, folder: Path, *, split: Split | None) -> Iterator[ImageRow]:
        """Yield the images at any depth below the folder of one class."""
        # A link back to the root or the split would bring the images of every other class under this label.
        entered = {os.path.realpath(self.root), os.path.realpath(folder.parent)}
        is_empty = True
        for image_path in self._images(folder, entered):
            is_empty = False
            yield ImageRow(image_path=image_path, label=folder.name, split=split)
        if is_empty:
            self.empty_classes.append((split, folder.name))

    def _images(self, folder: Path, entered: set[str]) -> Iterator[str]:
        """Yield the paths of the images in `folder` and below."""
        pending = [(folder, folder.relative_to(self.root).as_posix())]
        while pending:
            current, prefix = pending.pop()
            real = os.path.realpath(current)
            if real in entered:
                self.problems.append(f"{current} links to a folder that is read already")
                continue
            entered.add(real)
            entries = self._entries(current)
            pending += [(current / name, f"{prefix}/{name}") for name, is_folder in reversed(entries) if is_folder]
            for name, is_folder in entries:
                if not is_folder and looks_like_image(f"{current}/{name}"):
                    yield f"{prefix}/{name}"
                elif not is_folder:
                    self.ignored_files.append(current / name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # where a permission is lacking, or a link leads nowhere: the scan names the file
        return False


def _list_csv(path: Path) -> Listing:
    numbers = array("q")
    faults: list[tuple[int, str]] = []

    def read() -> Iterator[ImageRow]:
        for number, values in read_csv(path, required=("image_path", "label")):
            row, row_faults = _csv_row(values, path.parent)
            numbers.append(number)
            faults.extend((number, fault) for fault in row_faults)
            yield row

    rows = sort_by_path(Rows(read()))
    for (place, before), (again, image_path) in pairwise(zip(rows.places_M.tolist(), rows.image_paths(), strict=True)):
        if before == image_path:
            first, second = sorted((numbers[place], numbers[again]))
            faults.append((second, f"{image_path!r} stands in row {first} already"))
    if faults:
        listed = [f"row {number}: {fault}" for number, fault in sorted(faults)]
        raise DataError(
            f"{path} has {len(listed)} faults: {first_ten(listed)}", hint="mend these rows; nothing was read"
        )
    if not rows:
        raise DataError(f"{path} has no rows", hint=LAYOUTS_HINT)
    return Listing(root=path.parent, rows=rows)


def _csv_row(values: dict[str, str], root: Path) -> tuple[ImageRow, list[str]]:
    """Return the row and what is wrong with it."""
    faults = []
    image_path = Path(values["image_path"])
    if not values["image_path"].strip():
        faults.append("image_path is empty")
    elif image_path.is_absolute() or ".." in image_path.parts:
        faults.append(f"{values['image_path']!r} leads out of the folder of the CSV file")
    elif not os.path.exists(root / image_path):  # noqa: PTH110 - Path.exists raises for names that are too long
        faults.append(f"{values['image_path']!r} does not exist")
    # The space people put after a comma would make " cat" a class beside "cat".
    label, split, group = (values.get(column, "").strip() for column in ("label", "split", "group"))
    if not label:
        faults.append("label is empty")
    if split and split.lower() not in SPLIT_NAMES:
        faults.append(f"unknown split {split!r}, {nearest(split, list(SPLIT_NAMES))}")
    return (
        ImageRow(
            image_path=image_path.as_posix(), label=label, split=SPLIT_NAMES.get(split.lower()), group=group or None
        ),
        faults,
    )
