"""Training above the freezing boundary: frozen layers run once, and what they gave is what the rest learns from."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.config.schema import TrainConfig
from finetune.data.dataset import Batch, SampleKey
from finetune.data.decode import decode_image
from finetune.data.table import SPLITS, ImageTable
from finetune.data.transforms import evaluation_transform, to_tensor
from finetune.errors import ConfigError, ModelError
from finetune.features.cache import ActivationCache, View, present
from finetune.features.cut import Cut, cut_model
from finetune.features.extract import TrunkPass
from finetune.features.trunk import Trunk, map_dtype
from finetune.models.device import as_inputs
from finetune.models.initialize import Backbone
from finetune.runs.cache_folder import cache_folder, cache_limit_bytes, is_inside
from finetune.runs.processes import Processes
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter
from finetune.training.plan import Plan
from finetune.training.timing import compute_gradients, in_eval_mode, timed

VIEWS = 4  # of each image, where it may be augmented: they cost what four epochs of the frozen layers would
MEASURED = 16  # images that a measurement takes

HELD_BYTES = 2**28  # of the activations of a split that stay in memory once read

READ_BYTES_PER_SECOND = 0.5e9
"""At which activations come out of the page cache, are checked and made float32; a slow disk is slower only once."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What an image costs, in seconds, and the bytes of what crosses the boundary.

    `rest_seconds` is forward and backward of the part that learns, a third of it the forward alone.
    """

    decode_seconds: float
    trunk_seconds: float
    rest_seconds: float
    row_bytes: int

    @property
    def read_seconds(self) -> float:
        """Seconds to read what crosses the boundary."""
        return self.row_bytes / READ_BYTES_PER_SECOND

    @property
    def epoch_ratio(self) -> float:
        """How many times longer an epoch takes that runs the frozen layers than one that reads their activations."""
        return (self.decode_seconds + self.trunk_seconds + self.rest_seconds) / (self.read_seconds + self.rest_seconds)

    def saves(self, *, epochs: int, views: int) -> bool:
        """Tell whether computing `views` of every image once, and reading one an epoch, is the cheaper plan."""
        once = self.decode_seconds + self.trunk_seconds
        return views * once + epochs * self.read_seconds < epochs * once


def measure_costs(cut: Cut, backbone: Backbone, table: ImageTable) -> Costs:
    """Time decoding, trunk and rest on the first images of `table`.

    Raises:
        ImageError: A file can no longer be read.
    """
    spec, device = backbone.input_spec, next(backbone.module.parameters()).device
    transform, paths = evaluation_transform(spec), [table.path(row) for row in table.rows[:MEASURED]]

    def decode() -> torch.Tensor:
        pictures = (to_tensor(decode_image(path, short_side_px=spec.resize_px)) for path in paths)
        return torch.stack([torch.as_tensor(transform(picture)) for picture in pictures])

    decode_seconds, images_BCHW = timed(decode, device)
    images = as_inputs(images_BCHW, device)
    with in_eval_mode(cut.rest):
        cut.trunk(*images)
        trunk_seconds, crossing = timed(lambda: cut.trunk(*images), device)
        compute_gradients(cut.rest, crossing)
        rest_seconds, _ = timed(lambda: compute_gradients(cut.rest, crossing), device)
    count = len(images[0])
    return Costs(
        decode_seconds=decode_seconds / count,
        trunk_seconds=trunk_seconds / count,
        rest_seconds=rest_seconds / count,
        row_bytes=np.dtype(map_dtype(backbone.module)).itemsize * sum(tensor[0].numel() for tensor in crossing),
    )


def weigh_boundary(
    config: TrainConfig, plan: Plan, backbone: Backbone, table: ImageTable, *, reporter: Reporter
) -> Plan:
    """Return `plan` with the frozen stages run once or in every epoch, whichever costs less.

    What enters the head is always kept: it takes a few kilobytes an image and is there already. A map further down may
    take more time to read than to compute, or more of the disk than the cache may have.

    Args:
        config: Asks for "always" or "never", or leaves it to the measurement, of which there is none where all is to be
            deterministic.
        plan: Says which stages are frozen, and for how many epochs.
        backbone: Is measured on the first images.
        table: The training images.
        reporter: Told what was measured.

    Raises:
        ModelError: `boundary_cache` is "always" and the network cannot be cut there.
        ConfigError: It is "always" and there is no room.
    """
    frozen = len(plan.frozen_stages)
    changes_pixels = config.cutmix > 0 or config.random_erasing > 0
    if frozen == 0 or config.boundary_cache == "never" or plan.head_start == "neighbours" or changes_pixels:
        return plan
    if frozen == len(backbone.stages) - 1:
        return replace(plan, boundary_cache=True, views=0 if config.views == "auto" else config.views)
    if config.deterministic and config.boundary_cache == "auto":
        return plan
    try:
        costs = measure_costs(cut_model(backbone.module, backbone.stages, frozen), backbone, table)
    except ModelError as error:
        if config.boundary_cache == "always":
            raise
        reporter.say(f"The frozen layers run in every epoch: {error.message}.")
        return plan
    auto_views = 0 if config.augmentation == "none" else min(plan.epochs, VIEWS)
    views = auto_views if config.views == "auto" else config.views
    kept = replace(plan, boundary_cache=True, views=views)
    disk_bytes = costs.row_bytes * len(table) * max(views, 1)
    room_bytes = _room_bytes(table.root)
    if config.boundary_cache == "always" and disk_bytes > room_bytes:
        raise ConfigError(
            f"the activations take {disk_bytes / 1e9:.1f} GB, and there is room for {room_bytes / 1e9:.1f} GB",
            "take fewer --views, a larger FINETUNE_CACHE_GB, or --boundary-cache auto",
        )
    if config.boundary_cache == "always":
        return kept
    fits = disk_bytes <= room_bytes / 2
    is_cheaper = fits and costs.saves(epochs=plan.epochs, views=max(views, 1))
    reporter.say(
        f"The frozen layers run {'once' if is_cheaper else 'in every epoch'}: their activations take "
        f"{disk_bytes / 1e9:.1f} GB, and an epoch that runs them about {costs.epoch_ratio:.1f} times as long."
    )
    return kept if is_cheaper else plan


def _room_bytes(data_root: Path) -> int:
    """Return how much may be kept: what the cache may hold and its disk has, or little where it is held in memory."""
    folder = cache_folder()
    if is_inside(folder, data_root):
        return HELD_BYTES
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return min(cache_limit_bytes(), shutil.disk_usage(there).free) if os.access(there, os.W_OK) else HELD_BYTES


class ActivationDataset(Dataset[Batch]):
    """What crosses the boundary for the images of a table; torch's loader asks it for whole batches.

    Args:
        table: The images of one split, all of them in every one of `caches`.
        label_map: Gives each label its class index.
        caches: One for each view; an epoch reads the view whose turn it is.
        width: How many numbers of each row cross, the first, where more are kept.
    """

    def __init__(
        self,
        table: ImageTable,
        label_map: LabelMap,
        *,
        caches: Sequence[ActivationCache],
        width: int | None = None,
    ) -> None:
        self.table = table
        self.caches = caches
        self.width = width
        self.class_indices = table.class_indices(label_map)
        self._class_indices_N = torch.from_numpy(self.class_indices)
        self._held: dict[int, tuple[torch.Tensor, ...] | None] = {}
        self._room = HELD_BYTES

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: SampleKey) -> Batch:
        """Return a batch of one image."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        """Return the batch of `keys`, all of one epoch; the first of it are the tensors that cross, float32."""
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        view, indices = pairs[0][0] % len(self.caches), [index for _, index in pairs]
        indices_B = torch.tensor(indices)
        if (held := self._hold(view)) is not None:
            crossing = tuple(tensor[indices_B] for tensor in held)
        else:
            rows = zip(*(self._row(view, index) for index in indices), strict=True)
            crossing = tuple(torch.stack(tensors) for tensors in rows)
        paths = [self.table.rows[index].image_path for index in indices]
        return tuple(tensor.float() for tensor in crossing), self._class_indices_N[indices_B], paths

    def _hold(self, view: int) -> tuple[torch.Tensor, ...] | None:
        """Return what crosses for one view of all images, (N, …) as it is kept, or None where it is too much."""
        if view not in self._held:
            first = self._row(view, 0)
            needed_bytes = len(self) * sum(tensor.nbytes for tensor in first)
            self._held[view] = None
            if needed_bytes <= self._room:
                self._room -= needed_bytes
                held = tuple(tensor.new_empty(len(self), *tensor.shape) for tensor in first)
                for index in range(len(self)):
                    for tensor, kept in zip(held, self._row(view, index) if index else first, strict=True):
                        tensor[index] = kept
                self._held[view] = held
        return self._held[view]

    def _row(self, view: int, index: int) -> tuple[torch.Tensor, ...]:
        """Return what crosses for one view of one image, as it is kept."""
        arrays = present(self.caches[view].get(self.table.rows[index].sha256))
        return tuple(torch.from_numpy(array[: self.width].copy()) for array in arrays)


def activation_datasets(
    trunk: Trunk,
    table: ImageTable,
    label_map: LabelMap,
    *,
    views: Sequence[View],
    precision: str,
    processes: Processes,
    reporter: Reporter,
) -> dict[str, ActivationDataset]:
    """Run `trunk` on whatever the cache lacks and return a data set for each split that has images.

    Training images come in the augmented `views`, or as they are where there are none; held-out ones as they are.

    Raises:
        ImageError, DataError: A file can no longer be read, or has changed.
    """
    device = next(trunk.backbone.module.parameters()).device
    datasets: dict[str, ActivationDataset] = {}
    for split in SPLITS:
        if not len(part := table.select(split)):
            continue
        caches = []
        for view in views if split == "train" and views else [None]:
            with TrunkPass(
                trunk,
                data_root=table.root,
                images=len(table),
                device=device,
                reporter=reporter,
                view=view,
                precision=precision,
                processes=processes,
            ) as trunk_pass:
                trunk_pass.fill(part, reporter)
            caches.append(trunk_pass.cache)
        width = trunk.width if trunk.is_pooled else None
        datasets[split] = ActivationDataset(part, label_map, caches=caches, width=width)
    return datasets
