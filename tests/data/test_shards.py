"""Shards against the library whose convention they follow, and whatever may be wrong with one."""

import gc
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from finetune.data.decode import file_state, read_image_file
from finetune.data.listing import list_images
from finetune.data.scan import scan_images
from finetune.errors import DataError, ImageError
from tests.data.conftest import DataFolder, draw, encode_picture

PNG = encode_picture(draw(1))


def pack(data: DataFolder, name: str, members: dict[str, bytes]) -> Path:
    """Add a shard to `data` with these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member, content in members.items():
            header = tarfile.TarInfo(member)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return data.add(name, buffer.getvalue())


def sample(key: str, label: str, seed: int = 0) -> dict[str, bytes]:
    return {f"{key}.png": encode_picture(draw(seed)), f"{key}.cls": label.encode()}


def write_with_library(path: Path, samples: list[dict[str, Any]]) -> None:
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for each in samples:
            writer.write(each)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the library leaves its shards open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_the_library_writes_is_what_it_reads(data: DataFolder):
    written = []
    for split, first in (("train", 0), ("train", 6), ("val", 12)):
        samples = [
            {"__key__": f"{number:06d}", "jpg": encode_picture(draw(number), "JPEG"), "cls": str(number % 3).encode()}
            for number in range(first, first + 5)
        ]
        write_with_library(data.path / f"{split}-{first:06d}.tar", samples)
        written += [(f"{split}-{first:06d}.tar", split, each) for each in samples]
    facts = {"label": "roses", "width": 3}
    other = {"__key__": "sub/folder.of/9", "JSON": json.dumps(facts).encode(), "PNG": PNG, "txt": b"a rose"}
    write_with_library(data.path / "test-0.tar", [other])
    listing = list_images(data.path)
    found = {row.image_path: (row.label, row.split) for row in listing.rows}
    expected = {f"{shard}/{each['__key__']}.jpg": each for shard, _, each in written}
    assert found.pop("test-0.tar/sub/folder.of/9.PNG") == ("roses", "test")
    assert found == {
        f"{shard}/{each['__key__']}.jpg": (each["cls"].decode(), {"val": "valid"}.get(split, split))
        for shard, split, each in written
    }
    read = {
        f"{Path(each['__url__']).name}/{each['__key__']}.jpg": each["jpg"]
        for shard in {shard for shard, _, _ in written}
        for each in webdataset.WebDataset(str(data.path / shard), shardshuffle=False)
    }
    gc.collect()
    assert len(read) == 15
    for image_path, content in read.items():
        assert read_image_file(data.path / image_path) == content == expected[image_path]["jpg"]
    data.expected = data.state()  # the library wrote it, not `data`


def test_scan_knows_an_unchanged_shard_again_and_sees_a_changed_one(data: DataFolder, tmp_path: Path):
    pack(data, "train-0.tar", sample("a", "x", 1) | sample("b", "y", 2))
    first = scan_images(list_images(data.path), cache_folder=tmp_path / "looks").table.rows
    assert len({row.sha256 for row in first}) == 2
    assert scan_images(list_images(data.path), cache_folder=tmp_path / "looks").table.rows == first
    shard = pack(data, "train-0.tar", sample("a", "y", 3) | sample("b", "y", 2))
    os.utime(shard, ns=(0, 1_000_000_000))
    again = scan_images(list_images(data.path), cache_folder=tmp_path / "looks").table.rows
    assert [row.label for row in again] == ["y", "y"]
    assert again[0].sha256 != first[0].sha256
    assert again[1].sha256 == first[1].sha256


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"a.png": PNG}, "'a' has no label in train-0.tar"),
        ({"a.cls": b"x"}, "'a' has 0 pictures in train-0.tar"),
        ({"a.png": PNG, "a.jpg": PNG, "a.cls": b"x"}, "'a' has 2 pictures"),
        ({"a.png": PNG, "a.CLS": b"x", "a.cls": b"y"}, "'a' has a .cls twice"),
        ({"a.png": PNG, "a.cls": b" \n"}, "'a' has a .cls without a label"),
        ({"a.png": PNG, "a.cls": "rosé".encode("latin-1")}, "'a' has a .cls 'utf-8' codec can't decode"),
        ({"a.png": PNG, "a.cls": b"x" * (2**20 + 1)}, "'a' has a .cls of 1,048,577 bytes"),
        ({"a.png": PNG, "a.json": b'{"label": [1]}'}, "'a' has a .json without a label"),
        ({"a.png": PNG, "a.json": b'{"label": true}'}, "'a' has a .json without a label"),
        ({"a.png": PNG, "a.json": b'{"label": "\\ud800"}'}, "'a' has a .json 'utf-8' codec can't encode"),
        ({"a.png": PNG, "a.json": b'{"label": '}, "'a' has a .json Expecting value"),
        ({"a.png": PNG, "a.json": b'{"label": ' + b"[" * 100_000}, "'a' has a .json maximum recursion depth"),
        ({"a.png": PNG, "a.json": b"[]"}, "'a' has no label"),
        ({"a.heic": PNG, "a.json": b'{"label": 3}'}, "'a' has 0 pictures"),
        ({"IMG.2020.png": PNG, "IMG.2020.cls": b"x"}, "'IMG' goes on with a dot, where the convention ends a key"),
    ],
)
def test_faults_of_samples_are_named(data: DataFolder, members: dict[str, bytes], fault: str):
    pack(data, "train-0.tar", members)
    with pytest.raises(DataError) as caught:
        list_images(data.path)
    assert fault in caught.value.message


def test_faults_of_all_shards_are_listed_together(data: DataFolder):
    pack(data, "train-0.tar", {"a.png": PNG} | sample("b", "x"))
    pack(data, "train-1.tar", {"c.cls": b"x"})
    data.add("train-2.tar", "no tar file")
    with pytest.raises(DataError) as caught:
        list_images(data.path)
    assert caught.value.message.startswith("the shards have 3 faults: 'a' has no label in train-0.tar, 'c' has 0")
    assert "train-2.tar cannot be read" in caught.value.message
    assert "KEY.cls" in caught.value.hint


def test_a_shard_cut_anywhere_is_refused(data: DataFolder):
    whole = pack(data, "train-0.tar", sample("a", "x", 1) | sample("b", "y", 2)).read_bytes()
    ends = whole.rstrip(b"\0")
    for size in {*range(0, len(ends), 512), 100, len(ends) - 1, len(ends)}:
        data.add("train-0.tar", whole[:size])
        with pytest.raises(DataError, match=r"train-0.tar cannot be read"):
            list_images(data.path)


def test_what_follows_the_end_is_noticed(data: DataFolder):
    whole = pack(data, "train-0.tar", sample("a", "x", 1) | sample("b", "y", 2)).read_bytes()
    zeroed = bytearray(whole)
    second = whole.index(b"b.png")
    zeroed[second : second + 512] = bytes(512)
    for content in (whole + whole, bytes(zeroed), whole + bytes(1_000_000)):
        data.add("train-0.tar", content)
        with pytest.raises(DataError, match="goes on after its end"):
            list_images(data.path)


def test_sizes_that_no_file_has_are_damage(data: DataFolder):
    whole = bytearray(pack(data, "train-0.tar", sample("a", "x", 1)).read_bytes())
    for size in (-512, 2**80):
        header = bytearray(whole[:512])
        header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 2**88).to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data.add("train-0.tar", bytes(header + whole[512:]))
        with pytest.raises(DataError, match="damaged"):
            list_images(data.path)


def test_a_pipe_is_not_waited_for(data: DataFolder):
    data.pipe("train-0.tar")
    with pytest.raises(DataError, match="no regular file"):
        list_images(data.path)


def test_a_shard_written_anew_after_it_was_listed_gives_no_picture(data: DataFolder):
    shard = pack(data, "train-0.tar", sample("a", "x", 1))
    row = list_images(data.path).rows[0]
    pack(data, "train-0.tar", sample("a", "y", 2))
    os.utime(shard, ns=(0, 1_000_000_000))
    with pytest.raises(ImageError, match="changed since it was listed"):
        read_image_file(data.path / row.image_path)
    list_images(data.path)
    assert read_image_file(data.path / row.image_path) == encode_picture(draw(2))


def test_a_byte_order_mark_makes_no_other_class(data: DataFolder):
    pack(data, "train-0.tar", {"a.png": PNG, "a.cls": b"\xef\xbb\xbfcafe", "b.png": PNG, "b.cls": b"cafe\n"})
    assert list_images(data.path).class_names == ("cafe",)


def test_more_pictures_of_a_sample_are_left_alone(data: DataFolder):
    pack(data, "train-0.tar", sample("a", "x") | {"a.mask.png": PNG})
    assert [row.image_path for row in list_images(data.path).rows] == ["train-0.tar/a.png"]


def test_a_damaged_header_does_not_pass_for_the_end(data: DataFolder):
    whole = bytearray(pack(data, "train-0.tar", sample("a", "x", 1) | sample("b", "y", 2)).read_bytes())
    second = whole.index(b"b.png")
    whole[second + 150] ^= 1  # in the checksum
    data.add("train-0.tar", bytes(whole))
    with pytest.raises(DataError, match="damaged, ends too early"):
        list_images(data.path)


def test_only_plain_members_count(data: DataFolder):
    clutter = {".b.png": PNG, ".cache/c.png": PNG, "notes.txt": b"", "about.json": b"{}"}
    shard = pack(data, "train-0.tar", sample("./a", "x") | clutter)
    assert [row.image_path for row in list_images(data.path).rows] == ["train-0.tar/a.png"]
    kinds = {"c": tarfile.SYMTYPE, "d": tarfile.LNKTYPE, "e": tarfile.FIFOTYPE, "f": tarfile.DIRTYPE}
    with tarfile.open(shard, "a") as tar:
        for name, kind in kinds.items():
            header = tarfile.TarInfo(f"{name}.png")
            header.type, header.linkname = kind, "./a.png"
            tar.addfile(header)
    data.expected = data.state()
    with pytest.raises(DataError, match=r"have 3 faults: 'c' has a c.png that is a link or other than a plain file"):
        list_images(data.path)


def test_compressed_shards_are_refused_with_what_to_do(data: DataFolder):
    data.add("train-000000.tar.gz", "")
    with pytest.raises(DataError, match="compressed") as caught:
        list_images(data.path)
    assert "unpack" in caught.value.hint


def test_what_lies_beside_and_what_is_missing_is_said(data: DataFolder):
    for number in (0, 1, 3):
        pack(data, f"train-{number:06d}.tar", sample("a", "x", number))
    pack(data, "valid-late.tar", sample("a", "x", 9))
    data.add("logs/today.txt", "nothing")
    data.add("README.txt", "about")
    listing = list_images(data.path)
    assert len(listing.rows) == 4
    assert listing.problems == (
        "no images are in these, beside shards: logs",
        "shards are missing from the sequence: train-000002.tar",
    )
    assert [file.name for file in listing.ignored_files] == ["README.txt"]


def test_archives_beside_class_folders_are_passed_over(data: DataFolder):
    data.images("roses/a.png", "tulips/b.png")
    data.add("train-images.tar.gz", "")
    pack(data, "train-0.tar", {"a.png": PNG})
    listing = list_images(data.path)
    assert listing.class_names == ("roses", "tulips")
    assert listing.problems == ("not read, because they lie beside folders: train-0.tar",)


def test_pictures_that_are_not_there(data: DataFolder):
    shard = pack(data, "train-0.tar", sample("a", "x"))
    for path in (shard / "b.png", shard / "a.cls", data.path / "train-1.tar" / "a.png"):
        with pytest.raises(ImageError) as caught:
            read_image_file(path)
        assert caught.value.reason == "missing"
    with pytest.raises(FileNotFoundError):
        file_state(str(shard / "b.png"))


def test_a_bad_picture_in_a_shard_has_its_reason_and_path(data: DataFolder):
    pack(data, "train-0.tar", sample("a", "x") | {"b.png": b"", "b.cls": b"x", "c.png": PNG[:60], "c.cls": b"y"})
    bad = scan_images(list_images(data.path)).bad_files
    assert [(each.path, each.reason) for each in bad] == [
        ("train-0.tar/b.png", "empty"),
        ("train-0.tar/c.png", "truncated"),
    ]


def test_the_index_is_kept_and_a_damaged_one_made_again(data: DataFolder, fresh_cache: Path):
    pack(data, "train-0.tar", sample("a", "x"))
    rows = list_images(data.path).rows
    (kept,) = (fresh_cache / "scans").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert list_images(data.path).rows == rows
    assert kept.stat().st_mtime_ns == stamp
    kept.write_bytes(kept.read_bytes()[:-30])
    assert list_images(data.path).rows == rows
    assert kept.stat().st_mtime_ns != stamp


def test_no_index_is_kept_among_the_images(data: DataFolder, monkeypatch: pytest.MonkeyPatch):
    pack(data, "train-0.tar", sample("a", "x"))
    monkeypatch.setenv("FINETUNE_CACHE", str(data.path / "cache"))
    assert len(list_images(data.path).rows) == 1
    assert not (data.path / "cache").exists()
