"""Epochs in an experiment tracker."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune
from finetune.config import TrainConfig
from finetune.errors import MissingExtraError
from finetune.runs.folder import RunFolder
from finetune.training.progress import Progress
from finetune.training.tracking import Tracking


def test_tensorboard_gets_every_epoch(tmp_path: Path) -> None:
    run, progress = RunFolder(tmp_path), Progress()
    progress.history.start_loss, progress.history.start_accuracy = 2.0, 0.25
    tracking = Tracking("tensorboard", run, TrainConfig(data="images"))
    tracking.epoch_started(progress)
    for epoch in (1, 2):
        progress.epoch = progress.global_step = epoch
        for name in progress.history.series():
            getattr(progress.history, name).append(1 / epoch)
        tracking.epoch_ended(progress)
    tracking.close()
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("valid_loss")] == [(0, 2.0), (1, 1.0), (2, 0.5)]
    assert [event.step for event in events.Scalars("train_accuracy")] == [1, 2]


@pytest.mark.parametrize("begin", [finetune.train, finetune.tune])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_made(
    tmp_path: Path, begin: Callable[..., object]
) -> None:
    with pytest.raises(MissingExtraError, match="--tracker trackio needs the package trackio"):
        begin(tmp_path, output=tmp_path / "run", tracker="trackio")
    assert not list(tmp_path.iterdir())
