"""`finetune data`, and the way from it to a trained model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.data.named import SETS


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from finetune.api import write_data

    folder = tmp_path_factory.mktemp("data") / "digits"
    write_data("digits", folder)
    return folder


def test_digits_are_written_and_the_next_step_is_named(finetune: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "my digits"
    outcome = finetune("data", "digits", "--output", folder)
    assert outcome.code == 0
    assert outcome.out == f"1,797 images of 10 classes in {folder}\n"
    assert f"finetune train '{folder}'" in outcome.err
    assert len(list(folder.rglob("*.png"))) == 1797


def test_a_rerun_says_that_they_are_there(finetune: Callable[..., Any], digits: Path) -> None:
    outcome = finetune("data", "digits", "--output", digits, "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"1,797 images of 10 classes already in {digits}\n"


def test_the_splits_are_counted(finetune: Callable[..., Any], tmp_path: Path) -> None:
    counts = {"images_per_split": {"train": 1200, "test": 3}, "class_count": 10}
    (tmp_path / ".finetune-data.json").write_text(json.dumps({"name": "mnist", "counts": counts}))
    (tmp_path / "train" / "0").mkdir(parents=True)
    for number in range(1203):
        (tmp_path / "train" / "0" / f"{number}.png").touch()
    outcome = finetune("data", "mnist", "--output", tmp_path)
    assert outcome.out.startswith("1,203 images (1,200 train, 3 test) of 10 classes already in ")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("mnits", "--output", "new"), 2, "mnist"),
        (("cifar10", "--output", "new"), 3, "HF_HUB_OFFLINE"),
        (("digits", "--output", "mine"), 2, "not empty"),
        (("digits", "--output", "mine/file"), 2, "is a file"),
        (("pets", "--output", "new", "--source", "mine"), 2, "--source"),
        (("mnist", "--output", "new", "--source", "mine"), 3, "train-images-idx3-ubyte"),
        (("mnist", "--output", "new", "--source", "gone"), 3, "gone"),
    ],
)
def test_what_cannot_be_meant_is_told_in_two_lines(
    finetune: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    outcome = finetune("data", *words)
    assert (outcome.code, outcome.out) == (code, "")
    assert text in outcome.err
    assert len(outcome.err.splitlines()) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_the_help_names_every_set(finetune: Callable[..., Any]) -> None:
    words = finetune("data", "--help").out.replace(",", " ").replace(".", " ").split()
    assert set(SETS) <= set(words)


def test_digits_train_a_classic_network(finetune: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = finetune(
        "train", digits, "--model", "lenet5_relu", "--epochs", 1, "--device", "cpu", "--output", run, "--quiet"
    )
    assert outcome.code == 0, outcome.err
    assert (run / "model.safetensors").is_file()
