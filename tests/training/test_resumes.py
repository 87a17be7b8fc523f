"""What a resume can go on from: any end of a training, with any recipe, to the bits of one that was never stopped."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.errors import RunError
from finetune.runs.folder import RunFolder
from finetune.training import assemble, checkpoint, folds
from finetune.training.progress import Progress
from finetune.training.watchers import ProgressBar
from tests.training.exact_resume import write_images

pytestmark = pytest.mark.usefixtures("fresh_cache")

OPTIONS: dict[str, Any] = {
    "model": "timm/test_resnet",
    "use_pretrained": False,
    "scenario": "large-similar",
    "image_size": 32,
    "epochs": 4,
    "batch_size": 8,
    "workers": 0,
}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checkpoint, "TRAINING_PER_SAVE", 0)
    write_images(tmp_path / "data")
    return tmp_path / "data"


class Stopped(BaseException):
    """The training is dead."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something after a step of the training."""
    step_ended = ProgressBar.step_ended

    def acting(self: ProgressBar, progress: Progress) -> None:
        step_ended(self, progress)
        if progress.global_step == step:
            act()

    monkeypatch.setattr(ProgressBar, "step_ended", acting)


def die() -> None:
    raise Stopped


def events_of(run: Path, event: str) -> list[dict[str, Any]]:
    return [each for each in RunFolder(run).events() if each["event"] == event]


RECIPES: dict[str, dict[str, Any]] = {
    "mixup and cutmix": {"mixup": 0.4, "cutmix": 1.0},
    "random erasing and trivial": {"random_erasing": 0.5, "augmentation": "trivial"},
    "balanced sampling, one-cycle": {"imbalance": "balanced-sampling", "schedule": "one-cycle"},
    "class weights, smoothing, clipping": {
        "imbalance": "class-weights",
        "label_smoothing": 0.1,
        "max_grad_norm": 1.0,
        "schedule": "step",
    },
    "ema, parts, patience": {"averaging": "ema", "gradient_accumulation": 3, "patience": 2},
    "ends, plateau, hinge": {"averaging": "ends", "schedule": "plateau", "loss": "hinge"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_with_any_recipe_is_gone_on_with_to_the_same_bits(
    data: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    options = OPTIONS | RECIPES[recipe]
    whole = finetune.train(data, output=data.parent / "whole", **options).folder
    with monkeypatch.context() as patch:
        stop_at(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            finetune.train(data, output=data.parent / "run", **options)
    resumed = finetune.train(output=data.parent / "run", resume=True).folder
    assert RunFolder(resumed).model.read_bytes() == RunFolder(whole).model.read_bytes()


@pytest.mark.parametrize(
    "place", [(checkpoint.Checkpointer, "save"), (checkpoint, "sync_folder")], ids=["before", "in"]
)
def test_a_run_that_was_killed_before_its_first_save_was_whole_begins_again(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: tuple[object, str]
) -> None:
    whole = finetune.train(data, output=data.parent / "whole", **OPTIONS).folder
    run = data.parent / "run"
    with monkeypatch.context() as patch:
        patch.setattr(*place, lambda *_: die())
        with pytest.raises(Stopped):
            finetune.train(data, output=run, **OPTIONS)
    assert (run / "config.yaml").exists()
    assert len(list((run / "checkpoints").glob("*"))) == (place[1] == "sync_folder")
    with pytest.raises(RunError, match="--seed was 0 and is 3"):
        finetune.train(output=run, resume=True, seed=3)
    with caplog.at_level("INFO", logger="finetune"):
        finetune.train(output=run, resume=True)
    assert f"{run} was stopped before its first save: it begins again." in caplog.messages
    assert RunFolder(run).model.read_bytes() == RunFolder(whole).model.read_bytes()
    assert [event["epoch"] for event in events_of(run, "epoch")] == [1, 2, 3, 4]
    assert len(events_of(run, "start")) == 1


def test_a_run_whose_saves_are_all_damaged_is_not_trained_anew(data: Path) -> None:
    run = RunFolder(finetune.train(data, output=data.parent / "run", **OPTIONS).folder)
    run.model.unlink()
    shutil.rmtree(run.plots)
    for manifest in run.checkpoints.glob("*/manifest.json"):
        manifest.write_text("{")
    for _ in range(2):
        with pytest.raises(RunError, match="no training state"):
            finetune.train(output=run.path, resume=True)
    assert len(list(run.checkpoints.glob("*/model.safetensors"))) > 1


def test_a_cross_validation_killed_as_it_began_begins_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(folds, "write_split_csv", lambda *_: die())
        with pytest.raises(Stopped):
            finetune.train(data, output=data.parent / "run", **OPTIONS, folds=2)
    finetune.train(output=data.parent / "run", resume=True)
    assert RunFolder(data.parent / "run").model.exists()


def test_a_finished_run_without_saves_is_not_trained_anew(data: Path) -> None:
    options = OPTIONS | {"scenario": "auto", "head": "knn"}
    run = RunFolder(finetune.train(data, output=data.parent / "run", **options).folder)
    before = run.model.read_bytes()
    with pytest.raises(RunError, match="no training state"):
        finetune.train(output=run.path, resume=True, epochs=5)
    assert run.model.read_bytes() == before


def test_a_run_of_no_epochs_can_be_given_some(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A solved head, as few images are given by default."""
    options = OPTIONS | {"scenario": "small-similar", "epochs": 0, "mixup": 0.2, "patience": 3}
    with caplog.at_level("WARNING", logger="finetune"):
        run = finetune.train(data, output=data.parent / "run", **options).folder
    assert "without an epoch --mixup, --patience had no effect." in caplog.messages
    assert not events_of(run, "epoch")
    finetune.train(output=run, resume=True, epochs=2)
    assert [event["epoch"] for event in events_of(run, "epoch")] == [1, 2]
    with pytest.raises(RunError, match="--seed was 0 and is 1"):
        finetune.train(output=run, resume=True, epochs=3, seed=1)


def unimproving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no epoch be better than the start."""
    monkeypatch.setattr(Progress, "is_best", lambda self, accuracy: not self.has_started)


def test_a_run_that_stopped_early_goes_on_if_it_is_made_longer_and_stops_early_again(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unimproving(monkeypatch)
    options = OPTIONS | {"patience": 2, "epochs": 9}
    runs = [data.parent / name for name in ("run", "stopped")]
    for run in runs:
        finetune.train(data, output=run, **options)
        assert len(events_of(run, "epoch")) == 2
        finetune.train(output=run, resume=True)
        assert len(events_of(run, "epoch")) == 2, "nothing is to be done"
    finetune.train(output=runs[0], resume=True, epochs=20)
    assert len(events_of(runs[0], "epoch")) == 4
    with monkeypatch.context() as patch:
        stop_at(patch, 10, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            finetune.train(output=runs[1], resume=True, epochs=20)
    finetune.train(output=runs[1], resume=True)
    assert len(events_of(runs[1], "epoch")) == 4
    losses = [[event["train_loss"] for event in events_of(run, "epoch")] for run in runs]
    assert losses[0] == losses[1]


def test_the_frozen_layers_may_be_computed_anew_in_the_middle_of_a_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is cleared between two phases that learn from it, and a kill leaves it half filled."""
    options = OPTIONS | {"phases": "head:2,top1:2", "epochs": "auto", "boundary_cache": "always", "views": 2}
    whole = finetune.train(data, output=data.parent / "whole", **options).folder
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "second"))
    with monkeypatch.context() as patch:
        stop_at(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            finetune.train(data, output=data.parent / "run", **options)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "third"))
    with monkeypatch.context() as patch:
        fill = assemble.TrunkPass.take
        taken: list[str] = []

        def dying(self: Any, sha256: str, prepared: Any) -> None:
            taken.append(sha256)
            if len(taken) == 11:
                die()
            fill(self, sha256, prepared)

        patch.setattr(assemble.TrunkPass, "take", dying)
        with pytest.raises(Stopped):
            finetune.train(output=data.parent / "run", resume=True)
    finetune.train(output=data.parent / "run", resume=True)
    assert RunFolder(data.parent / "run").model.read_bytes() == RunFolder(whole).model.read_bytes()
