"""Inputs found, and many images predicted one after the other."""

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import finetune
from finetune.data.decode import read_image_file
from finetune.errors import DataError, PredictionInputError
from finetune.prediction import batch
from finetune.prediction.batch import find_inputs, predict_many
from finetune.prediction.classifier import load_classifier
from finetune.runs.records import FailedPrediction, Prediction


@pytest.fixture
def folder(tmp_path: Path, flowers: Path) -> Path:
    """Five images in two folders, a broken one, and files that are no images."""
    (tmp_path / "sub").mkdir()
    for number, image in enumerate(sorted(flowers.glob("valid/1/*.jpg"))[:5]):
        shutil.copy(image, tmp_path / ("sub" if number % 2 else ".") / f"{number}.JPG")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.jpg").write_bytes(b"")
    return tmp_path


def test_folders_are_searched_and_files_taken_as_they_are(folder: Path) -> None:
    names = [path.name for path in find_inputs([str(folder), str(folder / "notes.txt")])]
    assert names == ["0.JPG", "2.JPG", "4.JPG", "broken.jpg", "1.JPG", "3.JPG", "notes.txt"]


def test_patterns_are_expanded_unless_a_file_has_that_name(folder: Path) -> None:
    assert [path.name for path in find_inputs([str(folder / "**" / "*.JPG")])] == [
        "0.JPG",
        "2.JPG",
        "4.JPG",
        "1.JPG",
        "3.JPG",
    ]
    odd = folder / "a[1].jpg"
    shutil.copy(folder / "0.JPG", odd)
    assert find_inputs([str(odd)]) == [odd]


@pytest.fixture
def shards(folder: Path, fresh_cache: Path) -> Path:
    """A shard without labels, and another archive."""
    packed = folder / "packed"
    packed.mkdir()
    for name in ("test-000000.tar", "photos.tar"):
        with tarfile.open(packed / name, "w") as tar:
            for member in ("0.JPG", "sub/3.JPG", "notes.txt", "sub/1.JPG"):
                tar.add(folder / member, member.replace("1.JPG", "IMG.1.JPG"))
    return packed


def test_a_shard_stands_for_its_pictures(shards: Path, flowers_run: Path, folder: Path) -> None:
    names = ["0.JPG", "sub/3.JPG", "sub/IMG.1.JPG"]
    assert find_inputs([str(shards)]) == [shards / "test-000000.tar" / name for name in names]
    assert find_inputs([str(shards / "ph*.tar")]) == [shards / "photos.tar" / name for name in names]
    paths = find_inputs([str(shards / "photos.tar")])
    assert paths == [shards / "photos.tar" / name for name in names]
    classifier = load_classifier(flowers_run)
    packed = list(predict_many(classifier, paths))
    alone = list(predict_many(classifier, [folder / name.replace("IMG.", "") for name in names]))
    assert [result.image for result in packed] == [str(path) for path in paths]
    assert [replace(result, image="") for result in packed] == [replace(result, image="") for result in alone]


def test_no_picture_of_a_shard_is_left_out(folder: Path, flowers_run: Path) -> None:
    with tarfile.open(folder / "photos.tar", "w") as tar:
        tar.add(folder / "0.JPG", "a.JPG")
        tar.add(folder / "2.JPG", "a.edited.JPG")
        link = tarfile.TarInfo("b.JPG")
        link.type, link.linkname = tarfile.LNKTYPE, "a.JPG"
        tar.addfile(link)
    *found, failed = predict_many(load_classifier(flowers_run), find_inputs([str(folder / "photos.tar")]))
    assert [Path(each.image).name for each in [*found, failed]] == ["a.JPG", "a.edited.JPG", "b.JPG"]
    assert all(isinstance(each, Prediction) for each in found)
    assert isinstance(failed, FailedPrediction)
    assert failed.code == "missing"


def test_shards_of_one_name_are_told_apart_by_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, order in (("one", "ab"), ("two", "ba")):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "p.tar", "w") as tar:
            for letter in order:
                member = tarfile.TarInfo(f"{letter}.png")
                member.size = 1
                tar.addfile(member, io.BytesIO(letter.encode()))
        os.utime(tmp_path / name / "p.tar", ns=(0, 0))
    (tmp_path / "two" / "link").symlink_to(tmp_path / "one")
    for folder, written in (("one", "p.tar"), ("two", "p.tar"), ("two", "link/../one/p.tar"), ("two", "link/p.tar")):
        monkeypatch.chdir(tmp_path / folder)
        read = {path.stem: read_image_file(path) for path in find_inputs([written])}
        assert read == {"a": b"a", "b": b"b"}


def test_a_shard_that_cannot_be_read_stops_no_other(shards: Path, flowers_run: Path) -> None:
    whole = (shards / "photos.tar").read_bytes()
    broken = shards / "test-000000.tar"
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"test-000000.tar cannot be read"):
        find_inputs([str(broken)])
    tarfile.open(shards / "train-0.tar", "w").close()
    assert find_inputs([str(shards)]) == [broken], "as one of the inputs, with what is wrong"
    with pytest.raises(PredictionInputError, match=r"train-0.tar holds no images"):
        find_inputs([str(shards / "photos.tar"), str(shards / "train-0.tar")])
    paths = find_inputs([str(shards / "photos.tar"), str(broken)])
    assert paths == find_inputs([str(shards / "*.tar")])
    *others, failed = predict_many(load_classifier(flowers_run), paths)
    assert all(isinstance(other, Prediction) for other in others)
    assert isinstance(failed, FailedPrediction)
    assert (len(others), failed.image, failed.code) == (3, str(broken), "not_an_image")


@pytest.mark.parametrize("text", ["*.gif", "empty", "empty.tar", "empt*.tar"])
def test_nothing_found_is_an_error(folder: Path, text: str) -> None:
    (folder / "empty").mkdir()
    tarfile.open(folder / "empty.tar", "w").close()
    with pytest.raises(PredictionInputError, match=r"empt|gif"):
        find_inputs([str(folder / text)])


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_one_bad_image_never_stops_the_others(flowers_run: Path, folder: Path, batch_size: int) -> None:
    paths = [*find_inputs([str(folder)]), folder / "gone.jpg", folder / "notes.txt"]
    results = list(predict_many(load_classifier(flowers_run), paths, batch_size=batch_size))
    assert [result.image for result in results] == [str(path) for path in paths]
    failed = {Path(r.image).name: r.code for r in results if isinstance(r, FailedPrediction)}
    assert failed == {"broken.jpg": "truncated", "gone.jpg": "missing", "notes.txt": "not_an_image"}
    alone = finetune.load(flowers_run)
    for result in results:
        if isinstance(result, Prediction):
            assert result.probability == pytest.approx(alone.predict(result.image).probability, abs=1e-5)


def test_results_stream_while_later_images_are_still_to_be_read(
    flowers_run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    decode = batch.decode_image
    monkeypatch.setattr(batch, "decode_image", lambda path, **options: read.append(path) or decode(path, **options))
    endless = [folder / "0.JPG"] * 1_000
    results: Iterator[object] = predict_many(load_classifier(flowers_run), endless, batch_size=2)
    assert isinstance(next(results), Prediction)
    assert len(read) <= 6
