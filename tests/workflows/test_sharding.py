"""FSDP, as accelerate's launcher switches it on: the same training as in one process, divided among two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli.main import main
from tests.training.exact_resume import write_images
from tests.workflows.test_processes import PROJECT, numbers, saving_often

FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"]
FSDP += ["--fsdp_min_num_params", "1000", "--num_processes", "2"]
VIT = ["--model", "timm/test_vit", "--no-use-pretrained", "--image-size", "32", "--scenario", "large-different"]
# Of 31 images the last batch is a single one: a process has none. Three parts are more than some shares have images.
LOOP = ["--batch-size", "5", "--workers", "0", "--quiet"]
PARTS = [*LOOP, "--epochs", "2", "--gradient-accumulation", "3"]
STOP = """
import os, signal
take_step = step.train_step
def stopped(*arguments, **options):
    if options["step"] == 10 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return take_step(*arguments, **options)
from finetune.training import loop
loop.train_step = stopped
"""


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", *FSDP, *words]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_images(tmp_path / "data")
    return tmp_path / "data"


def assert_alike(one: Path, other: Path) -> None:
    """Compare the losses of every epoch."""
    expected, found = numbers(one), numbers(other)
    losses = [name for name in expected if "loss" in name]
    assert len(losses) >= 4
    assert {name: found[name] for name in losses} == pytest.approx({name: expected[name] for name in losses}, abs=1e-5)


def test_two_processes_train_what_one_does_and_save_what_one_can_go_on_with(data: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    options = [*VIT, *PARTS, "--optimizer", "adamw", "--max-grad-norm", "1"]
    assert main(["train", str(data), *options, "--output", str(runs[0])]) == 0
    done = launch("-m", "finetune", "train", str(data), *options, "--output", str(runs[1]))
    assert done.returncode == 0, done.stderr
    assert_alike(*runs)
    for run in runs:
        assert main(["train", "--output", str(run), "--resume", "--epochs", "3", "--quiet"]) == 0
    assert_alike(*runs)


def test_batch_norm_and_a_frozen_body_are_divided_too(data: Path, tmp_path: Path) -> None:
    network = ["--model", "timm/test_resnet", "--no-use-pretrained", "--image-size", "32"]
    options = [*network, *LOOP, "--sync-batch-norm", "--scenario", "large-different", "--phases", "head:1,all:1"]
    runs = [tmp_path / "one", tmp_path / "two"]
    assert main(["train", str(data), *options, "--output", str(runs[0])]) == 0
    done = launch("-m", "finetune", "train", str(data), *options, "--output", str(runs[1]))
    assert done.returncode == 0, done.stderr
    assert_alike(*runs)


def test_a_resume_is_exact(data: Path, tmp_path: Path) -> None:
    network = ["small-different" if word == "large-different" else word for word in VIT]
    options = [*network, *PARTS, "--averaging", "ends", "--head-stages", "all"]
    whole = launch(saving_often(tmp_path), "train", str(data), *options, "--output", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "parts"
    stopped = launch(saving_often(tmp_path, STOP), "train", str(data), *options, "--output", str(run))
    assert stopped.returncode != 0
    last = max((run / "checkpoints").glob("step-*"))
    assert json.loads((last / "state.json").read_text())["progress"]["global_step"] == 10
    resumed = launch(saving_often(tmp_path), "train", "--output", str(run), "--resume", "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_what_cannot_be_divided_is_said(data: Path, tmp_path: Path) -> None:
    done = launch(
        "-m", "finetune", "train", str(data), *VIT, *PARTS, "--averaging", "ema", "--output", str(tmp_path / "r")
    )
    assert done.returncode != 0
    assert "error: --averaging ema follows the whole network at every step, FSDP divides it" in done.stderr
    assert "finetune/training" not in done.stderr


def test_where_nothing_is_trained_nothing_is_divided_and_epochs_can_follow(data: Path, tmp_path: Path) -> None:
    run, options = tmp_path / "run", ["--model", "timm/test_resnet", "--no-use-pretrained", "--image-size", "32"]
    options += ["--scenario", "small-similar", "--epochs", "0", *LOOP]
    done = launch("-m", "finetune", "train", str(data), *options, "--output", str(run))
    assert done.returncode == 0, done.stderr
    longer = launch("-m", "finetune", "train", "--output", str(run), "--resume", "--epochs", "1", "--quiet")
    assert longer.returncode == 0, longer.stderr
    assert any(name.endswith("epoch/train_loss") for name in numbers(run))
