"""Tiny images out of memory are, to the bit, those that the files give one by one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune.data.loaders import fastest_workers, labelled_dataset, split_loaders, training_loader
from finetune.data.pixels import MAX_SIDE_PX, HeldDataset, can_hold, hold_pixels
from finetune.data.table import ImageRow, ImageTable
from finetune.data.transforms import BATCH_CHANGES, Augmentation
from finetune.errors import ImageError
from finetune.runs.records import InputSpec, LabelMap

SPEC = InputSpec(image_size_px=16, resize_px=18, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
GREY = SPEC.with_channels(1)
LABELS = LabelMap.from_names(["2", "10"], {})


@pytest.fixture
def table(tmp_path: Path, picture: Callable[..., Image.Image]) -> ImageTable:
    rows = []
    for index in range(10):
        image = picture(index)
        image.save(tmp_path / f"{index}.png")
        width, height = image.size
        label, split = ("2" if index % 2 else "10"), ("train" if index < 7 else "valid")
        rows.append(
            ImageRow(image_path=f"{index}.png", label=label, split=split, width_px=width, height_px=height)  # type: ignore[arg-type]
        )
    return ImageTable(tmp_path, tuple(rows))


@pytest.mark.parametrize("spec", [SPEC, GREY, replace(SPEC, pixel_permutation_seed=3)], ids=["rgb", "grey", "shuffled"])
@pytest.mark.parametrize("augmentation", sorted(BATCH_CHANGES))
def test_batches_are_those_of_the_files(table: ImageTable, spec: InputSpec, augmentation: Augmentation) -> None:
    train = table.select("train")
    held, filed = (
        labelled_dataset(train, LABELS, spec, augmentation=augmentation, seed=4, pixels=pixels)
        for pixels in (hold_pixels(table, spec), None)
    )
    for epoch in (0, 1):
        batches = []
        for dataset in (held, filed):
            loader = training_loader(dataset, batch_size=3, seed=4)
            loader.batch_sampler.start(epoch)  # type: ignore[union-attr]
            batches.append(list(loader))
        for (images, classes, paths), (expected_images, expected_classes, expected_paths) in zip(*batches, strict=True):
            assert torch.equal(images, expected_images)
            assert torch.equal(classes, expected_classes)
            assert paths == expected_paths


def test_augmentation_moves_with_epoch_and_seed_only(table: ImageTable) -> None:
    pixels = hold_pixels(table, SPEC)

    def image(seed: int, key: tuple[int, int], company: list[tuple[int, int]]) -> torch.Tensor:
        dataset = HeldDataset(table, LABELS, pixels=pixels, spec=SPEC, augmentation="affine", seed=seed)
        return dataset.__getitems__([*company, key])[0][-1]

    before = torch.random.get_rng_state()
    assert torch.equal(image(0, (1, 2), []), image(0, (1, 2), [(1, 5), (1, 0)]))
    assert not torch.equal(image(0, (1, 2), []), image(0, (2, 2), []))
    assert not torch.equal(image(0, (1, 2), []), image(1, (1, 2), []))
    assert torch.equal(before, torch.random.get_rng_state())


def test_only_tiny_images_for_small_networks_are_held(table: ImageTable) -> None:
    assert can_hold(table, SPEC, "affine")
    assert not can_hold(table, SPEC, "light")
    assert not can_hold(table, replace(SPEC, image_size_px=224, resize_px=256), "none")
    one_large = (*table.rows[1:], replace(table.rows[0], width_px=MAX_SIDE_PX + 1))
    assert not can_hold(ImageTable(table.root, one_large), SPEC, "none")


def test_held_images_are_evaluated_from_memory_and_need_no_worker(table: ImageTable) -> None:
    pixels = hold_pixels(table, SPEC)
    for row in table.rows:
        table.path(row).unlink()
    loaders = split_loaders(table, LABELS, SPEC, batch_size=4, pixels=pixels)
    assert {split: sum(len(batch[0]) for batch in loader) for split, loader in loaders.items()} == {
        "train": 7,
        "valid": 3,
    }
    assert fastest_workers(loaders["train"].dataset, batch_size=1, consume=lambda _: None) == 0  # type: ignore[arg-type]


def test_file_that_became_unreadable_is_named(table: ImageTable) -> None:
    table.path(table.rows[3]).write_bytes(b"")
    with pytest.raises(ImageError, match=r"3\.png: empty"):
        hold_pixels(table, SPEC)
