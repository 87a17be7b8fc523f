"""Every command and every Python block of README.md runs as it stands, in the order in which a reader meets it."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
README = (PROJECT / "README.md").read_text()
BLOCKS = re.findall(r"(<!-- ci: \w+ -->\n)?```(bash|python)\n(.*?)```", README, flags=re.DOTALL)
LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}
EXPECTED_OUTPUT = {"finetune check photos": "36 images", "finetune advise photos": "scenario: "}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, flowers: Path) -> Iterator[Path]:
    """A folder with what the README takes for granted: the examples, a run on them, and the reader's own photos."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "data_examples").symlink_to(PROJECT / "data_examples")
    for class_folder in (flowers / "train").iterdir():
        (folder / "photos" / class_folder.name).mkdir(parents=True)
        for image in sorted(class_folder.iterdir())[:6]:
            shutil.copy(image, folder / "photos" / class_folder.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def test_every_command_of_the_readme_runs(
    place: Path, flowers_run: Path, finetune: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that set up an environment are run word for word by .ci/run; here their training and predicting are."""
    (place / "runs").mkdir()
    (place / "runs" / "flowers").symlink_to(flowers_run)
    lines = [line for mark, kind, text in BLOCKS if kind == "bash" and not mark for line in text.splitlines() if line]
    lines += [
        line.replace(".venv/bin/", "") for mark, _, text in BLOCKS if "predict" in mark for line in text.splitlines()
    ]
    assert len(lines) >= 16
    for line in lines:
        words = shlex.split(line)
        if words[0] in LAUNCHERS:
            command = [sys.executable, "-m", LAUNCHERS[words[0]], *words[1 + (words[1] == "launch") :]]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, (line, result.stderr)
            continue
        assert words[0] == "finetune", line
        result = finetune(*words[1:], "--quiet")
        assert result.code == 0, (line, result.err)
        assert EXPECTED_OUTPUT.get(line, "") in result.out
        if line.startswith("finetune predict runs/flowers "):
            assert "fire lily" in result.out


@pytest.mark.parametrize("text", [text for _, kind, text in BLOCKS if kind == "python"])
def test_every_python_block_of_the_readme_runs(place: Path, text: str) -> None:
    result = subprocess.run([sys.executable, "-c", text], cwd=place, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_marked_blocks_are_those_that_ci_runs() -> None:
    marks = [mark.split()[2] for mark, _, _ in BLOCKS if mark]
    assert marks == ["train", "predict", "test"]
    assert f"for name in {' '.join(marks)}" in (PROJECT / ".ci" / "run").read_text()


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (PROJECT / target).exists(), target
