"""Inputs found, and many images predicted one after the other."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import finetune
from finetune.errors import PredictionInputError
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


@pytest.mark.parametrize("text", ["*.gif", "empty"])
def test_nothing_found_is_an_error(folder: Path, text: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(PredictionInputError, match=r"empty|gif"):
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
