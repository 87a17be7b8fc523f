"""Trains a small network in one go, and stopped by a signal and resumed, in whatever could tell the two apart.

`test_exact_resume.py` walks some of the cases, `tests/benchmarks/exact_resume.py` all of them.
"""

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from PIL import Image
from timm.utils import ModelEmaV3
from torch import nn

from finetune.data.listing import list_images
from finetune.data.loaders import evaluation_loader, labelled_dataset, training_loader
from finetune.data.scan import scan_images
from finetune.models.device import resolve_device
from finetune.runs.folder import RunFolder
from finetune.runs.records import InputSpec, LabelMap
from finetune.runs.reporting import LoggingReporter
from finetune.training import checkpoint
from finetune.training.checkpoint import Checkpointer, read_state, restore_state
from finetune.training.loop import run_epochs
from finetune.training.progress import Progress
from finetune.training.schedules import build_schedule
from finetune.training.step import Learner, build_accelerator
from finetune.training.stopping import Interruption

Stop = Literal["mid-epoch", "epoch end", "evaluation"]
STOPS: tuple[Stop, ...] = ("mid-epoch", "epoch end", "evaluation")
SPEC = InputSpec(image_size_px=32, resize_px=36, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
CLASSES = LabelMap.from_names(["blue", "green", "red"], {})
BATCH_SIZE, STEPS, EPOCHS, STOP_EPOCH = 8, 4, 3, 2
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm CNN": lambda: timm.create_model("test_resnet", num_classes=3),
    "dropout ViT": lambda: timm.create_model("test_vit", num_classes=3, img_size=32, drop_rate=0.2, proj_drop_rate=0.1),
    "drop-path net": lambda: timm.create_model("test_convnext", num_classes=3, drop_path_rate=0.3),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train."""

    network: str
    optimizer: Literal["sgd", "adamw"]
    schedule: Literal["cosine", "plateau"]
    has_ema: bool
    workers: int
    accumulation: int

    def __str__(self) -> str:
        average = "EMA" if self.has_ema else "no EMA"
        return (
            f"{self.network}, {self.optimizer}, {self.schedule}, {average}, {self.workers} workers, "
            f"{self.accumulation} parts"
        )


def all_cases() -> list[Case]:
    """Return every combination."""
    names = ("network", "optimizer", "schedule", "has_ema", "workers", "accumulation")
    choices = itertools.product(NETWORKS, ("sgd", "adamw"), ("cosine", "plateau"), (False, True), (0, 2), (1, 4))
    return [Case(**dict(zip(names, values, strict=True))) for values in choices]


def write_images(folder: Path) -> None:
    """Write 43 noisy pictures of three colours as DATA/{train,valid}/CLASS/*.png."""
    generator = np.random.default_rng(0)
    for number in range(43):
        label = CLASSES.class_names[number % 3]
        path = folder / ("train" if number < 31 else "valid") / label / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 160, (40, 44, 3), dtype=np.uint8)
        pixels[:, :, 2 - number % 3] += 60
        Image.fromarray(pixels).save(path)


class SignalAt:
    """Sends SIGTERM to this very process at one of `STOPS`; as a watcher it comes before the one that heeds it."""

    def __init__(self, stop: Stop, learner: Learner) -> None:
        self.stop = stop
        self.evaluations = 0
        learner.model.register_forward_pre_hook(self._note)

    def epoch_started(self, progress: Progress) -> None: ...
    def epoch_ended(self, progress: Progress) -> None:
        self.evaluations = progress.epoch

    def step_ended(self, progress: Progress) -> None:
        step = {"mid-epoch": STEPS * (STOP_EPOCH - 1) + 2, "epoch end": STEPS * STOP_EPOCH}.get(self.stop)
        if progress.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, model: nn.Module, _inputs: Any) -> None:
        if self.stop == "evaluation" and not model.training and self.evaluations == STOP_EPOCH - 1:
            self.evaluations = EPOCHS
            os.kill(os.getpid(), signal.SIGTERM)


def learner_of(case: Case, *, seed: int) -> Learner:
    """Build a network and all that trains it."""
    torch.manual_seed(seed)
    network = NETWORKS[case.network]().to(memory_format=torch.channels_last)
    rates = {"sgd": 0.02, "adamw": 2e-3}
    optimizer: torch.optim.Optimizer
    if case.optimizer == "sgd":
        optimizer = torch.optim.SGD(network.parameters(), lr=rates["sgd"], momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(network.parameters(), lr=rates["adamw"])
    schedule = build_schedule(
        optimizer, case.schedule, epochs=EPOCHS, steps_per_epoch=STEPS, warmup_epochs=1, step_epochs=1, step_factor=0.1
    )
    return Learner(
        model=network,
        criterion=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        schedule=schedule,
        accelerator=build_accelerator(resolve_device("cpu"), "fp32"),
        average=ModelEmaV3(network, decay=0.9, use_warmup=True) if case.has_ema else None,
        parts=case.accumulation,
    )


def train(case: Case, data: Path, run: RunFolder, *, stop: Stop | None = None, is_resumed: bool = False) -> Progress:
    """Train to the end, or until a signal comes in at `stop`."""
    table = scan_images(list_images(data)).table
    train_set = labelled_dataset(table.select("train"), CLASSES, SPEC, augmentation="trivial", seed=3)
    loaders = {
        "train": training_loader(train_set, batch_size=BATCH_SIZE, seed=3, workers=case.workers),
        "valid": evaluation_loader(labelled_dataset(table.select("valid"), CLASSES, SPEC), batch_size=5),
    }
    reporter = LoggingReporter()
    learner = learner_of(case, seed=99 if is_resumed else 0)
    progress = restore_state(read_state(run, reporter), learner, is_longer=False) if is_resumed else Progress()
    checkpointer = Checkpointer(run, learner, identity={}, reporter=reporter)
    with Interruption() as interruption:
        watchers = [*([SignalAt(stop, learner)] if stop else []), interruption, checkpointer]
        run_epochs(learner, loaders, EPOCHS, progress=progress, watchers=watchers)
    return progress


def differences(case: Case, stop: Stop, data: Path, folder: Path) -> list[str]:
    """Train `case` whole, once for all stops, and in parts; return the names of what is not the same bits."""
    whole, parts = RunFolder(folder / "whole"), RunFolder(folder / stop)
    if not whole.path.exists():
        whole.path.mkdir(parents=True)
        train(case, data, whole)
    parts.path.mkdir(parents=True)
    stopped = train(case, data, parts, stop=stop)
    assert stopped.stop_reason, f"{case} did not stop at {stop}"
    train(case, data, parts, is_resumed=True)
    expected, found = (read_state(run, LoggingReporter()) for run in (whole, parts))
    different = [
        f"{kind}/{name}"
        for kind in ("model", "ema", "optimizer", "best", "rng")
        for name, tensor in getattr(expected, kind).items()
        if not torch.equal(getattr(found, kind)[name], tensor)
    ]
    kept = [state.values["progress"] for state in (expected, found)]
    for values in kept:
        values["history"].pop("seconds")
    different += [name for name, value in kept[0].items() if kept[1][name] != value]
    different += [name for name in ("schedule", "optimizer_groups") if expected.values[name] != found.values[name]]
    return different


def save_every_epoch() -> None:
    """Let short epochs be saved too."""
    checkpoint.TRAINING_PER_SAVE = 0
