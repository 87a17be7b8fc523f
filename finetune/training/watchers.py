"""What is shown and recorded while a model trains."""

import math
import time
from contextlib import ExitStack

from finetune.errors import StorageError
from finetune.runs.folder import RunFolder
from finetune.runs.reporting import Advance, Reporter
from finetune.training.checkpoint import FAILURES_BORNE
from finetune.training.progress import Progress


class EpochRecorder:
    """A watcher that appends one event an epoch to metrics.jsonl; what the disk refuses is told and tried again.

    Raises:
        StorageError: As many events wait as refused saves are borne.
    """

    def __init__(self, run: RunFolder, reporter: Reporter) -> None:
        self.run = run
        self.reporter = reporter
        self.waiting: list[tuple[str, dict[str, float]]] = []

    def epoch_started(self, progress: Progress) -> None:
        """Record the scores of the start, before the first epoch."""
        if progress.is_new:
            history = progress.history
            scores = {"valid_loss": history.start_loss, "valid_accuracy": history.start_accuracy}
            self._record("start", _finite(scores))

    def step_ended(self, progress: Progress) -> None:
        """Nothing to do."""

    def epoch_ended(self, progress: Progress) -> None:
        """Record the scores of the epoch."""
        last = {name: values[-1] for name, values in progress.history.series().items()}
        best = progress.history.best_epoch
        self._record("epoch", {"epoch": progress.epoch, **_finite(last), "best_epoch": best})

    def _record(self, event: str, values: dict[str, float]) -> None:
        self.waiting.append((event, values))
        while self.waiting:
            try:
                self.run.record(*self.waiting[0])
            except StorageError as error:
                if len(self.waiting) >= FAILURES_BORNE:
                    raise
                self.reporter.warn(f"{error.message}; the {event} will be recorded later.")
                return
            self.waiting.pop(0)


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
            star = "  (best so far)" if history.best_epoch == progress.epoch else ""
        self.reporter.say(
            f"Epoch {progress.epoch}/{progress.epochs}: train loss {history.train_loss[-1]:.3f}, accuracy "
            f"{history.train_accuracy[-1]:.1%}{valid}; {history.seconds[-1]:.0f} s{star}"
        )


def _finite(scores: dict[str, float]) -> dict[str, float]:
    """Leave out the scores of validation where nothing is held back."""
    return {name: score for name, score in scores.items() if math.isfinite(score)}
