"""A sample is a function of (seed, epoch, index) alone, and a file that cannot be read says its name."""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data.dataset import ImageDataset, sample_seed
from finetune.data.decode import decode_image
from finetune.data.loaders import Batch, evaluation_loader, readable, training_loader
from finetune.data.table import ImageRow, ImageTable
from finetune.data.transforms import Augmentation, to_tensor, training_transform
from finetune.errors import ImageError
from finetune.runs.records import InputSpec, LabelMap

SPEC = InputSpec(image_size_px=16, resize_px=20, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
LABELS = LabelMap.from_names(["2", "10"], {})
IMAGES = 6


@pytest.fixture
def table(tmp_path: Path, picture: Callable[..., Image.Image]) -> ImageTable:
    rows = []
    for index in range(IMAGES):
        label = "2" if index % 2 else "10"
        picture(index).save(tmp_path / f"{index}.png")
        rows.append(ImageRow(image_path=f"{index}.png", label=label, split="train"))
    return ImageTable(tmp_path, tuple(rows))


def random_dataset(table: ImageTable, seed: int = 0) -> ImageDataset:
    return ImageDataset(table, LABELS, spec=SPEC, augmentation="flowers", seed=seed)


def until_error(batches: Iterator[Batch]) -> tuple[list[list[str]], ImageError]:
    """Return the paths of each batch before the error, and the error without the frames that hold the workers."""
    seen = []
    try:
        for _, _, paths in batches:
            seen.append(list(paths))
    except ImageError as error:
        return seen, error.with_traceback(None)
    raise AssertionError("no error came")


def test_sample_holds_image_class_index_and_path(table: ImageTable) -> None:
    dataset = ImageDataset(table, LABELS, spec=SPEC)
    assert len(dataset) == IMAGES
    image_CHW, class_index, image_path = dataset[1]
    assert (image_CHW.shape, image_CHW.dtype) == ((3, 16, 16), torch.float32)
    assert (class_index, image_path) == (1, "1.png")
    assert [dataset[index][1] for index in range(IMAGES)] == [0, 1, 0, 1, 0, 1]


def test_sample_does_not_depend_on_what_was_asked_for_before(table: ImageTable) -> None:
    dataset = random_dataset(table)
    forward = [dataset[3, index][0] for index in range(IMAGES)]
    torch.manual_seed(123)
    backward = [random_dataset(table)[3, index][0] for index in reversed(range(IMAGES))]
    for one, other in zip(forward, reversed(backward), strict=True):
        assert torch.equal(one, other)


def test_other_epoch_seed_or_index_draws_anew(table: ImageTable) -> None:
    alike = ImageTable(table.root, (table.rows[0],) * 2)
    dataset = random_dataset(alike)
    first = dataset[0, 0][0]
    assert torch.equal(first, dataset[0][0])
    for other in (dataset[1, 0][0], dataset[0, 1][0], random_dataset(alike, seed=1)[0, 0][0]):
        assert not torch.equal(first, other)


def test_worker_processes_compute_the_same_samples(table: ImageTable) -> None:
    dataset = random_dataset(table, seed=5)
    loader = training_loader(dataset, batch_size=2, seed=5, workers=2)
    for epoch in (0, 1):
        loader.batch_sampler.start(epoch)
        seen = [
            (path, image) for images, _, paths in readable(loader) for path, image in zip(paths, images, strict=True)
        ]
        assert sorted(path for path, _ in seen) == [row.image_path for row in table.rows]
        for path, image_CHW in seen:
            assert torch.equal(image_CHW, dataset[epoch, int(Path(path).stem)][0])


def test_global_generators_are_left_alone(table: ImageTable) -> None:
    dataset = random_dataset(table)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    dataset[0, 0]
    dataset[1, 2]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_generators_of_the_gpus_are_left_alone(table: ImageTable, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    random_dataset(table)[0, 0]
    assert seeded == []


@pytest.mark.parametrize("augmentation", ["none", "light"])
def test_large_photograph_is_decoded_reduced_as_it_is_for_prediction(
    tmp_path: Path, picture: Callable[..., Image.Image], augmentation: Augmentation
) -> None:
    path = tmp_path / "large.jpg"
    picture(1, width=400, height=300).save(path, quality=95)
    row = ImageRow(image_path=path.name, label="2")
    dataset = ImageDataset(ImageTable(tmp_path, (row,)), LABELS, spec=SPEC, augmentation=augmentation, seed=3)
    transform = training_transform(SPEC, augmentation)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(sample_seed(3, 0, 0))
        expected_CHW = transform(to_tensor(decode_image(path, short_side_px=SPEC.resize_px)))
    assert torch.equal(dataset[0][0], expected_CHW)
    assert decode_image(path, short_side_px=SPEC.resize_px).shape == (38, 50, 3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("content", "reason"), [(None, "missing"), (b"", "empty"), (b"\x89PNG\r\n\x1a\n", "truncated")], ids=str
)
def test_unreadable_file_surfaces_with_its_name(
    table: ImageTable, content: bytes | None, reason: str, workers: int
) -> None:
    spoilt = table.root / "4.png"
    spoilt.unlink()
    if content is not None:
        spoilt.write_bytes(content)
    dataset = ImageDataset(table, LABELS, spec=SPEC)
    batches = readable(evaluation_loader(dataset, batch_size=2, workers=workers))
    seen, error = until_error(batches)
    assert seen == [["0.png", "1.png"], ["2.png", "3.png"]]
    assert error.reason == reason
    assert "4.png" in str(error)


def test_unreadable_file_is_not_replaced_by_another(table: ImageTable) -> None:
    (table.root / "4.png").unlink()
    sample = random_dataset(table)[0, 4]
    assert isinstance(sample, ImageError)
    assert sample.reason == "missing"


@pytest.mark.parametrize("augmentation", ["none", "light", "flowers", "trivial", "affine", "crop-flip", "alexnet"])
@pytest.mark.parametrize("workers", [0, 1])
def test_drafts_become_the_images_that_they_stand_for(
    table: ImageTable, augmentation: Augmentation, workers: int
) -> None:
    """What a device finishes is what a CPU would have made at once, though the pictures differ in size."""
    now, later = (
        ImageDataset(table, LABELS, spec=SPEC, augmentation=augmentation, seed=3, is_drafting=is_drafting)
        for is_drafting in (False, True)
    )
    loaders = [training_loader(dataset, batch_size=3, seed=0, workers=workers) for dataset in (now, later)]
    batches = 0
    for (images_BCHW, classes_B, paths), (drafts, draft_classes_B, draft_paths) in zip(*loaders, strict=True):
        assert torch.equal(later.finish(drafts), images_BCHW)
        assert torch.equal(classes_B, draft_classes_B)
        assert paths == draft_paths
        assert all(draft.picture_CHW.dtype == torch.uint8 for draft in drafts)
        batches += 1
    assert batches == math.ceil(len(table) / 3)
