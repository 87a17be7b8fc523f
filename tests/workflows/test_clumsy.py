"""What a clumsy user meets: two lines, the right exit code, never a traceback, and nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.workflows.conftest import draw


def assert_refused(outcome: Any, code: int, *texts: str) -> None:
    """Assert that a command ended with `code` and an explanation in at most two lines."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    lines = outcome.err.strip().splitlines()
    assert 1 <= len(lines) <= 2, outcome.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in outcome.err
    for text in texts:
        assert text in outcome.err


def test_a_path_that_is_not_there(finetune: Callable[..., Any], tmp_path: Path) -> None:
    assert_refused(finetune("train", tmp_path / "photso", "--quiet"), 3, "photso")
    assert_refused(finetune("check", tmp_path / "photso", "--quiet"), 3, "photso")


def test_an_empty_folder(finetune: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(finetune("train", tmp_path / "empty", "--output", tmp_path / "run", "--quiet"), 3, "empty")


def test_one_class(finetune: Callable[..., Any], tmp_path: Path) -> None:
    for index in range(4):
        draw(tmp_path / "data" / "only" / f"{index}.png", (9, 9, 9), seed=index)
    assert_refused(finetune("train", tmp_path / "data", "--output", tmp_path / "run", "--quiet"), 3, "only")


def test_a_typo_in_the_name_of_a_model(finetune: Callable[..., Any], coloured: Path, tmp_path: Path) -> None:
    outcome = finetune("train", coloured, "--model", "resnet5O", "--output", tmp_path / "run", "--quiet")
    assert_refused(outcome, 4, "resnet5O", "resnet50")


def test_weights_that_cannot_be_downloaded(finetune: Callable[..., Any], coloured: Path, tmp_path: Path) -> None:
    outcome = finetune("train", coloured, "--model", "resnet18", "--output", tmp_path / "run", "--quiet")
    assert_refused(outcome, 4, "--weights")


def test_a_weight_file_that_is_not_there(finetune: Callable[..., Any], coloured: Path, tmp_path: Path) -> None:
    outcome = finetune("train", coloured, "--weights", tmp_path / "gone.pth", "--output", tmp_path / "run", "--quiet")
    assert_refused(outcome, 4, "gone.pth")


def test_a_run_that_is_not_there(finetune: Callable[..., Any], coloured: Path, tmp_path: Path) -> None:
    assert_refused(finetune("predict", tmp_path / "gone", coloured), 4, "gone")
    assert_refused(finetune("evaluate", tmp_path / "gone", coloured), 4, "gone")
    assert_refused(finetune("train", coloured, "--output", tmp_path / "gone", "--resume"), 4, "gone")


def test_a_run_inside_the_images(finetune: Callable[..., Any], coloured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(coloured)
    assert_refused(finetune("train", ".", "--quiet"), 2, "inside DATA", "--output")
    assert_refused(finetune("train", coloured, "--output", coloured / "run", "--quiet"), 2, "inside DATA")


def test_a_typo_in_data_does_not_empty_the_run_it_would_overwrite(
    finetune: Callable[..., Any], flowers_run: Path, tmp_path: Path
) -> None:
    assert_refused(finetune("train", tmp_path / "typo", "--output", flowers_run, "--overwrite", "--quiet"), 3, "typo")
    assert (flowers_run / "model.safetensors").is_file()


def test_a_rate_that_blows_up(finetune: Callable[..., Any], coloured: Path, tmp_path: Path) -> None:
    rates = ("--learning-rate", "1e30", "--trunk-learning-rate", "1e30", "--optimizer", "sgd", "--epochs", 3)
    options = ("--scenario", "large-similar", "--image-size", 64, "--output", tmp_path / "run", "--quiet")
    assert_refused(finetune("train", coloured, *options, *rates), 5, "--learning-rate")


def test_a_name_longer_than_a_name_can_be(finetune: Callable[..., Any], flowers_run: Path, coloured: Path) -> None:
    name = "x" * 300
    assert_refused(finetune("predict", name, coloured, "--quiet"), 4)
    assert finetune("predict", flowers_run, name, "--quiet").code == 3
    assert_refused(finetune("train", name, "--quiet"), 3)


def test_a_device_that_is_not_there_for_predicting(
    finetune: Callable[..., Any], flowers_run: Path, flowers: Path
) -> None:
    assert_refused(finetune("predict", flowers_run, flowers / "valid" / "1", "--device", "mps", "--quiet"), 2, "mps")


def test_no_cuda_here(finetune: Callable[..., Any], coloured: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert_refused(finetune("train", coloured, "--device", "cuda", "--output", tmp_path / "run", "--quiet"), 2, "cuda")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train"], "DATA"),
        (["train", "x", "--seed", "-1"], "--seed"),
        (["train", "x", "--feature-extract", "--scenario", "large-similar"], "--feature-extract"),
        (["train", "x", "--head", "log_softmax", "--label-smoothing", "0.1"], "--label-smoothing"),
        (["train", "x", "--resume"], "--output"),
        (["train", "x", "--config", "no.yaml"], "no.yaml"),
        (["train", "x", "--lerning-rate", "1"], "--learning-rate"),
        (["train", "x", "--epochs", "many"], "many"),
        (["predict", "run"], "image"),
        (["predict", "run", "x", "--top-k", "0"], "--top-k"),
        (["predict", "run", "x", "--format", "parquet"], "--output"),
        (["config", "validate"], "FILE"),
    ],
)
def test_usage_errors_end_with_two(finetune: Callable[..., Any], words: list[str], text: str) -> None:
    outcome = finetune(*words)
    assert outcome.code == 2
    assert text in outcome.err
    assert "Traceback" not in outcome.err


def test_debug_shows_the_traceback(finetune: Callable[..., Any], tmp_path: Path) -> None:
    outcome = finetune("check", tmp_path / "gone", "--debug", "--quiet")
    assert outcome.code == 3
    assert "Traceback" in outcome.err


@pytest.fixture
def spoiled(coloured: Path, tmp_path: Path) -> Path:
    """The coloured images with one torn in half."""
    folder = tmp_path / "spoiled"
    shutil.copytree(coloured, folder)
    image = folder / "1" / "3.png"
    image.write_bytes(image.read_bytes()[:200])
    return folder


def test_a_bad_image_in_thirty_is_too_many_unless_allowed(
    finetune: Callable[..., Any], spoiled: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train = ("train", spoiled, "--feature-extract", "--image-size", "64", "--quiet")
    refused = finetune(*train, "--output", run)
    assert refused.code == 3
    assert "3.png" in refused.err
    assert "truncated" in (run / "bad_files.csv").read_text()
    (spoiled / "1" / "3.png").unlink()
    assert finetune(*train, "--output", run).code == 0, "a start that failed must not stand in the way of the next"
    (spoiled / "1" / "3.png").write_bytes(b"torn")
    assert finetune(*train, "--output", tmp_path / "other", "--allow-bad-images").code == 0
    assert '"1/3.png"' not in (tmp_path / "other" / "split.csv").read_text()


def test_check_tells_and_strict_refuses(finetune: Callable[..., Any], coloured: Path, spoiled: Path) -> None:
    fine = finetune("check", coloured, "--quiet")
    assert fine.code == 0
    assert "30 images" in fine.out
    assert finetune("check", spoiled, "--quiet").code == 3
    document = json.loads(finetune("check", coloured, "--format", "json", "--quiet").out)
    assert document["image_count"] == 30
    draw(coloured.parent / "uneven" / "a" / "1.png", (1, 2, 3), seed=1)
    for index in range(30):
        draw(coloured.parent / "uneven" / "b" / f"{index}.png", (200, 2, 3), seed=index + 2)
        draw(coloured.parent / "uneven" / "a" / f"{index % 2}.png", (1, 200, 3), seed=index % 2)
    assert finetune("check", coloured.parent / "uneven", "--quiet").code == 0
    assert finetune("check", coloured.parent / "uneven", "--strict", "--quiet").code == 3


def test_label_names_of_other_data_are_refused_if_given_and_passed_over_if_found_beside(
    finetune: Callable[..., Any], coloured: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    shutil.copytree(coloured, tmp_path / "other" / "data", ignore=shutil.ignore_patterns("*.json"))
    beside = tmp_path / "other" / "cat_to_name.json"
    beside.write_text('{"cat": "Katze"}')
    assert finetune("check", tmp_path / "other" / "data", "--quiet").code == 0
    assert finetune("check", tmp_path / "other" / "data", "--label-names", beside, "--quiet").code == 3
