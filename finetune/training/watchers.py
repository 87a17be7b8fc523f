"""What is shown and recorded while a model trains."""

import math
import time
from contextlib import ExitStack

from finetune.errors import StorageError
from finetune.runs.folder import RunFolder
from finetune.runs.reporting import Advance, Reporter
from finetune.training.checkpoint import FAILURES_BORNE
from finetune.training.progress import History, Progress


class EpochRecorder:
    """A watcher that appends the scores of the start and of every epoch to metrics.jsonl.

    What the disk refuses is told, and taken from the history as soon as the disk takes it.

    Raises:
        StorageError: The disk has refused as often in a row as is borne of saves.
    """

    def __init__(self, run: RunFolder, reporter: Reporter) -> None:
        events = [event["event"] for event in run.events()]
        self.run = run
        self.reporter = reporter
        self.has_start, self.epochs = "start" in events, events.count("epoch")
        self.refusals = 0

    def epoch_started(self, progress: Progress) -> None:
        """Record the scores of the start, before the first epoch."""
        if not self.has_start:
            self.record(progress)

    def step_ended(self, progress: Progress) -> None:
        """Nothing to do."""

    def epoch_ended(self, progress: Progress) -> None:
        """Record the scores of the epoch."""
        self.record(progress)

    def record(self, progress: Progress) -> None:
        """Append what metrics.jsonl lacks."""
        history = progress.history
        try:
            if not self.has_start:
                self.run.record(
                    "start", _finite({"valid_loss": history.start_loss, "valid_accuracy": history.start_accuracy})
                )
                self.has_start = True
            for epoch in range(self.epochs + 1, progress.epoch + 1):
                self.run.record("epoch", _scores(history, epoch))
                self.epochs = epoch
            self.refusals = 0
        except StorageError as error:
            self.refusals += 1
            if self.refusals >= FAILURES_BORNE:
                raise
            self.reporter.warn(f"{error.message}; it will be tried again.")


class ProgressBar:
    """A watcher that shows a bar for every epoch, with loss, accuracy, images a second and the time left."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.bar = ExitStack()
        self.advance: Advance | None = None
        self.shown = 0
        self.started = 0.0

    def epoch_started(self, progress: Progress) -> None:
        """Open the bar of an epoch; one that is resumed begins where it stood."""
        label = f"Epoch {progress.epoch + 1}/{progress.epochs}"
        self.advance = self.bar.enter_context(self.reporter.progress(label, progress.images_per_epoch))
        self.shown, self.started = 0, time.monotonic()

    def step_ended(self, progress: Progress) -> None:
        """Move the bar."""
        assert self.advance is not None
        totals = progress.totals
        rate = (totals.images - self.shown) / max(time.monotonic() - self.started, 1e-9)
        self.advance(
            totals.images - self.shown,
            f"loss {totals.mean_loss:.3f}  accuracy {totals.accuracy:.1%}  {rate:.0f} images/s",
        )
        self.shown, self.started = totals.images, time.monotonic()
        if progress.stop_reason:
            self.bar.close()

    def epoch_ended(self, progress: Progress) -> None:
        """Close the bar and say how the validation went."""
        self.bar.close()
        history = progress.history
        valid, star = "", ""
        if not math.isnan(history.valid_loss[-1]):
            valid = f"; valid loss {history.valid_loss[-1]:.3f}, accuracy {history.valid_accuracy[-1]:.1%}"
            is_best = history.valid_accuracy[-1] > max([history.start_accuracy, *history.valid_accuracy[:-1]])
            star = "  (best so far)" if is_best else ""
        self.reporter.say(
            f"Epoch {progress.epoch}/{progress.epochs}: train loss {history.train_loss[-1]:.3f}, accuracy "
            f"{history.train_accuracy[-1]:.1%}{valid}; {history.seconds[-1]:.0f} s{star}"
        )


def _scores(history: History, epoch: int) -> dict[str, float]:
    """Return what was measured at the end of an epoch, counted from 1, and which epoch was the best until then."""
    accuracies = [history.start_accuracy, *history.valid_accuracy[:epoch]]
    is_scored = math.isfinite(accuracies[-1])  # else nothing is held back, and the last weights are kept
    best = max(range(epoch + 1), key=accuracies.__getitem__) if is_scored else epoch
    scores = {name: values[epoch - 1] for name, values in history.series().items()}
    return {"epoch": epoch, **_finite(scores), "best_epoch": best}


def _finite(scores: dict[str, float]) -> dict[str, float]:
    """Leave out the scores of validation where nothing is held back."""
    return {name: score for name, score in scores.items() if math.isfinite(score)}
