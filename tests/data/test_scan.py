import csv
import hashlib
import os
import shutil
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data import looks
from finetune.data import scan as scan_module
from finetune.data.csv_files import read_csv, write_csv
from finetune.data.listing import list_images
from finetune.data.looks import read_looks
from finetune.data.scan import require_few_bad, scan_images, write_bad_files
from finetune.errors import DataError, StorageError

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
STRANGE_NAMES = ["new\nline", "carriage\rreturn", 'quo"te', "emoji 🌷", "-dash", "=cmd", "comma, here", " space ", "'"]


def paths(listing):
    return [row.image_path for row in listing.rows]


def rows(listing):
    return [(row.image_path, row.label, row.split) for row in listing.rows]


def refusal(data, *parts):
    with pytest.raises(DataError) as caught:
        list_images(data)
    for part in parts:
        assert part in str(caught.value)
    return caught.value


# Folders


def test_class_folders(data):
    data.images("b/1.png", "a/deep/er/2.JPG", "a/1.png")
    listing = list_images(data.path)
    assert rows(listing) == [("a/1.png", "a", None), ("a/deep/er/2.JPG", "a", None), ("b/1.png", "b", None)]
    assert listing.root == data.path
    assert (listing.empty_classes, listing.ignored_files, listing.problems) == ((), (), ())


@pytest.mark.parametrize("name", ["valid", "val", "validation", "VALID"])
def test_split_folders(name, data):
    data.images("train/a/1.png", f"{name}/a/x/2.png", "test/b/3.png")
    assert sorted(rows(list_images(data.path))) == sorted(
        [("train/a/1.png", "a", "train"), (f"{name}/a/x/2.png", "a", "valid"), ("test/b/3.png", "b", "test")]
    )


def test_val_and_valid_at_once(data):
    data.images("train/a/1.png", "val/a/2.png", "valid/a/3.png")
    refusal(data.path, "several folders for one split", "val", "valid")


def test_relative_folder_gives_absolute_paths(data, monkeypatch):
    data.image("a/1.png")
    monkeypatch.chdir(data.path.parent)
    table = scan_images(list_images(Path("data"))).table
    assert table.path(table.rows[0]) == data.path / "a/1.png"


def test_class_called_train_is_a_class(data):
    data.images("car/1.png", "train/2.png", "plane/3.png")
    assert {row.label for row in list_images(data.path).rows} == {"car", "plane", "train"}


def test_splits_without_class_folders_are_no_classes(data):
    data.images("train/1.png", "test/2.png")
    refusal(data.path, "no class folders in test, train", "DATA/CLASS/image.jpg")


def test_loose_images_are_ignored_beside_class_folders(data):
    data.images("a/1.png", "loose.png", "b/2.png")
    assert list_images(data.path).ignored_files == (data.path / "loose.png",)


def test_loose_images_alone(data):
    data.images("1.png", "2.png")
    refusal(data.path, "images but no class folders", "1.png", "DATA/CLASS/image.jpg")


def test_unlabelled_test_images_are_ignored(data):
    data.images("train/a/1.png", "test/2.png")
    listing = list_images(data.path)
    assert paths(listing) == ["train/a/1.png"]
    assert listing.ignored_files == (data.path / "test/2.png",)


def test_folders_beside_the_splits_are_told(data):
    data.images("train/a/1.png", "extra/2.png")
    listing = list_images(data.path)
    assert paths(listing) == ["train/a/1.png"]
    assert "extra" in listing.problems[0]


def test_data_that_is_not_there(tmp_path):
    refusal(tmp_path / "absent", "No such file", "DATA/CLASS/image.jpg")


def test_empty_folder(data):
    refusal(data.path, "no images", "DATA/CLASS/image.jpg")


def test_folder_of_empty_classes(data):
    data.folder("a")
    data.add("b/readme.txt", "nothing")
    refusal(data.path, "no images")


def test_file_that_is_no_csv(data):
    refusal(data.image("a.png"), "neither a folder nor a CSV")


def test_pipe_in_place_of_data(data):
    refusal(data.pipe("data.csv"), "neither a folder nor a CSV")


def test_hidden_files_and_clutter_are_skipped_silently(data):
    data.images(
        "a/1.png", "a/.hidden.png", ".ipynb_checkpoints/2.png", "a/.ipynb_checkpoints/3.png", "__MACOSX/a/4.png"
    )
    data.images("a/._1.png", "a/__MACOSX/5.png")
    data.add("a/Thumbs.db", "thumbs")
    data.add("a/desktop.ini", "ini")
    data.add(".DS_Store", "store")
    listing = list_images(data.path)
    assert paths(listing) == ["a/1.png"]
    assert (listing.ignored_files, listing.empty_classes, listing.problems) == ((), (), ())


def test_content_decides_for_strange_extensions(data, encode, picture):
    data.image("a/1.png")
    data.add("a/photo", encode(picture(), "JPEG"))
    data.add("a/photo.bak", encode(picture(), "WEBP"))
    data.add("a/notes.txt", "notes")
    data.add("a/paper.pdf", b"%PDF-1.4")
    data.add("a/phone.heic", b"\0\0\0\x18ftypheic")
    listing = list_images(data.path)
    assert paths(listing) == ["a/1.png", "a/photo", "a/photo.bak"]
    assert [path.name for path in listing.ignored_files] == ["notes.txt", "paper.pdf", "phone.heic"]


@pytest.mark.parametrize("name", ["A.JPG", "A.Jpeg", "A.PNG", "A.TIFF", "A.GIF", "A.WebP", "A.BMP", "A.PPM"])
def test_upper_case_extension(name, data):
    data.image(f"a/{name}")
    assert scan_images(list_images(data.path)).table.rows[0].image_path == f"a/{name}"


def test_empty_class(data):
    data.images("train/a/1.png", "train/b/2.png", "valid/a/3.png")
    data.folder("train/c")
    data.folder("valid/b")
    assert set(list_images(data.path).empty_classes) == {("train", "c"), ("valid", "b")}


def test_strange_names(data):
    for index, name in enumerate(STRANGE_NAMES):
        data.image(f"{name}/{name}.png", index)
    scan = scan_images(list_images(data.path))
    assert not scan.bad_files
    assert {row.label for row in scan.table.rows} == set(STRANGE_NAMES)
    assert all(scan.table.path(row).is_file() for row in scan.table.rows)


def test_name_that_is_no_utf8(data, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    data.image(f"{name}/1.png")
    data.add(f"{name}/2.png", "no picture")
    scan = scan_images(list_images(data.path), cache_folder=tmp_path / "cache")
    assert scan.table.rows[0].label == name
    assert len(scan.table.fingerprint()) == 64
    write_bad_files(scan.bad_files, tmp_path / "bad.csv")
    assert next(read_csv(tmp_path / "bad.csv", required=["path"]))[1]["path"] == f"{name}/2.png"


# Links


def test_link_loop_is_entered_once(data):
    data.images("a/1.png", "b/2.png")
    data.link("a/again", data.path / "a")
    data.link("a/up", data.path)
    data.link("c", data.path)
    listing = list_images(data.path)
    assert paths(listing) == ["a/1.png", "b/2.png"]
    assert len(listing.problems) == 3


def test_many_links_among_folders_do_not_multiply(data):
    names = [f"a/{letter}" for letter in "abcdefghijkl"]
    data.images(*(f"{name}/1.png" for name in names))
    for name in names:
        for other in names:
            data.link(f"{name}/to_{other[-1]}", data.path / other)
    started = time.monotonic()
    assert len(list_images(data.path).rows) == len(names)
    assert time.monotonic() - started < 5


def test_link_to_itself_is_a_missing_image(data):
    data.image("a/1.png")
    data.link("a/self.png", data.path / "a/self.png")
    assert [bad.reason for bad in scan_images(list_images(data.path)).bad_files] == ["missing"]


def test_dangling_link_is_a_missing_image(data):
    data.image("a/1.png")
    data.link("a/2.png", data.path / "gone.png")
    (bad,) = scan_images(list_images(data.path)).bad_files
    assert (bad.path, bad.reason, bad.label) == ("a/2.png", "missing", "a")


def test_links_out_of_the_root_are_followed(data, tmp_path, encode, picture):
    store = tmp_path / "store"
    (store / "tulips").mkdir(parents=True)
    (store / "tulips/1.png").write_bytes(encode(picture(1)))
    (store / "2.png").write_bytes(encode(picture(2)))
    data.link("tulips", store / "tulips")
    data.link("roses/2.png", store / "2.png")
    scan = scan_images(list_images(data.path))
    assert [(row.image_path, row.label) for row in scan.table.rows] == [
        ("roses/2.png", "roses"),
        ("tulips/1.png", "tulips"),
    ]


def test_named_pipe_is_told_without_waiting(data):
    data.image("a/1.png")
    data.pipe("a/2.png")
    data.pipe("a/no_extension")
    scan = scan_images(list_images(data.path))
    assert [(bad.path, bad.reason) for bad in scan.bad_files] == [("a/2.png", "not_a_file")]
    assert [path.name for path in scan.listing.ignored_files] == ["no_extension"]


def test_unreadable_folder_is_told(data, monkeypatch):
    data.images("a/1.png", "b/2.png")
    real = os.scandir

    def refuse(path):
        if path.name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_images(data.path)
    assert listing.problems == (f"{data.path / 'b'} cannot be read: Permission denied",)
    assert listing.empty_classes == ((None, "b"),)


def test_unreadable_file_is_told(data, monkeypatch):
    data.images("a/1.png", "a/2.png")
    real = Path.read_bytes

    def refuse(path):
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (bad,) = scan_images(list_images(data.path)).bad_files
    monkeypatch.undo()
    assert (bad.path, bad.reason) == ("a/2.png", "permission")


# CSV


def add_csv(data, text, *images):
    data.images(*images)
    return data.add("table.csv", text)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv(mark, data):
    text = f'{mark}image_path,label,split,group,note\n"x, y.png","a ""b""",train,g1,n\n'
    text += "./sub//2.png, c ,VAL,,\n\n3.png,c,test"
    listing = list_images(add_csv(data, text, "x, y.png", "sub/2.png", "3.png"))
    assert listing.root == data.path
    assert [(row.image_path, row.label, row.split, row.group) for row in listing.rows] == [
        ("3.png", "c", "test", None),
        ("sub/2.png", "c", "valid", None),
        ("x, y.png", 'a "b"', "train", "g1"),
    ]


@pytest.mark.parametrize("label", ["<script>", "=cmd", "../x", "-l", "🌷"])
def test_csv_labels_are_text(label, data):
    listing = list_images(add_csv(data, f"image_path,label\n1.png,{label}\n", "1.png"))
    assert listing.rows[0].label == label


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("path,label\n1.png,a\n", ["lacks the column image_path", "path, label"]),
        ("image_path;label\n1.png;a\n", ["lacks the column image_path and label", "commas"]),
        ("", ["lacks the column image_path and label"]),
        ("image_path,label\n", ["no rows"]),
        ("image_path,label\n1.png,a\nabsent.png,a\n", ["1 faults", "row 3: 'absent.png' does not exist"]),
        ("image_path,label\n1.png,a\n./1.png,b\n", ["row 3: '1.png' stands in row 2 already"]),
        ("image_path,label\n../secret.png,a\n", ["row 2: '../secret.png' leads out of the folder"]),
        ("image_path,label\n/etc/passwd,a\n", ["row 2: '/etc/passwd' leads out of the folder"]),
        ("image_path,label\na/../../x.png,a\n", ["row 2", "leads out of the folder"]),
        ("image_path,label,split\n1.png,a,tarin\n", ["row 2: unknown split 'tarin', the nearest are: train"]),
        ("image_path,label\n1.png, \n", ["row 2: label is empty"]),
        ("image_path,label\n1.png\n", ["row 2: label is empty"]),
        ("image_path,label\n ,a\n", ["row 2: image_path is empty"]),
        ("image_path,label\n1.png,a,b\n", ["more values than columns: row 2"]),
        (f"image_path,label\n{'x' * 300}.png,a\n", ["row 2", "does not exist"]),
        ('image_path,label\n"1.png"x,a\n', ["cannot be read as CSV"]),
    ],
)
def test_csv_faults(text, parts, data):
    refusal(add_csv(data, text, "1.png"), *parts)


def test_csv_faults_are_told_together(data):
    lines = "".join(f"absent{number}.png,a\n" for number in range(15))
    error = refusal(data.add("t.csv", f"image_path,label\n{lines}"), "15 faults", "row 2:", "row 11:", "and 5 more")
    assert "row 12:" not in error.message


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_csv_files_round_trip_any_text(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    write_csv(path, columns=("first", "second"), rows=values)
    assert [(row["first"], row["second"]) for _, row in read_csv(path, required=["first"])] == values


# Scanning


def test_scan_fills_hashes_and_sizes(data, picture):
    data.add("a/1.png", data.image("a/2.png", 1).read_bytes())
    data.image("b/3.bmp", 1)
    one, two, three = scan_images(list_images(data.path)).table.rows
    assert one.sha256 == two.sha256 == data.expected["a/1.png"] != three.sha256
    assert one.perceptual_hash == three.perceptual_hash is not None
    assert (one.width_px, one.height_px) == picture().size == (64, 48)


def test_scan_names_bad_files_and_reports_progress(data, tmp_path):
    data.images("a/1.png", "b/2.png")
    data.add("a/0.png", "")
    data.add("b/text.png", "no picture")
    calls = []
    scan = scan_images(list_images(data.path), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [row.image_path for row in scan.table.rows] == ["a/1.png", "b/2.png"]
    assert [(bad.path, bad.reason, bad.label) for bad in scan.bad_files] == [
        ("a/0.png", "empty", "a"),
        ("b/text.png", "not_an_image", "b"),
    ]
    write_bad_files(scan.bad_files, tmp_path / "bad_files.csv")
    with (tmp_path / "bad_files.csv").open(newline="") as file:
        header, first, second = csv.reader(file)
    assert header == ["path", "reason", "detail"]
    assert first == ["a/0.png", "empty", "the file has 0 bytes"]
    assert second[:2] == ["b/text.png", "not_an_image"]


def picture_bytes(height, width, kind="PNG"):
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def test_disk_that_refuses(tmp_path):
    with pytest.raises(StorageError):
        write_bad_files([], tmp_path / "absent" / "bad_files.csv")


@pytest.fixture
def decoded(monkeypatch):
    """Return the list of the sizes of files that were not known and have been opened since."""
    sizes = []
    real = scan_module.image_size

    def counted(content):
        sizes.append(len(content))
        return real(content)

    monkeypatch.setattr(scan_module, "image_size", counted)
    return sizes


class Keeper:
    """An onlooker that keeps the mean of every picture it is shown."""

    def __init__(self, short_side_px=scan_module.SHORT_SIDE_PX):
        self.short_side_px = short_side_px
        self.taken = []
        self.threads = set()

    def prepare(self, image_HWC, sha256):
        self.threads.add(threading.current_thread())
        return None if image_HWC.shape[0] == 9 else (sha256, image_HWC.shape[:2])

    def take(self, sha256, prepared):
        assert threading.current_thread() is threading.main_thread()
        assert prepared[0] == sha256
        self.taken.append(prepared)


def test_onlooker_is_shown_every_new_picture_in_order_and_no_bad_file(data, tmp_path):
    data.images("a/1.png", "a/2.png", "b/3.png")
    data.add("b/bad.png", "no picture")
    keeper = Keeper()
    scan = scan_images(list_images(data.path), cache_folder=tmp_path / "cache", onlooker=keeper)
    assert [sha256 for sha256, _ in keeper.taken] == [row.sha256 for row in scan.table.rows]
    assert threading.main_thread() not in keeper.threads
    second = Keeper()
    assert scan_images(list_images(data.path), cache_folder=tmp_path / "cache", onlooker=second) == scan
    assert second.taken == []


def test_what_an_onlooker_does_not_want_is_not_given_to_it(data):
    data.add("a/1.png", picture_bytes(9, 20))
    data.add("a/2.png", picture_bytes(20, 9))
    keeper = Keeper()
    scan_images(list_images(data.path), onlooker=keeper)
    assert [size for _, size in keeper.taken] == [(20, 9)]


def test_large_photographs_are_reduced_to_what_an_onlooker_needs(data, tmp_path):
    data.add("a/1.jpg", picture_bytes(400, 500, kind="JPEG"))
    sizes = {}
    for short_side_px in (90, 256):
        keeper = Keeper(short_side_px)
        scan = scan_images(list_images(data.path), cache_folder=tmp_path / "cache", onlooker=keeper)
        sizes[short_side_px] = [size for _, size in keeper.taken]
        assert (scan.table.rows[0].width_px, scan.table.rows[0].height_px) == (500, 400)
    assert sizes == {90: [(100, 125)], 256: [(400, 500)]}


def test_second_scan_decodes_only_what_changed(data, tmp_path, decoded):
    data.images("a/1.png", "a/2.png", "b/3.png")
    data.add("b/bad.png", "no picture")
    cache = tmp_path / "cache"
    first = scan_images(list_images(data.path), cache_folder=cache)
    assert len(decoded) == 4
    assert scan_images(list_images(data.path), cache_folder=cache) == first
    assert len(decoded) == 4
    file = data.image("a/1.png", 7)
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    again = scan_images(list_images(data.path), cache_folder=cache)
    assert len(decoded) == 5
    assert again.table.rows[0].sha256 == data.expected["a/1.png"] != first.table.rows[0].sha256
    assert [path for path in cache.rglob("*") if path.suffix == ".tmp"] == []


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\xff\x00", b"[]", b"PK\x03\x04", b'{"format": 1, "files": []}'],
)
def test_corrupt_cache_is_ignored(content, data, tmp_path):
    data.images("a/1.png", "b/2.png")
    first = scan_images(list_images(data.path), cache_folder=tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("*.npz")
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    assert scan_images(list_images(data.path), cache_folder=tmp_path / "cache") == first
    assert len(read_looks(file, lambda keys: np.arange(len(keys)))) == 2, "a sound cache is written in its place"


def test_cache_of_another_format_is_ignored(data, tmp_path, decoded, monkeypatch):
    data.image("a/1.png")
    scan_images(list_images(data.path), cache_folder=tmp_path / "cache")
    monkeypatch.setattr(looks, "FORMAT_NUMBER", 999)
    scan_images(list_images(data.path), cache_folder=tmp_path / "cache")
    assert len(decoded) == 2


def test_cache_inside_the_data_is_never_written(data):
    data.image("a/1.png")
    scan_images(list_images(data.path), cache_folder=data.path / "cache")
    scan_images(list_images(data.path), cache_folder=data.path)
    assert not (data.path / "cache").exists()


def test_cache_that_cannot_be_written_stops_nothing(data, tmp_path):
    data.image("a/1.png")
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert len(scan_images(list_images(data.path), cache_folder=tmp_path / "cache").table) == 1


def test_mended_permission_is_seen_at_once(data, tmp_path, monkeypatch):
    data.image("a/1.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        assert scan_images(list_images(data.path), cache_folder=tmp_path / "cache").bad_files
    assert not scan_images(list_images(data.path), cache_folder=tmp_path / "cache").bad_files


def scan_with_bad(data, *, good, bad, split="train"):
    first = data.image(f"{split}/a/good0.png")
    for number in range(1, good):
        shutil.copy(first, data.path / f"{split}/a/good{number}.png")
        data.expected[f"{split}/a/good{number}.png"] = data.expected[f"{split}/a/good0.png"]
    for number in range(bad):
        data.add(f"{split}/a/bad{number}.png", "")
    return scan_images(list_images(data.path))


def test_one_percent_of_training_images_may_be_bad(data):
    scan = scan_with_bad(data, good=99, bad=1)
    assert len(scan.bad_files) == 1
    require_few_bad(scan)


def test_more_than_one_percent_is_refused(data):
    scan = scan_with_bad(data, good=98, bad=12)
    with pytest.raises(DataError, match="12 of 110 training images cannot be read") as caught:
        require_few_bad(scan)
    assert "'train/a/bad0.png' (empty: the file has 0 bytes)" in caught.value.message
    assert "and 2 more" in caught.value.message
    assert "--allow-bad-images" in caught.value.hint
    require_few_bad(scan, allow_bad_images=True)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_not_one_held_out_image_may_be_bad(split, data):
    data.image("train/a/1.png")
    scan = scan_with_bad(data, good=199, bad=1, split=split)
    with pytest.raises(DataError, match=f"1 of 200 {'validation' if split == 'valid' else 'test'} images"):
        require_few_bad(scan)


def test_fingerprint_follows_content_not_order(data):
    data.images("a/1.png", "b/2.png")
    table = scan_images(list_images(data.path)).table
    assert type(table)(table.root, table.rows[::-1]).fingerprint() == table.fingerprint()
    data.image("a/1.png", 9)
    assert scan_images(list_images(data.path)).table.fingerprint() != table.fingerprint()


def test_a_csv_in_any_order_gives_every_image_its_own_hash_and_size(data, tmp_path):
    sizes = {"c": (9, 20), "a": (10, 21), "d": (11, 22), "b": (12, 23)}
    for name, size in sizes.items():
        data.add(f"{name}.png", picture_bytes(*size))
    text = "image_path,label\n" + "".join(f"{name}.png,x{name}\n" for name in sizes)
    table = data.add("table.csv", text)
    rows = scan_images(list_images(table)).table.rows
    assert [row.image_path for row in rows] == ["a.png", "b.png", "c.png", "d.png"]
    for row in rows:
        assert (row.width_px, row.height_px) in (sizes[row.image_path[0]], sizes[row.image_path[0]][::-1])
        assert row.sha256 == hashlib.sha256((data.path / row.image_path).read_bytes()).hexdigest()


def test_deep_folders_are_listed(data):
    folder = data.path / "a"
    deep = "/".join("d" * 300)
    (folder / deep).mkdir(parents=True)
    data.image(f"a/{deep}/1.png")
    assert [row.image_path for row in list_images(data.path).rows] == [f"a/{deep}/1.png"]
