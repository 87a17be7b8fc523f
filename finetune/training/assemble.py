"""The only place where a config becomes objects: images, network, advice, plan, and all that the loop works on."""

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data import DataLoader

from finetune.config.schema import OPTION_NAMES, TrainConfig
from finetune.config.yaml_io import to_yaml
from finetune.data.check import require_trainable
from finetune.data.loaders import fastest_workers, labelled_dataset, split_loaders, training_loader
from finetune.data.pixels import HeldPixels, can_hold, hold_pixels
from finetune.data.read import read_images
from finetune.data.scan import write_bad_files
from finetune.data.split import apply_split, split_table, write_split_csv
from finetune.data.table import ImageTable
from finetune.errors import RunError
from finetune.evaluation.infer import probabilities_of
from finetune.models.device import resolve_device
from finetune.models.freezing import freeze_stages, hold_batch_norm
from finetune.models.initialize import Backbone, build_backbone
from finetune.models.neighbours import require_vectors
from finetune.models.param_groups import parameter_groups
from finetune.models.stages import stage_parameters
from finetune.runs import strict_json
from finetune.runs.environment import describe_environment
from finetune.runs.folder import RunFolder, write_whole
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter
from finetune.training.checkpoint import SavedState, read_state, restore_state
from finetune.training.loop import Learner
from finetune.training.objectives import balanced_class_weights, build_criterion
from finetune.training.plan import Plan
from finetune.training.progress import Progress
from finetune.training.schedules import build_schedule
from finetune.training.start import start_network

FREE_TO_CHANGE = frozenset({"data", "output", "overwrite", "resume", "epochs", "workers", "device"})
"""Options that a resume may be given anew."""


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
    loaders: dict[str, DataLoader[Any]]
    progress: Progress

    def identity(self) -> dict[str, Any]:
        """Return what a resume must find unchanged."""
        return {
            "options": _fixed_options(self.config),
            "plan": asdict(self.plan),  # epochs among it, so that a longer training is noticed
            "data_fingerprint": self.table.fingerprint(),
            "pretrained_weights": self.backbone.weights,
        }


def assemble(config: TrainConfig, run: RunFolder, reporter: Reporter) -> Job:
    """Turn `config` into a job: a new one, or with `resume` the one that was interrupted in `run`.

    Raises:
        ConfigError, DataError, ModelError: The options, the images or the network cannot be used.
        RunError: A resume finds other options or images than were saved, or no state to go on from.
    """
    accelerator = build_accelerator(config.device, config.precision)
    seed_everything(config.seed)
    saved = read_state(run, reporter) if config.resume else None
    table, label_map = _images(config, run, reporter)
    backbone = _network(config, len(label_map), accelerator, use_pretrained=config.use_pretrained and saved is None)
    is_tiny = can_hold(table, backbone.input_spec, config.augmentation)
    pixels = hold_pixels(table, backbone.input_spec) if is_tiny else None
    loaders = split_loaders(table, label_map, backbone.input_spec, batch_size=config.batch_size, pixels=pixels)
    if saved:
        values = saved.values["identity"]["plan"]
        plan = Plan(**values | {"frozen_stages": tuple(values["frozen_stages"])})
        plan = replace(plan, epochs=plan.epochs if config.epochs == "auto" else config.epochs)
        backbone = replace(backbone, weights=saved.values["identity"]["pretrained_weights"])
    else:
        plan = start_network(config, run, backbone, loaders, device=accelerator.device, reporter=reporter)
        if plan.start == "fresh" and backbone.is_pretrained:
            fresh = replace(config, weights=None)
            backbone = _network(fresh, len(label_map), accelerator, use_pretrained=False)
    freeze_stages(backbone.module, backbone.stages, len(plan.frozen_stages))
    if plan.batch_norm == "eval":
        hold_batch_norm(backbone.module)
    workers = _workers(config, backbone, loaders["train"], accelerator.device)
    loaders = split_loaders(
        table, label_map, backbone.input_spec, batch_size=config.batch_size, workers=workers, pixels=pixels
    )
    loaders["train"] = _training_loader(config, backbone, table, label_map, workers=workers, pixels=pixels)
    learner = _learner(config, backbone, plan, loaders["train"], accelerator, class_count=len(label_map))
    job = Job(
        config=_resolved(config, plan, backbone, workers),
        run=run,
        table=table,
        label_map=label_map,
        backbone=backbone,
        plan=plan,
        learner=learner,
        loaders=loaders,
        progress=Progress(),
    )
    if saved:
        _refuse_changes(config, saved, job)
        job.progress = restore_state(saved, learner, is_longer=plan.epochs != values["epochs"])
        _forget_later_events(run, saved)
    else:
        environment = describe_environment(
            device=str(accelerator.device), threads=torch.get_num_threads(), seed=config.seed
        )
        write_whole(run.environment, strict_json.dump(environment, indent=1))
    write_whole(run.config, to_yaml(job.config))
    return job


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; loaders and splits have their own."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_accelerator(device: str, precision: str) -> Accelerator:
    """Return accelerate's handle on the device, the number format and the processes.

    Raises:
        ConfigError: The device is not there.
    """
    place = resolve_device(device)
    if precision == "auto":
        precision = "bf16" if place.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if AcceleratorState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier training's choices bind for good otherwise
    return Accelerator(cpu=device == "cpu", mixed_precision="no" if precision == "fp32" else precision)


def _images(config: TrainConfig, run: RunFolder, reporter: Reporter) -> tuple[ImageTable, LabelMap]:
    images = read_images(
        Path(config.data),
        label_names=config.label_names,
        allow_bad_images=config.allow_bad_images,
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


def _network(config: TrainConfig, class_count: int, accelerator: Accelerator, *, use_pretrained: bool) -> Backbone:
    backbone = build_backbone(
        config.model,
        num_classes=class_count,
        use_pretrained=use_pretrained,
        weights=config.weights,
        head=config.head,
        image_size=None if config.image_size == "auto" else config.image_size,
        channels=None if config.channels == "auto" else config.channels,
    )
    if config.head == "knn":
        require_vectors(backbone.module)
    if config.shuffle_pixels:
        spec = replace(backbone.input_spec, pixel_permutation_seed=config.seed)
        backbone = replace(backbone, input_spec=spec)
    backbone.module.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return backbone


def _training_loader(
    config: TrainConfig,
    backbone: Backbone,
    table: ImageTable,
    label_map: LabelMap,
    *,
    workers: int,
    pixels: HeldPixels | None,
) -> DataLoader[Any]:
    dataset = labelled_dataset(
        table.select("train"),
        label_map,
        backbone.input_spec,
        augmentation=config.augmentation,
        seed=config.seed,
        pixels=pixels,
    )
    weights_N = None
    if config.imbalance == "balanced-sampling":
        class_indices_N = torch.tensor(dataset.class_indices)
        weights_N = 1.0 / torch.bincount(class_indices_N)[class_indices_N].double()
    return training_loader(dataset, batch_size=config.batch_size, seed=config.seed, workers=workers, weights=weights_N)


def _workers(config: TrainConfig, backbone: Backbone, loader: DataLoader[Any], device: torch.device) -> int:
    if config.workers != "auto":
        return config.workers
    was_training = backbone.module.training
    backbone.module.eval()
    workers = fastest_workers(
        loader.dataset,  # type: ignore[arg-type]
        batch_size=config.batch_size,
        consume=lambda images_BCHW: probabilities_of(backbone.module, images_BCHW.to(device)),
    )
    backbone.module.train(was_training)
    return workers


def _learner(
    config: TrainConfig,
    backbone: Backbone,
    plan: Plan,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    *,
    class_count: int,
) -> Learner:
    class_weights_K = None
    if config.imbalance == "class-weights":
        class_indices_N = torch.tensor(loader.dataset.class_indices)  # type: ignore[attr-defined]
        counts_K = torch.bincount(class_indices_N, minlength=class_count)
        class_weights_K = balanced_class_weights(counts_K).to(accelerator.device)
    groups = parameter_groups(
        backbone.module,
        set(stage_parameters(backbone.module, backbone.stages[-1])),
        learning_rate=plan.learning_rate,
        trunk_learning_rate=plan.trunk_learning_rate,
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
        steps_per_epoch=len(loader),
        warmup_epochs=config.warmup_epochs,
        step_epochs=config.step_epochs,
        step_factor=config.step_factor,
    )
    return Learner(
        model=backbone.module,
        criterion=build_criterion(
            config.head, loss=config.loss, label_smoothing=config.label_smoothing, class_weights_K=class_weights_K
        ),
        optimizer=optimizer,
        schedule=schedule,
        accelerator=accelerator,
        max_grad_norm=config.max_grad_norm,
    )


def _resolved(config: TrainConfig, plan: Plan, backbone: Backbone, workers: int) -> TrainConfig:
    return replace(
        config,
        data=str(Path(config.data).resolve()),
        output=None,
        weights=None if plan.start == "fresh" else config.weights,
        scenario=plan.scenario,
        head_start="random" if plan.head_start == "random" else "probe",
        image_size=backbone.input_spec.image_size_px,
        channels=backbone.input_spec.channels,
        epochs=plan.epochs,
        optimizer=plan.optimizer,
        learning_rate=plan.learning_rate,
        trunk_learning_rate=plan.trunk_learning_rate,
        weight_decay=plan.weight_decay,
        workers=workers,
        resume=False,
        overwrite=False,
    )


def _fixed_options(config: TrainConfig) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in OPTION_NAMES if name not in FREE_TO_CHANGE}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _refuse_changes(config: TrainConfig, saved: SavedState, job: Job) -> None:
    """Compare the options as they were given with those the run was saved with; an "auto" agrees with any."""
    before = saved.values["identity"]
    options = _fixed_options(TrainConfig()) | before["options"]  # a run of an earlier version knew fewer options
    changes = [
        f"--{name.replace('_', '-')} was {options[name]!r} and is {value!r}"
        for name, value in _fixed_options(config).items()
        if value not in ("auto", options[name])
    ]
    if before["data_fingerprint"] != job.table.fingerprint():
        changes.append("the images are not those that training began with")
    if changes:
        raise RunError(f"{job.run.path} cannot be resumed: {'; '.join(changes)}", "train anew with another --output")


def _forget_later_events(run: RunFolder, saved: SavedState) -> None:
    """Cut metrics.jsonl back to where the saved state left it: what came after will happen again."""
    with run.metrics.open("r+b") as file:
        file.truncate(saved.values["metrics_bytes"])
