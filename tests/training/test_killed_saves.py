"""A save that is killed: by SIGKILL at any of its operations, and its order as the kernel sees it."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.runs.folder import RunFolder
from finetune.training import checkpoint
from finetune.training.checkpoint import read_state, restore_state
from finetune.training.progress import Progress
from finetune.training.step import Learner
from tests.training.exact_resume import write_images
from tests.training.test_checkpoint import Heard, train


@pytest.fixture(autouse=True)
def _every_epoch_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "TRAINING_PER_SAVE", 0)


class Killed(BaseException):
    """The process that saved is dead, and with it the training."""


class FileThatKills:
    """A file that writes half of its bytes through to the disk before it does what `deadly` says."""

    def __init__(self, file: Any, deadly: Callable[[], None]) -> None:
        self.file = file
        self.deadly = deadly

    def __enter__(self) -> "FileThatKills":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.deadly()
        self.file.write(data[len(data) // 2 :])


class DyingSave:
    """Saves; the save after the second epoch is another process's, killed before its `at`-th operation, from 0.

    With `again` there is a whole save of the same step already, which it is to replace.
    """

    def __init__(self, at: int, *, again: bool) -> None:
        self.at = at
        self.again = again
        self.happened: list[str] = []
        self.save = checkpoint.write_state

    def __call__(self, run: RunFolder, learner: Learner, progress: Progress, **options: Any) -> None:
        if progress.epoch != 2:
            self.save(run, learner, progress, **options)
            return
        if self.again:
            self.save(run, learner, progress, **options)
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks of processes with threads
            child = os.fork()
        if child == 0:
            try:
                self._become_deadly(writing)
                self.save(run, learner, progress, **options)
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as said:
            self.happened = said.read().split()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            raise Killed

    def _become_deadly(self, notes: int) -> None:
        """Kill this process before the `at`-th write, fsync, rename or replace, and note those before it."""
        count = itertools.count()

        def die(name: str) -> None:
            if next(count) == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(notes, f"{name}\n".encode())

        def deadly(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def act(*arguments: Any, **options: Any) -> Any:
                die(name)
                return call(*arguments, **options)

            return act

        def open_deadly(self: Path, *arguments: Any, **options: Any) -> Any:
            file = open_file(self, *arguments, **options)
            return FileThatKills(file, lambda: die("write")) if "w" in (arguments or ("r",))[0] else file

        open_file = Path.open
        Path.open = open_deadly  # type: ignore[method-assign]
        os.fsync = deadly("fsync", os.fsync)
        for name in ("rename", "replace"):
            setattr(Path, name, deadly(name, getattr(Path, name)))


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_any_write_fsync_or_rename_of_a_save_costs_no_more_than_it(
    tmp_path: Path, make_learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    whole, deaths = make_learner(), set()
    (tmp_path / "whole").mkdir()
    train(whole, RunFolder(tmp_path / "whole"), Progress(), epochs=3)
    for at in itertools.count():
        run, save = RunFolder(tmp_path / str(at)), DyingSave(at, again=again)
        run.path.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_state", save)
            try:
                train(make_learner(), run, Progress(), epochs=3)
                break  # there are no more operations to die at
            except Killed:
                deaths.add(save.happened[-1] if at else "nothing")
        resumed = make_learner(seed=7)
        progress = restore_state(read_state(run, Heard()), resumed, is_longer=False)  # type: ignore[arg-type]
        assert progress.epoch in ((2,) if again else (1, 2))
        assert progress.epoch == 1 or again or "rename" in save.happened
        train(resumed, run, progress, epochs=3)
        assert not list(run.checkpoints.glob(".*")), "what the kill left lying about"
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), (save.happened, name)
    assert at > 14
    assert deaths == {"nothing", "write", "fsync", "rename", "replace"}


TRACED = "write,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir"
TRAIN = ["--model", "lenet5", "--epochs", "3", "--workers", "0", "--quiet"]


def test_the_kernel_sees_a_save_made_durable_before_it_gets_its_name(tmp_path: Path) -> None:
    """strace tells: each file is written and synced, then the folder, then renamed, then the parent synced, then the
    pointer likewise, and only then is anything deleted."""
    if not (strace := shutil.which("strace")):
        message = "strace is missing: install the Debian package strace"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    write_images(tmp_path / "data")
    trace, run = tmp_path / "trace", tmp_path / "run"
    script = "import sys; from finetune.training import checkpoint; checkpoint.TRAINING_PER_SAVE = 0; "
    script += "from finetune.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "train", str(tmp_path / "data"), "--output", str(run), *TRAIN]
    watched = [strace, "-f", "-y", "-qq", "-e", f"trace={TRACED}", "-o", str(trace), *command]
    ended = subprocess.run(watched, capture_output=True, text=True, check=False)
    if "PTRACE" in ended.stderr or "ptrace" in ended.stderr:
        pytest.skip(f"this machine lets nobody trace: {ended.stderr.splitlines()[0]}")
    assert ended.returncode == 0, ended.stderr
    happened = list(calls_in(trace.read_text(errors="replace"), run / "checkpoints"))
    names = [name for call, name in happened if call == "rename" and name.startswith("step-")]
    assert names == sorted(names)
    assert len(names) == 4, "the start and three epochs"
    for name in names:
        part = rf"\.{name}\.\d+\.part"
        files = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "best.safetensors"]
        saved = [
            (call, re.sub(r"\.\d+\.part", "", where).removeprefix("."))
            for call, where in happened[: happened.index(("rename", name)) + 1]
            if re.fullmatch(rf"({part}|{name})(/.*)?", where)
        ]
        assert saved[-2:] == [("fsync", name), ("rename", name)]
        order = list(dict.fromkeys(where.partition("/")[2] for call, where in saved[:-2]))
        assert set(files[:-1]) < set(order) <= {*files, "manifest.json"}
        assert order[-1] == "manifest.json"
        for file in order:
            own = [call for call, where in saved if where == f"{name}/{file}"]
            assert own[-1] == "fsync"
            assert set(own[:-1]) == {"write"}
        before = happened[: happened.index(("rename", name))]
        deleted = {where.partition("/")[0] for call, where in before if call in ("unlink", "rmdir")}
        assert name not in deleted
        assert len(deleted - {""}) <= max(names.index(name) - 2, 0), "pruned before this one was in place"
        after = happened[happened.index(("rename", name)) + 1 :]
        pointed = [(call, re.sub(r"\.\d+\.part", "", where).removeprefix(".")) for call, where in after]
        assert pointed[0] == ("fsync", "")
        assert pointed[1:5] == [("write", "latest"), ("fsync", "latest"), ("rename", "latest"), ("fsync", "")]


def calls_in(trace: str, folder: Path) -> list[tuple[str, str]]:
    """Return what happened in `folder`, as calls and names in it; a rename has the name that it gives."""
    found = []
    for line in trace.splitlines():
        if match := re.search(r"(write|fsync|fdatasync)\(\d+<([^>]*)>", line):
            call, path = match.groups()
        elif match := re.search(r"(rename|unlink|rmdir)\w*\((.*)\)", line):
            call, path = match[1], re.findall(r'"([^"]*)"', match[2])[-1]
        else:
            continue
        if path.startswith(f"{folder}/") or path == str(folder):
            found.append((call, path.removeprefix(str(folder)).removeprefix("/")))
    return found
