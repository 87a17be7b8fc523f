"""The epochs of a training sent to an experiment tracker, by way of accelerate."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Literal

from accelerate import Accelerator

from finetune.config.schema import TrainConfig
from finetune.errors import MissingExtraError, StorageError
from finetune.runs import strict_json
from finetune.runs.folder import RunFolder, write_whole
from finetune.runs.reporting import Reporter
from finetune.training.progress import Progress

TrackerName = Literal["tensorboard", "mlflow", "wandb", "trackio"]
PROJECT = "finetune"


@dataclass(frozen=True)
class _Service:
    """How a tracker that keeps runs by itself begins one by a title, what it calls it then, and how it goes on."""

    begin: Callable[[str], dict[str, str]]
    call: Callable[[Any], str]
    resume: Callable[[str], dict[str, str]]


SERVICES = {
    "mlflow": _Service(
        begin=lambda title: {"run_name": title}, call=lambda run: run.info.run_id, resume=lambda run: {"run_id": run}
    ),
    "wandb": _Service(
        begin=lambda title: {"name": title},
        call=lambda run: run.id,
        resume=lambda run: {"id": run, "resume": "allow"},
    ),
    "trackio": _Service(
        begin=lambda title: {"name": title},
        call=lambda run: run.name,
        resume=lambda run: {"name": run, "resume": "allow"},
    ),
}


def require_tracker(name: str) -> None:
    """Make sure that the tracker called `name` can be had.

    Raises:
        MissingExtraError: It is not installed.
    """
    if name != "none" and find_spec(name) is None:
        extra = ' (or pip install "finetune[tensorboard]")' if name == "tensorboard" else ""
        raise MissingExtraError(f"--tracker {name} needs the package {name}", f"pip install {name}{extra}")


class Tracking:
    """A watcher that logs the scores of every epoch under its number; the scores of the start are those of epoch 0.

    TensorBoard's files lie in the run folder; the others keep theirs where their own settings say. What they call the
    run is kept, and a resume goes on with it. No training is lost with a tracker that fails: that is told, and no more
    is sent to it.
    """

    def __init__(self, name: TrackerName, run: RunFolder, config: TrainConfig, reporter: Reporter) -> None:
        self.name = name
        self.reporter = reporter
        self.has_failed = False
        self.accelerator = Accelerator(log_with=name, project_dir=run.path)
        values = {option: value if _is_plain(value) else str(value) for option, value in asdict(config).items()}
        with self._failures():
            if name not in SERVICES:
                self.accelerator.init_trackers(run.tensorboard.name, config=values)
            elif not self._goes_on(run):
                begin = SERVICES[name].begin(run.path.name)
                self.accelerator.init_trackers(PROJECT, config=values, init_kwargs={name: begin})
                self._keep_name(run)

    def _goes_on(self, run: RunFolder) -> bool:
        """Go on with the run that an interrupted training has begun, if there is one and it can be found."""
        called = _names(run).get(self.name)
        if called is None:
            return False
        try:
            self.accelerator.init_trackers(PROJECT, init_kwargs={self.name: SERVICES[self.name].resume(called)})
        except Exception as error:  # each tracker has its own: it was deleted, or is on another server
            self.reporter.warn(f"{self.name} cannot go on with its run {called} ({error}): a new one begins.")
            self.accelerator.trackers.clear()
            return False
        return True

    def _keep_name(self, run: RunFolder) -> None:
        """Keep what the tracker calls the run for a resume."""
        called = SERVICES[self.name].call(self.accelerator.get_tracker(self.name, unwrap=True))
        try:
            run.trackers.parent.mkdir(exist_ok=True)
            write_whole(run.trackers, strict_json.dump(_names(run) | {self.name: called}))
        except (OSError, StorageError) as error:
            self.reporter.warn(f"{error}; a resume will begin a new run in {self.name}.")

    def epoch_started(self, progress: Progress) -> None:
        """Log the scores of the start, before the first step."""
        if progress.global_step == 0:
            history = progress.history
            self._log({"valid_loss": history.start_loss, "valid_accuracy": history.start_accuracy}, 0)

    def step_ended(self, progress: Progress) -> None:
        """Nothing to do."""

    def epoch_ended(self, progress: Progress) -> None:
        """Log the scores of the epoch."""
        self._log({name: values[-1] for name, values in progress.history.series().items()}, progress.epoch)

    def close(self) -> None:
        """Write what is left."""
        with self._failures():
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _log(self, values: dict[str, float], epoch: int) -> None:
        if not self.has_failed:
            with self._failures():
                scores = {name: value for name, value in values.items() if math.isfinite(value)}
                self.accelerator.log(scores, step=epoch)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each tracker has its own, of networks, accounts and disks
            if not self.has_failed:
                self.reporter.warn(f"{self.name} fails ({error}); metrics.jsonl has what it will lack from here on.")
            self.has_failed = True


def _names(run: RunFolder) -> dict[str, str]:
    """Return what trackers call `run`."""
    try:
        return dict(strict_json.parse(run.trackers.read_bytes()))
    except (OSError, ValueError):
        return {}


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str)
