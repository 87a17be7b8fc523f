"""`finetune predict`: its formats, its streams, its exit code."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from finetune.cli.predict import write_json, write_table
from finetune.runs.records import ClassProbability, FailedPrediction, Prediction


@pytest.fixture
def mixed(tmp_path: Path, flowers: Path) -> Path:
    """Two flowers with awkward names and a file that is no image."""
    images = sorted(flowers.glob("valid/21/*.jpg"))
    shutil.copy(images[0], tmp_path / 'a "quoted"\nname.jpg')
    shutil.copy(images[1], tmp_path / "-dash 🌸.jpg")
    (tmp_path / "torn.jpg").write_bytes(images[2].read_bytes()[:900])
    return tmp_path


def test_json_is_one_document_and_nothing_else(finetune: Callable[..., Any], flowers_run: Path, mixed: Path) -> None:
    outcome = finetune("predict", flowers_run, mixed, "--format", "json")
    assert outcome.code == 3
    assert "1 of 3 images could not be read" in outcome.err
    document = json.loads(outcome.out)
    assert (document["model"], document["classes"]) == ("efficientnet_lite0", 6)
    by_name = {Path(found["image"]).name: found for found in document["predictions"]}
    flower = by_name["-dash 🌸.jpg"]
    assert set(flower) == {"image", "class_name", "display_name", "probability", "abstained", "top"}
    assert set(flower["top"][0]) == {"class_name", "display_name", "class_index", "probability"}
    assert (flower["class_name"], flower["display_name"], flower["abstained"]) == ("21", "fire lily", False)
    assert set(by_name["torn.jpg"]) == {"image", "error"}
    assert by_name["torn.jpg"]["error"]["code"] == "truncated"


def test_csv_survives_awkward_names(finetune: Callable[..., Any], flowers_run: Path, mixed: Path) -> None:
    outcome = finetune("predict", flowers_run, mixed, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(outcome.out, newline="")))
    assert {Path(row["image"]).name for row in rows} == {path.name for path in mixed.iterdir()}
    assert {row["error"] for row in rows} == {"", "truncated"}


def test_a_table_keeps_one_line_an_image(finetune: Callable[..., Any], flowers_run: Path, mixed: Path) -> None:
    lines = finetune("predict", flowers_run, mixed, "--top-k", 2).out.splitlines()
    assert len(lines) == 3
    assert sum("fire lily" in line for line in lines) == 2
    assert any("cannot be read: truncated" in line for line in lines)


def test_parquet_and_a_file_of_results(
    finetune: Callable[..., Any], flowers_run: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("out") / "found.parquet"
    assert finetune("predict", flowers_run, mixed, "--format", "parquet", "--output", target).code == 3
    frame = pandas.read_parquet(target)
    assert list(frame.columns) == ["image", "class_name", "display_name", "probability", "abstained", "error"]
    assert frame["display_name"].dropna().tolist() == ["fire lily", "fire lily"]
    assert [path.name for path in target.parent.iterdir()] == ["found.parquet"]


def test_a_destination_that_cannot_be_written(finetune: Callable[..., Any], flowers_run: Path, mixed: Path) -> None:
    outcome = finetune("predict", flowers_run, mixed, "--output", mixed / "no" / "such" / "folder.txt")
    assert outcome.code == 6
    assert "cannot write" in outcome.err


def test_results_are_written_as_they_come() -> None:
    file = io.StringIO()
    top = (ClassProbability(class_name="1", display_name="<b>daisy</b>", class_index=0, probability=0.9),)

    def results() -> Any:
        yield Prediction(image="a.jpg", abstained=False, top=top)
        assert "a.jpg" in file.getvalue()
        yield FailedPrediction(image="b.jpg", code="missing", message="there is no such file")
        assert "b.jpg" in file.getvalue()

    write_json(results(), file, model="m", classes=1)
    assert json.loads(file.getvalue())["predictions"][0]["display_name"] == "<b>daisy</b>"


def test_an_abstention_is_told() -> None:
    file = io.StringIO()
    top = (ClassProbability(class_name="1", display_name="daisy", class_index=0, probability=0.2),)
    write_table([Prediction(image="a.jpg", abstained=True, top=top)], file)
    assert "none of these" in file.getvalue()
