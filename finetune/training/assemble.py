"""The only place where a config becomes objects: images, network, advice, plan, and all that the loop works on."""

import random
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3

from finetune.config.schema import OPTION_NAMES, TrainConfig
from finetune.config.yaml_io import to_yaml
from finetune.data.check import require_trainable
from finetune.data.listing import Listing
from finetune.data.read import read_images
from finetune.data.scan import Onlooker, write_bad_files
from finetune.data.split import apply_split, split_table, write_split_csv
from finetune.data.table import ImageTable
from finetune.errors import RunError
from finetune.features.extract import TrunkPass
from finetune.features.trunk import pooled_trunk
from finetune.models.device import resolve_device, resolve_precision
from finetune.models.freezing import freeze_stages, hold_batch_norm
from finetune.models.heads import head_module
from finetune.models.initialize import Backbone, build_backbone
from finetune.models.neighbours import require_vectors
from finetune.models.param_groups import parameter_groups
from finetune.runs import strict_json
from finetune.runs.environment import describe_environment
from finetune.runs.folder import RunFolder, write_whole
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter
from finetune.training.batches import Batches, build_batches
from finetune.training.checkpoint import SavedState, read_state, restore_state
from finetune.training.mixing import Mix
from finetune.training.objectives import balanced_class_weights, build_criterion
from finetune.training.plan import Plan
from finetune.training.progress import Progress
from finetune.training.schedules import build_schedule
from finetune.training.start import is_studied, start_network
from finetune.training.step import Learner, build_accelerator

FREE_TO_CHANGE = frozenset({"data", "output", "overwrite", "resume", "epochs", "workers", "device"})
"""Options that a resume may be given anew."""
OTHER_IMAGES = "the images are not those that training began with"
ANEW = "train anew with another --output"


@dataclass(kw_only=True)
class Job:
    """Everything a training works with, ready to run."""

    config: TrainConfig
    run: RunFolder
    table: ImageTable
    label_map: LabelMap
    backbone: Backbone
    plan: Plan
    learner: Learner
    batches: Batches
    progress: Progress

    def identity(self) -> dict[str, Any]:
        """Return what a resume must find unchanged."""
        return {
            "options": _fixed_options(self.config),
            "plan": asdict(self.plan),  # epochs among it, so that a longer training is noticed
            "data_fingerprint": self.table.fingerprint(),
            "pretrained_weights": self.backbone.weights,
        }


def assemble(config: TrainConfig, run: RunFolder, listing: Listing, reporter: Reporter) -> Job:
    """Turn `config` into a job on the images of `listing`: a new one, or the one that `resume` goes on with.

    Raises:
        ConfigError, DataError, ModelError: The options, the images or the network cannot be used.
        RunError: A resume finds other options or images than were saved, or no state to go on from.
    """
    device = resolve_device(config.device)
    seed_everything(config.seed)
    saved = read_state(run, reporter) if config.resume else None
    if saved:
        _refuse_changes(config, saved, run)
    backbone = _network(config, listing, device, is_filled_later=saved is not None)
    precision = resolve_precision(config.precision, device, backbone.module)
    with ExitStack() as stack:
        trunk_pass = None
        if saved is None and is_studied(config, backbone):
            trunk_pass = stack.enter_context(_pooled_pass(backbone, listing, device, precision, reporter))
        table, label_map = _images(config, run, listing, onlooker=trunk_pass, reporter=reporter)
        if saved:
            if saved.values["identity"]["data_fingerprint"] != table.fingerprint():
                raise RunError(f"{run.path} cannot be resumed: {OTHER_IMAGES}", ANEW)
            plan = _saved_plan(config, saved)
            backbone = replace(backbone, weights=saved.values["identity"]["pretrained_weights"])
            backbone.module.load_state_dict(saved.model)  # what frozen layers give is computed before all is restored
        else:
            plan = start_network(config, run, backbone, table, label_map, trunk_pass=trunk_pass, reporter=reporter)
    if plan.start == "fresh" and backbone.is_pretrained:
        backbone = _network(config, listing, device, is_filled_later=True)
    freeze_stages(backbone.module, backbone.stages, len(plan.frozen_stages))
    if plan.batch_norm == "eval":
        hold_batch_norm(backbone.module)
    batches = build_batches(
        config, plan, backbone, table, label_map, device=device, precision=precision, reporter=reporter
    )
    training_precision = resolve_precision(config.precision, device, batches.model)
    accelerator = build_accelerator(device, training_precision)
    learner = _learner(config, backbone, plan, batches, accelerator, reporter)
    job = Job(
        config=_resolved(config, plan, backbone, batches.workers),
        run=run,
        table=table,
        label_map=label_map,
        backbone=backbone,
        plan=plan,
        learner=learner,
        batches=batches,
        progress=Progress(),
    )
    if saved:
        is_longer = plan.epochs > saved.values["identity"]["plan"]["epochs"]
        job.progress = restore_state(saved, learner, is_longer=is_longer)
        _forget_later_events(run, saved)
    else:
        environment = describe_environment(
            device=str(device), threads=torch.get_num_threads(), precision=training_precision, seed=config.seed
        )
        write_whole(run.environment, strict_json.dump(environment, indent=1))
    write_whole(run.config, to_yaml(job.config))
    return job


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; loaders and splits have their own."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _pooled_pass(
    backbone: Backbone, listing: Listing, device: torch.device, precision: str, reporter: Reporter
) -> TrunkPass:
    return TrunkPass(
        pooled_trunk(backbone),
        data_root=listing.root,
        images=len(listing.rows),
        device=device,
        reporter=reporter,
        precision=precision,
    )


def _images(
    config: TrainConfig, run: RunFolder, listing: Listing, *, onlooker: Onlooker | None, reporter: Reporter
) -> tuple[ImageTable, LabelMap]:
    images = read_images(
        Path(config.data),
        listing=listing,
        label_names=config.label_names,
        allow_bad_images=config.allow_bad_images,
        onlooker=onlooker,
        reporter=reporter,
    )
    write_bad_files(images.scan.bad_files, run.bad_files)
    for finding in images.diagnosis.findings:
        if finding.severity == "warning":
            reporter.warn(finding.message)
    require_trainable(images.diagnosis)
    if config.resume:
        return apply_split(images.scan.table, run.split), images.label_map
    table = split_table(images.scan.table, seed=config.seed, valid_fraction=config.valid_fraction)
    write_split_csv(table, run.split)
    return table, images.label_map


def _network(config: TrainConfig, listing: Listing, device: torch.device, *, is_filled_later: bool) -> Backbone:
    """Build the network, with random weights where those it will have come from elsewhere."""
    backbone = build_backbone(
        config.model,
        num_classes=len(listing.class_names),
        use_pretrained=config.use_pretrained and not is_filled_later,
        weights=None if is_filled_later else config.weights,
        head=config.head,
        image_size=None if config.image_size == "auto" else config.image_size,
        channels=None if config.channels == "auto" else config.channels,
    )
    if config.head == "knn":
        require_vectors(backbone.module)
    if config.shuffle_pixels:
        spec = replace(backbone.input_spec, pixel_permutation_seed=config.seed)
        backbone = replace(backbone, input_spec=spec)
    backbone.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return backbone


def _saved_plan(config: TrainConfig, saved: SavedState) -> Plan:
    """Return the plan that `saved` followed, with another number of epochs if one was asked for."""
    values = saved.values["identity"]["plan"]
    plan = Plan(**values | {"frozen_stages": tuple(values["frozen_stages"])})
    return plan if config.epochs == "auto" else replace(plan, epochs=config.epochs)


def _learner(
    config: TrainConfig,
    backbone: Backbone,
    plan: Plan,
    batches: Batches,
    accelerator: Accelerator,
    reporter: Reporter,
) -> Learner:
    class_weights_K = None
    if config.imbalance == "class-weights" and plan.head_start != "neighbours":
        class_indices_N = torch.tensor(batches.loaders["train"].dataset.class_indices)  # type: ignore[attr-defined]
        class_count = head_module(backbone.module).weight.shape[0]
        counts_K = torch.bincount(class_indices_N, minlength=class_count)
        class_weights_K = balanced_class_weights(counts_K).to(accelerator.device)
    groups = parameter_groups(
        backbone.module,
        backbone.stages,
        learning_rate=plan.learning_rate,
        trunk_learning_rate=plan.trunk_learning_rate,
        depth_ratio=plan.depth_ratio,
        weight_decay=plan.weight_decay,
    ) or [{"params": [], "lr": plan.learning_rate}]  # nearest neighbours have nothing to learn
    optimizer: torch.optim.Optimizer
    match plan.optimizer:
        case "adamw":
            optimizer = torch.optim.AdamW(groups)
        case "adam":
            optimizer = torch.optim.Adam(groups)
        case "sgd":
            optimizer = torch.optim.SGD(groups, momentum=config.momentum)
    schedule = build_schedule(
        optimizer,
        config.schedule,
        epochs=plan.epochs,
        steps_per_epoch=len(batches.loaders["train"]),
        warmup_epochs=config.warmup_epochs,
        step_epochs=config.step_epochs,
        step_factor=config.step_factor,
    )
    return Learner(
        model=batches.model,
        network=backbone.module,
        criterion=build_criterion(
            config.head, loss=config.loss, label_smoothing=config.label_smoothing, class_weights_K=class_weights_K
        ),
        optimizer=optimizer,
        schedule=schedule,
        accelerator=accelerator,
        max_grad_norm=config.max_grad_norm,
        finish=batches.finish,
        mix=_mix(config, backbone),
        average=ModelEmaV3(backbone.module, decay=config.ema_decay, use_warmup=True)
        if config.averaging == "ema"
        else None,
        averages_ends=config.averaging == "ends",
        parts=config.gradient_accumulation,
        reporter=reporter,
    )


def _mix(config: TrainConfig, backbone: Backbone) -> Mix | None:
    if not config.mixup and not config.cutmix:
        return None
    class_count = head_module(backbone.module).weight.shape[0]
    return Mix(mixup=config.mixup, cutmix=config.cutmix, class_count=class_count, seed=config.seed)


def _resolved(config: TrainConfig, plan: Plan, backbone: Backbone, workers: int) -> TrainConfig:
    return replace(
        config,
        data=str(Path(config.data).resolve()),
        output=None,
        weights=None if plan.start == "fresh" else _absolute(config.weights),
        label_names=_absolute(config.label_names),
        scenario=plan.scenario,
        head_start="random" if plan.head_start == "random" else "probe",
        image_size=backbone.input_spec.image_size_px,
        channels=backbone.input_spec.channels,
        epochs=plan.epochs,
        optimizer=plan.optimizer,
        learning_rate=plan.learning_rate,
        trunk_learning_rate=plan.trunk_learning_rate,
        depth_ratio=plan.depth_ratio,
        weight_decay=plan.weight_decay,
        views=plan.views,
        boundary_cache="always" if plan.boundary_cache else "never",
        workers=workers,
        resume=False,
        overwrite=False,
    )


def _absolute(path: Path | None) -> Path | None:
    return path and path.resolve()


def _fixed_options(config: TrainConfig) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in OPTION_NAMES if name not in FREE_TO_CHANGE}
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}


def _refuse_changes(config: TrainConfig, saved: SavedState, run: RunFolder) -> None:
    """Compare the options as they were given with those the run was saved with; an "auto" agrees with any."""
    # A run of an earlier version knew fewer options.
    options = _fixed_options(TrainConfig()) | saved.values["identity"]["options"]
    changes = [
        f"--{name.replace('_', '-')} was {options[name]!r} and is {value!r}"
        for name, value in _fixed_options(config).items()
        if value not in ("auto", options[name])
    ]
    if changes:
        raise RunError(f"{run.path} cannot be resumed: {'; '.join(changes)}", ANEW)


def _forget_later_events(run: RunFolder, saved: SavedState) -> None:
    """Cut metrics.jsonl back to where the saved state left it: what came after will happen again."""
    with run.metrics.open("r+b") as file:
        file.truncate(saved.values["metrics_bytes"])
