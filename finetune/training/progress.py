"""Where a training stands: the record that the loop keeps, every watcher reads, and a checkpoint stores."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch


@dataclass(kw_only=True)
class History:
    """What happened, one value an epoch; losses are means over images (nats), accuracies lie in 0..1.

    Without validation images its scores are NaN and the last weights are kept.

    `start_loss` and `start_accuracy` are the validation scores before the first epoch. `best_epoch` is the epoch,
    counted from 1, whose weights are kept; 0 is the start. `ends_accuracy` is that of the mean of these and the start's
    weights, where it was asked for; it is kept in their place if it is no worse.
    """

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_accuracy: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    start_loss: float = math.nan
    start_accuracy: float = math.nan
    best_epoch: int = 0
    best_accuracy: float = math.nan
    ends_accuracy: float = math.nan

    def __len__(self) -> int:
        return len(self.train_loss)

    def series(self) -> dict[str, list[float]]:
        """Return the lists with one value an epoch, by name."""
        return {name: values for name, values in asdict(self).items() if isinstance(values, list)}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a batch: the mean loss, the right predictions, and the images.

    `weight` is by what the criterion divided the sum over the images when it took their mean.
    """

    loss: float = 0.0
    right: int = 0
    images: int = 0
    weight: float = 0.0


@dataclass(kw_only=True)
class Totals:
    """Sums over the images of a phase so far."""

    loss: float = 0.0
    right: int = 0
    images: int = 0

    def add(self, batch: Outcome) -> None:
        """Count a batch."""
        self.loss += batch.loss * batch.images
        self.right += batch.right
        self.images += batch.images

    @property
    def mean_loss(self) -> float:
        """Mean loss of an image, in nats; NaN before the first."""
        return self.loss / self.images if self.images else math.nan

    @property
    def accuracy(self) -> float:
        """Share of right predictions, in 0..1; NaN before the first."""
        return self.right / self.images if self.images else math.nan


@dataclass(kw_only=True)
class Progress:
    """Position, sums and best weights. `epoch` and `step` count what is done; `step` starts anew each epoch.

    `phase` counts the phases that are over, and `phase_epoch` and `phase_step` the epochs and all steps in them.
    `longer_from` is the epoch after which a resume last asked for more of them.
    `epochs` and `images_per_epoch` say what is planned, the former up to the end of the phase.
    """

    phase: int = 0
    phase_epoch: int = 0
    phase_step: int = 0
    longer_from: int = 0
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    totals: Totals = field(default_factory=Totals)
    history: History = field(default_factory=History)
    best_step: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    start_weights: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    stop_reason: str = ""
    is_interrupted: bool = False
    is_resumed: bool = False
    epochs: int = 0
    images_per_epoch: int = 0

    @property
    def is_new(self) -> bool:
        """Whether nothing has been learned, and nothing saved, so far."""
        return self.global_step == 0 and not self.is_resumed

    @property
    def has_started(self) -> bool:
        """Whether the start has been scored."""
        return bool(self.best_weights)

    def next_phase(self) -> None:
        """Begin the next phase where this one ended."""
        self.phase += 1
        self.phase_epoch, self.phase_step = self.epoch, self.global_step
        self.stop_reason = ""

    def is_best(self, accuracy: float) -> bool:
        """Whether `accuracy` is better than the best so far: a NaN never is, and a tie keeps the earlier."""
        return not self.has_started or accuracy > self.history.best_accuracy

    def keep_best(self, model: torch.nn.Module, accuracy: float) -> None:
        """Remember the weights of `model` as the best."""
        self.history.best_accuracy = accuracy
        self.history.best_epoch = self.epoch
        self.best_step = self.global_step
        self.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def to_json(self) -> dict[str, Any]:
        """Return all but the weights as plain values; NaN becomes None, for JSON has no NaN."""
        history = {
            name: [_no_nan(each) for each in value] if isinstance(value, list) else _no_nan(value)
            for name, value in asdict(self.history).items()
        }
        return {
            "phase": self.phase,
            "phase_epoch": self.phase_epoch,
            "phase_step": self.phase_step,
            "longer_from": self.longer_from,
            "epoch": self.epoch,
            "step": self.step,
            "global_step": self.global_step,
            "totals": asdict(self.totals),
            "history": history,
            "best_step": self.best_step,
        }

    @classmethod
    def from_json(
        cls, values: dict[str, Any], best_weights: dict[str, torch.Tensor], start_weights: dict[str, torch.Tensor]
    ) -> "Progress":
        """Read what `to_json` wrote."""
        history: dict[str, Any] = {
            name: [_or_nan(each) for each in value] if isinstance(value, list) else _or_nan(value)
            for name, value in values["history"].items()
        }
        return cls(
            phase=values["phase"],
            phase_epoch=values["phase_epoch"],
            phase_step=values["phase_step"],
            longer_from=values["longer_from"],
            epoch=values["epoch"],
            step=values["step"],
            global_step=values["global_step"],
            totals=Totals(**values["totals"]),
            history=History(**history),
            best_step=values["best_step"],
            best_weights=best_weights,
            start_weights=start_weights,
            is_resumed=True,
        )


def _no_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


class Watcher(Protocol):
    """Looks on while a model trains; setting `progress.stop_reason` ends the training at that point.

    What was trained of the epoch is scored then, unless `progress.is_interrupted` too: a resume will go on with it.
    """

    def epoch_started(self, progress: Progress) -> None:
        """An epoch begins, or goes on where it was interrupted."""

    def step_ended(self, progress: Progress) -> None:
        """One optimiser step is done; `progress.totals` holds the sums of the epoch so far."""

    def epoch_ended(self, progress: Progress) -> None:
        """An epoch is done and validated; the last entries of `progress.history` are its scores."""
