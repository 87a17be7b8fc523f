"""When to stop before the planned end: no more progress, or a signal."""

import signal
import threading
import time
from types import FrameType, TracebackType

from finetune.runs.processes import ALONE, Processes
from finetune.training.progress import Progress

ECHO_SECONDS = 2.0  # within which a signal that comes again is that of the launcher


class EarlyStopping:
    """A watcher that ends a phase once the validation accuracy has not risen for `patience` epochs of it."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def epoch_started(self, progress: Progress) -> None:
        """Nothing to do."""

    def step_ended(self, progress: Progress) -> None:
        """Nothing to do."""

    def epoch_ended(self, progress: Progress) -> None:
        """Stop when the best epoch, or the one at which it was made longer, lies `patience` epochs back."""
        since = max(progress.history.best_epoch, progress.phase_epoch, progress.longer_from)
        if progress.epoch - since >= self.patience:
            progress.stop_reason = f"no better validation accuracy for {self.patience} epochs"


class Interruption:
    """A watcher that turns SIGINT and SIGTERM into a stop at the next step boundary, where the state can be saved.

    A second signal ends the process at once. Outside the main thread Python allows no handlers, and none are set. What
    one of several processes receives stops all of them; a launcher may send again what the terminal has sent already.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, processes: Processes = ALONE) -> None:
        self.received: signal.Signals | None = None
        self.received_at = 0.0
        self.processes = processes

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)

    def epoch_started(self, progress: Progress) -> None:
        """Nothing to do."""

    def step_ended(self, progress: Progress) -> None:
        """Stop if a signal has come."""
        if number := self.processes.most(self.received or 0):
            if self.received is None:
                self.received_at = time.monotonic()
            self.received = signal.Signals(number)
            progress.stop_reason, progress.is_interrupted = f"{self.received.name} received", True

    epoch_ended = step_ended

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.received_at = signal.Signals(number), time.monotonic()
        elif self.processes.count == 1 or time.monotonic() - self.received_at > ECHO_SECONDS:
            raise SystemExit(128 + number)
