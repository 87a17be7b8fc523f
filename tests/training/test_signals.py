"""Signals in a step, an evaluation or a save, and a second one: what is saved, and with which code the process ends."""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.runs.folder import RunFolder
from finetune.runs.reporting import LoggingReporter
from finetune.training import checkpoint, loop
from finetune.training.checkpoint import read_state
from finetune.training.progress import Progress
from finetune.training.step import Learner
from finetune.training.watchers import ProgressBar
from tests.training.exact_resume import STEPS, write_images

pytestmark = pytest.mark.usefixtures("fresh_cache")

OPTIONS: dict[str, Any] = {
    "model": "timm/test_resnet",
    "use_pretrained": False,
    "scenario": "large-similar",
    "image_size": 32,
    "epochs": 3,
    "batch_size": 8,
    "workers": 0,
}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checkpoint, "TRAINING_PER_SAVE", 0)
    write_images(tmp_path / "data")
    return tmp_path / "data"


def saved_step(run: Path) -> int:
    return int(read_state(RunFolder(run), LoggingReporter()).values["progress"]["global_step"])


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_in_a_save_lets_it_finish_and_ends_at_the_next_step(
    data: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, kind: type[BaseException]
) -> None:
    write, happened = checkpoint._place, []

    def interrupted(target: Path, files: Mapping[str, bytes]) -> None:
        if target.name == f"step-{STEPS:09d}":
            os.kill(os.getpid(), number)
            happened.append(target.name)
        write(target, files)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_place", interrupted)
        with pytest.raises(kind) as ended:
            finetune.train(data, output=data.parent / "run", **OPTIONS)
    if kind is SystemExit:
        assert ended.value.code == 128 + number  # type: ignore[attr-defined]
    assert happened
    assert saved_step(data.parent / "run") == STEPS + 1
    assert finetune.train(output=data.parent / "run", resume=True).metrics["valid"].images == 12
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("place", ["a step", "an evaluation"])
def test_a_signal_is_acted_on_at_the_end_of_what_it_comes_in(
    data: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: signal.Signals, kind: type[BaseException]
) -> None:
    undisturbed = finetune.train(data, output=data.parent / "whole", **OPTIONS).folder
    name, at = {"a step": ("train_step", STEPS + 2), "an evaluation": ("evaluate_loss", 2)}[place]
    work, calls = getattr(loop, name), []

    def disturbed(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return work(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, name, disturbed)
        with pytest.raises(kind) as ended:
            finetune.train(data, output=data.parent / "run", **OPTIONS)
    if kind is SystemExit:
        assert ended.value.code == 128 + number  # type: ignore[attr-defined]
    assert saved_step(data.parent / "run") == {"a step": STEPS + 2, "an evaluation": STEPS}[place]
    resumed = finetune.train(output=data.parent / "run", resume=True).folder
    assert RunFolder(resumed).model.read_bytes() == RunFolder(undisturbed).model.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_leaves_the_save_before(
    data: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    step_ended: Callable[[ProgressBar, Progress], None] = ProgressBar.step_ended

    def impatient(self: ProgressBar, progress: Progress) -> None:
        step_ended(self, progress)
        if progress.global_step == STEPS + 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "step_ended", impatient)
        with pytest.raises(SystemExit) as ended:
            finetune.train(data, output=data.parent / "run", **OPTIONS)
    assert ended.value.code == 128 + number
    assert saved_step(data.parent / "run") == STEPS
    assert finetune.train(output=data.parent / "run", resume=True).metrics["valid"].images == 12


def test_out_of_memory_with_one_image_ends_with_its_own_code(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.cli.main import main
    from finetune.training import step

    def full(learner: Learner, *_: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(step, "_add_gradients", full)
    words = ["--model", "timm/test_resnet", "--no-use-pretrained", "--scenario", "large-similar", "--image-size", "32"]
    code = main(["train", str(data), "--output", str(data.parent / "run"), "--epochs", "1", *words, "--workers", "0"])
    errors = capsys.readouterr().err
    assert code == 7
    assert "a batch is computed in 2 parts" in errors
    assert "a batch is computed in 32 parts" in errors
    assert "error: out of memory" in errors
    assert saved_step(data.parent / "run") == 0
