"""Shards of images: tar files in the convention of WebDataset, read at random by an index instead of as a stream.

    train-000000.tar          and -000001 and so on; valid, val, validation and test likewise
        KEY.jpg               a picture
        KEY.cls or KEY.json   its label: the text of the one, "label" in the other

A picture has the path SHARD/KEY.jpg, as if its shard were a folder, and is a file like any other from there on: any
order, any share of them for a process and any position to go on from cost no more than reading what is wanted. The
convention (Aizman 2020, arXiv 2001.01858) cuts a name at the first dot behind the last slash.
"""

import hashlib
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.array_file import read_arrays, write_arrays
from finetune.data.formats import IMAGE_EXTENSIONS
from finetune.data.table import FOREIGN_BYTES, SPLIT_NAMES, ImageRow, Rows, Split
from finetune.errors import DataError, first_ten
from finetune.runs.cache_folder import cache_folder, is_inside

Array = np.ndarray[Any, Any]

# Shapes: N pictures of a shard.

FORMAT_NUMBER = 1  # of an index; raise it when more or other members count
MOST_LABEL_BYTES = 2**20
CONVENTION = 'a sample of a shard is KEY.jpg (or png …) with its label in KEY.cls, or as "label" in KEY.json'

_SHARD = re.compile(rf"({'|'.join(SPLIT_NAMES)})-.*\.tar", re.IGNORECASE)
_COMPRESSED = re.compile(rf"({'|'.join(SPLIT_NAMES)})-.*\.(tar\.\w+|tgz|tbz2?|txz)", re.IGNORECASE)


@dataclass
class _Sample:
    """What a shard holds under one key."""

    pictures: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, offset and size in bytes."""
    labels: dict[str, list[bytes]] = field(default_factory=dict)
    """The contents of its members "cls" and "json"."""


def find_shards(files: list[Path]) -> dict[Path, Split]:
    """Return those of `files` that are shards by their names, each with its split.

    Raises:
        DataError: One is compressed.
    """
    if compressed := [file.name for file in files if _COMPRESSED.fullmatch(file.name)]:
        raise DataError(
            f"shards are compressed: {first_ten(compressed)}",
            "unpack them to .tar, as with gunzip: the images in them are compressed already",
        )
    matches = ((file, _SHARD.fullmatch(file.name)) for file in files)
    return {file: SPLIT_NAMES[match[1].lower()] for file, match in matches if match}


def missing_shards(shards: Iterable[Path]) -> list[str]:
    """Return the names that lack between the first number and the last of each split's shards, the first of them."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for shard in shards:
        if match := re.fullmatch(r"(.*-)(\d+)\.tar", shard.name):
            numbers.setdefault((match[1], len(match[2])), set()).add(int(match[2]))
    return [
        f"{stem}{number:0{digits}}.tar"
        for (stem, digits), there in numbers.items()
        if len(there) > 1 and max(there) - min(there) < 2 * len(there)
        for number in range(min(there), max(there))
        if number not in there
    ]


def list_shards(shards: Mapping[Path, Split]) -> Rows:
    """Return a row for every picture in `shards`.

    Raises:
        DataError: A shard cannot be read, or breaks the convention; all faults are named.
    """
    faults: list[str] = []

    def rows() -> Iterator[ImageRow]:
        for shard, split in shards.items():
            try:
                listing = json.loads(_columns(shard, ["listing"])["listing"].tobytes())
            except (OSError, tarfile.TarError) as error:
                faults.append(f"{shard.name} cannot be read: {error}")
                continue
            faults.extend(f"{fault} in {shard.name}" for fault in listing["faults"])
            for name, label in listing["pictures"]:
                yield ImageRow(image_path=f"{shard.name}/{name}", label=label, split=split)

    listed = Rows(rows())
    if faults:
        raise DataError(f"the shards have {len(faults)} faults: {first_ten(faults)}", CONVENTION)
    return listed


def read_packed(path: str) -> bytes:
    """Return the bytes of a picture in a shard.

    Raises:
        FileNotFoundError: There is no such shard, or nothing of this name in it.
        OSError: The shard cannot be read.
    """
    shard, offset, size, _ = _place_of(path)
    with open(shard, "rb") as file:  # noqa: PTH123 (there may be a million)
        file.seek(offset)
        return file.read(size)


def packed_state(path: str) -> tuple[int, int]:
    """Return the size of a picture in a shard, in bytes, and when the shard was changed, in nanoseconds.

    Raises:
        FileNotFoundError, OSError: As `read_packed`.
    """
    _, _, size, mtime_ns = _place_of(path)
    return size, mtime_ns


def _place_of(path: str) -> tuple[str, int, int, int]:
    """Return the shard that the picture `path` is in, its offset and size there, and when the shard was changed."""
    for match in re.finditer(r"\.tar/", path, re.IGNORECASE):
        shard, name = path[: match.end() - 1], path[match.end() :]
        if os.path.isfile(shard):  # noqa: PTH113 (there may be a million)
            mtime_ns = os.stat(shard).st_mtime_ns  # noqa: PTH116
            keys_N, offsets_N, sizes_N = _places(shard, mtime_ns)
            key = np.uint64(_key(name))
            place = int(np.searchsorted(keys_N, key))
            if place < len(keys_N) and keys_N[place] == key:
                return shard, int(offsets_N[place]), int(sizes_N[place]), mtime_ns
    raise FileNotFoundError(f"there is no {path}")


@cache
def _places(shard: str, _mtime_ns: int) -> tuple[Array, Array, Array]:
    """Return the keys of a shard's pictures (N,), sorted, their offsets and their sizes, for one state of the file."""
    try:
        columns = _columns(Path(shard), ["keys", "offsets", "sizes"])
    except tarfile.TarError as error:
        raise OSError(f"{shard} cannot be read: {error}") from error
    return columns["keys"], columns["offsets"], columns["sizes"]


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors=FOREIGN_BYTES), digest_size=8).digest())


def _columns(shard: Path, names: Iterable[str]) -> Mapping[str, Array]:
    """Return columns of the index of `shard`, which is made where none is kept that is of this version of the file."""
    status = shard.stat()
    stamp = np.array([FORMAT_NUMBER, status.st_size, status.st_mtime_ns])
    folder = cache_folder() / "scans"
    file = folder / f"{hashlib.sha256(b'shard ' + os.fsencode(shard)).hexdigest()[:32]}.npz"
    may_keep = not is_inside(folder, shard.parent)
    kept = read_arrays(file, [*names, "stamp"]) if may_keep else None
    if kept is None or not np.array_equal(kept["stamp"], stamp):
        kept = {"stamp": stamp, **_index(_samples(shard))}
        if may_keep:
            write_arrays(file, kept)
    return kept


def _samples(shard: Path) -> dict[str, _Sample]:
    """Read through a shard and return its samples by key.

    Raises:
        OSError, tarfile.TarError: It cannot be read, or not to its end.
    """
    samples: dict[str, _Sample] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them
            name = posixpath.normpath(member.name).lstrip("/")
            folder, file_name = posixpath.split(name)
            stem, _, extension = file_name.partition(".")
            extension = extension.lower()
            if not stem or not member.isreg() or member.issparse():
                continue
            sample = samples.setdefault(posixpath.join(folder, stem), _Sample())
            if f".{extension}" in IMAGE_EXTENSIONS:
                sample.pictures.append((name, member.offset_data, member.size))
            elif extension in ("cls", "json"):
                content = tar.extractfile(member)
                assert content is not None  # of a regular file
                sample.labels.setdefault(extension, []).append(content.read(MOST_LABEL_BYTES))
        with shard.open("rb") as file:  # tarfile takes a damaged header for the end
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it is damaged or ends too early at byte {tar.offset:,}")
    return samples


def _index(samples: Mapping[str, _Sample]) -> dict[str, Array]:
    """Return the columns of the index of a shard with these samples."""
    listing: dict[str, list[Any]] = {"pictures": [], "faults": []}
    places = []
    for key, sample in samples.items():
        if not sample.pictures and "cls" not in sample.labels:
            continue  # a note, or facts about the whole set
        try:
            label = _label(sample)
        except ValueError as error:
            listing["faults"].append(f"{key!r} {error}")
            continue
        ((name, offset, size),) = sample.pictures
        listing["pictures"].append((name, label))
        places.append((_key(name), offset, size))
    keys, offsets, sizes = zip(*sorted(places), strict=True) if places else ((), (), ())
    return {
        "keys": np.array(keys, np.uint64),
        "offsets": np.array(offsets, np.int64),
        "sizes": np.array(sizes, np.int64),
        "listing": np.frombuffer(json.dumps(listing).encode(), np.uint8),
    }


def _label(sample: _Sample) -> str:
    """Return the label of the one picture in `sample`.

    Raises:
        ValueError: There is not one of each; the message says so of the sample.
    """
    if len(sample.pictures) != 1:
        raise ValueError(f"has {len(sample.pictures)} pictures")
    kind = "cls" if "cls" in sample.labels else "json"
    contents = sample.labels.get(kind, [])
    if len(contents) != 1:
        raise ValueError("has several labels" if contents else "has no label")
    label: object = contents[0].decode(errors="replace")
    if kind == "json":
        try:
            facts = json.loads(contents[0])
        except ValueError as error:
            raise ValueError(f"has a .json that cannot be read: {error}") from error
        label = facts.get("label") if isinstance(facts, dict) else None
        label = str(label) if type(label) is int else label
    if not isinstance(label, str) or not label.strip():
        raise ValueError(f"has no label in its .{kind}")
    return label.strip()
