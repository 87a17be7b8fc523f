"""Epochs in an experiment tracker."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune
from finetune.config import TrainConfig
from finetune.errors import MissingExtraError
from finetune.runs.folder import RunFolder
from finetune.runs.reporting import LoggingReporter
from finetune.training.progress import Progress
from finetune.training.tracking import Tracking
from tests.training.exact_resume import write_images

RECORDER = """
import json, os
from types import SimpleNamespace

def note(what, values, step=None):
    with open(os.environ["NOTES"], "a") as file:
        print(json.dumps([what, values, step]), file=file)

def log(values, step=None, **_):
    note("log", values, step)
"""
STAND_INS = {
    "wandb": """
def init(project, **more):
    note("run", [project, more])
    return SimpleNamespace(id="7", name="7", log=log, finish=lambda: note("end", None))
config = SimpleNamespace(update=lambda values, allow_val_change: note("options", values))
""",
    "mlflow": """
utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=1000))
search_experiments = lambda filter_string: []
create_experiment = lambda name, **_: name
def start_run(experiment_id, **more):
    note("run", [experiment_id, {name: value for name, value in more.items() if name.startswith("run") and value}])
    return SimpleNamespace(info=SimpleNamespace(run_id="7"))
log_params = lambda values: note("options", values)
log_metrics = log
end_run = lambda: note("end", None)
""",
}
STAND_INS["trackio"] = STAND_INS["wandb"]
"""What accelerate calls of each package, writing down what it is called with: the packages themselves are large."""
BEGUN = {"wandb": {"name": "a run"}, "mlflow": {"run_name": "a run"}, "trackio": {"name": "a run"}}
GONE_ON_WITH = {
    "wandb": {"id": "7", "resume": "allow"},
    "mlflow": {"run_id": "7"},
    "trackio": {"name": "7", "resume": "allow"},
}


def test_tensorboard_gets_every_epoch(tmp_path: Path) -> None:
    run, progress = RunFolder(tmp_path), Progress()
    progress.history.start_loss, progress.history.start_accuracy = 2.0, 0.25
    tracking = Tracking("tensorboard", run, TrainConfig(data="images"), LoggingReporter())
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


@pytest.mark.parametrize("name", sorted(STAND_INS))
def test_every_other_tracker_gets_the_options_and_every_epoch_of_a_run(tmp_path: Path, name: str) -> None:
    packages, notes, run = tmp_path / "packages", tmp_path / "notes", tmp_path / "a run"
    about = packages / f"{name}-1.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (packages / f"{name}.py").write_text(RECORDER + STAND_INS[name])
    write_images(tmp_path / "data")
    begin = [str(tmp_path / "data"), "--model", "lenet5", "--epochs", "2", "--tracker", name]
    for words in (begin, ["--resume", "--epochs", "3"]):
        subprocess.run(
            [sys.executable, "-m", "finetune", "train", *words, "--output", str(run), "--quiet"],
            env={**os.environ, "PYTHONPATH": str(packages), "NOTES": str(notes)},
            check=True,
        )
    found = [json.loads(line) for line in notes.read_text().splitlines()]
    whats = ["run", "options", "log", "log", "log", "end"]
    assert [what for what, _, _ in found] == [*whats, "run", "log", "end"]
    assert [found[0][1], found[6][1]] == [["finetune", BEGUN[name]], ["finetune", GONE_ON_WITH[name]]]
    assert {"model": "lenet5", "epochs": 2}.items() <= found[1][1].items()
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    start, *epochs = (event for event in events if event["event"] in ("start", "epoch"))
    for (_, values, step), event in zip([*found[2:5], found[7]], [start, *epochs], strict=True):
        assert step == event.get("epoch", 0)
        assert values["valid_loss"] == pytest.approx(event["valid_loss"])
        assert values["valid_accuracy"] == event["valid_accuracy"]


def test_a_run_that_the_tracker_has_lost_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun: list[dict[str, Any]] = []

    def init_trackers(self: Accelerator, project: str, *, init_kwargs: dict[str, Any], config: object = None) -> None:
        begun.append(init_kwargs["wandb"])
        if "id" in begun[-1]:
            raise LookupError("no such run")

    monkeypatch.setattr(Accelerator, "init_trackers", init_trackers)
    monkeypatch.setattr(Accelerator, "get_tracker", lambda *_, **__: SimpleNamespace(id=f"run {len(begun)}"))
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: ["wandb"])
    run, reporter = RunFolder(tmp_path / "here"), LoggingReporter()
    run.path.mkdir()
    with caplog.at_level("WARNING", logger="finetune"):
        trackings = [Tracking("wandb", run, TrainConfig(data="images"), reporter) for _ in range(2)]
    assert begun == [{"name": "here"}, {"id": "run 1", "resume": "allow"}, {"name": "here"}]
    assert json.loads(run.trackers.read_text()) == {"wandb": "run 3"}
    assert caplog.messages == ["wandb cannot go on with its run run 1 (no such run): a new one begins."]
    assert not any(tracking.has_failed for tracking in trackings)


def test_a_name_that_the_disk_refuses_stops_no_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Accelerator, "init_trackers", lambda *_, **__: None)
    monkeypatch.setattr(Accelerator, "get_tracker", lambda *_, **__: SimpleNamespace(id="7"))
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: ["wandb"])
    (tmp_path / "checkpoints").write_text("no folder")
    with caplog.at_level("WARNING", logger="finetune"):
        tracking = Tracking("wandb", RunFolder(tmp_path), TrainConfig(data="images"), LoggingReporter())
    assert not tracking.has_failed
    assert caplog.messages[-1].endswith("a resume will begin a new run in wandb.")


@pytest.mark.parametrize("place", ["init_trackers", "log"])
def test_a_tracker_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    calls = []

    def unreachable(*_: object, **__: object) -> None:
        calls.append(place)
        raise ConnectionError("the server does not answer")

    monkeypatch.setattr(Accelerator, place, unreachable)
    write_images(tmp_path / "data")
    options = {"model": "lenet5", "epochs": 3, "tracker": "tensorboard", "workers": 0}
    with caplog.at_level("WARNING", logger="finetune"):
        run = finetune.train(tmp_path / "data", output=tmp_path / "run", **options)
    assert sum("tensorboard fails (the server does not answer)" in line for line in caplog.messages) == 1
    assert len(calls) == 1
    assert [event["event"] for event in RunFolder(run.folder).events()].count("epoch") == 3


@pytest.mark.parametrize("begin", [finetune.train, finetune.tune])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_made(
    tmp_path: Path, begin: Callable[..., object]
) -> None:
    with pytest.raises(MissingExtraError, match="--tracker trackio needs the package trackio"):
        begin(tmp_path, output=tmp_path / "run", tracker="trackio")
    assert not list(tmp_path.iterdir())
