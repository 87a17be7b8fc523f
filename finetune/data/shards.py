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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

FORMAT_NUMBER = 3  # of an index; raise it when more or other members count
MOST_LABEL_BYTES = 2**20
MOST_PADDING = 2 * tarfile.RECORDSIZE  # zeros at the end of a shard; more of them are a file that was not filled
CONVENTION = 'a sample of a shard is KEY.jpg (or png …) with its label in KEY.cls, or as "label" in KEY.json'

_SHARD = re.compile(rf"({'|'.join(SPLIT_NAMES)})-.*\.tar", re.IGNORECASE)
_COMPRESSED = re.compile(rf"({'|'.join(SPLIT_NAMES)})-.*\.(tar\.\w+|tgz|tbz2?|txz)", re.IGNORECASE)

_listed: dict[str, list[int]] = {}  # what each shard was known by when it was listed in this process


@dataclass
class _Sample:
    """What a shard holds under one key."""

    pictures: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, offset and size in bytes."""
    labels: dict[str, str] = field(default_factory=dict)
    """What its members "cls" and "json" say."""
    faults: list[str] = field(default_factory=list)
    parts: list[tuple[str, int, int]] = field(default_factory=list)
    """Pictures whose name goes on between key and extension; likewise."""
    links: list[str] = field(default_factory=list)
    """Names of pictures that are no plain files."""


def find_shards(files: Iterable[Path]) -> dict[Path, Split]:
    """Return those of `files` that are shards by their names, each with its split."""
    matches = ((file, _SHARD.fullmatch(file.name)) for file in files)
    return {file: SPLIT_NAMES[match[1].lower()] for file, match in matches if match}


def compressed_shards(files: Iterable[Path]) -> list[str]:
    """Return the names of those of `files` that would be shards if they were not compressed."""
    return [file.name for file in files if _COMPRESSED.fullmatch(file.name)]


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
                columns = _columns(shard, ["listing", "stamp"])
            except (OSError, tarfile.TarError) as error:
                faults.append(f"{shard.name} cannot be read: {error}")
                continue
            _listed[str(shard.absolute())] = columns["stamp"].tolist()
            listing = json.loads(columns["listing"].tobytes())
            faults.extend(f"{fault} in {shard.name}" for fault in listing["faults"])
            for name, label in listing["pictures"] if not faults else ():
                yield ImageRow(image_path=f"{shard.name}/{name}", label=label, split=split)

    listed = Rows(rows())
    if faults:
        raise DataError(f"the shards have {len(faults)} faults: {first_ten(faults)}", CONVENTION)
    return listed


def pictures_of(shard: Path) -> list[Path]:
    """Return the paths of all pictures in a shard, whatever the convention says of them.

    Raises:
        DataError: It cannot be read.
    """
    try:
        listing = json.loads(_columns(shard, ["listing"])["listing"].tobytes())
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"the shard {shard} cannot be read: {error}", "make it anew") from error
    return [shard / name for name in [*(name for name, _ in listing["pictures"]), *listing["others"]]]


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
        shard, name = str(Path(path[: match.end() - 1]).absolute()), path[match.end() :]
        if os.path.isfile(shard):  # noqa: PTH113 (there may be a million)
            stamp = _stamp(shard)
            if _listed.get(shard, stamp) != stamp:  # what lies under a key now may have another label
                raise OSError(f"{shard} has changed since it was listed")
            keys_N, offsets_N, sizes_N = _places(shard, *stamp)
            key = np.uint64(_key(name))
            place = int(np.searchsorted(keys_N, key))
            if place < len(keys_N) and keys_N[place] == key:
                return shard, int(offsets_N[place]), int(sizes_N[place]), stamp[-1]
    raise FileNotFoundError(f"there is no {path}")


def _stamp(shard: str | Path) -> list[int]:
    """Return by what a shard is known again."""
    status = os.stat(shard)  # noqa: PTH116 (there may be a million calls)
    return [FORMAT_NUMBER, status.st_size, status.st_mtime_ns]


@cache
def _places(shard: str, *_stamp: int) -> tuple[Array, Array, Array]:
    """Return the keys of a shard's pictures (N,), sorted, their offsets and their sizes, for one state of the file."""
    try:
        columns = _columns(Path(shard), ["keys", "offsets", "sizes"])
    except tarfile.TarError as error:
        raise OSError(f"{shard} cannot be read: {error}") from error
    return columns["keys"], columns["offsets"], columns["sizes"]


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors=FOREIGN_BYTES), digest_size=8).digest())


def _columns(shard: Path, names: Sequence[str]) -> Mapping[str, Array]:
    """Return columns of the index of `shard`, which is made where none is kept that is of this version of the file."""
    stamp = np.array(_stamp(shard))
    folder = cache_folder() / "scans"
    file = folder / f"{hashlib.sha256(b'shard ' + os.fsencode(shard.absolute())).hexdigest()[:32]}.npz"
    may_keep = not is_inside(folder, shard.parent)
    kept = read_arrays(file, {*names, "stamp"}) if may_keep else None
    if kept is None or not np.array_equal(kept["stamp"], stamp):
        kept = {"stamp": stamp, **_index(_samples(shard))}
        if may_keep:
            write_arrays(file, kept.items())
    return kept


def _samples(shard: Path) -> dict[str, _Sample]:
    """Read through a shard and return its samples by key.

    Raises:
        OSError, tarfile.TarError: It cannot be read, or not to its end.
    """
    if not shard.is_file():  # opening a named pipe would wait forever
        raise OSError("it is no regular file")
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            before = -1
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them
                if member.size < 0 or tar.offset <= before:
                    raise tarfile.ReadError(f"it is damaged at byte {member.offset:,}")
                before = tar.offset
                _take_down(member, tar, samples)
            _require_end(shard, tar.offset)
    except (ValueError, OverflowError, RecursionError) as error:  # of sizes that no file has
        raise tarfile.ReadError(f"it is damaged: {error}") from error
    return samples


def _take_down(member: tarfile.TarInfo, tar: tarfile.TarFile, samples: dict[str, _Sample]) -> None:
    """Take down what `member` adds to its sample."""
    name = posixpath.normpath(member.name).lstrip("/")
    folder, file_name = posixpath.split(name)
    stem, _, extension = file_name.partition(".")
    extension = extension.lower()
    if member.isdir() or not stem or any(part.startswith(".") or part == "__MACOSX" for part in folder.split("/")):
        return
    sample = samples.setdefault(posixpath.join(folder, stem), _Sample())
    is_picture = f".{extension}" in IMAGE_EXTENSIONS
    if (is_picture or extension in ("cls", "json")) and (not member.isreg() or member.issparse()):
        sample.faults.append(f"has a {file_name} that is a link or other than a plain file")
        sample.links += [name] if is_picture else []
    elif is_picture:
        sample.pictures.append((name, member.offset_data, member.size))
    elif posixpath.splitext(extension)[1] in IMAGE_EXTENSIONS and member.isreg():
        sample.parts.append((name, member.offset_data, member.size))
    elif extension in ("cls", "json"):
        content = tar.extractfile(member)
        assert content is not None  # of a regular file
        try:
            if member.size > MOST_LABEL_BYTES:
                raise ValueError(f"of {member.size:,} bytes, at most {MOST_LABEL_BYTES:,} are read")
            label = _label(extension, content.read())
            if extension in sample.labels:
                raise ValueError("twice")
        except (ValueError, RecursionError) as error:
            sample.faults.append(f"has a .{extension} {error}")
            return
        if label is not None:
            sample.labels[extension] = label


def _label(kind: str, content: bytes) -> str | None:
    """Return the label in a member "cls" or "json", None where the latter is about something else.

    Raises:
        ValueError: It holds none.
    """
    text = content.decode("utf-8-sig")
    label: object = text
    if kind == "json":
        facts = json.loads(text)
        if not isinstance(facts, dict) or "label" not in facts:
            return None
        label = str(facts["label"]) if type(facts["label"]) is int else facts["label"]
    if not isinstance(label, str) or not label.strip():
        raise ValueError("without a label")
    label.encode()  # a UnicodeEncodeError is a ValueError
    return label.strip()


def _require_end(shard: Path, offset: int) -> None:
    """Refuse a shard that is no longer one after `offset`: tarfile takes whatever it does not know for the end."""
    with shard.open("rb") as file:
        file.seek(offset)
        rest = file.read(MOST_PADDING + 1)
    if not tarfile.BLOCKSIZE <= len(rest) <= MOST_PADDING or any(rest):
        raise tarfile.ReadError(f"it is damaged, ends too early, or goes on after its end at byte {offset:,}")


def _index(samples: Mapping[str, _Sample]) -> dict[str, Array]:
    """Return the columns of the index of a shard with these samples."""
    listing: dict[str, list[Any]] = {"pictures": [], "others": [], "faults": []}
    places = []
    for key, sample in samples.items():
        faults = sample.faults
        if sample.parts and not sample.pictures:
            names = first_ten([posixpath.basename(name) for name, _, _ in sample.parts])
            faults = [f"goes on with a dot, where the convention ends a key: {names}"]
        elif not faults and (sample.pictures or sample.labels):
            faults = [f"has {len(sample.pictures)} pictures"] if len(sample.pictures) != 1 else []
            faults += [] if sample.labels else ["has no label"]
        listing["faults"] += [f"{key!r} {fault}" for fault in faults]
        label = sample.labels.get("cls", sample.labels.get("json"))
        listing["pictures"] += [(name, label) for name, _, _ in sample.pictures]
        listing["others"] += [*(name for name, _, _ in sample.parts), *sample.links]
        places += [(_key(name), offset, size) for name, offset, size in sample.pictures + sample.parts]
    keys, offsets, sizes = zip(*sorted(places), strict=True) if places else ((), (), ())
    return {
        "keys": np.array(keys, np.uint64),
        "offsets": np.array(offsets, np.int64),
        "sizes": np.array(sizes, np.int64),
        "listing": np.frombuffer(json.dumps(listing).encode(), np.uint8),
    }
