"""Signals in a step, an evaluation or a save, and a second one: what is saved, and with which code the process ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
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


DISTURBED = """
import os, signal, sys
from finetune.training import checkpoint, loop
checkpoint.TRAINING_PER_SAVE = 0
place, at, *numbers = sys.argv[1].split()
places = {"step": (loop, "train_step"), "evaluation": (loop, "evaluate_loss"), "save": (checkpoint, "_place")}
room, name = places[place]
work, calls = getattr(room, name), []

def disturbed(*arguments, **options):
    calls.append(name)
    if len(calls) == int(at):
        for number in numbers:
            os.kill(os.getpid(), getattr(signal, number))
    return work(*arguments, **options)

setattr(room, name, disturbed)
from finetune.cli.main import run_process
sys.argv[1:2] = []
run_process()
"""
WORDS = ["--model", "timm/test_resnet", "--no-use-pretrained", "--scenario", "large-similar", "--image-size", "32"]
WORDS += ["--epochs", "3", "--batch-size", "8", "--workers", "0", "--quiet"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("disturbance", "code", "saved"),
    [
        ("step 6 SIGTERM", 143, STEPS + 2),
        ("step 6 SIGINT", 130, STEPS + 2),
        ("evaluation 2 SIGTERM", 143, STEPS),
        ("evaluation 2 SIGTERM SIGTERM", 143, 0),
        ("evaluation 2 SIGINT SIGINT", 130, 0),
        ("save 2 SIGTERM", 143, STEPS + 1),
        ("save 2 SIGTERM SIGTERM", 143, 0),
    ],
)
def test_the_process_ends_with_the_code_of_its_signal(data: Path, disturbance: str, code: int, saved: int) -> None:
    """A second signal ends it at once: in an evaluation, or in a save, of which nothing is left then."""
    run = data.parent / "run"
    command = [sys.executable, "-c", DISTURBED, disturbance, "train", str(data), "--output", str(run), *WORDS]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert saved_step(run) == saved
    assert finetune.train(output=run, resume=True).metrics["valid"].images == 12
    assert not list(RunFolder(run).checkpoints.glob(".*"))


def test_an_interrupt_whose_save_the_disk_refuses_says_so(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.cli.main import main

    step_ended: Callable[[ProgressBar, Progress], None] = ProgressBar.step_ended

    def disturbed(self: ProgressBar, progress: Progress) -> None:
        step_ended(self, progress)
        if progress.global_step == STEPS + 2:
            monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ProgressBar, "step_ended", disturbed)
    code = main(["train", str(data), "--output", str(data.parent / "run"), *WORDS])
    errors = capsys.readouterr().err
    assert code == 6
    assert "error: interrupted, and the training state could not be saved" in errors
    assert "the state is saved" not in errors
    assert saved_step(data.parent / "run") == STEPS
