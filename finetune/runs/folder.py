"""The run folder: its names, how it is opened, and how files get into it whole."""

import fcntl
import itertools
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

from finetune.errors import RunError, StorageError, first_ten
from finetune.runs import strict_json


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, by name. `train` writes them; every other command only reads."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config; training with it repeats the run."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, device, threads and seed."""
        return self.path / "environment.json"

    @property
    def split(self) -> Path:
        """Which image went to which split."""
        return self.path / "split.csv"

    @property
    def bad_files(self) -> Path:
        """The images that could not be read, with the reason."""
        return self.path / "bad_files.csv"

    @property
    def advice(self) -> Path:
        """Evidence, scenario and plan."""
        return self.path / "advice.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: baselines, epochs, final scores."""
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """The best model, self-describing."""
        return self.path / "model.safetensors"

    @property
    def predictions(self) -> Path:
        """Every validation and test image with its prediction."""
        return self.path / "predictions.csv"

    @property
    def checkpoints(self) -> Path:
        """Training state for a resume."""
        return self.path / "checkpoints"

    @property
    def trackers(self) -> Path:
        """The ids that experiment trackers have given this run, for a resume."""
        return self.checkpoints / "trackers.json"

    @property
    def folds(self) -> Path:
        """The runs of a cross-validation."""
        return self.path / "folds"

    def fold(self, number: int) -> "RunFolder":
        """Return the run in which the images of a fold, counted from 0, are held back."""
        return RunFolder(self.folds / f"fold-{number + 1}")

    @property
    def held_out(self) -> Path:
        """What a run of a cross-validation predicts of the images that it holds back."""
        return self.path / "held_out.safetensors"

    @property
    def held_out_start(self) -> Path:
        """What the solved head of such a run predicts of them before it is fine-tuned."""
        return self.path / "held_out_start.safetensors"

    @property
    def tensorboard(self) -> Path:
        """Events for TensorBoard, where they were asked for."""
        return self.path / "tensorboard"

    @property
    def plots(self) -> Path:
        """Curves, confusion matrix and samples."""
        return self.path / "plots"

    def record(self, event: str, values: Mapping[str, object]) -> None:
        """Append one event to metrics.jsonl.

        Raises:
            StorageError: The disk is full or refuses; nothing was appended.
        """
        line = strict_json.dump({"event": event, **values}) + "\n"
        before = self.metrics.stat().st_size if self.metrics.exists() else 0
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            with suppress(OSError):  # part of the line may be there
                os.truncate(self.metrics, before)
            raise StorageError(
                f"cannot write {self.metrics}: {error.strerror}", "free some space, then --resume"
            ) from error

    def events(self) -> list[dict[str, Any]]:
        """Return the events of metrics.jsonl, oldest first; a last line cut off by a kill is left out.

        Raises:
            RunError: Another line is no JSON.
        """
        if not self.metrics.exists():
            return []
        try:
            lines = self.metrics.read_text(encoding="utf-8").split("\n")
            events = [strict_json.parse(line) for line in lines[:-1]]
            if not all(isinstance(event, dict) and "event" in event for event in events):
                raise ValueError("a line of it is no event")
            return events
        except ValueError as error:
            raise RunError(f"{self.metrics} is damaged: {error}", "train anew with another --output") from error


RUN_NAMES = frozenset(
    getattr(RunFolder(Path()), name).name for name, member in vars(RunFolder).items() if isinstance(member, property)
)
"""The names of everything in a run folder."""

GLANCES, GLANCE_SECONDS = 5, 0.02  # of others at a lock, before it counts as held

EARLY_NAMES = frozenset({"bad_files.csv", "split.csv", "advice.json", "metrics.jsonl", "environment.json"})
"""What a start writes before its config, none of it dear to anyone."""


def next_free_folder(data: str, model: str) -> Path:
    """Return runs/<data>-<model>, or with -2, -3 … appended where that is taken."""
    return next(path for path in _default_folders(data, model) if not path.exists())


def _default_folders(data: str, model: str) -> Iterator[Path]:
    source = Path(data).resolve()
    name = source.name if source.is_dir() else source.stem
    stem = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") or "data" for part in (name, model))
    yield Path("runs") / stem
    yield from (Path("runs") / f"{stem}-{number}" for number in itertools.count(2))


@contextmanager
def open_run(
    path: Path, *, resume: bool = False, overwrite: bool = False, patience_seconds: float = 0.0
) -> Iterator[RunFolder]:
    """Create the run folder at `path`, or open it again, and hold it against a second process.

    What a start that failed has left behind, before anything was learned, counts as empty. One that holds it may take
    `patience_seconds` to let go of it.

    Raises:
        RunError: It holds files and neither `resume` nor `overwrite` is asked for, it holds files that no run wrote,
            there is nothing to resume, or another process is training in it.
        StorageError: It cannot be created.
    """
    run = RunFolder(path)
    entries = _entries(path)
    if resume and not run.config.exists():
        raise RunError(f"there is no run to resume in {path}", "check --output, or leave --resume out to start anew")
    # A name that ends in .part is of a write that was killed.
    names = {entry.name for entry in entries if not entry.name.endswith(".part")}
    is_leftover = not run.config.exists() and names <= EARLY_NAMES
    if entries and not is_leftover and not resume and not overwrite:
        raise RunError(
            f"{path} is not empty", "pass --resume to go on with it, --overwrite to empty it, or another --output"
        )
    if overwrite and (foreign := names - RUN_NAMES):
        raise RunError(f"{path} holds files of other origin: {first_ten(sorted(foreign))}", "choose another --output")
    with hold_folder(path, patience_seconds=patience_seconds):
        if overwrite or is_leftover:
            _empty(path)
        yield run


def find_model_file(path: Path) -> Path:
    """Return the model.safetensors that `path` means: the file itself, or the one in a run folder.

    Raises:
        RunError: There is no such file or folder, or the run has not written its model yet.
    """
    if os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises for names that are too long)
        return path
    if not os.path.exists(path):  # noqa: PTH110
        raise RunError(f"there is no run folder or model file {path}", "check the path; `finetune train` prints it")
    run = RunFolder(path)
    if not run.model.is_file():
        has_begun = any(run.checkpoints.glob("step-*")) or run.folds.is_dir()
        hint = "its training has not ended: go on with `finetune train --resume`" if has_begun else "train one first"
        raise RunError(f"{path} holds no model.safetensors", hint)
    return run.model


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader, or a power cut, finds the old file or the new one, never a part.

    Raises:
        StorageError: The disk is full or refuses.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error.strerror}", "free some space or choose another --output"
        ) from error


def sync_folder(path: Path) -> None:
    """Make the names in the folder `path` durable, as fsync on a file does its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(path: Path) -> list[Path]:
    if not os.path.exists(path):  # noqa: PTH110 (Path.exists raises for names that are too long)
        return []
    if not path.is_dir():
        raise RunError(f"{path} is a file, not a run folder", "choose another --output")
    return [entry for entry in path.iterdir() if entry.name != ".lock"]


def _empty(path: Path) -> None:
    for entry in _entries(path):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def is_training(run: RunFolder) -> bool:
    """Tell whether a process is at work in the run folder."""
    try:
        with (run.path / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


_locks: WeakSet[IO[str]] = WeakSet()


def _leave_locks() -> None:
    """Let the locks be their parent's alone: a forked process that outlives it would hold its folder."""
    for file in _locks:
        file.close()


os.register_at_fork(after_in_child=_leave_locks)


@contextmanager
def hold_folder(path: Path, *, patience_seconds: float = 0.0) -> Iterator[None]:
    """Make the folder `path`, if need be, and hold it against other processes by its `.lock`.

    The kernel frees it when this process ends.

    Raises:
        RunError: Another process holds it.
        StorageError: It cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / ".lock").open("a+")
    except OSError as error:
        raise StorageError(
            f"cannot write to the run folder {path}: {error.strerror}", "choose another --output"
        ) from error
    with file:
        _locks.add(file)
        for patience in range(GLANCES + round(patience_seconds / GLANCE_SECONDS), -1, -1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if patience:  # it may be no more than `is_training` having a look
                    time.sleep(GLANCE_SECONDS)
                    continue
                file.seek(0)
                raise RunError(
                    f"process {file.read().strip()} is training in {path}", "wait for it, or stop it first"
                ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
