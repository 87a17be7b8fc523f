"""Where the batches of a training come from: files, pictures in memory or on disk, or what frozen layers gave once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from finetune.config.schema import TrainConfig
from finetune.data.dataset import Draft, ImageDataset, LabelledDataset
from finetune.data.loaders import (
    evaluation_loader,
    fastest_workers,
    labelled_dataset,
    split_loaders,
    training_loader,
)
from finetune.data.picture_cache import PictureCache, worth_caching
from finetune.data.pixels import can_hold, hold_pixels
from finetune.data.table import ImageTable
from finetune.evaluation.infer import probabilities_of
from finetune.features.cache import View
from finetune.features.cut import Cut, cut_model
from finetune.features.trunk import boundary_trunk
from finetune.models.device import resolve_precision
from finetune.models.initialize import Backbone
from finetune.runs.processes import Processes
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter
from finetune.training.boundary import ActivationDataset, activation_datasets
from finetune.training.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Batches:
    """A loader for each split that has images, and what its batches enter: the network, or the part above the cut.

    `workers` is the number of processes that decode, `pictures` where they keep what they decoded, and `finish` what is
    left to do to a training batch on the device.
    """

    loaders: dict[str, DataLoader[Any]]
    model: nn.Module
    workers: int
    pictures: PictureCache | None = None
    finish: Callable[[Sequence[Draft]], torch.Tensor] | None = None

    def close(self) -> None:
        """End writing to the cache."""
        if self.pictures:
            self.pictures.close()


def build_batches(
    config: TrainConfig,
    plan: Plan,
    backbone: Backbone,
    table: ImageTable,
    label_map: LabelMap,
    *,
    device: torch.device,
    processes: Processes,
    reporter: Reporter,
) -> Batches:
    """Build the loaders of a training that follows `plan`.

    Frozen stages that are to run once do so here, on whatever the cache lacks. Random changes are
    left to a GPU, for they take a CPU longer.

    Raises:
        ImageError, DataError: A file can no longer be read, or has changed.
    """
    if plan.boundary_cache:
        precision = resolve_precision(config.precision, device, backbone.module)
        cut = cut_model(backbone.module, backbone.stages, len(plan.frozen_stages))
        datasets = activation_datasets(
            boundary_trunk(backbone, cut, len(plan.frozen_stages), kept_outputs=plan.kept_outputs),
            table,
            label_map,
            views=[View(augmentation=config.augmentation, seed=config.seed, number=n) for n in range(plan.views)],
            precision=precision,
            processes=processes,
            reporter=reporter,
        )
        return _kept_batches(config, plan, cut, datasets, processes=processes)
    return _image_batches(config, plan, backbone, table, label_map, device=device, processes=processes)


def _kept_batches(
    config: TrainConfig, plan: Plan, cut: Cut, datasets: Mapping[str, ActivationDataset], *, processes: Processes
) -> Batches:
    """Load what frozen layers gave."""
    loaders: dict[str, DataLoader[Any]] = {
        split: evaluation_loader(data, batch_size=_scored_at_once(config, plan), processes=processes)
        for split, data in datasets.items()
    }
    loaders["train"] = _training_loader(config, plan, datasets["train"], workers=0, processes=processes)
    return Batches(loaders=loaders, model=cut.rest, workers=0)


def _image_batches(
    config: TrainConfig,
    plan: Plan,
    backbone: Backbone,
    table: ImageTable,
    label_map: LabelMap,
    *,
    device: torch.device,
    processes: Processes,
) -> Batches:
    """Load images: out of memory where all are tiny, else from the disk."""
    spec, train = backbone.input_spec, table.select("train")
    is_held = can_hold(table, spec, config.augmentation) and not config.random_erasing
    pixels = hold_pixels(table, spec) if is_held else None
    pictures = PictureCache(spec) if pixels is None and worth_caching(table, spec, plan.epochs) else None
    dataset: LabelledDataset
    if pixels is not None:
        dataset = labelled_dataset(
            train, label_map, spec, augmentation=config.augmentation, seed=config.seed, pixels=pixels
        )
    else:
        dataset = ImageDataset(
            train,
            label_map,
            spec=spec,
            augmentation=config.augmentation,
            seed=config.seed,
            pictures=pictures,
            is_drafting=device.type == "cuda",
            random_erasing=config.random_erasing,
        )
    workers = 0
    if pixels is None and plan.epochs:
        workers = processes.from_main(lambda: _workers(config, plan, backbone, table, label_map, device))
    loaders = split_loaders(
        table,
        label_map,
        spec,
        batch_size=_scored_at_once(config, plan),
        workers=workers,
        pixels=pixels,
        pictures=pictures,
        processes=processes,
    )
    loaders["train"] = _training_loader(config, plan, dataset, workers=workers, processes=processes)
    finish = dataset.finish if isinstance(dataset, ImageDataset) and dataset.is_drafting else None
    return Batches(loaders=loaders, model=backbone.module, workers=workers, pictures=pictures, finish=finish)


def _scored_at_once(config: TrainConfig, plan: Plan) -> int:
    """Return how many images there is memory to score at once: as many as to learn from."""
    return math.ceil(plan.batch_size / config.gradient_accumulation)


def _training_loader(
    config: TrainConfig, plan: Plan, dataset: LabelledDataset, *, workers: int, processes: Processes
) -> DataLoader[Any]:
    weights_N = None
    if config.imbalance == "balanced-sampling":
        class_indices_N = torch.tensor(dataset.class_indices)
        weights_N = 1.0 / torch.bincount(class_indices_N)[class_indices_N].double()
    return training_loader(
        dataset,
        batch_size=plan.batch_size,
        seed=config.seed,
        workers=workers,
        weights=weights_N,
        processes=processes,
    )


def _workers(
    config: TrainConfig, plan: Plan, backbone: Backbone, table: ImageTable, label_map: LabelMap, device: torch.device
) -> int:
    """Measure how many processes decode fast enough for the network, unless it was said."""
    if config.workers != "auto":
        return config.workers
    was_training = backbone.module.training
    backbone.module.eval()
    workers = fastest_workers(
        labelled_dataset(table.select("train"), label_map, backbone.input_spec),
        batch_size=plan.batch_size,
        consume=lambda images_BCHW: probabilities_of(backbone.module, images_BCHW, device=device),
    )
    backbone.module.train(was_training)
    return workers
