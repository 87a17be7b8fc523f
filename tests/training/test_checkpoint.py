"""Training state: what is written, verified, kept, and gone on from."""

import copy
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from finetune.data.loaders import EpochSampler
from finetune.errors import RunError, StorageError
from finetune.runs.folder import RunFolder
from finetune.training import checkpoint
from finetune.training.checkpoint import Checkpointer, read_state, restore_state
from finetune.training.loop import run_epochs
from finetune.training.progress import History, Progress
from finetune.training.step import Learner
from tests.training.conftest import coloured_images

IDENTITY = {"options": {"seed": 0}, "data_fingerprint": "x"}


class Heard:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


class StopAt:
    """A watcher that stops at a step, as a signal would."""

    def __init__(self, global_step: int) -> None:
        self.global_step = global_step

    def epoch_started(self, progress: Progress) -> None: ...
    def epoch_ended(self, progress: Progress) -> None: ...
    def step_ended(self, progress: Progress) -> None:
        if progress.global_step == self.global_step:
            progress.stop_reason, progress.is_interrupted = "test", True


class KeyedImages(torch.utils.data.Dataset[Any]):
    """Images by (epoch, index), as the street's sampler asks for them."""

    def __init__(self, count: int) -> None:
        self.images = coloured_images(count)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.images[key[1]]


def street_loaders() -> dict[str, DataLoader[Any]]:
    images = KeyedImages(31)
    return {
        "train": DataLoader(images, batch_sampler=EpochSampler(31, 10, seed=0), generator=torch.Generator()),
        "valid": DataLoader(coloured_images(12, seed=1), batch_size=5, generator=torch.Generator()),
    }


@pytest.fixture(autouse=True)
def _every_epoch_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "TRAINING_PER_SAVE", 0)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def train(learner: Learner, run: RunFolder, progress: Progress, *, epochs: int = 4, stop_at: int = -1) -> Progress:
    checkpointer = Checkpointer(run, learner, identity=IDENTITY, reporter=Heard())  # type: ignore[arg-type]
    run_epochs(learner, street_loaders(), epochs, progress=progress, watchers=[StopAt(stop_at), checkpointer])
    return progress


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "step", "plateau", "one-cycle", "constant"])
@pytest.mark.parametrize("stop_at", [6, 8])
def test_a_resumed_training_ends_at_the_same_bits(
    tmp_path: Path, make_learner: Callable[..., Learner], optimizer: str, schedule: str, stop_at: int
) -> None:
    """Stopped in mid-epoch (6) and with an epoch's last step done but its validation not (8)."""
    whole = make_learner(optimizer=optimizer, schedule=schedule)
    whole_progress = (
        train(whole, RunFolder(tmp_path / "whole"), Progress()) if (tmp_path / "whole").mkdir() is None else None
    )
    (tmp_path / "cut").mkdir()
    cut = RunFolder(tmp_path / "cut")
    train(make_learner(optimizer=optimizer, schedule=schedule), cut, Progress(), stop_at=stop_at)
    torch.manual_seed(99)  # a new process has another generator state
    resumed = make_learner(seed=5, optimizer=optimizer, schedule=schedule)
    progress = restore_state(read_state(cut, Heard()), resumed, is_longer=False)  # type: ignore[arg-type]
    assert progress.global_step == stop_at
    train(resumed, cut, progress)
    assert whole_progress is not None
    series, expected = progress.history.series(), whole_progress.history.series()
    assert {name: series[name] for name in series if name != "seconds"} == {
        name: expected[name] for name in expected if name != "seconds"
    }
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_longer_training_goes_on_where_the_longer_schedule_is(
    run: RunFolder, make_learner: Callable[..., Learner]
) -> None:
    """Also from the end of the shorter one, where its rates had fallen to nothing."""
    train(make_learner(epochs=2), run, Progress(), epochs=2)
    longer = make_learner(epochs=6)
    progress = restore_state(read_state(run, Heard()), longer, is_longer=True)  # type: ignore[arg-type]
    reference = make_learner(epochs=6)
    rates = []
    for _ in range(progress.global_step):
        reference.optimizer.step()
        reference.schedule.step_ended()
        rates.append(reference.optimizer.param_groups[0]["lr"])
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])
    train(longer, run, progress, epochs=6)
    assert progress.epoch == 6


def test_a_damaged_save_is_passed_over_and_named(run: RunFolder, make_learner: Callable[..., Learner]) -> None:
    train(make_learner(), run, Progress())
    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    heard = Heard()
    state = read_state(run, heard)  # type: ignore[arg-type]
    assert state.folder < newest
    assert newest.name in heard.said[0]
    assert "checksum" in heard.said[0]
    assert restore_state(state, make_learner(), is_longer=False).epoch == 3
    assert not newest.exists()  # nor will a later save take it for its own


def test_the_best_of_the_save_before_is_kept_too(run: RunFolder, make_learner: Callable[..., Learner]) -> None:
    """Else the newest could not be fallen back from, after an epoch that was the best."""
    learner, progress = make_learner(), Progress(history=History(best_accuracy=0.1))
    for step, best_step in ((0, 0), (10, 10), (20, 10), (30, 30)):
        progress.global_step, progress.best_step = step, best_step
        progress.best_weights = {name: tensor + best_step for name, tensor in learner.model.state_dict().items()}
        if step == best_step:
            learner.model.load_state_dict(progress.best_weights)
        checkpoint.write_state(run, learner, progress, identity=IDENTITY)
    assert sorted(folder.name[-2:] for folder in run.checkpoints.glob("step-*")) == ["10", "20", "30"]
    (run.checkpoints / "step-000000030" / "state.json").write_text("{}")
    restored = restore_state(read_state(run, Heard()), make_learner(), is_longer=False)  # type: ignore[arg-type]
    assert (restored.global_step, restored.best_step) == (20, 10)


def test_the_best_weights_survive_a_save_that_was_refused(run: RunFolder, make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    progress = train(learner, run, Progress(), epochs=2)
    best = {name: tensor.clone() for name, tensor in progress.best_weights.items()}
    shutil.rmtree(run.checkpoints / f"step-{progress.best_step:09d}")
    progress.global_step = 99
    checkpoint.write_state(run, learner, progress, identity=IDENTITY)
    restored = restore_state(read_state(run, Heard()), make_learner(), is_longer=False)  # type: ignore[arg-type]
    assert all(torch.equal(restored.best_weights[name], tensor) for name, tensor in best.items())


def test_no_save_that_verifies_is_an_error(run: RunFolder, make_learner: Callable[..., Learner]) -> None:
    train(make_learner(), run, Progress(), epochs=1)
    for manifest in run.checkpoints.glob("*/manifest.json"):
        manifest.write_text("{")
    with pytest.raises(RunError, match="no training state"):
        read_state(run, Heard())  # type: ignore[arg-type]


def test_the_last_two_and_the_best_are_kept(run: RunFolder, make_learner: Callable[..., Learner]) -> None:
    progress = train(make_learner(), run, Progress())
    kept = sorted(folder.name for folder in run.checkpoints.glob("step-*"))
    assert kept == sorted({f"step-{progress.best_step:09d}", "step-000000012", "step-000000016"})
    assert (run.checkpoints / "latest").read_text().strip() == "step-000000016"
    assert not list(run.checkpoints.glob(".*"))


def test_epochs_shorter_than_saves_are_not_all_saved(
    run: RunFolder, make_learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost by it: the last save carries the best weights of an epoch that had no save of its own."""
    monkeypatch.setattr(checkpoint, "TRAINING_PER_SAVE", 1e9)
    progress = train(make_learner(), run, Progress())
    assert sorted(folder.name for folder in run.checkpoints.glob("step-*")) == ["step-000000000", "step-000000016"]
    restored = restore_state(read_state(run, Heard()), make_learner(), is_longer=False)  # type: ignore[arg-type]
    assert restored.epoch == 4
    assert all(torch.equal(restored.best_weights[name], best) for name, best in progress.best_weights.items())


def test_nothing_is_pickled_and_json_is_strict(run: RunFolder, make_learner: Callable[..., Learner]) -> None:
    train(make_learner(), run, Progress(), epochs=1)
    files = {path.name for folder in run.checkpoints.glob("step-*") for path in folder.iterdir()}
    assert files == {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"}
    state = next(run.checkpoints.glob("step-*")) / "state.json"
    json.loads(state.read_text(), parse_constant=pytest.fail)


class FileWith:
    """A file some of whose methods are others."""

    def __init__(self, file: Any, **methods: Callable[..., Any]) -> None:
        self.file = file
        self.__dict__.update(methods)

    def __enter__(self) -> "FileWith":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_save_is_durable_before_it_gets_its_name(
    run: RunFolder, make_learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is written and synced, then the folder, then renamed, then the parent; then the pointer likewise."""
    happened: list[str] = []
    fsync, rename, replace, open_file = os.fsync, Path.rename, Path.replace, Path.open

    def note_open(self: Path, *arguments: Any, **options: Any) -> Any:
        file = open_file(self, *arguments, **options)

        def noted(what: str) -> Callable[..., Any]:
            def act(*data: bytes) -> None:
                happened.append(f"{what} {self.name}")
                getattr(file, what)(*data)

            return act

        return FileWith(file, write=noted("write"), flush=noted("flush")) if "wb" in arguments else file

    def note_fsync(descriptor: int) -> None:
        happened.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        happened.append(f"rename {Path(target).name}")
        return rename(self, target)

    def note_replace(self: Path, target: Path) -> Path:
        happened.append(f"replace {Path(target).name}")
        return replace(self, target)

    learner = make_learner()
    progress = Progress()
    progress.keep_best(learner.model, 0.5)
    monkeypatch.setattr(Path, "open", note_open)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(Path, "replace", note_replace)
    checkpoint.write_state(run, learner, progress, identity=IDENTITY)
    part = f".step-000000000.{os.getpid()}.part"
    written = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]
    pointer = f".latest.{os.getpid()}.part"
    assert happened == [
        *(f"{what} {name}" for name in written for what in ("write", "flush", "fsync")),
        f"fsync {part}",
        "rename step-000000000",
        "fsync checkpoints",
        *(f"{what} {pointer}" for what in ("write", "flush", "fsync")),
        "replace latest",
        "fsync checkpoints",
    ]


def test_a_full_disk_keeps_the_old_save_and_stops_at_the_third_refusal(
    run: RunFolder, make_learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner()
    progress = train(learner, run, Progress(), epochs=1)
    before = {path: path.stat().st_size for path in run.checkpoints.rglob("*")}
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    heard = Heard()
    checkpointer = Checkpointer(run, learner, identity=IDENTITY, reporter=heard)  # type: ignore[arg-type]
    checkpointer.save(progress)
    checkpointer.save(progress)
    assert len(heard.said) == 2
    with pytest.raises(StorageError, match="3 saves in a row"):
        checkpointer.save(progress)
    assert {path: path.stat().st_size for path in run.checkpoints.rglob("*")} == before


def test_the_optimiser_of_other_parameters_is_refused(run: RunFolder, make_learner: Callable[..., Learner]) -> None:
    train(make_learner(), run, Progress(), epochs=1)
    other = make_learner()
    other.optimizer = torch.optim.AdamW(other.model.fc.parameters())
    with pytest.raises(RunError, match="other parameters"):
        restore_state(read_state(run, Heard()), copy.copy(other), is_longer=False)  # type: ignore[arg-type]


class Killed(BaseException):
    """Stands in for a kill: nothing that cleans up after an ordinary error sees it."""


def count_and_kill(patch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Let the `at`-th write, fsync, rename or replace, counted from 0, be the last thing that happens."""
    happened: list[str] = []

    def deadly(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            if len(happened) >= at:
                raise Killed
            happened.append(name)
            return call(*arguments, **options)

        return act

    open_file = Path.open

    def open_deadly(self: Path, *arguments: Any, **options: Any) -> Any:
        file = open_file(self, *arguments, **options)
        mode = arguments[0] if arguments else options.get("mode", "r")
        if "w" in mode:
            return FileWith(file, write=deadly(f"write {self.name}", file.write))
        return file

    patch.setattr(Path, "open", open_deadly)
    patch.setattr(os, "fsync", deadly("fsync", os.fsync))
    for name in ("rename", "replace"):
        patch.setattr(Path, name, deadly(name, getattr(Path, name)))
    return happened


class DyingSave:
    """Saves, but in the second epoch dies at the `at`-th operation, counted from 0."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.happened: list[str] = []
        self.save = checkpoint.write_state

    def __call__(self, run: RunFolder, learner: Learner, progress: Progress, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if progress.epoch == 2:
                self.happened = count_and_kill(patch, self.at)
            self.save(run, learner, progress, **options)


def test_a_kill_at_any_write_fsync_or_rename_of_a_save_costs_no_more_than_it(
    tmp_path: Path, make_learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, deaths = make_learner(), set()
    (tmp_path / "whole").mkdir()
    train(whole, RunFolder(tmp_path / "whole"), Progress(), epochs=3)
    for at in itertools.count():
        run, save = RunFolder(tmp_path / str(at)), DyingSave(at)
        run.path.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_state", save)
            try:
                train(make_learner(), run, Progress(), epochs=3)
                break  # there are no more operations to die at
            except Killed:
                deaths.add(save.happened[-1].split()[0] if at else "nothing")
        resumed = make_learner(seed=7)
        progress = restore_state(read_state(run, Heard()), resumed, is_longer=False)  # type: ignore[arg-type]
        assert progress.epoch in (1, 2)
        assert progress.epoch == 1 or "rename" in save.happened
        train(resumed, run, progress, epochs=3)
        assert not list(run.checkpoints.glob(".*")), "what the kill left lying about"
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), (save.happened, name)
    assert at > 14
    assert deaths == {"nothing", "write", "fsync", "rename", "replace"}
