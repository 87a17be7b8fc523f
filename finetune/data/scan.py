"""One look at every image before anything is learned from it: what cannot be decoded is known by name and reason."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finetune.data.csv_files import write_csv
from finetune.data.decode import Pixels, decode_image, file_state, image_size, perceptual_hash, read_image_file
from finetune.data.listing import Listing
from finetune.data.looks import (
    FAULTS,
    Look,
    Looks,
    Stamp,
    gather_looks,
    known_looks,
    looks_file,
    path_keys,
    write_looks,
)
from finetune.data.table import SPLITS, ImageRow, ImageTable, Split
from finetune.errors import DataError, ImageError, ImageFault, first_ten
from finetune.runs.processes import ALONE, Processes

MAX_BAD_FRACTION = 0.01
"""How much of the training images may be unreadable before training is refused."""

SHORT_SIDE_PX = 256
"""To which a large photograph may be reduced while it is decoded, where nobody asks for more of it."""

LATEST_NS = 2**63 - 1  # in the year 2262
_FILES_AT_ONCE = 64  # queued for the threads; an interrupt waits for no more than those being decoded


class Onlooker(Protocol):
    """Sees every picture that a scan decodes, so that nobody has to decode it a second time.

    `short_side_px` is what it needs of a picture at least.
    """

    short_side_px: int

    def prepare(self, image_HWC: Pixels, sha256: str) -> Any:
        """Make what is to be kept of a picture, in one of several threads."""

    def take(self, sha256: str, prepared: Any) -> None:
        """Receive what `prepare` made, in the scan's own thread and in the order of the files."""


@dataclass(frozen=True, kw_only=True)
class BadFile:
    """An image that was refused: its path relative to the root, why, and the split and label it was meant for."""

    path: str
    reason: ImageFault
    detail: str
    split: Split | None
    label: str


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The images that decode, with their hashes and sizes, the files that do not, and the listing both came from."""

    table: ImageTable
    bad_files: tuple[BadFile, ...]
    listing: Listing


def scan_images(
    listing: Listing,
    *,
    cache_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    onlooker: Onlooker | None = None,
    processes: Processes = ALONE,
) -> Scan:
    """Decode every listed image once, in threads, and take down its hashes, its size and what is wrong with it.

    Each of several processes looks at its share and is told what the others saw.

    Args:
        listing: what to decode.
        cache_folder: where looks are kept, so that a file of unchanged path, size and time is not decoded again. None,
            or a folder inside the data, keeps nothing.
        progress: called with the files done and their total after each file.
        onlooker: is shown every picture that has to be decoded.
        processes: those that share the work.
    """
    short_side_px = onlooker.short_side_px if onlooker else SHORT_SIDE_PX
    rows = processes.share(listing.rows)
    cache_file = looks_file(cache_folder, listing.root) if cache_folder else None
    keys = path_keys(_paths(listing.root, rows), len(rows))
    looks = known_looks(cache_file, keys) if cache_file else Looks.empty(keys)
    has_fresh, look_at = False, partial(_look_at, short_side_px=short_side_px, onlooker=onlooker)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        # Whole batches, so that decoding threads and an onlooker that computes do not fight for the same cores.
        for start in range(0, len(rows), _FILES_AT_ONCE):
            several = slice(start, start + _FILES_AT_ONCE)
            before = [Stamp(*stamp) for stamp in looks.stamps[several].tolist()]
            batch = pool.map(look_at, _paths(listing.root, rows[several]), before)
            for place, (look, prepared) in enumerate(list(batch), start):
                if look:
                    has_fresh = True
                    looks.put(place, look)
                if onlooker and look and prepared is not None:
                    onlooker.take(look.sha256, prepared)
                if progress:
                    progress(place + 1, len(rows))
    if processes.count > 1:
        looks, has_fresh = gather_looks(looks, processes), processes.any(has_fresh)
    if cache_file and has_fresh and processes.is_main:
        write_looks(cache_file, looks)
    return _scan_of(listing, looks)


def _paths(root: Path, rows: Sequence[ImageRow]) -> Iterator[str]:
    return (f"{root}/{row.image_path}" for row in rows)


def write_bad_files(bad_files: Iterable[BadFile], path: Path) -> None:
    """Write the CSV `path,reason,detail` that a run folder keeps.

    Raises:
        StorageError: if it cannot be written.
    """
    write_csv(
        path, columns=("path", "reason", "detail"), rows=((bad.path, bad.reason, bad.detail) for bad in bad_files)
    )


def require_few_bad(scan: Scan, *, allow_bad_images: bool = False) -> None:
    """Refuse a data set whose unreadable images would bend what is learned or measured.

    Of the training images (or those not split yet) 1 % may be bad, of validation and test images none: a score over
    fewer images than there are is not the score asked for.

    Raises:
        DataError: listing the first ten with their reasons, unless `allow_bad_images`.
    """
    if allow_bad_images:
        return
    refused: list[BadFile] = []
    counts = []
    kinds: dict[str, tuple[Split | None, ...]] = {
        "training": ("train", None),
        "validation": ("valid",),
        "test": ("test",),
    }
    for name, splits in kinds.items():
        bad = [file for file in scan.bad_files if file.split in splits]
        codes = [-1 if split is None else SPLITS.index(split) for split in splits]
        total = int(np.isin(scan.listing.rows.split_codes, codes).sum())
        if len(bad) > (MAX_BAD_FRACTION * total if name == "training" else 0):
            refused += bad
            counts.append(f"{len(bad)} of {total} {name} images")
    if refused:
        files = first_ten(f"{file.path!r} ({file.reason}: {file.detail})" for file in refused)
        raise DataError(
            f"{' and '.join(counts)} cannot be read: {files}",
            hint="mend or remove them, or pass --allow-bad-images to go on without them",
        )


def _look_at(path: str, before: Stamp, *, short_side_px: int, onlooker: Onlooker | None) -> tuple[Look | None, Any]:
    """Decode the file at `path` and return what an onlooker made of it too; None if it is as it was `before`."""
    try:
        size_bytes, mtime_ns = file_state(path)  # before reading, so that a change in between shows in the next scan
        stamp = Stamp(size_bytes, min(mtime_ns, LATEST_NS), short_side_px)
    except (OSError, ValueError):
        stamp = Stamp(short_side_px=short_side_px)
    if stamp == before:
        return None, None
    try:
        data = read_image_file(path)
        size_px = image_size(data)
        image_HWC = decode_image(data, short_side_px=short_side_px)
    except ImageError as error:
        return Look(stamp=stamp, reason=error.reason, detail=error.detail), None
    sha256 = hashlib.sha256(data).hexdigest()
    look = Look(stamp=stamp, sha256=sha256, perceptual_hash=perceptual_hash(image_HWC), size_px=size_px)
    return look, onlooker.prepare(image_HWC, sha256) if onlooker else None


def _scan_of(listing: Listing, looks: Looks) -> Scan:
    bad = []
    for place in np.flatnonzero(looks.faults >= 0).tolist():
        row, reason = listing.rows[place], FAULTS[looks.faults[place]]
        detail = looks.details.get(place, "")
        bad.append(BadFile(path=row.image_path, reason=reason, detail=detail, split=row.split, label=row.label))
    rows = listing.rows.with_pictures(looks.pictures)
    good = rows.take(looks.faults < 0) if bad else rows
    return Scan(table=ImageTable(listing.root, good), bad_files=tuple(bad), listing=listing)
