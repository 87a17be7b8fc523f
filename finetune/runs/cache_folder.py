"""The cache folder: where it is, how much it may hold, what lies in it, and what may be deleted from it.

    $FINETUNE_CACHE/activations/ID/   a store of rows, see `row_store`; exports/ID/ and pictures/ID/ are others
        description.json              what determines its rows
        PID-RANDOM.rows, .index       a segment: the rows that one process wrote, and a RECORD for each
    $FINETUNE_CACHE/scans/ID.npz      what the images of one data folder were found to be
    $FINETUNE_CACHE/data/NAME/        what `finetune data` downloaded

All of it can be computed again, but for the downloads, which are listed and neither counted nor deleted. Nor is a file
of any other name: the folder may be one that holds other things.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError, StorageError
from finetune.runs import strict_json
from finetune.runs.folder import write_whole

KINDS = ("activations", "exports", "pictures")
"""The folders of stores."""

FORMAT = 1
"""Of a store's files; a store of another format is made anew."""

RECORD = struct.Struct("<32sQQII")
"""An entry of an index: key, offset and bytes of the row, CRC-32 of the row, CRC-32 of the entry up to here."""

DESCRIPTION = "description.json"
GIGABYTE = 10**9
DEFAULT_GIGABYTES = 20.0

_STORE = re.compile(r"[0-9a-f]{32}")
_SEGMENT_FILE = re.compile(r"\d+-[0-9a-f]{16}\.(index|rows)")
_DESCRIPTION_FILE = re.compile(r"description\.json|\.description\.json\.\d+\.part")
_SCAN_FILE = re.compile(r"[0-9a-f]{32}\.(npz|json|\d+\.tmp)")


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One store, all scans, the downloads of one data set, or something unknown that lies in the cache folder.

    `kind` is one of KINDS, "scans", "data" or "unknown", `what` a line for people. `rows` counts the rows
    of a store, one twice that two processes wrote at once, and the files of anything else. `last_used` is in UTC.
    """

    kind: str
    id: str
    what: str
    rows: int
    bytes: int
    last_used: datetime


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Files that are deleted together, in this order, with the time of their last use in seconds."""

    files: tuple[Path, ...]
    bytes: int
    last_used: float


def cache_folder() -> Path:
    """Return `$FINETUNE_CACHE`, or else `finetune` in the user's cache folder."""
    if own := os.environ.get("FINETUNE_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "finetune"


def cache_limit_bytes() -> int:
    """Return how much the cache may hold: `$FINETUNE_CACHE_GB` times 10⁹, by default 20 GB.

    Raises:
        ConfigError: The variable is no number, or a negative one.
    """
    text = os.environ.get("FINETUNE_CACHE_GB") or str(DEFAULT_GIGABYTES)
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise ConfigError(
            f"FINETUNE_CACHE_GB is {text!r}, but must be a number of gigabytes, 0 or more",
            f"unset it to keep up to {DEFAULT_GIGABYTES:g} GB",
        )
    return round(gigabytes * GIGABYTE)


def is_inside(folder: Path, data_root: Path) -> bool:
    """Tell whether `folder`, wherever links lead it, lies in the user's data, where no cache may ever be written."""
    return folder.resolve().is_relative_to(data_root.resolve())


def store_id(made_by: Mapping[str, Any]) -> str:
    """Return the name of the store whose rows are determined by `made_by`, plain JSON values, and their keys."""
    text = json.dumps(made_by, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_description(store: Path) -> dict[str, Any] | None:
    """Return what determines the rows in the folder `store`, or None if they cannot be believed."""
    try:
        document = strict_json.parse((store / DESCRIPTION).read_bytes())
        made_by: dict[str, Any] = document["made_by"]
        return made_by if document["format"] == FORMAT and store_id(made_by) == store.name else None
    except (OSError, ValueError, TypeError, KeyError):  # absent or damaged
        return None


def write_description(store: Path, made_by: Mapping[str, Any]) -> None:
    """Create the folder `store` for rows that `made_by` determines, emptied of what cannot be believed.

    Raises:
        OSError: The disk refuses.
    """
    empty_store(store)
    store.mkdir(parents=True, exist_ok=True)
    write_whole(store / DESCRIPTION, strict_json.dump({"format": FORMAT, "made_by": made_by}, indent=1))


def index_files(store: Path) -> list[Path]:
    """Return the indices of the segments in the folder `store`."""
    return [path for path in _entries(store) if path.suffix == ".index" and _SEGMENT_FILE.fullmatch(path.name)]


def store_bytes(store: Path) -> int:
    """Return what the segments in the folder `store` hold."""
    return sum(segment.bytes for segment in _segments(store))


def list_cache() -> list[CacheEntry]:
    """Describe what the cache folder holds; of a store only names, sizes and the description are read."""
    root = cache_folder()
    entries = [_describe_store(store) for store in _stores(root)]
    if scans := _scans(root):
        what = "hashes and sizes of the images of data folders"
        entries.append(_entry("scans", root / "scans", what, scans))
    for path in _entries(root / "data"):
        entries.append(_entry("data", path, f"downloads for {path.name}, kept until you delete them", _below(path)))
    for path in _strangers(root):
        entries.append(
            _entry("unknown", path, f"{path.relative_to(root)}, not made by finetune and left alone", _below(path))
        )
    return entries


def prune_cache(max_bytes: int, *, folder: Path | None = None) -> int:
    """Delete what was used least recently until at most `max_bytes` are left; return the bytes freed.

    What any process is writing to at this moment stays. A process that reads what is deleted goes on reading it.

    Args:
        max_bytes: What stores and scans may hold together, 0 or more.
        folder: The cache folder, if not `cache_folder()`.

    Raises:
        StorageError: The disk refuses.
    """
    root = folder or cache_folder()
    if not root.is_dir():
        return 0
    with _translated(root), hold_cache(root):
        return make_room(root, max_bytes)


def clear_cache() -> int:
    """Delete every store and every scan, but no download; return the bytes freed.

    Raises:
        StorageError: The disk refuses.
    """
    root = cache_folder()
    if not root.is_dir():
        return 0
    with _translated(root), hold_cache(root):
        pieces = _pieces(root)
        for piece in pieces:
            _delete(piece.files)
        for store in _stores(root):
            empty_store(store)
    return sum(piece.bytes for piece in pieces)


@contextmanager
def hold_cache(root: Path) -> Iterator[None]:
    """Be the only process that creates or deletes files under `root`; adding to a segment takes no lock.

    The kernel lets go of it when the process ends, however it ends.

    Raises:
        OSError: The folder cannot be created or written to.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".cache.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where another thread has forked meanwhile


def make_room(root: Path, max_bytes: int) -> int:
    """Do what `prune_cache` does, for a caller that holds the cache."""
    pieces = sorted(_pieces(root), key=lambda piece: piece.last_used)
    excess = sum(piece.bytes for piece in pieces) - max_bytes
    freed = 0
    for piece in pieces:
        if freed >= excess:
            break
        if not _is_being_written(piece.files[0]):
            _delete(piece.files)
            freed += piece.bytes
    for store in _stores(root):
        if not _segments(store):
            empty_store(store)
    return freed


def empty_store(store: Path) -> None:
    """Delete the segments and the description in the folder `store`, and the folder if it holds nothing else."""
    for segment in _segments(store):
        _delete(segment.files)
    _delete([path for path in _entries(store) if _DESCRIPTION_FILE.fullmatch(path.name)])
    with suppress(OSError):
        store.rmdir()


def _pieces(root: Path) -> list[_Piece]:
    return [*_scans(root), *(segment for store in _stores(root) for segment in _segments(store))]


def _scans(root: Path) -> list[_Piece]:
    return [_piece([path], counts_reading=True) for path in _entries(root / "scans") if _SCAN_FILE.fullmatch(path.name)]


def _stores(root: Path) -> list[Path]:
    return [path for kind in KINDS for path in _entries(root / kind) if _STORE.fullmatch(path.name)]


def _segments(store: Path) -> list[_Piece]:
    files = defaultdict(list)
    for path in _entries(store):
        if _SEGMENT_FILE.fullmatch(path.name):
            files[path.stem].append(path)
    # The index sorts, and so goes, first: rows without an index are only bytes, an index without rows looks damaged.
    return [_piece(paths) for paths in files.values()]


def _below(path: Path) -> list[_Piece]:
    """Return the file `path`, or every file in the folder `path`."""
    files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    return [_piece([file]) for file in files]


def _strangers(root: Path) -> Iterator[Path]:
    for path in _entries(root):
        if path.name in KINDS:
            yield from (inner for inner in _entries(path) if not _STORE.fullmatch(inner.name))
        elif path.name == "scans":
            yield from (inner for inner in _entries(path) if not _SCAN_FILE.fullmatch(inner.name))
        elif path.name not in ("data", ".cache.lock"):
            yield path


def _piece(files: Sequence[Path], *, counts_reading: bool = False) -> _Piece:
    """Sum up `files`, dated by the first; scans are read far more often than written, so their reading counts."""
    statuses = [status for file in files if (status := _status(file))]
    times = [max(status.st_mtime, status.st_atime) if counts_reading else status.st_mtime for status in statuses]
    size = sum(status.st_size for status in statuses)
    return _Piece(files=tuple(files), bytes=size, last_used=next(iter(times), 0.0))


def _describe_store(store: Path) -> CacheEntry:
    segments = _segments(store)
    statuses = [status for index in index_files(store) if (status := _status(index))]
    row_count = sum(status.st_size // RECORD.size for status in statuses)
    made_by = read_description(store)
    what = "damaged or of another version, made anew when next used"
    if made_by is not None:
        what = str(made_by.get("title", "without a title"))
    return _entry(store.parent.name, store, what, segments, row_count=row_count)


def _entry(kind: str, path: Path, what: str, pieces: Sequence[_Piece], *, row_count: int | None = None) -> CacheEntry:
    own_time = status.st_mtime if (status := _status(path)) else 0.0
    return CacheEntry(
        kind=kind,
        id=path.name,
        what=what,
        rows=len(pieces) if row_count is None else row_count,
        bytes=sum(piece.bytes for piece in pieces),
        last_used=datetime.fromtimestamp(max((piece.last_used for piece in pieces), default=own_time), UTC),
    )


def _is_being_written(path: Path) -> bool:
    """Tell whether a living process holds the index `path`, as whoever writes a segment does."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _delete(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # absent, or no folder
        return []


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # another process has deleted it
        return None


@contextmanager
def _translated(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot clean the cache {root}: {error.strerror}", "check who owns it and whether it can be written"
        ) from error
