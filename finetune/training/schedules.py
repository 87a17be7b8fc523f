"""How the learning rates move, in torch's own schedulers."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

ScheduleName = Literal["cosine", "step", "plateau", "one-cycle", "constant"]


@dataclass(frozen=True)
class Schedule:
    """A torch scheduler and when it moves: after every step, or after every epoch."""

    scheduler: LRScheduler
    every: Literal["step", "epoch"]

    @classmethod
    def of(cls, scheduler: "LRScheduler | Schedule | None", optimizer: Optimizer) -> "Schedule":
        """Take a plain torch scheduler as one that moves every epoch, and None as rates that stay."""
        if isinstance(scheduler, Schedule):
            return scheduler
        return cls(scheduler or ConstantLR(optimizer, factor=1.0), "epoch")

    def step_ended(self) -> None:
        """Move on after an optimiser step."""
        if self.every == "step":
            self.scheduler.step()

    def epoch_ended(self, valid_loss: float) -> None:
        """Move on after an epoch; the plateau schedule looks at the validation loss."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(valid_loss)
        elif self.every == "epoch":
            self.scheduler.step()

    def state(self) -> dict[str, Any]:
        """Return what a resume needs, plain values only.

        The plateau schedule's infinities are left out: JSON has none, and a new schedule begins with the same ones.
        """
        state = self.scheduler.state_dict()
        return {name: value for name, value in state.items() if not isinstance(value, float) or math.isfinite(value)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.scheduler.load_state_dict(dict(state))

    def catch_up(self, steps: int, rates: Sequence[float]) -> None:
        """Go to where this schedule, made for a longer training than the one saved, is after `steps` steps.

        `rates` are those it began with, for each group of the optimiser: torch's schedules move from rate to rate.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch minds that the optimiser has not stepped
            for group, rate in zip(self.scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            for _ in range(steps):
                self.scheduler.step()


def build_schedule(
    optimizer: Optimizer,
    name: ScheduleName,
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: float,
    step_epochs: int,
    step_factor: float,
) -> Schedule:
    """Return the schedule `name` over `epochs` of `steps_per_epoch`; the other arguments are those of `TrainConfig`."""
    steps = max(1, epochs * steps_per_epoch)
    warmup_steps = min(round(warmup_epochs * steps_per_epoch), steps - 1)
    match name:
        case "cosine" if warmup_steps > 0:
            warmup = LinearLR(optimizer, start_factor=0.01, total_iters=warmup_steps)
            cosine = CosineAnnealingLR(optimizer, T_max=steps - warmup_steps)
            return Schedule(SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps]), "step")
        case "cosine":
            return Schedule(CosineAnnealingLR(optimizer, T_max=steps), "step")
        case "one-cycle":
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            # Two steps more than are taken: the cycle needs at least that many to have a rise and a fall.
            return Schedule(OneCycleLR(optimizer, max_lr=rates, total_steps=steps + 2), "step")
        case "step":
            return Schedule(StepLR(optimizer, step_size=step_epochs, gamma=step_factor), "epoch")
        case "plateau":
            return Schedule(ReduceLROnPlateau(optimizer, factor=step_factor, patience=step_epochs), "epoch")
        case "constant":
            return Schedule.of(None, optimizer)
