"""The store of rows: what was put is found again, whatever is killed, cut off, flipped, full or in a hurry."""

import errno
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.runs import row_store
from finetune.runs.cache_folder import GIGABYTE, RECORD, clear_cache, list_cache, prune_cache
from finetune.runs.row_store import RowStore, open_store

MADE_BY = {"title": "rows of a test", "cut": 3, "shape": [2, 3]}


@pytest.fixture(autouse=True)
def cache(fresh_cache: Path) -> Path:
    return fresh_cache


def key_of(number: int) -> str:
    return sha256(str(number).encode()).hexdigest()


def row_of(number: int) -> bytes:
    return random.Random(number).randbytes(number * 37 % 300)


def opened(made_by: dict[str, Any] = MADE_BY, kind: str = "activations", **options: Any) -> RowStore:
    return open_store(kind, made_by, **options)


def fill(numbers: range) -> None:
    with opened() as store:
        for number in numbers:
            store.put(key_of(number), row_of(number))
        assert store.write_error is None


def files(cache: Path, suffix: str) -> list[Path]:
    return sorted(cache.glob(f"*/*/*{suffix}"))


def only(paths: list[Path]) -> Path:
    (path,) = paths
    return path


def found(numbers: range) -> set[int]:
    """Return which rows a newly opened store holds, after a look at each that must be right."""
    with opened() as store:
        return check_all(store, numbers)


def check_all(store: RowStore, numbers: range) -> set[int]:
    rows = {number: store.get(key_of(number)) for number in numbers}
    for number, row in rows.items():
        assert row is None or bytes(row) == row_of(number)
    return {number for number, row in rows.items() if row is not None}


# What is put is found


@pytest.mark.parametrize(
    "row", [b"abc", bytearray(b"abc"), memoryview(b"xabc")[1:], np.arange(12, dtype=np.float32).reshape(3, 4), b""]
)
def test_a_row_comes_back_here_and_in_the_next_process(row: Any) -> None:
    with opened() as store:
        assert store.get(key_of(1)) is None
        assert key_of(1) not in store
        store.put(key_of(1), row)
        assert key_of(1) in store
        assert bytes(store.get(key_of(1)) or b"") == bytes(row)
    again = opened()
    assert key_of(1) in again
    view = again.get(key_of(1))
    assert view is not None
    assert view.readonly
    assert bytes(view) == bytes(row)
    assert again.damaged == 0


def test_many_rows_read_while_they_are_written() -> None:
    with opened() as store:
        for number in range(300):
            store.put(key_of(number), row_of(number))
            assert check_all(store, range(number, number + 2)) == {number}
        assert check_all(store, range(300)) == set(range(300))
    assert found(range(310)) == set(range(300))


def test_opening_and_asking_write_nothing(cache: Path) -> None:
    with opened() as store:
        assert store.missing([key_of(1)]) == [key_of(1)]
        assert store.get(key_of(1)) is None
    assert not cache.exists()


def test_missing_keeps_the_order_and_names_each_once() -> None:
    fill(range(3, 5))
    keys = [key_of(number) for number in (7, 3, 1, 7, 4, 0, 1)]
    assert opened().missing(keys) == [key_of(number) for number in (7, 1, 0)]
    assert opened().missing(iter([])) == []


def test_a_second_put_changes_nothing(cache: Path) -> None:
    with opened() as store:
        store.put(key_of(1), b"first")
        store.put(key_of(1), b"again")
        assert bytes(store.get(key_of(1)) or b"") == b"first"
    assert only(files(cache, ".rows")).read_bytes() == b"first"


def test_a_store_goes_on_after_close() -> None:
    store = opened()
    for number in range(4):
        store.put(key_of(number), row_of(number))
        store.close()
        store.close()
    assert check_all(store, range(4)) == set(range(4))
    assert found(range(4)) == set(range(4))


@pytest.mark.parametrize("key", ["", "ab", "g" * 64, key_of(1) + "00"])
def test_a_key_is_a_sha256(key: str) -> None:
    with opened() as store, pytest.raises((AssertionError, ValueError)):
        store.put(key, b"row")


@pytest.mark.parametrize(
    "other",
    [
        {**MADE_BY, "cut": 4},
        {**MADE_BY, "cut": "3"},
        {**MADE_BY, "cut": 3.0},
        {**MADE_BY, "shape": [3, 2]},
        {**MADE_BY, "shape": [2, 3, 1]},
        {**MADE_BY, "title": "rows of another test"},
        {**MADE_BY, "view": None},
        {"title": "rows of a test", "cut": 3},
        {"nested": MADE_BY},
        {},
    ],
)
def test_rows_made_differently_never_meet(other: dict[str, Any]) -> None:
    fill(range(3))
    with opened(other) as store:
        assert check_all(store, range(3)) == set()
        store.put(key_of(0), b"another row")
    with opened(other) as store:
        assert bytes(store.get(key_of(0)) or b"") == b"another row"
    assert found(range(3)) == set(range(3))


def test_kinds_never_meet() -> None:
    fill(range(3))
    assert check_all(opened(kind="pictures"), range(3)) == set()
    with pytest.raises(AssertionError):
        opened(kind="data")


def test_the_order_of_a_description_does_not_matter() -> None:
    fill(range(3))
    assert check_all(opened(dict(reversed(MADE_BY.items()))), range(3)) == set(range(3))
    assert check_all(opened({**MADE_BY, "shape": (2, 3)}), range(3)) == set(range(3))


def test_the_cache_can_be_moved(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(range(3))
    moved = cache.rename(cache.with_name("moved"))
    assert found(range(3)) == set()
    assert check_all(opened(folder=moved), range(3)) == set(range(3))
    monkeypatch.setenv("FINETUNE_CACHE", str(moved))
    assert found(range(3)) == set(range(3))


# Damage


def test_wherever_a_kill_cuts_the_writing_short_the_whole_rows_survive(cache: Path) -> None:
    fill(range(1, 4))
    rows, index = only(files(cache, ".rows")), only(files(cache, ".index"))
    all_rows, all_records = rows.read_bytes(), index.read_bytes()
    lengths = [len(row_of(number)) for number in range(1, 4)]
    whole = 0
    for number, length in enumerate(lengths, start=1):
        for cut in range(length):
            rows.write_bytes(all_rows[: whole + cut])
            index.write_bytes(all_records[: (number - 1) * RECORD.size])
            assert found(range(5)) == set(range(1, number))
        whole += length
        for cut in range(RECORD.size):
            rows.write_bytes(all_rows[:whole])
            index.write_bytes(all_records[: (number - 1) * RECORD.size + cut])
            with opened() as store:
                assert check_all(store, range(5)) == set(range(1, number))
                assert store.damaged == 0


@pytest.mark.parametrize("suffix", [".rows", ".index"])
def test_a_flipped_byte_anywhere_is_found_and_mended(cache: Path, suffix: str) -> None:
    numbers = range(1, 4)
    fill(numbers)
    path = only(files(cache, suffix))
    pristine = {file: file.read_bytes() for file in path.parent.iterdir()}
    for place in range(0, len(pristine[path]), 5):
        for file in path.parent.iterdir():
            file.unlink()
        for file, content in pristine.items():
            file.write_bytes(content)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([pristine[path][place] ^ 0x10]))
        with opened() as store:
            left = check_all(store, numbers)
            assert len(left) == 2
            assert store.damaged == 1
            (lost,) = set(numbers) - left
            assert store.missing(map(key_of, numbers)) == [key_of(lost)]
            assert store.get(key_of(lost)) is None
            assert store.damaged == 1
            store.put(key_of(lost), row_of(lost))
            assert check_all(store, numbers) == set(numbers)
        with opened() as store:
            assert check_all(store, numbers) == set(numbers)
            assert store.damaged == 0


def test_a_damaged_row_loses_against_the_one_put_again_by_another_process(cache: Path) -> None:
    fill(range(1, 3))
    path = only(files(cache, ".rows"))
    reader = opened()
    assert check_all(reader, range(1, 2)) == {1}
    path.write_bytes(bytes(path.stat().st_size))
    with opened() as store:
        assert check_all(store, range(1, 3)) == set()
        store.put(key_of(2), row_of(2))
    reader.refresh()
    assert check_all(reader, range(2, 3)) == {2}
    assert found(range(1, 3)) == {2}


@pytest.mark.parametrize("suffix", [".rows", ".index"])
@pytest.mark.parametrize("cut", ["one byte", "everything"])
def test_a_shortened_file_loses_no_more_than_it_lacks(cache: Path, suffix: str, cut: str) -> None:
    fill(range(1, 6))
    path = only(files(cache, suffix))
    os.truncate(path, path.stat().st_size - 1 if cut == "one byte" else 0)
    left = set(range(1, 5)) if cut == "one byte" else set()
    with opened() as store:
        assert check_all(store, range(1, 6)) == left
        assert store.damaged == (5 - len(left) if suffix == ".rows" else 0)
    fill(range(1, 6))
    with opened() as store:
        assert check_all(store, range(1, 6)) == set(range(1, 6))
        assert store.damaged == 0


def test_rows_that_become_shorter_after_the_records_were_read_are_missing(cache: Path) -> None:
    fill(range(1, 4))
    with opened() as store:
        os.truncate(only(files(cache, ".rows")), 0)
        assert check_all(store, range(1, 4)) == set()
        assert store.damaged == 3


@pytest.mark.parametrize("size", [0, 200])
def test_rows_that_have_become_another_file_are_checked_again(cache: Path, size: int) -> None:
    with opened() as store:
        store.put(key_of(1), row_of(1))
        assert check_all(store, range(1, 2)) == {1}
        path = only(files(cache, ".rows"))
        path.unlink()
        path.write_bytes(bytes(size))
        store.put(key_of(2), row_of(2))
        assert check_all(store, range(2, 3)) == set()
        assert check_all(store, range(1, 2)) == (set() if size else {1})  # of an empty file there is no new mapping


@pytest.mark.parametrize("size", [1, RECORD.size - 1, RECORD.size, 10 * RECORD.size + 3])
def test_an_index_of_garbage_is_no_index(cache: Path, size: int) -> None:
    fill(range(1, 4))
    only(files(cache, ".index")).write_bytes(random.Random(0).randbytes(size))
    with opened() as store:
        assert check_all(store, range(1, 4)) == set()
        assert store.damaged == size // RECORD.size
    fill(range(1, 4))
    assert found(range(1, 4)) == {1, 2, 3}


@pytest.mark.parametrize("offset", [0, 2**63, 2**64 - 1])
def test_a_record_that_points_outside_is_damage(cache: Path, offset: int) -> None:
    fill(range(1, 2))
    record = struct.pack("<32sQQI", bytes.fromhex(key_of(9)), offset, 2**63, 0)
    with only(files(cache, ".index")).open("ab") as file:
        file.write(record + struct.pack("<I", zlib.crc32(record)))
    with opened() as store:
        assert store.damaged == 1
        assert store.get(key_of(9)) is None
        assert check_all(store, range(1, 2)) == {1}


@pytest.mark.parametrize("fault", ["absent", "empty", "no JSON", "other rows", "other format", "no object", "a folder"])
def test_a_store_without_its_description_is_emptied(cache: Path, fault: str) -> None:
    fill(range(3))
    path = only(files(cache, "description.json"))
    segment = only(files(cache, ".rows"))
    document = json.loads(path.read_bytes())
    path.unlink()
    contents = {
        "empty": "",
        "no JSON": json.dumps(document)[:-1],
        "other rows": json.dumps({**document, "made_by": {**MADE_BY, "cut": 4}}),
        "other format": json.dumps({**document, "format": 0}),
        "no object": "[1]",
    }
    if fault in contents:
        path.write_text(contents[fault])
    elif fault == "a folder":
        path.mkdir()
    assert found(range(3)) == set()
    if fault == "a folder":
        path.rmdir()
    fill(range(1, 2))
    assert not segment.exists()
    assert found(range(3)) == {1}


def test_an_index_without_rows_is_no_segment(cache: Path) -> None:
    fill(range(1, 3))
    only(files(cache, ".rows")).unlink()
    with opened() as store:
        assert store.missing(map(key_of, range(1, 3))) == [key_of(1), key_of(2)]
        assert store.damaged == 0


# Several processes


FILL = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_row_store import MADE_BY, key_of, row_of
from finetune.runs.row_store import open_store
first, last, start = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
store = open_store("activations", MADE_BY)
print("ready", flush=True)
while not start.exists():
    time.sleep(0.001)
keys = {{key_of(number): number for number in range(first, last)}}
for key in store.missing(keys):
    store.put(key, row_of(keys[key]))
    print(keys[key], flush=True)
"""


def start_filling(numbers: range, start: Path) -> "subprocess.Popen[str]":
    script = FILL.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(numbers.start), str(numbers.stop), str(start)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("moment", [0, 1, 40, 400])
def test_a_kill_costs_no_more_than_what_is_not_there(tmp_path: Path, moment: int) -> None:
    numbers = range(3000)
    (tmp_path / "start").touch()
    with start_filling(numbers, tmp_path / "start") as process:
        assert process.stdout is not None
        put = [int(process.stdout.readline()) for _ in range(moment)]
        process.send_signal(signal.SIGKILL)
    there = found(numbers)
    assert set(put) <= there
    with start_filling(numbers, tmp_path / "start") as process:
        assert process.stdout is not None
        again = {int(line) for line in process.stdout}
    assert again == set(numbers) - there
    assert found(numbers) == set(numbers)


@pytest.mark.parametrize(("ours", "theirs"), [(range(500), range(500)), (range(400), range(200, 600))])
def test_two_processes_at_once_fill_it_without_a_wrong_value(
    tmp_path: Path, cache: Path, ours: range, theirs: range
) -> None:
    start = tmp_path / "start"
    with start_filling(ours, start) as first, start_filling(theirs, start) as second:
        start.touch()
        first.communicate()
        second.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    everything = set(ours) | set(theirs)
    with opened() as store:
        assert store.missing(map(key_of, sorted(everything))) == []
        assert check_all(store, range(600)) == everything
        assert store.damaged == 0


def test_what_another_process_has_put_is_seen_by_refresh_and_missing() -> None:
    with opened() as reader, opened() as writer:
        writer.put(key_of(1), row_of(1))
        assert reader.get(key_of(1)) is None
        reader.refresh()
        assert check_all(reader, range(1, 2)) == {1}
        writer.put(key_of(2), row_of(2))
        assert reader.missing([key_of(2), key_of(3)]) == [key_of(3)]
        assert check_all(reader, range(1, 3)) == {1, 2}


def test_a_store_travels_to_another_process() -> None:
    with opened() as store:
        store.put(key_of(1), row_of(1))
        with pickle.loads(pickle.dumps(store)) as other:
            assert check_all(other, range(1, 2)) == {1}
            other.put(key_of(2), row_of(2))
        store.refresh()
        assert check_all(store, range(1, 3)) == {1, 2}


FORK = """
import os, sys, threading
sys.path.insert(0, {tests!r})
from test_row_store import MADE_BY, check_all, key_of, row_of
from finetune.runs.row_store import open_store
store = open_store("activations", MADE_BY)
store.put(key_of(1), row_of(1))
store._lock.acquire()  # as a thread of the parent may hold it
children = []
for child in (2, 3):
    pid = os.fork()
    if not pid:
        for number in (child, child + 10):
            store.put(key_of(number), row_of(number))
        assert check_all(store, range(20)) == {{1, child, child + 10}}, "child"
        os._exit(0)
    children.append(pid)
store._lock.release()
store.put(key_of(4), row_of(4))
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
store.put(key_of(5), row_of(5))
store.refresh()
assert check_all(store, range(20)) == {{1, 2, 12, 3, 13, 4, 5}}, "parent"
"""


def test_a_forked_child_writes_a_segment_of_its_own(cache: Path) -> None:
    subprocess.run([sys.executable, "-c", FORK.format(tests=str(Path(__file__).parent))], check=True, timeout=60)
    assert len({path.name.partition("-")[0] for path in files(cache, ".rows")}) == 3
    assert found(range(20)) == {1, 2, 12, 3, 13, 4, 5}


def test_threads_share_a_store(cache: Path) -> None:
    numbers = range(400)

    def work(seed: int) -> set[int]:
        mine = list(numbers)
        random.Random(seed).shuffle(mine)
        for number in mine:
            if store.get(key_of(number)) is None:
                store.put(key_of(number), row_of(number))
        return check_all(store, numbers)

    with opened() as store, ThreadPoolExecutor(8) as pool:
        assert all(there == set(numbers) for there in pool.map(work, range(8)))
    assert only(files(cache, ".index")).stat().st_size == len(numbers) * RECORD.size
    assert found(numbers) == set(numbers)


# The bound


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the limit of the cache, in bytes."""
    return lambda size: monkeypatch.setenv("FINETUNE_CACHE_GB", f"{size / GIGABYTE:.9f}")


def put_rows(made_by: dict[str, Any], count: int, *, kind: str = "activations") -> RowStore:
    with opened(made_by, kind) as store:
        for number in range(count):
            store.put(key_of(number), bytes(1000 - RECORD.size))
    return store


def sizes() -> dict[str, int]:
    return {entry.what: entry.bytes for entry in list_cache()}


def date(cache: Path, title: str, seconds: int) -> None:
    """Make the segments of a store as old as that."""
    for path in files(cache, "description.json"):
        if json.loads(path.read_bytes())["made_by"]["title"] == title:
            for index in path.parent.glob("*.index"):
                os.utime(index, (seconds, seconds))


def test_what_was_used_least_recently_goes_first_whatever_its_kind(cache: Path, limit: Callable[[int], None]) -> None:
    limit(64_000)
    put_rows({"title": "old"}, 20)
    put_rows({"title": "older"}, 20, kind="pictures")
    date(cache, "old", 2000)
    date(cache, "older", 1000)
    put_rows({"title": "new"}, 30)
    assert sizes() == {"new": 30_000, "old": 20_000, "older": 14_000}
    put_rows({"title": "newer"}, 34)
    assert sizes() == {"newer": 34_000, "new": 30_000}


def test_the_bound_holds_while_a_store_is_written(limit: Callable[[int], None]) -> None:
    limit(64_000)
    put_rows({"title": "old"}, 60)
    with opened({"title": "new"}) as store:
        for number in range(60):
            store.put(key_of(number), bytes(1000 - RECORD.size))
            assert sum(sizes().values()) <= 65_000  # the limit and the grain
        assert sizes()["new"] == 60_000


def test_closing_brings_the_cache_back_to_its_bound(limit: Callable[[int], None]) -> None:
    limit(64_000)
    with opened({"title": "bounded"}) as store:
        store.put(key_of(1), bytes(1000 - RECORD.size))
        limit(1_000_000)
        put_rows({"title": "unbounded"}, 100)
        assert sizes()["unbounded"] == 100_000
    assert 40_000 < sum(sizes().values()) <= 64_000


def test_reading_and_asking_count_as_use(cache: Path, limit: Callable[[int], None]) -> None:
    for title in ("read", "asked", "only opened"):
        put_rows({"title": title}, 20)
        date(cache, title, 1000)
    assert opened({"title": "read"}).get(key_of(0)) is not None
    assert opened({"title": "asked"}).missing([key_of(0)]) == []
    assert opened({"title": "only opened"}).missing([key_of(99)]) == [key_of(99)]
    limit(64_000)
    put_rows({"title": "new"}, 20)
    assert sizes() == {"asked": 20_000, "new": 20_000, "read": 20_000}


def test_a_store_that_fills_the_cache_keeps_its_first_rows(limit: Callable[[int], None]) -> None:
    limit(64_000)
    store = put_rows({"title": "large"}, 100)
    assert store.write_error is not None
    assert store.write_error.errno == errno.EDQUOT
    assert "FINETUNE_CACHE_GB" in str(store.write_error)
    assert 60_000 <= sizes()["large"] <= 64_000
    assert store.get(key_of(59)) is not None
    assert store.get(key_of(99)) is None
    assert put_rows({"title": "large"}, 100).write_error is not None
    assert 60_000 <= sizes()["large"] <= 64_000


def test_a_row_larger_than_the_limit_and_a_limit_of_nothing(cache: Path, limit: Callable[[int], None]) -> None:
    limit(1000)
    with opened() as store:
        store.put(key_of(1), bytes(1000))
        assert store.write_error is not None
    limit(0)
    assert put_rows({"title": "none"}, 1).write_error is not None
    assert list_cache() == []


def test_what_is_being_written_stays(cache: Path) -> None:
    with opened() as store, opened(kind="pictures") as other:
        store.put(key_of(1), row_of(1))
        other.put(key_of(1), row_of(1))
        assert prune_cache(0) == 0
        assert found(range(2)) == {1}
        other.close()
        assert prune_cache(0) > 0
        assert not (cache / "pictures").exists() or not list((cache / "pictures").iterdir())
        store.put(key_of(2), row_of(2))
        assert found(range(3)) == {1, 2}
    assert prune_cache(0) > 0
    assert found(range(3)) == set()
    assert list_cache() == []


def test_what_a_killed_process_was_writing_can_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "start").touch()
    with start_filling(range(3000), tmp_path / "start") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        assert prune_cache(0) == 0
        process.kill()
    assert prune_cache(0) > 0


def test_a_reader_survives_the_deletion_of_its_segment() -> None:
    fill(range(1, 4))
    with opened() as reading, opened() as opened_only:
        row = reading.get(key_of(1))
        assert row is not None
        clear_cache()
        assert bytes(row) == row_of(1)
        assert check_all(reading, range(1, 4)) == {1, 2, 3}
        assert check_all(opened_only, range(1, 4)) == set()
        assert key_of(1) not in opened_only
        assert opened_only.missing([key_of(1)]) == [key_of(1)]
        assert opened_only.damaged == 0
        opened_only.put(key_of(1), row_of(1))
        assert opened_only.write_error is None
    assert found(range(1, 4)) == {1}


def test_a_deletion_is_seen_by_refresh() -> None:
    fill(range(1, 4))
    with opened() as store:
        clear_cache()
        assert key_of(1) in store
        store.refresh()
        store.refresh()
        assert key_of(1) not in store


def test_a_writer_whose_segment_was_deleted_begins_another_at_once() -> None:
    with opened() as store:
        store.put(key_of(1), row_of(1))
        clear_cache()
        store.put(key_of(2), row_of(2))
        assert store.write_error is None
        assert check_all(store, range(3)) == {1, 2}  # this process can still read what it wrote
        assert found(range(3)) == {2}


def test_a_writer_that_sees_that_its_segment_was_deleted_begins_another() -> None:
    with opened() as store:
        store.put(key_of(1), row_of(1))
        clear_cache()
        assert store.missing([key_of(2)]) == [key_of(2)]
        store.put(key_of(2), row_of(2))
        assert store.write_error is None
        assert found(range(3)) == {2}


# A disk that refuses


def test_a_full_disk_stops_the_writing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as store:
        store.put(key_of(1), row_of(1))
        with monkeypatch.context() as patch:

            def refuse(*_: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(row_store, "_write_all", refuse)
            store.put(key_of(2), row_of(2))
        store.put(key_of(3), row_of(3))
        assert store.write_error is not None
        assert store.write_error.errno == errno.ENOSPC
        assert check_all(store, range(1, 4)) == {1}
    fill(range(3, 4))
    assert found(range(1, 4)) == {1, 3}


SMALL_FILES = """
import resource, sys
sys.path.insert(0, {tests!r})
from test_row_store import MADE_BY, check_all, key_of, row_of
from finetune.runs.row_store import open_store
with open_store("activations", MADE_BY) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    for number in range(100):
        store.put(key_of(number), row_of(number))
    assert store.write_error is not None
    there = check_all(store, range(100))
    print(len(there))
"""


def test_a_row_that_the_disk_takes_in_part_is_not_there() -> None:
    command = [sys.executable, "-c", SMALL_FILES.format(tests=str(Path(__file__).parent))]
    count = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 3 <= count < 20
    assert found(range(100)) == set(range(count))
    fill(range(100))
    assert found(range(100)) == set(range(100))


def test_a_cache_that_cannot_be_created_stops_nothing(cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    with opened() as store:
        store.put(key_of(1), row_of(1))
        assert isinstance(store.write_error, OSError)
        assert store.get(key_of(1)) is None
        assert store.missing([key_of(1)]) == [key_of(1)]
    assert cache.read_text() == "a file where a folder should be"


def test_a_row_is_on_disk_before_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    write_all = row_store._write_all

    def killed(file: Any, content: memoryview) -> None:
        write_all(file, content)
        raise KeyboardInterrupt

    with opened() as store, monkeypatch.context() as patch:
        patch.setattr(row_store, "_write_all", killed)
        with pytest.raises(KeyboardInterrupt):
            store.put(key_of(1), row_of(1))
    with opened() as store:
        assert store.missing([key_of(1)]) == [key_of(1)]
        assert store.damaged == 0


def test_a_store_stays_where_it_was_opened(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_CACHE", "cache")
    with opened() as store:
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.put(key_of(1), row_of(1))
        assert check_all(store, range(1, 2)) == {1}
    assert only(files(cache, ".rows")).read_bytes() == row_of(1)


def test_a_file_of_other_origin_is_neither_read_nor_changed(cache: Path) -> None:
    fill(range(1, 3))
    stranger = only(files(cache, ".rows")).with_name("notes.index")
    stranger.write_bytes(bytes(range(200)))
    with opened() as store:
        assert check_all(store, range(1, 3)) == {1, 2}
        assert store.damaged == 0
    assert stranger.read_bytes() == bytes(range(200))


def test_an_interrupt_in_the_middle_of_a_row_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    write_all = row_store._write_all
    with opened() as store:
        store.put(key_of(1), row_of(1))
        with monkeypatch.context() as patch:

            def interrupted(file: Any, content: memoryview) -> None:
                write_all(file, content[: len(content) // 2])
                raise KeyboardInterrupt

            patch.setattr(row_store, "_write_all", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.put(key_of(2), row_of(2))
        store.put(key_of(3), row_of(3))
        assert check_all(store, range(1, 4)) == {1, 3}
    assert found(range(1, 4)) == {1, 3}


# Whatever comes


def damage(folder: Path, random_: random.Random) -> None:
    """Flip, cut or add bytes somewhere in the files of a store, or delete one."""
    paths = sorted(path for path in folder.glob("*/*/*") if path.is_file())
    if not paths:
        return
    path = random_.choice(paths)
    content = bytearray(path.read_bytes())
    action = random_.choice(["flip", "flip", "flip", "cut", "add", "delete"])
    if action == "flip" and content:
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    elif action == "cut":
        del content[random_.randrange(len(content) + 1) :]
    elif action == "add":
        content += random_.randbytes(random_.choice([1, RECORD.size, 100]))
    if action == "delete":
        path.unlink()
    else:
        # As a new file: to shorten one that a process has mapped would end the process.
        path.unlink()
        path.write_bytes(content)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "get", "reopen", "refresh", "damage", "prune"]), st.integers(0, 9)),
        max_size=40,
    ),
    st.integers(0, 999),
)
def test_whatever_happens_no_row_is_ever_wrong(steps: list[tuple[str, int]], seed: int) -> None:
    """Undamaged, each row that was put is there; damaged, it is right or missing, and can be put again."""
    random_ = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stores = [opened(folder=folder), opened(folder=folder)]
        put: set[int] = set()
        is_whole = True
        for action, number in steps:
            store = stores[number % 2]
            if action == "put":
                store.put(key_of(number), row_of(number))
                assert check_all(store, range(number, number + 1)) == {number} or not is_whole
                put.add(number)
            elif action == "get":
                check_all(store, range(10))
            elif action == "reopen":
                store.close()
                stores[number % 2] = opened(folder=folder)
            elif action == "refresh":
                missing = store.missing(map(key_of, range(10)))
                assert not is_whole or missing == [key_of(number) for number in range(10) if number not in put]
            elif action == "damage":
                damage(folder, random_)
                is_whole = False
            elif prune_cache(random_.choice([0, 300, 1000]), folder=folder):
                is_whole = False
        for store in stores:
            store.close()
        with opened(folder=folder) as store:
            there = check_all(store, range(10))
            assert there == put if is_whole else there <= put
            for number in range(10):
                store.put(key_of(number), row_of(number))
            assert check_all(store, range(10)) == set(range(10))
        with opened(folder=folder) as store:
            assert check_all(store, range(10)) == set(range(10))
            assert store.damaged == 0


def test_what_a_store_wrote_is_read_after_the_cache_was_cleared() -> None:
    """Though it has read none of it before: a training reads a view of its images epochs after they were computed."""
    store = opened()
    for number in range(3):
        store.put(key_of(number), row_of(number))
    store.close()
    clear_cache()
    assert check_all(store, range(3)) == {0, 1, 2}
