"""An image table as a torch data set whose samples depend on nothing but (seed, epoch, index)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.data.decode import decode_image
from finetune.data.table import ImageTable
from finetune.errors import ImageError
from finetune.runs.records import LabelMap

SampleKey = int | tuple[int, int]
"""Index of an image, or (epoch, index) where the transform is random."""

Sample = tuple[torch.Tensor, int, str] | ImageError
"""Image (C, H, W) float32, class index, image path; or why the file could not be read."""

Batch = tuple[torch.Tensor, torch.Tensor, Sequence[str]]
"""Images (B, C, H, W), class indices (B,), image paths."""


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of all that is random about image `index` in `epoch`."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> 1)


def to_tensor(image_HWC: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> torch.Tensor:
    """View a decoded picture (H, W, 3) as a uint8 tensor (3, H, W)."""
    return torch.from_numpy(image_HWC).permute(2, 0, 1)


class ImageDataset(Dataset[Sample]):
    """The images of a table, decoded and transformed when they are asked for.

    Args:
        table: The images of one split.
        label_map: Gives each label its class index.
        transform: From uint8 (3, H, W) to float32 (C, H, W).
        seed: Makes a random transform a function of (seed, epoch, index), whichever process computes it.
    """

    def __init__(
        self,
        table: ImageTable,
        label_map: LabelMap,
        *,
        transform: Callable[[torch.Tensor], torch.Tensor],
        seed: int = 0,
    ) -> None:
        self.table = table
        self.transform = transform
        self.seed = seed
        self.class_indices = [label_map.index(row.label) for row in table.rows]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Return the sample of `key`, or the error of an unreadable file: a worker process cannot raise it whole."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        row = self.table.rows[index]
        try:
            image_CHW = to_tensor(decode_image(self.table.path(row)))
        except ImageError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that reseeds GPUs too.
            torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
            return self.transform(image_CHW), self.class_indices[index], row.image_path
