"""One look at every image before anything is learned from it: what cannot be decoded is known by name and reason."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from finetune.data.csv_files import write_csv
from finetune.data.decode import Pixels, decode_image, image_size, perceptual_hash, read_image_file
from finetune.data.listing import Listing
from finetune.data.table import ImageTable, Split
from finetune.errors import DataError, ImageError, ImageFault, first_ten
from finetune.runs.cache_folder import is_inside
from finetune.runs.processes import ALONE, Processes

MAX_BAD_FRACTION = 0.01
"""How much of the training images may be unreadable before training is refused."""

SHORT_SIDE_PX = 256
"""To which a large photograph may be reduced while it is decoded, where nobody asks for more of it."""

_CACHE_FORMAT = 2  # raise it when decoding or hashing changes
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


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What one file turned out to be, with the size and time it had then; `reason` is None for a good image.

    A picture that may be reduced to another short side is another one to the perceptual hash.
    """

    size_bytes: int = 0
    mtime_ns: int = 0
    short_side_px: int = 0
    sha256: str = ""
    perceptual_hash: int | None = None
    width_px: int = 0
    height_px: int = 0
    reason: ImageFault | None = None
    detail: str = ""


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
    cache_file = _cache_file(cache_folder, listing.root) if cache_folder else None
    known = _read_cache(cache_file) if cache_file else {}
    all_paths = [str(listing.root / row.image_path) for row in listing.rows]
    paths = processes.share(all_paths)
    own: list[_Look] = []
    look_at = partial(_look_at, known=known, onlooker=onlooker)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), _FILES_AT_ONCE):
            batch = paths[start : start + _FILES_AT_ONCE]
            # Whole batches, so that decoding threads and an onlooker that computes do not fight for the same cores.
            for look, prepared in list(pool.map(look_at, batch)):
                own.append(look)
                if onlooker and prepared is not None:
                    onlooker.take(look.sha256, prepared)
                if progress:
                    progress(len(own), len(paths))
    looks = processes.gather_shares(own)
    if cache_file and processes.is_main:
        _write_cache(cache_file, known, dict(zip(all_paths, looks, strict=True)))
    return _scan_of(listing, looks)


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
    for name, splits in (("training", ("train", None)), ("validation", ("valid",)), ("test", ("test",))):
        bad = [file for file in scan.bad_files if file.split in splits]
        total = sum(row.split in splits for row in scan.listing.rows)
        if len(bad) > (MAX_BAD_FRACTION * total if name == "training" else 0):
            refused += bad
            counts.append(f"{len(bad)} of {total} {name} images")
    if refused:
        files = first_ten(f"{file.path!r} ({file.reason}: {file.detail})" for file in refused)
        raise DataError(
            f"{' and '.join(counts)} cannot be read: {files}",
            hint="mend or remove them, or pass --allow-bad-images to go on without them",
        )


def _look_at(path: str, *, known: Mapping[str, _Look], onlooker: Onlooker | None) -> tuple[_Look, Any]:
    """Decode the file at `path`, unless it is known and has not changed; return what an onlooker made of it, too."""
    short_side_px = onlooker.short_side_px if onlooker else SHORT_SIDE_PX
    try:
        status = os.stat(path)  # noqa: PTH116 - before reading, so that a change in between shows up in the next scan
        look = _Look(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, short_side_px=short_side_px)
    except (OSError, ValueError):
        look = _Look(short_side_px=short_side_px)
    before = known.get(path)
    if before and _stamp(before) == _stamp(look):
        return before, None
    try:
        data = read_image_file(path)
        width, height = image_size(data)
        image_HWC = decode_image(data, short_side_px=short_side_px)
    except ImageError as error:
        return replace(look, reason=error.reason, detail=error.detail), None
    sha256 = hashlib.sha256(data).hexdigest()
    look = replace(look, sha256=sha256, perceptual_hash=perceptual_hash(image_HWC), width_px=width, height_px=height)
    return look, onlooker.prepare(image_HWC, sha256) if onlooker else None


def _stamp(look: _Look) -> tuple[int, int, int]:
    return look.size_bytes, look.mtime_ns, look.short_side_px


def _scan_of(listing: Listing, looks: list[_Look]) -> Scan:
    good, bad = [], []
    for row, look in zip(listing.rows, looks, strict=True):
        if look.reason is not None:
            bad.append(
                BadFile(path=row.image_path, reason=look.reason, detail=look.detail, split=row.split, label=row.label)
            )
            continue
        good.append(
            replace(
                row,
                sha256=look.sha256,
                perceptual_hash=look.perceptual_hash,
                width_px=look.width_px,
                height_px=look.height_px,
            )
        )
    return Scan(table=ImageTable(listing.root, tuple(good)), bad_files=tuple(bad), listing=listing)


def _cache_file(cache_folder: Path, root: Path) -> Path | None:
    """Return the file for the looks at `root`, or None where writing it would change the user's data."""
    folder = cache_folder / "scans"
    return None if is_inside(folder, root) else folder / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.json"


def _read_cache(path: Path) -> dict[str, _Look]:
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != _CACHE_FORMAT:
            return {}
        return {file: _Look(**look) for file, look in document["files"].items()}
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ):  # absent or corrupt: looking again is all it costs
        return {}


def _write_cache(path: Path, known: Mapping[str, _Look], looks: Mapping[str, _Look]) -> None:
    # A file that could not be opened may be mended without a new size or time.
    lasting = {file: look for file, look in looks.items() if look.reason not in ("missing", "permission")}
    if lasting.items() <= known.items():
        return
    files = {file: asdict(look) for file, look in {**known, **lasting}.items()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"format": _CACHE_FORMAT, "files": files}))
        temporary.replace(path)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
