"""What goes wrong around a training: each with its outcome, and nothing lost."""

import itertools
import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import finetune
from finetune.data import loaders
from finetune.data.dataset import ImageDataset
from finetune.errors import DataError, RunError, StorageError
from finetune.runs.folder import RunFolder, open_run
from finetune.runs.reporting import LoggingReporter
from finetune.training import checkpoint
from finetune.training.checkpoint import read_state
from finetune.training.progress import Progress
from finetune.training.watchers import ProgressBar

pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture(autouse=True)
def _every_epoch_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "TRAINING_PER_SAVE", 0)


def train(folder: Path, **options: Any) -> finetune.Run:
    settings = {
        "model": "resnet18",
        "use_pretrained": False,
        "scenario": "large-similar",
        "image_size": 32,
        "epochs": 3,
        "batch_size": 10,
        "workers": 0,
    }
    return finetune.train(folder, output=folder.parent / "run", **{**settings, **options})


def saved_step(folder: Path) -> int:
    """Return the step of the newest save, which verifies."""
    reporter = LoggingReporter()
    return int(read_state(RunFolder(folder.parent / "run"), reporter).values["progress"]["global_step"])


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Do something at a step of the training."""
    step_ended = ProgressBar.step_ended

    def act(self: ProgressBar, progress: Progress) -> None:
        step_ended(self, progress)
        if progress.global_step == number:
            action()

    monkeypatch.setattr(ProgressBar, "step_ended", act)


def test_a_worker_that_dies_is_named_and_the_run_goes_on_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        multiprocessing.active_children()[0].kill()
        time.sleep(1)  # until the signal that a child is gone has come

    with monkeypatch.context() as patch:
        at_step(patch, 4, kill)
        with pytest.raises(DataError, match=r"gave up: DataLoader worker \(pid.*\d+.*\)"):
            train(folder, workers=2)
    assert saved_step(folder) == 3
    assert finetune.train(output=folder.parent / "run", resume=True, workers=0).metrics["valid"]


def test_a_worker_that_hangs_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    getitem = ImageDataset.__getitem__

    def hang(self: ImageDataset, key: Any) -> Any:
        if torch.utils.data.get_worker_info() and isinstance(key, tuple) and key[0] == 1:
            time.sleep(3600)
        return getitem(self, key)

    monkeypatch.setattr(loaders, "HUNG_SECONDS", 2.0)
    monkeypatch.setattr(ImageDataset, "__getitem__", hang)
    with pytest.raises(DataError, match="gave up: DataLoader timed out after 2"):
        train(folder, workers=2)
    assert saved_step(folder) == 3
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("change", ["vanished", "changed"])
def test_an_image_that_vanishes_or_changes_before_a_resume_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_step(patch, 5, stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder)
    victim = folder / "train" / "red" / "00.png"
    if change == "vanished":
        victim.unlink()
    else:
        Image.new("RGB", (40, 40), "green").save(victim)
    difference = {"vanished": "gone", "changed": "changed"}[change]
    with pytest.raises(DataError, match=rf"are not those of .*split\.csv; 1 {difference}: 'train/red/00\.png'"):
        finetune.train(output=folder.parent / "run", resume=True)
    assert saved_step(folder) == 3


def test_a_split_that_was_edited_before_a_resume_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_step(patch, 5, stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder)
    split = folder.parent / "run" / "split.csv"
    split.write_text(split.read_text().replace('"valid"', '"train"', 1))
    with pytest.raises(RunError, match=r"split\.csv was edited since training began"):
        finetune.train(output=folder.parent / "run", resume=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda victim: victim.write_bytes(b"no image any more"), r"00\.png has changed since it was looked at"),
        (lambda victim: Image.new("RGB", (40, 40)).save(victim), r"00\.png has changed since it was looked at"),
        (lambda victim: victim.unlink(), r"00\.png: missing"),
    ],
    ids=["spoiled", "another image", "vanished"],
)
def test_an_image_that_changes_during_training_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], named: str, workers: int
) -> None:
    victim = folder / "train" / "red" / "00.png"
    at_step(monkeypatch, 4, lambda: change(victim))
    monkeypatch.setattr("finetune.training.batches.worth_caching", lambda *_: False)
    with pytest.raises(DataError, match=named):
        train(folder, workers=workers)
    assert saved_step(folder) >= 3


def refuse_records(monkeypatch: pytest.MonkeyPatch, *, calls: list[int]) -> None:
    """Let the disk refuse these of the epochs that come to metrics.jsonl, counted from 1."""
    record, count = RunFolder.record, itertools.count(1)

    def refuse(self: RunFolder, event: str, values: Any) -> None:
        if event != "epoch" or next(count) not in calls:
            return record(self, event, values)
        raise StorageError("cannot write metrics.jsonl: No space left on device", "free some space, then --resume")

    monkeypatch.setattr(RunFolder, "record", refuse)


def recorded_epochs(folder: Path) -> list[int]:
    return [event["epoch"] for event in RunFolder(folder.parent / "run").events() if event["event"] == "epoch"]


@pytest.mark.parametrize("refused", [[1, 2], [3], [2, 3]], ids=str)
def test_records_that_the_disk_refuses_are_told_and_made_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: list[int]
) -> None:
    with monkeypatch.context() as patch:
        refuse_records(patch, calls=refused)
        run = train(folder)
    assert recorded_epochs(folder) == [1, 2, 3]
    assert caplog.text.count("No space left on device; it will be tried again") == len(refused)
    finetune.train(output=run.folder, resume=True)
    assert recorded_epochs(folder) == [1, 2, 3], "also where the last save was made before them"


def test_the_third_record_that_the_disk_refuses_ends_the_run_with_its_saves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse_records(patch, calls=[1, 2, 3])
        with pytest.raises(StorageError, match="No space left"):
            train(folder)
    assert saved_step(folder) == 6, "that of the second epoch"
    finetune.train(output=folder.parent / "run", resume=True)
    assert recorded_epochs(folder) == [1, 2, 3]


def test_a_record_that_a_power_cut_has_cut_off_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_step(patch, 8, stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder)
    metrics = RunFolder(folder.parent / "run").metrics
    metrics.write_bytes(metrics.read_bytes()[:-9])
    finetune.train(output=folder.parent / "run", resume=True)
    assert recorded_epochs(folder) == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch-size", "8"], r"the loss of step 2 became (nan|inf) at learning rate \S+ on .*\d\d\.png"),
        (["--batch-size", "28"], r"the validation loss of epoch 1 became nan; the saves before it are kept"),
    ],
    ids=["step", "validation"],
)
def test_a_training_that_diverges_ends_with_its_own_code_and_keeps_the_saves_before(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    from finetune.cli.main import main

    words = ["--model", "resnet18", "--no-use-pretrained", "--scenario", "large-similar", "--image-size", "32"]
    words += ["--optimizer", "sgd", "--warmup-epochs", "0", "--max-grad-norm", "0", "--epochs", "3", "--workers", "0"]
    words += ["--learning-rate", "1e38", "--trunk-learning-rate", "1e38"]
    code = main(["train", str(folder), "--output", str(folder.parent / "run"), *words, *options])
    errors = capsys.readouterr().err
    assert code == 5
    assert re.search(said, errors)
    assert "hint: train with a lower --learning-rate" in errors
    state = read_state(RunFolder(folder.parent / "run"), LoggingReporter())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.model.values() if tensor.is_floating_point())


def test_a_second_process_on_the_same_run_is_refused_by_name(folder: Path) -> None:
    train(folder)
    with (
        open_run(folder.parent / "run", resume=True, overwrite=False),
        pytest.raises(RunError, match=r"process \d+"),
    ):
        finetune.train(output=folder.parent / "run", resume=True)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(folder: Path) -> None:
    blocked = folder.parent / "file"
    blocked.write_text("")
    with pytest.raises((RunError, StorageError)):
        finetune.train(folder, output=blocked / "run")
