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
    """How a tracker that keeps runs by itself begins one with a title, what its id is, and how it goes on with that."""

    begin: Callable[[str], dict[str, str]]
    run_id: Callable[[Any], str]
    resume: Callable[[str], dict[str, str]]


SERVICES = {
    "mlflow": _Service(
        begin=lambda title: {"run_name": title},
        run_id=lambda run: run.info.run_id,
        resume=lambda run_id: {"run_id": run_id},
    ),
    "wandb": _Service(
        begin=lambda title: {"name": title},
        run_id=lambda run: run.id,
        resume=lambda run_id: {"id": run_id, "resume": "allow"},
    ),
    "trackio": _Service(
        begin=lambda title: {"name": title},
        run_id=lambda run: run.name,  # a run is gone on with by its name only
        resume=lambda run_id: {"name": run_id, "resume": "allow"},
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

    TensorBoard's files lie in the run folder; the others keep theirs where their own settings say. The id of the run
    there is kept, and a resume goes on with it. No training is lost with a tracker that fails: that is told, and no
    more is sent to it.
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
                self._keep_run_id(run)

    def _goes_on(self, run: RunFolder) -> bool:
        """Go on with the run that an interrupted training has begun, if there is one and it can be found."""
        run_id = _run_ids(run).get(self.name)
        if run_id is None:
            return False
        try:
            self.accelerator.init_trackers(PROJECT, init_kwargs={self.name: SERVICES[self.name].resume(run_id)})
        except Exception as error:  # each tracker has its own: it was deleted, or is on another server
            self.reporter.warn(f"{self.name} cannot go on with its run {run_id} ({error}): a new one begins.")
            self.accelerator.trackers.clear()
            return False
        return True

    def _keep_run_id(self, run: RunFolder) -> None:
        """Keep the id that the tracker has given the run, for a resume."""
        run_id = SERVICES[self.name].run_id(self.accelerator.get_tracker(self.name, unwrap=True))
        try:
            run.trackers.parent.mkdir(exist_ok=True)
            write_whole(run.trackers, strict_json.dump(_run_ids(run) | {self.name: run_id}))
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


def _run_ids(run: RunFolder) -> dict[str, str]:
    """Return the ids that trackers have given `run`."""
    try:
        return dict(strict_json.parse(run.trackers.read_bytes()))
    except (OSError, ValueError):
        return {}


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str)
