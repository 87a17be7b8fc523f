"""One phase of a training: what stays frozen in it, where its batches come from, and what learns from them."""

import torch
from timm.utils import ModelEmaV3

from finetune.config.schema import TrainConfig
from finetune.data.loaders import batch_of
from finetune.errors import ConfigError
from finetune.models.device import resolve_precision
from finetune.models.freezing import freeze_stages, hold_batch_norm
from finetune.models.heads import head_module
from finetune.models.initialize import Backbone
from finetune.models.param_groups import parameter_groups
from finetune.runs.processes import Processes
from finetune.runs.reporting import Reporter
from finetune.training.batches import Batches
from finetune.training.mixing import Mix
from finetune.training.objectives import balanced_class_weights, build_criterion
from finetune.training.plan import Plan
from finetune.training.schedules import build_schedule
from finetune.training.sharding import ShardedModel, is_sharding_asked
from finetune.training.step import Learner, build_accelerator
from finetune.training.sync_norm import SharedStatistics


def freeze(plan: Plan, backbone: Backbone) -> None:
    """Freeze what `plan` freezes, and hold the statistics of BatchNorm if it says so."""
    freeze_stages(backbone.module, backbone.stages, len(plan.frozen_stages))
    if plan.batch_norm == "eval":
        hold_batch_norm(backbone.module)


def build_learner(
    config: TrainConfig,
    plan: Plan,
    backbone: Backbone,
    batches: Batches,
    *,
    device: torch.device,
    processes: Processes,
    reporter: Reporter,
) -> Learner:
    """Build what learns from `batches` as `plan` says."""
    precision = resolve_precision(config.precision, device, batches.model)
    optimizer, train_loader = _optimizer(config, plan, backbone), batches.loaders["train"]
    is_shared = config.sync_batch_norm and processes.count > 1 and plan.batch_norm == "train"
    schedule = build_schedule(
        optimizer,
        config.schedule,
        epochs=plan.epochs,
        steps_per_epoch=len(train_loader),
        warmup_epochs=config.warmup_epochs,
        step_epochs=config.step_epochs,
        step_factor=config.step_factor,
    )
    sharded = None
    if is_sharding_asked(processes) and plan.epochs:
        _require_shardable(config, precision)
        sharded = ShardedModel(batches.model, processes=processes, device=device)
        sharded.give_to(optimizer)
    class_weights_K, mix = None, None
    if plan.head_start != "neighbours":
        class_count = head_module(backbone.module).weight.shape[0]
        if config.imbalance == "class-weights":
            class_indices_N = torch.tensor(train_loader.dataset.class_indices)  # type: ignore[attr-defined]
            class_weights_K = balanced_class_weights(torch.bincount(class_indices_N, minlength=class_count)).to(device)
        if config.mixup or config.cutmix:
            mix = Mix(mixup=config.mixup, cutmix=config.cutmix, class_count=class_count, seed=config.seed)
    return Learner(
        model=batches.model,
        network=backbone.module,
        criterion=build_criterion(
            config.head, loss=config.loss, label_smoothing=config.label_smoothing, class_weights_K=class_weights_K
        ),
        optimizer=optimizer,
        schedule=schedule,
        accelerator=build_accelerator(device, precision),
        max_grad_norm=plan.max_grad_norm,
        finish=batches.finish,
        mix=mix,
        average=_average(config, backbone),
        keeps_start=config.averaging == "ends",
        parts=config.gradient_accumulation,
        processes=processes,
        shared_statistics=SharedStatistics(processes) if is_shared else None,
        sharded=sharded,
        sample=lambda: batch_of(train_loader, [(0, 0)]),
        reporter=reporter,
    )


def _optimizer(config: TrainConfig, plan: Plan, backbone: Backbone) -> torch.optim.Optimizer:
    groups = parameter_groups(
        backbone.module,
        backbone.stages,
        learning_rate=plan.learning_rate * plan.rate_share,
        trunk_learning_rate=plan.trunk_learning_rate * plan.rate_share,
        depth_ratio=plan.depth_ratio,
        weight_decay=plan.weight_decay,
    ) or [{"params": [], "lr": plan.learning_rate}]  # nearest neighbours have nothing to learn
    match plan.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups)
        case "adam":
            return torch.optim.Adam(groups)
        case "sgd":
            return torch.optim.SGD(groups, momentum=config.momentum)


def _require_shardable(config: TrainConfig, precision: str) -> None:
    if config.averaging == "ema":
        raise ConfigError(
            "--averaging ema follows the whole network at every step, FSDP divides it", "average the ends"
        )
    if precision == "fp16":
        raise ConfigError("FSDP trains in bf16 or fp32, not in fp16", "take another --precision")


def _average(config: TrainConfig, backbone: Backbone) -> ModelEmaV3 | None:
    return ModelEmaV3(backbone.module, decay=config.ema_decay, use_warmup=True) if config.averaging == "ema" else None
