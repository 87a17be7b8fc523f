"""A disk that fills up while a model trains, or that may only be read: a memory file system stands in for it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.runs.folder import RunFolder
from finetune.runs.reporting import LoggingReporter
from finetune.training.checkpoint import read_state
from tests.training.exact_resume import write_images

TRAIN = """
import sys
from finetune.training import checkpoint
checkpoint.TRAINING_PER_SAVE = 0
from finetune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
OPTIONS = ["--model", "timm/test_resnet", "--no-use-pretrained", "--scenario", "large-similar", "--image-size", "32"]


def train(*words: str) -> list[str]:
    return [sys.executable, "-c", TRAIN, "train", *words, "--workers", "0"]


def namespace_is_allowed() -> bool:
    unshare = shutil.which("unshare")
    command = [unshare or "", "-rm", "true"]
    return unshare is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


def in_namespace(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script that mounts a file system of its own, and ends with 99 where it may not."""
    command = ["unshare", "-rm", "bash", "-c", script, "sh", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode == 99:
        pytest.skip("this kernel mounts no memory file system in a user namespace")
    return ended


@pytest.mark.skipif(not namespace_is_allowed(), reason="this kernel allows no user namespace with a file system in it")
def test_a_full_disk_keeps_the_saves_there_are_and_ends_with_its_own_code(tmp_path: Path) -> None:
    data, disk, rescued = tmp_path / "images", tmp_path / "disk", tmp_path / "rescued"
    write_images(data)
    disk.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ample = train(str(data), "--output", str(tmp_path / "ample"), "--epochs", "1", *OPTIONS, "--quiet")
    subprocess.run(ample, check=True, env=environment, stdout=subprocess.DEVNULL)
    a_save = sum(file.stat().st_size for file in max((tmp_path / "ample/checkpoints").glob("step-*")).iterdir())
    words = train(str(data), "--output", str(disk / "run"), "--epochs", "9", *OPTIONS)
    script = 'mount -t tmpfs -o size="$1" none "$2" || exit 99; shift; to=$2; at=$1; shift 2; "$@"; code=$?; '
    script += 'cp -r "$at/run" "$to"; exit $code'
    ended = in_namespace(script, str(int(2.5 * a_save)), str(disk), str(rescued), *words)
    assert ended.returncode == 6, ended.stderr
    assert ended.stderr.count("the training state could not be saved") == 2
    assert "refused 3 saves in a row" in ended.stderr
    assert "then --resume" in ended.stderr
    state = read_state(RunFolder(rescued), LoggingReporter())
    assert state.values["progress"]["epoch"] == 1
    assert not list((rescued / "checkpoints").glob(".*"))
    resumed = train("--output", str(rescued), "--resume", "--quiet")
    subprocess.run(resumed, check=True, env=environment, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (rescued / "metrics.jsonl").read_text().splitlines()]
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == list(range(1, 10))


@pytest.mark.skipif(not namespace_is_allowed(), reason="this kernel allows no user namespace with a file system in it")
@pytest.mark.parametrize(
    "words",
    [
        ["train", "DATA", "--output", "DISK/run"],
        ["tune", "DATA", "--output", "DISK/study", "--trials", "1"],
        ["train", "--output", "DISK/old", "--resume", "--epochs", "2"],
        ["train", "DATA", "--output", "DISK/old", "--overwrite"],
        ["predict", "DISK/old", "DATA/valid", "--format", "csv", "--output", "DISK/found.csv"],
        ["config", "write", "DISK/mine.yaml"],
    ],
    ids=["train", "tune", "resume", "overwrite", "predict", "config"],
)
def test_what_may_only_be_read_is_said_in_a_line(words: list[str], run_on_disk: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = [word.replace("DATA", str(run_on_disk.parent / "images")).replace("DISK", str(disk)) for word in words]
    script = 'mount -t tmpfs none "$1" && cp -r "$2" "$1/old" && mount -o remount,ro "$1" || exit 99; shift 2; "$@"'
    command = [sys.executable, "-m", "finetune", *words]
    ended = in_namespace(script, str(disk), str(run_on_disk), *command)
    assert ended.returncode == 6, ended.stderr
    *_, error, hint = ended.stderr.strip().splitlines()
    assert error.startswith("error: cannot write ")
    assert error.endswith("Read-only file system")
    assert hint.startswith("hint: ")


@pytest.fixture(scope="module")
def run_on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, beside its images."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "images")
    words = train(str(folder / "images"), "--output", str(folder / "run"), "--epochs", "1", *OPTIONS, "--quiet")
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return folder / "run"
