"""A training in the making: all it works with, and what changes from one of its phases to the next."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import OPTION_NAMES, TrainConfig
from finetune.data.table import ImageTable
from finetune.evaluation.infer import Predictions
from finetune.models.initialize import Backbone
from finetune.runs.folder import RunFolder
from finetune.runs.processes import ALONE, Processes
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter
from finetune.training.batches import Batches, build_batches
from finetune.training.budget import Budget, measure_pace
from finetune.training.phase import build_learner, freeze
from finetune.training.plan import Plan
from finetune.training.progress import Progress
from finetune.training.step import Learner

FREE_TO_CHANGE = frozenset(
    {"data", "output", "overwrite", "resume", "phases", "epochs", "budget", "tracker", "workers", "device"}
)
"""Options that a resume may be given anew, phases within limits of their own."""


@dataclass(kw_only=True)
class Job:
    """Everything a training works with, ready to run; batches and learner are those of the phase it is in."""

    config: TrainConfig
    run: RunFolder
    table: ImageTable
    label_map: LabelMap
    backbone: Backbone
    plans: tuple[Plan, ...]
    """One for each phase."""
    device: torch.device
    reporter: Reporter
    processes: Processes = ALONE
    budget: Budget | None = None
    had_no_time: bool = False
    """Whether the budget does not do for an epoch."""
    folder: Path | None = None
    """The run to go on with after an interrupt, where it is not `run` alone."""
    is_fold: bool = False
    """Whether what is held back is scored alone, and chooses nothing: neither the epoch that is kept nor a rate."""
    held_out: Predictions | None = None
    """Of a cross-validation, which stand for those of the validation images where none are held back."""
    predictions: dict[str, Predictions] = field(default_factory=dict)
    """What the finished model says of each held-out split."""
    progress: Progress = field(default_factory=Progress)
    batches: Batches = field(init=False)
    learner: Learner = field(init=False)

    @property
    def plan(self) -> Plan:
        """The plan of the phase that training is in."""
        return self.plans[self.progress.phase]

    @property
    def is_last_phase(self) -> bool:
        """Whether no phase follows."""
        return self.progress.phase == len(self.plans) - 1

    def enter_phase(self) -> None:
        """Build batches and learner for the phase of `progress`.

        Raises:
            ImageError, DataError: A file can no longer be read, or has changed.
        """
        self.close()
        freeze(self.plan, self.backbone)
        count = self.processes.count
        if count > 1 and self.plan.epochs:
            if self.config.sync_batch_norm and self.plan.batch_norm == "eval":
                self.reporter.say("BatchNorm keeps the statistics it came with: there are none to be synchronised.")
            elif self.plan.batch_size < 2 * count and not self.config.sync_batch_norm:
                self.reporter.warn(
                    f"a batch of {self.plan.batch_size} images leaves some of {count} processes with one or none: "
                    "BatchNorm learns no statistics from one; --sync-batch-norm lets it see those of all."
                )
        self.batches = build_batches(
            self.config,
            self.plan,
            self.backbone,
            self.table,
            self.label_map,
            device=self.device,
            processes=self.processes,
            reporter=self.reporter,
        )
        self.learner = self._build_learner()

    def fit_budget(self) -> None:
        """Plan as many epochs as there is time for, by the pace of the first steps; a resume keeps those it has.

        Raises:
            ImageError, DataError: A file can no longer be read, or has changed.
        """
        if self.budget is None or self.plan.epochs == 0:
            return
        measured = measure_pace(self.learner, self.batches.loaders, left=self.budget.left)
        pace = self.processes.from_main(lambda: measured)
        fits = self.budget.fit(pace, most=self.plan.epochs, validations=1 + self.learner.averages_ends)
        fitting = self.processes.from_main(lambda: fits)
        if not self.config.resume:
            # A random head needs what there is: a part of an epoch, if need be.
            epochs = max(fitting, 1) if self.plan.head_start == "random" else fitting
            self.reporter.say(
                f"Budget of {self.budget.seconds:.0f} s: {epochs} of {self.plan.epochs} epochs of "
                f"{pace.later_epoch:.1f} s at {self.backbone.input_spec.image_size_px} px; "
                f"{max(self.budget.left, 0):.0f} s are left."
            )
            self.plans, self.had_no_time = (replace(self.plan, epochs=epochs),), epochs == 0
        self.learner = self._build_learner()

    def _build_learner(self) -> Learner:
        learner = build_learner(
            self.config,
            self.plan,
            self.backbone,
            self.batches,
            device=self.device,
            processes=self.processes.in_epoch(),
            reporter=self.reporter,
        )
        learner.averages_ends = learner.keeps_start and self.is_last_phase
        learner.keeps_last = self.is_fold
        return learner

    def close(self) -> None:
        """End writing to the cache."""
        if hasattr(self, "batches"):
            self.batches.close()

    def identity(self) -> dict[str, Any]:
        """Return what a resume must find unchanged."""
        return {
            "options": fixed_options(self.config),
            "phases": self.config.phases,
            "plans": [asdict(plan) for plan in self.plans],  # epochs among it, so that a longer training is noticed
            "data_fingerprint": self.table.fingerprint(),
            "pretrained_weights": self.backbone.weights,
        }


def fixed_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options that a resume must find unchanged, as plain values."""
    values = {name: getattr(config, name) for name in OPTION_NAMES if name not in FREE_TO_CHANGE}
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}
