"""The training loop, read top to bottom: start → epochs → steps. A notebook and the command run the same one."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from finetune.data.loaders import EpochSampler, then_none
from finetune.errors import ConfigError, DivergedError
from finetune.models.device import as_inputs
from finetune.training.objectives import check_pairing, main_output
from finetune.training.progress import History, Outcome, Progress, Totals, Watcher
from finetune.training.schedules import Schedule
from finetune.training.step import LOWER_RATES, Learner, train_step

# Shapes: B batch, C channels, H height, W width, K classes.


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
    if missing := {"train", "valid"} - set(loaders):
        raise ConfigError(f"the loaders lack {sorted(missing)}", "pass {'train': loader, 'valid': loader}")
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
    """Train until `num_epochs` are done or a watcher stops it, beginning where `progress` says and keeping it true.

    Where `loaders` has no "valid" the last weights are kept.
    """
    check_pairing(learner.network, learner.criterion)
    sampler, valid_loader = loaders["train"].batch_sampler, loaders.get("valid")
    if not learner.sharded:
        learner.model.to(learner.accelerator.device)
    if learner.accelerator.scaler is not None:  # which takes the scale out of the gradients
        learner.optimizer = learner.accelerator.prepare(learner.optimizer)
    progress.epochs, progress.images_per_epoch = num_epochs, len(loaders["train"].dataset)  # type: ignore[arg-type]

    if not progress.has_started:
        start = _validate(learner, valid_loader)
        progress.history.start_loss, progress.history.start_accuracy = start.mean_loss, start.accuracy
        progress.keep_best(learner.network, start.accuracy)
        progress.start_weights = progress.best_weights

    while progress.epoch < num_epochs and not progress.stop_reason:
        started = time.monotonic()
        if isinstance(sampler, EpochSampler):
            sampler.start(progress.epoch, progress.step)
        for watcher in watchers:
            watcher.epoch_started(progress)
        learner.trained.train()
        batches = learner.placed(loaders["train"])
        if learner.processes.count > 1:
            batches = then_none(batches, len(loaders["train"]) - progress.step)
        for batch in batches:
            progress.totals.add(train_step(learner, batch, step=progress.global_step + 1))
            progress.step += 1
            progress.global_step += 1
            for watcher in watchers:
                watcher.step_ended(progress)
            if progress.stop_reason:
                break
        if not progress.is_interrupted:
            _end_epoch(learner, valid_loader, progress=progress, seconds=time.monotonic() - started)
            for watcher in watchers:
                watcher.epoch_ended(progress)

    if learner.averages_ends and progress.start_weights and progress.history.best_epoch and not progress.is_interrupted:
        _average_ends(learner, valid_loader, progress)
    learner.network.load_state_dict(progress.best_weights)
    learner.reunite()
    learner.network.eval()
    learner.model.eval()


@torch.no_grad()
def evaluate_loss(learner: Learner, batches: Iterable[Any]) -> Totals:
    """Return loss and accuracy of what learns, in eval mode, over `batches`, those of all processes together."""
    network = learner.trained.eval()
    own = []
    for batch in learner.scored(batches):
        if batch is None:
            network(*learner.stand_in())
            continue
        images, class_indices_B, *_ = batch
        outputs_BK = main_output(network(*as_inputs(images))).float()
        right = int((outputs_BK.argmax(dim=1) == class_indices_B).sum())
        loss = float(learner.criterion(outputs_BK, class_indices_B))
        own.append(Outcome(loss=loss, right=right, images=len(class_indices_B)))
    totals = Totals()
    for outcome in learner.processes.gather_shares(own):  # in the order that one process would have
        totals.add(outcome)
    return totals


def _validate(learner: Learner, valid_loader: DataLoader[Any] | None) -> Totals:
    if valid_loader is None:
        return Totals()
    totals = evaluate_loss(learner, valid_loader)
    is_alone = learner.processes.count == 1
    assert is_alone or totals.images == len(valid_loader.dataset), totals  # type: ignore[arg-type]
    return totals


def _end_epoch(learner: Learner, valid_loader: DataLoader[Any] | None, *, progress: Progress, seconds: float) -> None:
    history, keeps_last = progress.history, learner.keeps_last or valid_loader is None
    learner.collect()
    history.learning_rates.append(float(learner.optimizer.param_groups[0]["lr"]))
    with learner.averaged():
        valid = _validate(learner, valid_loader)
        if valid_loader is not None and not math.isfinite(valid.mean_loss):
            raise DivergedError(
                f"the validation loss of epoch {progress.epoch + 1} became {valid.mean_loss}; "
                "the saves before it are kept",
                LOWER_RATES,
            )
        progress.epoch += 1
        if keeps_last or progress.is_best(valid.accuracy):
            progress.keep_best(learner.network, valid.accuracy)
    history.train_loss.append(progress.totals.mean_loss)
    history.train_accuracy.append(progress.totals.accuracy)
    history.valid_loss.append(valid.mean_loss)
    history.valid_accuracy.append(valid.accuracy)
    history.seconds.append(seconds)
    learner.schedule.epoch_ended(progress.totals.mean_loss if keeps_last else valid.mean_loss)
    progress.step, progress.totals = 0, Totals()


def _average_ends(learner: Learner, valid_loader: DataLoader[Any] | None, progress: Progress) -> None:
    """Keep the mean of the start's weights and the best ones if it is no worse (Wortsman 2022, arXiv 2109.01903)."""
    mean = {
        name: best.lerp(progress.start_weights[name], 0.5) if best.is_floating_point() else best
        for name, best in progress.best_weights.items()
    }
    learner.network.load_state_dict(mean)
    learner.spread()
    accuracy = _validate(learner, valid_loader).accuracy
    progress.history.ends_accuracy = accuracy
    if accuracy >= progress.history.best_accuracy:
        progress.best_weights = mean
