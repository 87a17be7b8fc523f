"""Batches come in an order that is a function of (seed, epoch), by as many workers as pay."""

import contextlib
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finetune.data import loaders
from finetune.data.dataset import ImageDataset
from finetune.data.loaders import (
    EpochSampler,
    evaluation_loader,
    fastest_workers,
    readable,
    split_loaders,
    training_loader,
)
from finetune.data.table import ImageRow, ImageTable
from finetune.errors import ImageError
from finetune.runs.records import InputSpec, LabelMap

SPEC = InputSpec(image_size_px=16, resize_px=20, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
LABELS = LabelMap.from_names(["rose", "lily"], {})


@pytest.fixture
def table(tmp_path: Path, picture: Callable[..., Image.Image]) -> ImageTable:
    """Return ten images, the last three of them for validation."""
    rows = []
    for index in range(10):
        picture(index).save(tmp_path / f"{index}.png")
        label = "rose" if index % 2 else "lily"
        rows.append(ImageRow(image_path=f"{index}.png", label=label, split="train" if index < 7 else "valid"))
    return ImageTable(tmp_path, tuple(rows))


@pytest.fixture
def dataset(table: ImageTable) -> ImageDataset:
    return ImageDataset(table, LABELS, spec=SPEC)


def test_an_epoch_is_a_permutation_in_batches() -> None:
    sampler = EpochSampler(23, 5, seed=1)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert len(sampler) == 5
    keys = [key for batch in batches for key in batch]
    assert {epoch for epoch, _ in keys} == {0}
    assert sorted(index for _, index in keys) == list(range(23))
    assert [index for _, index in keys] != list(range(23))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(23, 5, seed=seed)
        sampler.start(epoch)
        return [index for batch in sampler for _, index in batch]

    assert order(1, 2) == order(1, 2)
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9
    state = torch.get_rng_state()
    order(1, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("weights", [None, torch.arange(1.0, 24)], ids=["shuffled", "weighted"])
@pytest.mark.parametrize("batch", range(6))
def test_start_in_mid_epoch_gives_the_tail_of_the_whole(batch: int, weights: torch.Tensor | None) -> None:
    whole, resumed = (EpochSampler(23, 5, seed=1, weights=weights) for _ in range(2))
    whole.start(4)
    resumed.start(4, batch)
    assert list(resumed) == list(whole)[batch:]
    assert list(resumed) == list(whole), "the next epoch begins at its beginning"


def test_epoch_travels_with_every_index() -> None:
    sampler = EpochSampler(7, 3, seed=1)
    sampler.start(5)
    assert {epoch for batch in sampler for epoch, _ in batch} == {5}


def test_weights_draw_a_rare_class_as_often_as_a_common_one() -> None:
    counts = {0: 1_800, 1: 200}
    classes = torch.tensor([0] * counts[0] + [1] * counts[1])
    weights = torch.tensor([1 / counts[int(label)] for label in classes])
    drawn = torch.tensor([index for batch in EpochSampler(2_000, 32, seed=3, weights=weights) for _, index in batch])
    assert len(drawn) == 2_000
    rare = int((classes[drawn] == 1).sum())
    assert 900 < rare < 1_100  # half of them, within four and a half standard deviations
    assert len(set(drawn.tolist())) < 2_000, "with replacement"


def test_training_loader_follows_its_sampler(dataset: ImageDataset) -> None:
    loader = training_loader(dataset, batch_size=4, seed=2)
    expected = [[f"{index}.png" for _, index in batch] for batch in EpochSampler(10, 4, seed=2)]
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [paths for _, _, paths in batches] == expected
    images_BCHW, class_indices_B, paths = batches[0]
    assert images_BCHW.shape == (4, 3, 16, 16)
    assert class_indices_B.dtype == torch.int64
    assert class_indices_B.tolist() == [int(path[0]) % 2 for path in paths]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_loader_gives_every_image_once_in_order(dataset: ImageDataset, workers: int) -> None:
    state = torch.get_rng_state()
    batches = list(evaluation_loader(dataset, batch_size=4, workers=workers))
    assert [path for _, _, paths in batches for path in paths] == [f"{index}.png" for index in range(10)]
    assert [len(images) for images, _, _ in batches] == [4, 4, 2]
    assert torch.equal(torch.get_rng_state(), state), "an evaluation must not move the generator that dropout uses"


def test_only_splits_with_images_have_a_loader(table: ImageTable) -> None:
    found = split_loaders(table, LABELS, SPEC, batch_size=4)
    assert {split: [path for _, _, paths in loader for path in paths] for split, loader in found.items()} == {
        "train": [f"{index}.png" for index in range(7)],
        "valid": ["7.png", "8.png", "9.png"],
    }


class Batches:
    """Stands for the iterator of a loader, which ends its worker processes when nobody holds it any more."""

    def __iter__(self) -> Iterator[ImageError]:
        yield ImageError("empty", "0 bytes", "a.png")


def test_error_of_a_worker_does_not_keep_the_loader_alive() -> None:
    batches = Batches()
    alive = weakref.ref(batches)
    gc.disable()  # what only the collector frees, stalls: workers that it shuts down are waited for 5 s each
    try:
        with contextlib.suppress(ImageError):
            list(readable(batches))
        del batches
        assert alive() is None
    finally:
        gc.enable()


def test_small_set_is_not_measured(dataset: ImageDataset) -> None:
    seen: list[Any] = []
    assert fastest_workers(dataset, batch_size=2, consume=seen.append) == 0
    assert seen == []


def test_large_set_is_measured(dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "WORTH_MEASURING", 10)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    seen: list[torch.Tensor] = []
    assert fastest_workers(dataset, batch_size=2, consume=seen.append) in (0, 1, 2)
    assert [images_BCHW.shape for images_BCHW in seen] == [(2, 3, 16, 16)] * 15


def test_fastest_number_of_workers_wins(dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {0: 3.0, 2: 1.0, 4: 2.0}
    monkeypatch.setattr(loaders, "WORTH_MEASURING", 10)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(loaders, "evaluation_loader", lambda _part, *, batch_size, workers: workers)
    monkeypatch.setattr(loaders, "_seconds_a_batch", lambda workers, _consume: seconds[workers])
    assert fastest_workers(dataset, batch_size=2, consume=len) == 2


def test_single_core_gets_no_workers(dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "WORTH_MEASURING", 10)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert fastest_workers(dataset, batch_size=2, consume=len) == 0
