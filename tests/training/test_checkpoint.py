"""Training state: what is written, verified, kept, and gone on from."""

import copy
import errno
import hashlib
import itertools
import json
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


def test_a_save_that_was_to_be_replaced_when_the_process_was_killed_is_put_back(
    run: RunFolder, make_learner: Callable[..., Learner]
) -> None:
    train(make_learner(), run, Progress(), epochs=1)
    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    newest.rename(newest.with_name(f".{newest.name}.123.old.part"))
    assert read_state(run, Heard()).folder == newest  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["[]", "{}", '{"model.safetensors": 3}'])
def test_a_manifest_that_is_none_is_damage(run: RunFolder, make_learner: Callable[..., Learner], text: str) -> None:
    train(make_learner(), run, Progress())
    newest, heard = sorted(run.checkpoints.glob("step-*"))[-1], Heard()
    (newest / "manifest.json").write_text(text)
    assert read_state(run, heard).folder < newest  # type: ignore[arg-type]
    assert f"passed over the damaged training state {newest.name}" in heard.said[0]


@pytest.mark.parametrize("place", ["", "progress"])
def test_fields_that_this_version_does_not_know_are_refused(
    run: RunFolder, make_learner: Callable[..., Learner], place: str
) -> None:
    train(make_learner(), run, Progress())
    newest, heard = sorted(run.checkpoints.glob("step-*"))[-1], Heard()
    state, manifest = (json.loads((newest / name).read_text()) for name in ("state.json", "manifest.json"))
    (state[place] if place else state)["colour"] = "blue"
    text = json.dumps(state)
    manifest["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (newest / "state.json").write_text(text)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert read_state(run, heard).folder < newest  # type: ignore[arg-type]
    assert "state.json has other fields: colour" in heard.said[0]


def test_a_disk_that_cannot_be_read_for_a_while_costs_no_save(
    run: RunFolder, make_learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_learner(), run, Progress())
    saves = sorted(run.checkpoints.iterdir())

    def refuse(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(StorageError, match=r"cannot be read: .*Input/output error"):
            read_state(run, Heard())  # type: ignore[arg-type]
    assert sorted(run.checkpoints.iterdir()) == saves


def test_where_the_best_weights_are_lost_those_of_the_newest_save_take_their_place(
    run: RunFolder, make_learner: Callable[..., Learner]
) -> None:
    learner, heard = make_learner(), Heard()
    progress = Progress(epoch=2, history=History(best_accuracy=0.9, best_epoch=1, valid_accuracy=[0.9, 0.7]))
    for step, best_step in ((10, 10), (20, 10)):
        progress.global_step, progress.best_step = step, best_step
        progress.best_weights = {name: tensor + 1 for name, tensor in learner.model.state_dict().items()}
        checkpoint.write_state(run, learner, progress, identity=IDENTITY)
    shutil.rmtree(run.checkpoints / "step-000000010")
    restored = restore_state(read_state(run, heard), make_learner(seed=7), is_longer=False)  # type: ignore[arg-type]
    assert "lost (step-000000010/manifest.json is missing); those of step-000000020" in heard.said[0]
    assert (restored.best_step, restored.history.best_epoch, restored.history.best_accuracy) == (20, 2, 0.7)
    assert all(torch.equal(restored.best_weights[name], own) for name, own in learner.model.state_dict().items())


def test_ten_minutes_without_a_save_are_followed_by_one(
    run: RunFolder, make_learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch: the clock moves on by four minutes a step."""
    clock = itertools.count(0.0, 240.0)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    now, saved = [0.0], []

    class Clock(StopAt):
        def step_ended(self, progress: Progress) -> None:
            now[0] = next(clock)

    monkeypatch.setattr(checkpoint, "write_state", lambda run, learner, progress, **_: saved.append(progress.step))
    checkpointer = Checkpointer(run, make_learner(), identity=IDENTITY, reporter=Heard())  # type: ignore[arg-type]
    run_epochs(make_learner(), street_loaders(), 1, progress=Progress(), watchers=[Clock(-1), checkpointer])
    assert saved == [0, 4, 0]
