"""The cache folder: where it is, what it may hold, what is listed, and that nothing of other origin is ever deleted."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError, StorageError
from finetune.runs.cache_folder import (
    RECORD,
    cache_folder,
    cache_limit_bytes,
    clear_cache,
    is_inside,
    list_cache,
    prune_cache,
    store_id,
)
from finetune.runs.row_store import open_store

KEY = "0" * 64
SCAN = "0123456789abcdef" * 2 + ".json"


@pytest.fixture
def cache(fresh_cache: Path) -> Path:
    """A cache folder that does not exist yet."""
    return fresh_cache


def write(path: Path, content: str | bytes = "content", *, used: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    if used is not None:
        os.utime(path, (used, used))
    return path


def put(title: str, row: bytes = b"row", *, kind: str = "activations", used: int | None = None) -> Path:
    """Put one row into the store of this title and return the store's folder."""
    made_by = {"title": title}
    with open_store(kind, made_by) as store:
        store.put(KEY, row)
        assert store.write_error is None
    folder = cache_folder() / kind / store_id(made_by)
    if used is not None:
        for index in folder.glob("*.index"):
            os.utime(index, (used, used))
    return folder


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".cache.lock"
    }


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FINETUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/finetune")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/finetune")
    monkeypatch.setenv("FINETUNE_CACHE", "/own")
    assert cache_folder() == Path("/own")


@pytest.mark.parametrize(
    ("text", "expected"), [(None, 20 * 10**9), ("", 20 * 10**9), ("5", 5 * 10**9), ("0.5", 5 * 10**8), ("0", 0)]
)
def test_how_much_it_may_hold(monkeypatch: pytest.MonkeyPatch, text: str | None, expected: int) -> None:
    monkeypatch.delenv("FINETUNE_CACHE_GB", raising=False)
    if text is not None:
        monkeypatch.setenv("FINETUNE_CACHE_GB", text)
    assert cache_limit_bytes() == expected


@pytest.mark.parametrize("text", ["much", "20 GB", "-1", "nan", "inf", "1e999"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_GB", text)
    with pytest.raises(ConfigError, match="FINETUNE_CACHE_GB") as caught:
        cache_limit_bytes()
    assert repr(text) in caught.value.message
    with pytest.raises(ConfigError):
        open_store("activations", {})


def test_inside_the_data_is_inside_by_whatever_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    (data / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(data / "inner")
    monkeypatch.chdir(data)
    assert is_inside(data, data)
    assert is_inside(data / "not" / "yet", data)
    assert is_inside(tmp_path / "link" / "cache", data)
    assert is_inside(Path("cache"), data)
    assert is_inside(data / "cache", tmp_path / "link" / "..")
    assert not is_inside(tmp_path / "data-cache", data)
    assert not is_inside(data / ".." / "cache", data)
    assert not is_inside(tmp_path, data)


def test_an_absent_cache_is_empty_and_stays_absent(cache: Path) -> None:
    assert list_cache() == []
    assert prune_cache(0) == 0
    assert clear_cache() == 0
    assert not cache.exists()


def test_everything_is_listed(cache: Path) -> None:
    store = put("features of a net", bytes(100), used=86_400)
    write(cache / "scans" / SCAN, used=86_400)
    write(cache / "data" / "mnist" / "raw" / "images.gz", bytes(7))
    write(cache / "data" / "mnist" / "labels.gz", bytes(3))
    write(cache / "mine" / "note.txt", bytes(5))
    write(cache / "pictures" / "holiday.jpg", bytes(6))
    entries = list_cache()
    assert [(entry.kind, entry.id, entry.rows, entry.bytes) for entry in entries] == [
        ("activations", store.name, 1, 100 + RECORD.size),
        ("scans", "scans", 1, 7),
        ("data", "mnist", 2, 10),
        ("unknown", "mine", 1, 5),
        ("unknown", "holiday.jpg", 1, 6),
    ]
    assert entries[0].what == "features of a net"
    assert entries[0].last_used == datetime(1970, 1, 2, tzinfo=UTC)
    assert "pictures/holiday.jpg" in entries[4].what


@pytest.mark.parametrize(
    "content", [None, "", "{}", "[1]", '{"format": 1, "made_by": 3}', '{"format": 1, "made_by": {}}']
)
def test_a_store_that_cannot_be_believed_is_listed_as_damaged(cache: Path, content: str | None) -> None:
    description = put("a title") / "description.json"
    description.unlink()
    if content is not None:
        description.write_text(content)
    (entry,) = list_cache()
    assert entry.what.startswith("damaged")
    assert entry.bytes > 0


def test_a_store_without_a_title_is_listed(cache: Path) -> None:
    with open_store("pictures", {}) as store:
        store.put(KEY, b"")
    (entry,) = list_cache()
    assert (entry.kind, entry.what, entry.rows) == ("pictures", "without a title", 1)


def test_pruning_deletes_in_the_order_of_use(cache: Path) -> None:
    newest = put("newest", bytes(1000), used=3000)
    oldest = put("oldest", bytes(1000), kind="pictures", used=1000)
    scan = write(cache / "scans" / SCAN, bytes(1000), used=2000)
    one = 1000 + RECORD.size
    assert prune_cache(one + one + 1000) == 0
    assert prune_cache(one + one + 999) == one
    assert not oldest.exists()
    assert prune_cache(one) == 1000
    assert not scan.exists()
    assert files(newest)
    assert prune_cache(0) == one
    assert files(cache) == set()


def test_a_scan_that_was_read_of_late_is_kept(cache: Path) -> None:
    scan = write(cache / "scans" / SCAN)
    os.utime(scan, (3000, 1000))
    put("features", used=2000)
    assert prune_cache(7) > 0
    assert files(cache) == {f"scans/{SCAN}"}


def test_pruning_another_folder(cache: Path, tmp_path: Path) -> None:
    put("here")
    other = cache.rename(tmp_path / "elsewhere")
    put("there")
    assert prune_cache(0, folder=other) > 0
    assert files(other) == set()
    assert [entry.what for entry in list_cache()] == ["there"]


def test_nothing_of_other_origin_is_deleted(cache: Path) -> None:
    """As it must be where someone names the home folder as the cache."""
    strangers = [
        "pictures/holiday.jpg",
        "pictures/2024/sea.rows",
        "pictures/2024/description.json",
        "activations/notes.index",
        "data/mine.csv",
        "data/mnist/images.gz",
        "scans/passport.json",
        "description.json",
        "1-0123456789abcdef.rows",
        "documents/thesis.tex",
    ]
    for name in strangers:
        write(cache / name)
    store = put("features")
    put("pictures", kind="pictures")
    beside = write(store / "kept.txt")
    write(store / ".description.json.123.part")
    write(cache / "scans" / SCAN)
    write(cache / "scans" / SCAN.replace("json", "77.tmp"))
    (cache / "linked").symlink_to(cache / "documents")
    freed = prune_cache(0)
    assert freed > 0
    assert files(cache) == {*strangers, str(beside.relative_to(cache))}
    put("features")
    put("pictures", kind="pictures")
    write(cache / "scans" / SCAN)
    assert clear_cache() > 0
    assert files(cache) == {*strangers, str(beside.relative_to(cache))}


def test_clearing_frees_what_it_says(cache: Path) -> None:
    put("features", bytes(100))
    write(cache / "scans" / SCAN, bytes(10))
    write(cache / "data" / "mnist" / "images.gz", bytes(50))
    assert clear_cache() == 100 + RECORD.size + 10
    assert clear_cache() == 0
    assert [entry.kind for entry in list_cache()] == ["data"]


def test_half_a_segment_is_deleted_too(cache: Path) -> None:
    store = put("features", bytes(100))
    only_rows = write(store / "1-0123456789abcdef.rows", bytes(10), used=1000)
    only_index = write(store / "2-0123456789abcdef.index", bytes(10), used=2000)
    assert prune_cache(100 + RECORD.size + 10) == 10
    assert not only_rows.exists()
    assert prune_cache(100 + RECORD.size) == 10
    assert not only_index.exists()


FORK = """
import fcntl, os, sys, time
from pathlib import Path
from finetune.runs.cache_folder import hold_cache
root = Path(sys.argv[1])
with hold_cache(root):
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
try:
    with (root / ".cache.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
finally:
    os.kill(child, 9)
"""


def test_a_child_forked_at_the_wrong_moment_holds_nothing(cache: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, str(cache)], check=False, timeout=30)
    assert done.returncode == 0


@pytest.mark.parametrize("clean", [lambda: prune_cache(0), clear_cache])
def test_a_disk_that_refuses_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch, clean: Any) -> None:
    put("features")

    def refuse(path: Path, *, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        clean()
    assert str(cache) in caught.value.message
    assert caught.value.hint
