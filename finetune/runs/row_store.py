"""Rows of bytes on disk, each under a key, so that what is costly to compute is computed once.

A store is a folder of segments (`cache_folder` draws it). Every process appends to segments of its own, first the row
and then the record that names it, so that writers need no lock among each other and a kill leaves at most bytes that no
record names. Nothing is synced: a row is believed for its checksum only, so a power cut costs computing it again.
"""

import errno
import fcntl
import mmap
import os
import secrets
import threading
import weakref
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from finetune.runs.cache_folder import (
    GIGABYTE,
    KINDS,
    RECORD,
    cache_folder,
    cache_limit_bytes,
    hold_cache,
    index_files,
    make_room,
    prune_cache,
    read_description,
    store_bytes,
    store_id,
    write_description,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_SEGMENTS_IN_LIMIT = 64  # the grain in which the cache is pruned, and by which a writer may overrun its limit
_CHECKED_BYTES = RECORD.size - 4  # of a record, by its own checksum
_FORGOTTEN = bytes(RECORD.size)  # as a record; its checksum would be another
_NUMBER_BITS = 32  # of a place: the segment above, the number of the record in it below


def open_store(kind: str, made_by: Mapping[str, Any], *, folder: Path | None = None) -> "RowStore":
    """Open the store of the rows that `made_by` determines; `with` closes it.

    Nothing is written before the first row is. A store whose description on disk is not `made_by` counts as empty, and
    is emptied when a row is put into it.

    Args:
        kind: One of `KINDS`.
        made_by: Everything that determines a row beside its key, in plain JSON values; "title" is the line for people.
        folder: The cache folder, if not `cache_folder()`.

    Raises:
        ConfigError: FINETUNE_CACHE_GB is no number.
    """
    assert kind in KINDS, kind
    return RowStore(folder or cache_folder(), kind, made_by)


class RowStore:
    """Rows under keys of 64 hexadecimal digits; made by `open_store`.

    A row is a function of its key, so that putting it a second time changes nothing. Threads may share a store. A
    forked process may go on with it, and one that gets it pickled opens it again; each writes segments of its own.

    `damaged` counts the rows and records that this process found damaged; they are deleted, and the rows missing.
    `write_error` is why nothing more is written, or None: a cache that cannot be written is no reason to stop.
    """

    def __init__(self, root: Path, kind: str, made_by: Mapping[str, Any]) -> None:
        self.damaged = 0
        self.write_error: OSError | None = None
        self._root = root.absolute()
        self._kind = kind
        self._made_by = made_by
        self._folder = self._root / kind / store_id(made_by)
        self._limit_bytes = cache_limit_bytes()
        self._segments: list[_Segment] = []
        self._place_of: dict[bytes, int] = {}
        self._writer: _Writer | None = None
        self._has_written = False
        self._lock = threading.Lock()
        _OPEN_STORES.add(self)
        self.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["RowStore"], tuple[Path, str, Mapping[str, Any]]]:
        """Travel to another process as the way to open it."""
        return type(self), (self._root, self._kind, self._made_by)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._place_of

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return those of `keys` that no process has put yet, in their order and each once; the others are in use now.

        A row may still turn out to be damaged when it is read.
        """
        self.refresh()
        places = {key: self._place_of.get(bytes.fromhex(key)) for key in keys}
        for number in {place >> _NUMBER_BITS for place in places.values() if place is not None}:
            self._segments[number].mark_used()
        return [key for key, place in places.items() if place is None]

    def get(self, key: str) -> memoryview | None:
        """Return the row under `key`, mapped from the disk and read-only, or None if it is missing or damaged.

        What other processes have put since the last `refresh` or `missing` is not seen.
        """
        name = bytes.fromhex(key)
        with self._lock:
            place = self._place_of.get(name)
            if place is None:
                return None
            segment, number = self._segments[place >> _NUMBER_BITS], place & ((1 << _NUMBER_BITS) - 1)
            _, offset, length, row_crc, _ = RECORD.unpack_from(segment.records, number * RECORD.size)
            try:
                row = segment.view(offset, length)
            except OSError:  # another process has deleted it
                self._drop(segment)
                return None
            is_checked = segment.is_checked
        if is_checked[number] or zlib.crc32(row) == row_crc:
            is_checked[number] = 1
            return row
        with self._lock:
            if self._place_of.get(name) == place:  # no other thread has found it
                del self._place_of[name]
                self.damaged += 1
                segment.forget([number])
        return None

    def put(self, key: str, row: "ReadableBuffer") -> None:
        """Append the bytes of `row` under `key`, of 64 hexadecimal digits; where that fails, `write_error` says why."""
        name = bytes.fromhex(key)
        assert len(name) == 32, key
        view = memoryview(row)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        row_crc = zlib.crc32(view)
        with self._lock:
            if self.write_error or name in self._place_of:
                return
            try:
                self._place_of[name] = self._append(name, view, row_crc)
            except OSError as error:
                self.write_error = error
                self._end_segment()
            except BaseException:  # an interrupt in the middle: nothing is appended to what may be half a row
                self._end_segment()
                raise

    def refresh(self) -> None:
        """See what other processes have put, and what they have deleted."""
        with self._lock:
            is_believed = read_description(self._folder) is not None
            stems = {path.with_suffix("") for path in index_files(self._folder)} if is_believed else set()
            known = {segment.stem for segment in self._segments}
            self._segments += [_Segment(stem) for stem in sorted(stems - known)]
            for number, segment in enumerate(self._segments):
                if segment.stem in stems:
                    self._take_in(number)
                elif segment.records and not segment.is_mapped:
                    self._drop(segment)
            if self._writer and self._writer.segment.stem not in stems:
                self._end_segment()

    def close(self) -> None:
        """End the segment being written, and keep the cache within its bound if anything was written."""
        with self._lock:
            self._end_segment()
            if self._has_written:
                self._has_written = False
                with suppress(OSError):
                    prune_cache(self._limit_bytes, folder=self._root)

    def _append(self, name: bytes, row: memoryview, row_crc: int) -> int:
        """Write a row into a segment of this process, a new one if need be, and return its place."""
        segment_bytes = self._limit_bytes // _SEGMENTS_IN_LIMIT
        if self._writer and (self._writer.rows_bytes >= segment_bytes or self._writer.is_deleted):
            self._end_segment()
        if not self._writer:
            self._writer = self._begin_segment(max(segment_bytes, len(row) + RECORD.size))
        number = self._writer.append(name, row, row_crc)
        return self._segments.index(self._writer.segment) << _NUMBER_BITS | number

    def _begin_segment(self, room_bytes: int) -> "_Writer":
        with hold_cache(self._root):
            # Above the bound the first rows are kept: in an epoch over all, the oldest are the next to be read.
            if store_bytes(self._folder) + room_bytes > self._limit_bytes:
                limit = f"{self._limit_bytes / GIGABYTE:g} GB"
                raise OSError(errno.EDQUOT, f"the cache may hold {limit}, set by FINETUNE_CACHE_GB", str(self._folder))
            make_room(self._root, self._limit_bytes - room_bytes)
            if read_description(self._folder) is None:
                write_description(self._folder, self._made_by)
            writer = _Writer(self._folder / f"{os.getpid()}-{secrets.token_hex(8)}")
        self._segments.append(writer.segment)
        self._has_written = True
        return writer

    def _end_segment(self) -> None:
        """Close the segment being written; its rows stay readable to this process, whoever deletes it now."""
        if self._writer:
            self._writer.close()
        self._writer = None

    def _take_in(self, number: int) -> None:
        """Read the records that are new in a segment."""
        segment = self._segments[number]
        try:
            records = segment.read_records()
            rows_bytes = segment.rows_path.stat().st_size  # after the records, whose rows were there before them
        except OSError:  # another process has deleted it
            return
        first = segment.add(records)
        damaged = []
        for place, start in enumerate(range(0, len(records), RECORD.size), number << _NUMBER_BITS | first):
            record = records[start : start + RECORD.size]
            name, offset, length, _, record_crc = RECORD.unpack(record)
            if zlib.crc32(record[:_CHECKED_BYTES]) == record_crc and offset + length <= rows_bytes:
                self._place_of[name] = place
            elif record != _FORGOTTEN:
                damaged.append(first + start // RECORD.size)
        self.damaged += len(damaged)
        segment.forget(damaged)

    def _drop(self, gone: "_Segment") -> None:
        """Forget the rows of a segment that was deleted."""
        gone.clear()
        number = self._segments.index(gone)
        self._place_of = {name: place for name, place in self._place_of.items() if place >> _NUMBER_BITS != number}

    def _leave_writer(self) -> None:
        """Go on in a forked process: the segment being written, and a lock that may be held, belong to the parent."""
        self._lock = threading.Lock()
        self._end_segment()
        self._has_written = False


class _Segment:
    """The rows that one process wrote, as far as their records have been read."""

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self.rows_path = stem.with_suffix(".rows")
        self.index_path = stem.with_suffix(".index")
        self.records = bytearray()
        self.is_checked = bytearray()  # a flag a record: the row as it is mapped now has its checksum
        self._mapping: mmap.mmap | None = None

    @property
    def is_mapped(self) -> bool:
        """Tell whether rows can be read even after their file was deleted."""
        return self._mapping is not None

    def read_records(self) -> bytes:
        """Return the whole records that were added to the file since."""
        with self.index_path.open("rb") as file:
            file.seek(len(self.records))
            fresh = file.read()
        return fresh[: len(fresh) // RECORD.size * RECORD.size]

    def add(self, records: bytes) -> int:
        """Take `records` in and return the number of the first."""
        first = len(self.is_checked)
        self.records += records
        self.is_checked += bytes(len(records) // RECORD.size)
        return first

    def clear(self) -> None:
        """Take nothing for read."""
        self.records = bytearray()
        self.is_checked = bytearray()

    def view(self, offset: int, length: int) -> memoryview:
        """Return bytes of the rows, none where the file has become too short."""
        if self._mapping is None or offset + length > len(self._mapping):
            with self.rows_path.open("rb") as file:
                self.hold(file)
            self.mark_used()
        if self._mapping is None or offset + length > len(self._mapping):
            return memoryview(b"")
        return memoryview(self._mapping)[offset : offset + length]

    def hold(self, rows: FileIO | BufferedReader) -> None:
        """Map the open file of the rows, if there is anything in it; it stays readable after the file was deleted."""
        self.is_checked = bytearray(len(self.is_checked))  # the file may have become another since
        if os.fstat(rows.fileno()).st_size:
            self._mapping = mmap.mmap(rows.fileno(), 0, access=mmap.ACCESS_READ)

    def mark_used(self) -> None:
        """Put the segment last in the order of deletion."""
        with suppress(OSError):
            os.utime(self.index_path)

    def forget(self, numbers: list[int]) -> None:
        """Blank damaged records, on disk too, so that no other process believes or counts them."""
        for number in numbers:
            self.records[number * RECORD.size : (number + 1) * RECORD.size] = _FORGOTTEN
        if numbers:
            with suppress(OSError), self.index_path.open("r+b", buffering=0) as file:
                for number in numbers:
                    file.seek(number * RECORD.size)
                    file.write(_FORGOTTEN)


class _Writer:
    """A segment that this process appends to; a lock on its index keeps other processes from deleting it."""

    def __init__(self, stem: Path) -> None:
        self.segment = _Segment(stem)
        self.rows_bytes = 0
        with ExitStack() as stack:
            self._rows = stack.enter_context(self.segment.rows_path.open("x+b", buffering=0))
            self._index = stack.enter_context(self.segment.index_path.open("xb", buffering=0))
            fcntl.flock(self._index, fcntl.LOCK_EX)
            self._files = stack.pop_all()

    def append(self, name: bytes, row: memoryview, row_crc: int) -> int:
        """Write a row and then its record; return its number."""
        record = RECORD.pack(name, self.rows_bytes, len(row), row_crc, 0)[:_CHECKED_BYTES]
        record += zlib.crc32(record).to_bytes(4, "little")
        _write_all(self._rows, row)
        _write_all(self._index, memoryview(record))
        self.rows_bytes += len(row)
        return self.segment.add(record)

    @property
    def is_deleted(self) -> bool:
        """Tell whether the cache was cleared, so that nobody would find what is written from here on."""
        return not os.fstat(self._index.fileno()).st_nlink

    def close(self) -> None:
        """End the segment, whose rows this process can read from here on even if it is deleted."""
        with suppress(OSError):
            self.segment.hold(self._rows)
        self._files.close()


def _write_all(file: FileIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]


_OPEN_STORES: weakref.WeakSet[RowStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_OPEN_STORES):
        store._leave_writer()


os.register_at_fork(after_in_child=_after_fork)
