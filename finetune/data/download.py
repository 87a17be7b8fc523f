"""Files from the internet, whole and as published: where a connection broke, the next one goes on."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import cast
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from finetune.errors import DataError, StorageError
from finetune.runs.reporting import Advance

_TIMEOUT_SECONDS = 10.0  # for a connection, and for each piece of the answer
_ATTEMPTS = 5
_CHUNK_BYTES = 2**20
_MEGABYTE = 10**6


def fetch(url: str, target: Path, *, md5: str, progress: Callable[[str, int], AbstractContextManager[Advance]]) -> None:
    """Download `url` to `target`, unless the published file lies there already.

    The answer is gathered in `target` with `.part` appended and gets its name when its hash is right. A connection that
    breaks is resumed where it broke, here a few times and by the next call after that.

    Args:
        url: an http or https address.
        target: the file to write; its folder is created.
        md5: the published MD5, in hexadecimal.
        progress: opens a display for a label and a total in MB, as `Reporter.progress` does.

    Raises:
        DataError: there is no network, the server refuses, or what it sends is not the published file.
        StorageError: the disk is full or refuses to write.
    """
    if _has_md5(target, md5):
        return
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise _no_download(url, target, "HF_HUB_OFFLINE forbids it")
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            start = _size(part)
            try:
                _receive(url, part, target, progress)
            except DataError:
                if _size(part) <= start:
                    raise
                continue
            if _has_md5(part, md5):
                part.replace(target)
                return
            part.unlink()
            if not start:  # else the beginning may be of another file
                raise DataError(f"{url} is not the published file: its MD5 is not {md5}", "try again later")
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write {part}: {error.strerror}", "free some space, or set FINETUNE_CACHE to another folder"
        ) from error
    raise _no_download(url, target, f"the connection broke {_ATTEMPTS} times")


def _receive(
    url: str, part: Path, target: Path, progress: Callable[[str, int], AbstractContextManager[Advance]]
) -> None:
    """Append to `part` what it lacks, or write it anew where the server sends whole files only."""
    start = _size(part)
    headers = {"User-Agent": "finetune", **({"Range": f"bytes={start}-"} if start else {})}
    with _network(url, target):
        try:
            response = cast(HTTPResponse, urlopen(Request(url, headers=headers), timeout=_TIMEOUT_SECONDS))  # noqa: S310
        except HTTPError as error:
            error.close()
            if error.code == 416 and start:  # there is nothing after what we have
                return
            raise
    with response:
        start = start if response.status == 206 else 0
        expected = response.length or 0
        if expected > (free := shutil.disk_usage(part.parent).free):
            raise StorageError(
                f"{target.name} needs {expected // _MEGABYTE} MB more, {part.parent} has {free // _MEGABYTE} MB",
                "free some space, or set FINETUNE_CACHE to a folder on another disk",
            )
        with (
            part.open("ab" if start else "wb") as file,
            progress(f"Downloading {target.name}, MB", (start + expected) // _MEGABYTE) as advance,
        ):
            advance(start // _MEGABYTE, "")
            received = start
            for chunk in _chunks(response, url, target):
                file.write(chunk)
                advance((received + len(chunk)) // _MEGABYTE - received // _MEGABYTE, "")
                received += len(chunk)
    if received < start + expected:
        raise _no_download(url, target, f"it broke off after {received - start} of {expected} bytes")


def _chunks(response: HTTPResponse, url: str, target: Path) -> Iterator[bytes]:
    while True:
        with _network(url, target):
            chunk = response.read1(_CHUNK_BYTES)  # what has come, so that a stalled connection loses none of it
        if not chunk:
            return
        yield chunk


@contextmanager
def _network(url: str, target: Path) -> Iterator[None]:
    """Translate what connecting and reading raise; around nothing else, since a disk raises OSError too."""
    try:
        yield
    except HTTPError as error:
        raise _no_download(url, target, f"the server answers {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) else error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        raise _no_download(url, target, reason or type(cause).__name__) from error


def _no_download(url: str, target: Path, reason: str) -> DataError:
    return DataError(
        f"cannot download {url}: {reason}",
        f"check the network and run the same command again, or get the file elsewhere and put it at {target}",
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _has_md5(path: Path, md5: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == md5
