"""The training loop, read top to bottom: start → epochs → steps. A notebook and the command run the same one."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration, convert_to_fp32
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from finetune.data.dataset import Draft
from finetune.data.loaders import EpochSampler, readable
from finetune.errors import ConfigError, DivergedError, first_ten
from finetune.models.device import as_inputs, resolve_device
from finetune.training.objectives import check_pairing, main_output, total_loss
from finetune.training.progress import History, Progress, Totals, Watcher
from finetune.training.schedules import Schedule

# Shapes: B batch, C channels, H height, W width.

LOWER_RATES = "train with a lower --learning-rate and --trunk-learning-rate, or with --max-grad-norm 1"


def build_accelerator(device: torch.device, precision: str) -> Accelerator:
    """Return accelerate's handle on the device, the number format of the training steps and the processes."""
    if AcceleratorState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier training's choices bind for good otherwise
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        # Only pinned memory may be copied from while Python goes on: any other could be freed by then.
        dataloader_config=DataLoaderConfiguration(non_blocking=device.type == "cuda"),
    )


@dataclass(kw_only=True)
class Learner:
    """What the loop works on. `max_grad_norm` of 0 does not clip.

    `network` is the whole of which `model` may be the part above a cut; its weights are what is kept and saved.
    `finish` makes images of the drafts in a training batch, where batches hold drafts.
    """

    model: nn.Module
    network: nn.Module = None  # type: ignore[assignment]
    criterion: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    accelerator: Accelerator = field(default_factory=lambda: build_accelerator(resolve_device("auto"), "fp32"))
    max_grad_norm: float = 0.0
    finish: Callable[[Sequence[Draft]], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        self.network = self.network or self.model

    def learning_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimiser moves."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def train_model(
    model: nn.Module,
    loaders: Mapping[str, DataLoader[Any]],
    criterion: nn.Module,
    optimizer: Optimizer,
    num_epochs: int = 25,
    *,
    scheduler: LRScheduler | Schedule | None = None,
    watchers: Sequence[Watcher] = (),
) -> History:
    """Train `model` in place on plain loaders and leave it with its best validation weights.

    Each epoch has a training and a validation phase. The weights with the highest validation accuracy are kept, the
    start among them, and restored at the end. Frozen parameters stay as they are.

    Args:
        model: Network whose head gives logits or log-probabilities (B, K).
        loaders: "train" and "valid"; batches of images (B, C, H, W) float32 and class indices (B,) int64.
        criterion: `nn.CrossEntropyLoss` for a head of logits, `nn.NLLLoss` for a log_softmax head.
        optimizer: Holds the parameters that learn.
        num_epochs: Passes over the training images, 0 or more.
        scheduler: A torch scheduler that moves after every epoch, or a `Schedule` that says when.
        watchers: Called after every step and epoch, to show, store or stop.

    Returns:
        Losses, accuracies, learning rates and seconds of every epoch, and which one was best.

    Raises:
        ConfigError: The loss takes softmax twice or never, or a loader is missing.
        DivergedError: A loss or gradient is not finite; no update was made with it.
    """
    learner = Learner(model=model, criterion=criterion, optimizer=optimizer, schedule=Schedule.of(scheduler, optimizer))
    progress = Progress()
    run_epochs(learner, loaders, num_epochs, progress=progress, watchers=watchers)
    return progress.history


def run_epochs(
    learner: Learner,
    loaders: Mapping[str, DataLoader[Any]],
    num_epochs: int,
    *,
    progress: Progress,
    watchers: Sequence[Watcher] = (),
) -> None:
    """Train until `num_epochs` are done or a watcher stops it, beginning where `progress` says and keeping it true."""
    if missing := {"train", "valid"} - set(loaders):
        raise ConfigError(f"the loaders lack {sorted(missing)}", "pass {'train': loader, 'valid': loader}")
    check_pairing(learner.network, learner.criterion)
    sampler = loaders["train"].batch_sampler
    accelerator = learner.accelerator
    model, optimizer = accelerator.prepare(learner.model, learner.optimizer)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # scores come in float32, as those of a saved model do
    train_batches, valid_batches = accelerator.prepare(loaders["train"], loaders["valid"])
    learner.model = model
    if accelerator.scaler is not None or accelerator.num_processes > 1:
        learner.optimizer = optimizer  # else it adds nothing but time: it looks for a package at every step
    progress.epochs, progress.images_per_epoch = num_epochs, len(loaders["train"].dataset)  # type: ignore[arg-type]

    if not progress.has_started:
        start = evaluate_loss(learner, valid_batches)
        progress.history.start_loss, progress.history.start_accuracy = start.mean_loss, start.accuracy
        progress.keep_best(learner.network, start.accuracy)

    while progress.epoch < num_epochs and not progress.stop_reason:
        started = time.monotonic()
        if isinstance(sampler, EpochSampler):
            sampler.start(progress.epoch, progress.step)
        for watcher in watchers:
            watcher.epoch_started(progress)
        learner.model.train()
        for batch in readable(train_batches):
            progress.totals.add(*train_step(learner, batch, step=progress.global_step + 1))
            progress.step += 1
            progress.global_step += 1
            for watcher in watchers:
                watcher.step_ended(progress)
            if progress.stop_reason:
                break
        else:
            _end_epoch(learner, valid_batches, progress=progress, seconds=time.monotonic() - started)
            for watcher in watchers:
                watcher.epoch_ended(progress)

    learner.model = accelerator.unwrap_model(model)
    learner.network.load_state_dict(progress.best_weights)
    learner.network.eval()
    learner.model.eval()


def train_step(learner: Learner, batch: Sequence[Any], *, step: int = 1) -> tuple[float, int, int]:
    """Take one optimiser step, the `step`-th; return the mean loss, the right predictions and the images of `batch`.

    Raises:
        DivergedError: Loss or gradient is not finite; nothing was changed.
    """
    class_indices_B = batch[1]
    with _lone_image_guard(learner.model, len(class_indices_B)):
        images = learner.finish(batch[0]) if learner.finish else batch[0]
        with learner.accelerator.autocast():
            outputs = learner.model(*as_inputs(images))
        outputs = convert_to_fp32(outputs)
        loss = total_loss(outputs, class_indices_B, learner.criterion)
    _require_finite(loss, f"loss of step {step}", learner, batch)
    learner.optimizer.zero_grad()
    learner.accelerator.backward(loss)
    parameters = learner.learning_parameters()
    if learner.max_grad_norm:
        norm = learner.accelerator.clip_grad_norm_(parameters, learner.max_grad_norm)
    else:
        norm = get_total_norm([each.grad for each in parameters if each.grad is not None])
    if norm is not None and learner.accelerator.scaler is None:  # a loss scaler skips such a step by itself
        _require_finite(norm, f"gradient norm of step {step}", learner, batch)
    learner.optimizer.step()
    learner.schedule.step_ended()
    right = int((main_output(outputs).argmax(dim=1) == class_indices_B).sum())
    return loss.item(), right, len(class_indices_B)


@torch.no_grad()
def evaluate_loss(learner: Learner, batches: Iterable[Any]) -> Totals:
    """Return loss and accuracy of the model, in eval mode, over `batches`; exact over several processes."""
    learner.model.eval()
    totals = Totals()
    for batch in readable(batches):
        local_BK = main_output(learner.model(*as_inputs(batch[0])))
        outputs_BK, class_indices_B = learner.accelerator.gather_for_metrics((local_BK.float(), batch[1]))
        loss = float(learner.criterion(outputs_BK, class_indices_B))
        totals.add(loss, int((outputs_BK.argmax(dim=1) == class_indices_B).sum()), len(class_indices_B))
    return totals


def _end_epoch(learner: Learner, valid_batches: Iterable[Any], *, progress: Progress, seconds: float) -> None:
    history = progress.history
    history.learning_rates.append(float(learner.optimizer.param_groups[0]["lr"]))
    valid = evaluate_loss(learner, valid_batches)
    if not math.isfinite(valid.mean_loss):
        raise DivergedError(
            f"the validation loss of epoch {progress.epoch + 1} became {valid.mean_loss}; the saves before it are kept",
            LOWER_RATES,
        )
    history.train_loss.append(progress.totals.mean_loss)
    history.train_accuracy.append(progress.totals.accuracy)
    history.valid_loss.append(valid.mean_loss)
    history.valid_accuracy.append(valid.accuracy)
    history.seconds.append(seconds)
    learner.schedule.epoch_ended(valid.mean_loss)
    progress.epoch += 1
    progress.step, progress.totals = 0, Totals()
    if progress.is_best(valid.accuracy):
        progress.keep_best(learner.network, valid.accuracy)


def _require_finite(value: torch.Tensor, what: str, learner: Learner, batch: Sequence[Any]) -> None:
    if bool(torch.isfinite(value)):
        return
    learner.optimizer.zero_grad()
    rate = learner.optimizer.param_groups[0]["lr"]
    images = f" on {first_ten(batch[2])}" if len(batch) > 2 else ""
    raise DivergedError(
        f"the {what} became {value.item()} at learning rate {rate:g}{images}; that step was not taken",
        LOWER_RATES,
    )


@contextmanager
def _lone_image_guard(model: nn.Module, images: int) -> Iterator[None]:
    """Keep BatchNorm in eval mode for a batch of one image: it has no variance to normalise or to remember."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    if images > 1:
        norms = []
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
