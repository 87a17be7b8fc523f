"""Tiny images held decoded in memory, and batched by indexing: no file, no worker and no Python step an image.

A batch is a function of (seed, epoch, index) exactly as `ImageDataset` computes it from the files.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from finetune.data.dataset import Batch, SampleKey, sample_seed
from finetune.data.decode import decode_image, read_scanned_file
from finetune.data.table import ImageRow, ImageTable
from finetune.data.transforms import BATCH_CHANGES, Augmentation, batch_transform, still_transform, to_tensor
from finetune.runs.records import InputSpec, LabelMap

MAX_SIDE_PX = 64  # of a tiny image; above, decoding no longer costs more than computing with it
MAX_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class HeldPixels:
    """The images of a table after `still_transform`, (N, C, size, size) uint8, and the place of each by its path."""

    images_NCHW: torch.Tensor
    place_of: dict[str, int]


def can_hold(table: ImageTable, spec: InputSpec, augmentation: Augmentation) -> bool:
    """Tell whether `table` holds tiny images only, and they fit, for a network that sees them as tiny too."""
    held_bytes = len(table) * spec.channels * spec.image_size_px**2
    largest_px = int(table.rows.own_pictures().size_px.max(initial=spec.image_size_px))
    return augmentation in BATCH_CHANGES and largest_px <= MAX_SIDE_PX and held_bytes <= MAX_BYTES


def hold_pixels(table: ImageTable, spec: InputSpec) -> HeldPixels:
    """Decode every image of `table` once.

    Raises:
        ImageError, DataError: A file can no longer be read, or has changed.
    """
    transform = still_transform(spec)

    def prepare(row: ImageRow) -> torch.Tensor:
        data = read_scanned_file(table.path(row), row.sha256)
        image_HWC = decode_image(data, name=str(table.path(row)), short_side_px=spec.resize_px)
        return torch.as_tensor(transform(to_tensor(image_HWC)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(prepare, table.rows))
    return HeldPixels(
        images_NCHW=torch.stack(images), place_of={path: place for place, path in enumerate(table.rows.image_paths())}
    )


class HeldDataset(Dataset[Batch]):
    """The images of a table out of `pixels`; torch's loader asks it for whole batches.

    Args:
        table: The images of one split.
        label_map: Gives each label its class index.
        pixels: Holds at least the images of `table`.
        spec: The preprocessing that `pixels` were held for.
        augmentation: One of those in `BATCH_CHANGES`.
        seed: Makes the augmentation a function of (seed, epoch, index).
    """

    def __init__(
        self,
        table: ImageTable,
        label_map: LabelMap,
        *,
        pixels: HeldPixels,
        spec: InputSpec,
        augmentation: Augmentation,
        seed: int,
    ) -> None:
        self.pixels = pixels
        self.transform = batch_transform(spec, augmentation)
        self.seed = seed
        self.draws = change.draws if (change := BATCH_CHANGES[augmentation]) else 0
        self.image_paths = list(table.rows.image_paths())
        self.class_indices = table.class_indices(label_map)
        self._places_N = torch.tensor([pixels.place_of[path] for path in self.image_paths])
        self._class_indices_N = torch.from_numpy(self.class_indices)

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, key: SampleKey) -> Batch:
        """Return a batch of one image."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        """Return the batch of `keys`, collated."""
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        indices_B = torch.tensor([index for _, index in pairs])
        images_BCHW = self.transform(self.pixels.images_NCHW[self._places_N[indices_B]], self._draw(pairs))
        return images_BCHW, self._class_indices_N[indices_B], [self.image_paths[index] for _, index in pairs]

    def _draw(self, pairs: Sequence[tuple[int, int]]) -> torch.Tensor | None:
        if not self.draws:
            return None
        with torch.random.fork_rng(devices=[]):
            rows = []
            for epoch, index in pairs:
                torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
                rows.append(torch.rand(self.draws))
        return torch.stack(rows)
