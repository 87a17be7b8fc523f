"""Batches: in an order that is a pure function of (seed, epoch), loaded by as many workers as pay."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, Subset, default_collate

from finetune.data.dataset import Batch, Draft, DraftBatch, ImageDataset, LabelledDataset, Sample, SampleKey
from finetune.data.picture_cache import PictureCache
from finetune.data.pixels import HeldDataset, HeldPixels
from finetune.data.table import SPLITS, ImageTable
from finetune.data.transforms import Augmentation
from finetune.errors import DataError
from finetune.runs.environment import available_cores
from finetune.runs.processes import ALONE, Processes
from finetune.runs.records import InputSpec, LabelMap

WORTH_MEASURING = 1_000  # images; below, starting workers and timing them costs more than they save
MEASURED_BATCHES = 4
HUNG_SECONDS = 120.0  # without a batch, after which a process that decodes counts as hung


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) in an order drawn from (seed, epoch) alone.

    `start(epoch, batch)` says where the next iteration begins, so that going on in mid-epoch decodes nothing twice.
    With `weights`, images are drawn with replacement in proportion to them. Of every batch each of several `processes`
    gets its share, of a last one that is too small for all perhaps nothing.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        weights: torch.Tensor | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.weights = weights
        self.processes = processes
        self.epoch = 0
        self.first_batch = 0

    def start(self, epoch: int, batch: int = 0) -> None:
        """Begin the next iteration at `batch` of `epoch`, both counted from 0."""
        self.epoch, self.first_batch = epoch, batch

    def __len__(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.weights is None:
            order = torch.randperm(self.size, generator=generator)
        else:
            order = torch.multinomial(self.weights, self.size, replacement=True, generator=generator)
        epoch, batches = self.epoch, order.split(self.batch_size)[self.first_batch :]
        self.first_batch = 0
        for batch in batches:
            if share := self.processes.share(batch.tolist()):
                yield [(epoch, index) for index in share]


class OrderedSampler(Sampler[list[int]]):
    """Batches of indices in their order; of several `processes` each gets whole ones, in turn."""

    def __init__(self, size: int, batch_size: int, *, processes: Processes = ALONE) -> None:
        self.size = size
        self.batch_size = batch_size
        self.firsts = processes.share(range(0, size, batch_size))

    def __len__(self) -> int:
        return len(self.firsts)

    def __iter__(self) -> Iterator[list[int]]:
        for first in self.firsts:
            yield list(range(first, min(first + self.batch_size, self.size)))


def labelled_dataset(
    table: ImageTable,
    label_map: LabelMap,
    input_spec: InputSpec,
    *,
    augmentation: Augmentation = "none",
    seed: int = 0,
    pixels: HeldPixels | None = None,
    pictures: PictureCache | None = None,
) -> LabelledDataset:
    """Return the images of `table` as a data set: out of `pixels`, where they are held, or `pictures`, or the files."""
    if pixels is None:
        return ImageDataset(table, label_map, spec=input_spec, augmentation=augmentation, seed=seed, pictures=pictures)
    return HeldDataset(table, label_map, pixels=pixels, spec=input_spec, augmentation=augmentation, seed=seed)


def training_loader(
    dataset: LabelledDataset,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    weights: torch.Tensor | None = None,
    processes: Processes = ALONE,
) -> DataLoader[Any]:
    """Return shuffled batches whose order depends on (seed, epoch) only; `weights` (N,) draws with replacement.

    Each of several `processes` gets its share of every batch.
    """
    sampler = EpochSampler(len(dataset), batch_size, seed=seed, weights=weights, processes=processes)
    return _loader(dataset, workers, batch_sampler=sampler)


def evaluation_loader(
    dataset: LabelledDataset | Subset[Sample], *, batch_size: int, workers: int = 0, processes: Processes = ALONE
) -> DataLoader[Any]:
    """Return every image once, in the order of the table; each of several `processes` gets its share of the batches."""
    return _loader(dataset, workers, batch_sampler=OrderedSampler(len(dataset), batch_size, processes=processes))


def split_loaders(
    table: ImageTable,
    label_map: LabelMap,
    input_spec: InputSpec,
    *,
    batch_size: int,
    workers: int = 0,
    pixels: HeldPixels | None = None,
    pictures: PictureCache | None = None,
    processes: Processes = ALONE,
) -> dict[str, DataLoader[Any]]:
    """Return a loader for each split of `table` that has images, with the transform of evaluation."""
    return {
        split: evaluation_loader(
            labelled_dataset(table.select(split), label_map, input_spec, pixels=pixels, pictures=pictures),
            batch_size=batch_size,
            workers=workers,
            processes=processes,
        )
        for split in SPLITS
        if len(table.select(split))
    }


def readable(batches: Iterable[Batch | DataError]) -> Iterator[Batch]:
    """Iterate over `batches` and raise what a worker process found wrong with a file."""
    for batch in batches:
        if isinstance(batch, DataError):
            try:
                raise batch
            finally:
                del batch  # else error, traceback and frame hold each other, and the loader's processes, alive
        yield batch


def batch_of(loader: DataLoader[Any], keys: Sequence[SampleKey]) -> Batch | DraftBatch | DataError:
    """Return the batch of the images with these keys, as `loader` would make it."""
    dataset: Any = loader.dataset
    several = dataset.__getitems__ if hasattr(dataset, "__getitems__") else lambda keys: [dataset[key] for key in keys]
    batch: Batch | DraftBatch | DataError = loader.collate_fn(several(keys))
    return batch


def then_none(batches: Iterator[Batch], count: int) -> Iterator[Batch | None]:
    """Iterate over `batches`, and then over as many None as make up `count`."""
    for batch in batches:
        count -= 1
        yield batch
    yield from itertools.repeat(None, count)


@contextmanager
def worker_faults() -> Iterator[None]:
    """Say in plain words that a process that decodes images died or hangs: torch says so wherever Python just is.

    Raises:
        DataError: One did.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader "):
            raise
        raise DataError(
            f"a process that decodes images gave up: {str(error).splitlines()[0]}",
            "a killed one often means that memory ran out: go on with --resume and fewer --workers, or 0",
        ) from error


def fastest_workers(dataset: LabelledDataset, *, batch_size: int, consume: Callable[[Any], object]) -> int:
    """Measure how many loader processes feed `consume`, the work done on each batch, at the highest rate.

    Small data sets are not measured, nor those held in memory: 0. Start-up is left out, for workers live as long as
    the training.
    """
    cores = available_cores()
    if len(dataset) < WORTH_MEASURING or cores < 2 or isinstance(dataset, HeldDataset):
        return 0
    measured = range(min(len(dataset), (MEASURED_BATCHES + 1) * batch_size))
    part: Subset[Any] = Subset(dataset, measured)  # type: ignore[arg-type]
    seconds = {
        workers: _seconds_a_batch(evaluation_loader(part, batch_size=batch_size, workers=workers), consume)
        for workers in sorted({0, cores // 2, cores})
    }
    return min(seconds, key=lambda workers: seconds[workers])


def _seconds_a_batch(loader: DataLoader[Any], consume: Callable[[Any], object]) -> float:
    batches = readable(loader)
    consume(next(batches)[0])
    start, count = time.perf_counter(), 0
    for images_BCHW, _, _ in batches:
        consume(images_BCHW)
        count += 1
    return (time.perf_counter() - start) / max(count, 1)


def _loader(dataset: Any, workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        timeout=HUNG_SECONDS if workers else 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else every epoch draws from the global generator that dropout lives on
        collate_fn=_collate,
        worker_init_fn=_leave_group,
        **options,
    )


def _leave_group(_worker: int) -> None:
    """Leave signals to the process that trains: a launcher sends them to its whole group, and it stops in order."""
    os.setpgrp()


def _collate(samples: list[Sample] | Batch) -> Batch | DraftBatch | DataError:
    if isinstance(samples, tuple):  # a batch out of memory is collated already
        return samples
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, class_indices, paths = zip(*samples, strict=True)
    if isinstance(images[0], Draft):  # of any size, so that they cannot be stacked yet
        return list(images), torch.tensor(class_indices), list(paths)
    return default_collate(images), torch.tensor(class_indices), list(paths)
