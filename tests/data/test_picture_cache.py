"""Fitted pictures are decoded once, and whoever reads them afterwards gets, to the bit, what the files would give."""

import hashlib
import pickle
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from finetune.data import loaders, picture_cache
from finetune.data.decode import decode_image
from finetune.data.loaders import labelled_dataset, readable, split_loaders, training_loader
from finetune.data.picture_cache import MIN_PIXELS, PictureCache, worth_caching
from finetune.data.table import ImageRow, ImageTable
from finetune.data.transforms import Augmentation, fit_transform, to_tensor
from finetune.errors import DataError, ImageError
from finetune.runs.records import InputSpec, LabelMap

SPEC = InputSpec(image_size_px=24, resize_px=28, interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)
GREY = SPEC.with_channels(1)
LABELS = LabelMap.from_names(["lily", "rose"], {})
SIZES = [(64, 48), (300, 400), (28, 28), (20, 31), (500, 60), (56, 56)]


@pytest.fixture(autouse=True)
def cache_folder(fresh_cache: Path) -> Path:
    return fresh_cache


@pytest.fixture
def table(tmp_path: Path, picture: Callable[..., Image.Image]) -> ImageTable:
    """Return twelve images of many shapes, every other a JPEG, the last three of them for validation."""
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(12):
        path = tmp_path / "images" / f"{index}.{'png' if index % 2 else 'jpg'}"
        width, height = SIZES[index % len(SIZES)]
        picture(index, width=width, height=height).save(path)
        rows.append(
            ImageRow(
                image_path=path.name,
                label="rose" if index % 2 else "lily",
                split="train" if index < 9 else "valid",
                sha256=sha256_of(path),
                width_px=width,
                height_px=height,
            )
        )
    return ImageTable(tmp_path / "images", tuple(rows))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that the name of every picture joins when it is decoded for the cache in this process."""
    names: list[str] = []

    def decode(data: bytes, *, name: str, **options: Any) -> Any:
        names.append(Path(name).name)
        return decode_image(data, name=name, **options)

    monkeypatch.setattr(picture_cache, "decode_image", decode)
    return names


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fill(pictures: PictureCache, table: ImageTable) -> list[torch.Tensor]:
    return [pictures.picture(row, table.path(row)) for row in table.rows]


def fitted(table: ImageTable, spec: InputSpec) -> list[torch.Tensor]:
    """Return what the cache should hold, without it."""
    decoded = (decode_image(table.path(row), short_side_px=spec.resize_px) for row in table.rows)
    return [fit_transform(spec)(to_tensor(image_HWC)) for image_HWC in decoded]


def all_equal(ones: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def remove_files(table: ImageTable) -> None:
    for row in table.rows:
        table.path(row).unlink()


@pytest.mark.parametrize("spec", [SPEC, GREY], ids=["colour", "grey"])
def test_pictures_come_back_fitted_and_decoded_once(table: ImageTable, spec: InputSpec, decoded: list[str]) -> None:
    expected = fitted(table, spec)
    with PictureCache(spec) as pictures:
        assert all_equal(fill(pictures, table), expected)
        assert decoded == [row.image_path for row in table.rows]
        remove_files(table)
        assert all_equal(fill(pictures, table), expected)
    with PictureCache(spec) as again:
        kept = fill(again, table)
    assert all_equal(kept, expected)
    kept[0].zero_()  # the caller's own: what is on disk cannot be written to
    assert len(decoded) == len(table)


def test_second_epoch_decodes_nothing(table: ImageTable, decoded: list[str]) -> None:
    with PictureCache(SPEC) as pictures:
        dataset = labelled_dataset(table, LABELS, SPEC, augmentation="light", pictures=pictures)
        loader = training_loader(dataset, batch_size=5, seed=1)
        for epoch in range(3):
            loader.batch_sampler.start(epoch)  # type: ignore[union-attr]
            assert sum(len(paths) for _, _, paths in readable(loader)) == len(table)
            assert sorted(decoded) == sorted(row.image_path for row in table.rows)


@pytest.mark.parametrize("spec", [SPEC, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("augmentation", get_args(Augmentation))
def test_samples_are_the_same_bits_with_and_without_the_cache(
    table: ImageTable, spec: InputSpec, augmentation: Augmentation
) -> None:
    with PictureCache(spec) as pictures:
        cached, filed = (
            labelled_dataset(table, LABELS, spec, augmentation=augmentation, seed=2, pictures=kept)
            for kept in (pictures, None)
        )
        for epoch in range(3):
            for index in range(len(table)):
                image_CHW, class_index, path = cached[epoch, index]  # type: ignore[misc]
                expected_CHW, *expected = filed[epoch, index]  # type: ignore[misc]
                assert torch.equal(image_CHW, expected_CHW), (epoch, index)
                assert [class_index, path] == expected


def test_worker_processes_fill_and_read_one_cache(table: ImageTable) -> None:
    train = table.select("train")
    batches: dict[int, list[Any]] = {}
    with PictureCache(SPEC) as pictures:
        for workers in (0, 2):
            kept = pictures if workers else None
            dataset = labelled_dataset(train, LABELS, SPEC, augmentation="light", seed=3, pictures=kept)
            loader = training_loader(dataset, batch_size=2, seed=3, workers=workers)
            batches[workers] = []
            for epoch in range(3):
                loader.batch_sampler.start(epoch)  # type: ignore[union-attr]
                batches[workers] += list(readable(loader))
                if workers and epoch == 0:
                    remove_files(train)  # from now on, all must come from what both workers have put
    for (images, classes, paths), (expected_images, expected_classes, expected_paths) in zip(
        batches[2], batches[0], strict=True
    ):
        assert torch.equal(images, expected_images)
        assert torch.equal(classes, expected_classes)
        assert paths == expected_paths


@pytest.mark.slow
def test_cache_travels_to_a_process_that_is_started_anew(table: ImageTable) -> None:
    with PictureCache(SPEC) as pictures:
        dataset = labelled_dataset(table, LABELS, SPEC, pictures=pictures)
        expected = [dataset[index][0] for index in range(6)]  # type: ignore[index]
        for row in table.rows[:6]:
            table.path(row).unlink()
        loader = DataLoader(
            dataset, batch_size=4, num_workers=1, multiprocessing_context="spawn", collate_fn=loaders._collate
        )
        images = [image for images_BCHW, _, _ in readable(loader) for image in images_BCHW]
        assert all_equal(images[:6], expected)
        remove_files(ImageTable(table.root, table.rows[6:]))
        pictures.refresh()
        assert all_equal((dataset[index][0] for index in range(6, 12)), images[6:])  # type: ignore[index]


def test_pickled_cache_reads_and_writes_the_same_pictures(table: ImageTable, decoded: list[str]) -> None:
    with PictureCache(SPEC) as pictures:
        fill(pictures, ImageTable(table.root, table.rows[:3]))
        with pickle.loads(pickle.dumps(pictures)) as other:
            fill(other, table)
        pictures.refresh()
        fill(pictures, table)
    assert decoded == [row.image_path for row in table.rows]


def test_damaged_row_is_decoded_again_and_mended(table: ImageTable, cache_folder: Path, decoded: list[str]) -> None:
    expected = fitted(table, SPEC)
    with PictureCache(SPEC) as pictures:
        fill(pictures, table)
    (rows,) = cache_folder.rglob("*.rows")
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    rows.write_bytes(content)
    decoded.clear()
    for count in (1, 1):
        with PictureCache(SPEC) as again:
            assert all_equal(fill(again, table), expected)
        assert len(decoded) == count


def test_file_that_changed_since_the_scan_is_refused_and_not_kept(
    table: ImageTable, picture: Callable[..., Image.Image], decoded: list[str]
) -> None:
    row = table.rows[1]
    path = table.path(row)
    before = path.read_bytes()
    picture(99).save(path)
    changed = fit_transform(SPEC)(to_tensor(decode_image(path)))
    with PictureCache(SPEC) as pictures:
        with pytest.raises(DataError, match="has changed since it was looked at"):
            pictures.picture(row, path)
        path.write_bytes(before)
        for _ in range(2):
            assert not torch.equal(pictures.picture(row, path), changed)
        assert len(decoded) == 1
        picture(98).save(path)  # what was scanned is known now, and is what the row means
        assert not torch.equal(pictures.picture(row, path), fit_transform(SPEC)(to_tensor(decode_image(path))))


def test_table_that_was_not_scanned_is_served_but_not_kept(table: ImageTable, decoded: list[str]) -> None:
    row = replace(table.rows[0], sha256="")
    with PictureCache(SPEC) as pictures:
        for _ in range(2):
            assert torch.equal(pictures.picture(row, table.path(row)), fitted(table, SPEC)[0])
    assert len(decoded) == 2


def test_copies_of_a_file_share_a_picture(table: ImageTable, decoded: list[str]) -> None:
    copy = table.root / "copy.jpg"
    copy.write_bytes(table.path(table.rows[0]).read_bytes())
    with PictureCache(SPEC) as pictures:
        one = pictures.picture(table.rows[0], table.path(table.rows[0]))
        other = pictures.picture(replace(table.rows[0], image_path="copy.jpg"), copy)
    assert torch.equal(one, other)
    assert len(decoded) == 1


@pytest.mark.parametrize(
    "other",
    [
        GREY,
        replace(SPEC, resize_px=30),
        replace(SPEC, interpolation="bilinear"),
    ],
    ids=["channels", "size", "interpolation"],
)
def test_pictures_for_another_network_are_not_mistaken_for_these(
    table: ImageTable, other: InputSpec, decoded: list[str]
) -> None:
    with PictureCache(SPEC) as pictures, PictureCache(other) as others:
        fill(pictures, table)
        assert all_equal(fill(others, table), fitted(table, other))
    assert len(decoded) == 2 * len(table)


def test_networks_that_differ_in_crop_and_normalisation_share_pictures(table: ImageTable, decoded: list[str]) -> None:
    for spec in (SPEC, replace(SPEC, image_size_px=20, mean=(0.1,) * 3, pixel_permutation_seed=1)):
        with PictureCache(spec) as pictures:
            fill(pictures, table)
    assert len(decoded) == len(table)


@pytest.mark.parametrize("trouble", ["no room", "no folder"])
def test_cache_that_cannot_be_written_stops_nothing(
    table: ImageTable, trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "no room":
        monkeypatch.setenv("FINETUNE_CACHE_GB", "0")
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file" / "cache"))
    with PictureCache(SPEC) as pictures:
        assert pictures.write_error is None
        for _ in range(2):
            assert all_equal(fill(pictures, table), fitted(table, SPEC))
        assert isinstance(pictures.write_error, OSError)


def test_unreadable_file_says_its_name(table: ImageTable) -> None:
    path = table.path(table.rows[2])
    path.write_bytes(path.read_bytes()[:200])
    with PictureCache(SPEC) as pictures:
        with pytest.raises(ImageError, match=r"2\.jpg: truncated"):
            pictures.picture(replace(table.rows[2], sha256=sha256_of(path)), path)
        path.unlink()
        error = labelled_dataset(table, LABELS, SPEC, pictures=pictures)[2]
        assert isinstance(error, ImageError)


def test_every_split_is_evaluated_from_the_cache(table: ImageTable, decoded: list[str]) -> None:
    with PictureCache(SPEC) as pictures:
        fill(pictures, table)
        filed, cached = (split_loaders(table, LABELS, SPEC, batch_size=4, pictures=kept) for kept in (None, pictures))
        for split in ("train", "valid"):
            for batch, expected in zip(readable(cached[split]), readable(filed[split]), strict=True):
                assert torch.equal(batch[0], expected[0])
    assert len(decoded) == len(table)


def photographs(root: Path, *, width_px: int = 4000, height_px: int = 3000, count: int = 1000) -> ImageTable:
    row = ImageRow(image_path="x.jpg", label="lily", sha256="0" * 64, width_px=width_px, height_px=height_px)
    return ImageTable(root, (row,) * count)


def test_caching_pays_from_the_second_epoch_on(tmp_path: Path) -> None:
    spec = replace(SPEC, image_size_px=224, resize_px=256)
    large = photographs(tmp_path / "data")
    assert not worth_caching(large, spec, 1)
    assert worth_caching(large, spec, 2)
    assert not worth_caching(ImageTable(large.root, ()), spec, 2)
    side = round(MIN_PIXELS**0.5)
    assert worth_caching(photographs(tmp_path / "data", width_px=side, height_px=side), spec, 2)
    assert not worth_caching(photographs(tmp_path / "data", width_px=side, height_px=side - 1), spec, 2)


@pytest.mark.parametrize(
    ("width_px", "height_px", "spec", "bytes_each"),
    [
        (4000, 3000, replace(SPEC, resize_px=256), 341 * 256 * 3),
        (3000, 4000, replace(SPEC, resize_px=256), 341 * 256 * 3),
        (4000, 3000, replace(GREY, resize_px=256), 341 * 256),
        (200, 150, replace(SPEC, resize_px=256), 200 * 150 * 3),
    ],
)
def test_pictures_may_take_half_of_the_cache(
    width_px: int, height_px: int, spec: InputSpec, bytes_each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = photographs(tmp_path / "data", width_px=width_px, height_px=height_px)
    gigabytes = 2 * len(table) * bytes_each / 1e9
    monkeypatch.setenv("FINETUNE_CACHE_GB", str(gigabytes * 1.001))
    assert worth_caching(table, spec, 2)
    monkeypatch.setenv("FINETUNE_CACHE_GB", str(gigabytes * 0.999))
    assert not worth_caching(table, spec, 2)


def test_nothing_is_kept_among_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "data" / "cache"))
    assert not worth_caching(photographs(tmp_path / "data"), SPEC, 2)
    assert worth_caching(photographs(tmp_path / "other"), SPEC, 2)
