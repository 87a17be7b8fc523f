"""An image table as a torch data set whose samples depend on nothing but (seed, epoch, index)."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.data.decode import decode_image, read_scanned_file
from finetune.data.picture_cache import PictureCache
from finetune.data.table import ImageRow, ImageTable
from finetune.data.transforms import Augmentation, fit_transform, to_tensor, training_transform
from finetune.errors import DataError
from finetune.runs.records import InputSpec, LabelMap

SampleKey = int | tuple[int, int]
"""Index of an image, or (epoch, index) where the transform is random."""


class Draft(NamedTuple):
    """A fitted picture (C, H, W) uint8 that a device is to transform, and the seed of all that is random about it."""

    picture_CHW: torch.Tensor
    seed: int


Sample = tuple[torch.Tensor | Draft, int, str] | DataError
"""Image (C, H, W) float32 or the draft of one, class index, image path; or what is wrong with the file."""

Batch = tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor, Sequence[str]]
"""Images (B, C, H, W) or the tensors (B, …) that cross a cut, class indices (B,), image paths."""

DraftBatch = tuple[list[Draft], torch.Tensor, Sequence[str]]
"""A batch whose images are still to be made of their drafts."""


class LabelledDataset(Protocol):
    """What the loaders take: samples, or whole batches, whose classes are known beforehand."""

    class_indices: np.ndarray[Any, Any]

    def __len__(self) -> int:
        """Count the images."""

    def __getitem__(self, key: SampleKey) -> "Sample | Batch":
        """Return one of them."""


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of all that is random about image `index` in `epoch`."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> 1)


class ImageDataset(Dataset[Sample]):
    """The images of a table, decoded and transformed when they are asked for.

    Args:
        table: The images of one split.
        label_map: Gives each label its class index.
        spec: What the network expects of an image.
        augmentation: The random changes of training; none for evaluation.
        seed: Makes them a function of (seed, epoch, index), whichever process computes them.
        pictures: Keeps the fitted pictures for the same `spec`, so that the next epoch need not decode them. The
            samples are the same bits without it.
        random_erasing: Share of the images of which a random rectangle is made grey.
        is_drafting: Leave the transform to `finish`, which runs on the device that the drafts were brought to.
    """

    def __init__(
        self,
        table: ImageTable,
        label_map: LabelMap,
        *,
        spec: InputSpec,
        augmentation: Augmentation = "none",
        seed: int = 0,
        pictures: PictureCache | None = None,
        is_drafting: bool = False,
        random_erasing: float = 0.0,
    ) -> None:
        self.table = table
        self.spec = spec
        self.fit = fit_transform(spec)
        self.transform = training_transform(spec, augmentation, random_erasing=random_erasing)
        self.seed = seed
        self.pictures = pictures
        self.is_drafting = is_drafting
        self._epoch = 0
        self.class_indices = table.class_indices(label_map)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Return the sample of `key`, or what is wrong with its file: a worker process cannot raise it whole."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        row = self.table.rows[index]
        try:
            image_CHW = self._picture(row, epoch)
        except DataError as error:
            return error
        draft = Draft(image_CHW, sample_seed(self.seed, epoch, index))
        image = draft if self.is_drafting else self._transformed(draft)
        return image, int(self.class_indices[index]), row.image_path

    def finish(self, drafts: Sequence[Draft]) -> torch.Tensor:
        """Return the images (B, C, H, W) float32 of `drafts`, transformed where their pictures are.

        Each is changed by draws of its own, the same as without drafts; a device may round otherwise than a CPU.
        """
        return torch.stack([self._transformed(draft) for draft in drafts])

    def _transformed(self, draft: Draft) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that reseeds GPUs too.
            torch.default_generator.manual_seed(draft.seed)
            return torch.as_tensor(self.transform(draft.picture_CHW))

    def _picture(self, row: ImageRow, epoch: int) -> torch.Tensor:
        path = self.table.path(row)
        if self.pictures is None:
            data = read_scanned_file(path, row.sha256)
            picture_CHW = to_tensor(decode_image(data, name=str(path), short_side_px=self.spec.resize_px))
            # Only what is fitted is small enough to be handed on; the transform gives the same either way.
            return torch.as_tensor(self.fit(picture_CHW)) if self.is_drafting else picture_CHW
        if epoch != self._epoch:  # in the last one, other workers have put what this one may be asked for now
            self._epoch = epoch
            self.pictures.refresh()
        return self.pictures.picture(row, path)
