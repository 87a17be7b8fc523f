"""Well-known data sets as image folders that a person can look into and train on: where a street begins without photos.

torchvision knows where the sets are published and how their archives are built; this file brings the archives, lets
torchvision read them, and writes every image as a file of its own, pixel for pixel.
"""

import fcntl
import gzip
import io
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from finetune.data.download import fetch
from finetune.data.labels import LABEL_NAMES_FILE
from finetune.errors import ConfigError, DataError, FinetuneError, StorageError, nearest
from finetune.runs import strict_json
from finetune.runs.cache_folder import cache_folder
from finetune.runs.folder import write_whole
from finetune.runs.reporting import Reporter

MARK_FILE = ".finetune-data.json"
"""Tells what a folder was written from and whether it is complete; hidden, so that it is taken for no image."""

_DIGIT_SIDE_PX = 32
_DARKEST = 16  # scikit-learn counts 0..16 ink pixels in each 4×4 block of the scan
_IDX_FAULTS = (AssertionError, KeyError, RuntimeError, TypeError, ValueError)  # torchvision's on a damaged file


class Archive(NamedTuple):
    """A published file: its addresses, the place below torchvision's root where its data set looks, and its MD5."""

    urls: tuple[str, ...]
    place: str
    md5: str


class Picture(NamedTuple):
    """One image to write: its path below the folder, and what reads or encodes its bytes."""

    path: str
    read: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """How one data set is come by.

    `archives` lists what to download, `pictures` reads it from torchvision's root, and `label_names` gives the words
    for folders that are only numbers. All import torchvision or scikit-learn when they are called, not before.
    """

    archives: Callable[[], Sequence[Archive]]
    pictures: Callable[[Path], Sequence[Picture]]
    label_names: Callable[[], Mapping[str, str]] = dict


@dataclass(frozen=True, kw_only=True)
class WrittenData:
    """An image folder that holds a named data set; `images_per_split` has the key "all" where there are no splits."""

    folder: Path
    images_per_split: Mapping[str, int]
    class_count: int
    was_there: bool


def write_named(name: str, output: Path, *, source: Path | None = None, reporter: Reporter) -> WrittenData:
    """Write the data set `name` as the image folder `output`, downloading it where it is not in the cache yet.

    What a call that was stopped has left is gone on with. No file of another origin is touched: `output` must be
    absent, empty or begun by an earlier call for the same set.

    Args:
        name: one of `SETS`.
        output: the folder to write, with splits where the set has official ones.
        source: for mnist, a folder with its four IDX files, to be used in place of a download.
        reporter: shows messages and progress.

    Raises:
        ConfigError: the name is unknown, `output` holds other files, or the set takes no `source`.
        DataError: the set cannot be downloaded, or `source` lacks files or holds damaged ones.
        StorageError: the disk is full or refuses to write.
    """
    if name not in SETS:
        raise ConfigError(f"no data set is called {name!r}", nearest(name, list(SETS), count=len(SETS)))
    if source is not None and name != "mnist":
        raise ConfigError(f"{name} is not read from a local copy", "leave --source out; only mnist takes it")
    with _disk(output):
        finished = _read_mark(output, name)
    if finished:
        return finished
    cache = cache_folder() / "data" / name
    with _disk(cache), _torchvision_root(cache) as root:
        if source is not None:
            _place_idx_files(source, root / "MNIST" / "raw")
        else:
            _place_archives(SETS[name], cache, root, reporter)
        pictures = SETS[name].pictures(root)
        with _disk(output):
            output.mkdir(parents=True, exist_ok=True)
            write_whole(output / MARK_FILE, strict_json.dump({"name": name, "counts": {}}))
            _write_pictures(pictures, output, reporter)
    if label_names := SETS[name].label_names():
        write_whole(output / LABEL_NAMES_FILE, strict_json.dump(dict(label_names), indent=1))
    os.sync()  # so that no power cut leaves the mark but not the images, which are too many to be synced one by one
    counts = _count(pictures)
    write_whole(output / MARK_FILE, strict_json.dump({"name": name, "counts": counts}))
    return WrittenData(folder=output, was_there=False, **counts)


def _read_mark(output: Path, name: str) -> WrittenData | None:
    """Return what a complete folder holds, nothing for one to write or go on with; refuse what is not ours."""
    if not os.path.exists(output):  # noqa: PTH110 (Path.exists raises for names that are too long)
        return None
    if not output.is_dir():
        raise ConfigError(f"{output} is a file, not a folder", "choose another --output")
    mark = output / MARK_FILE
    if not mark.exists():
        if any(not entry.name.startswith(f".{MARK_FILE}.") for entry in output.iterdir()):  # its write was killed
            raise ConfigError(f"{output} is not empty", "choose another --output; nothing in it was changed")
        return None
    try:
        found = strict_json.parse(mark.read_bytes())
        owner, counts = found["name"], found["counts"]
        finished = WrittenData(folder=output, was_there=True, **counts) if counts else None
        if finished and _images_in(output) < sum(finished.images_per_split.values()):
            finished = None  # somebody has removed some
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{mark} is damaged", "choose another --output") from error
    if owner != name:
        raise ConfigError(f"{output} holds {owner}, not {name}", "choose another --output")
    return finished


def _images_in(output: Path) -> int:
    return sum(len(names) for folder, _, names in os.walk(output) if folder != str(output))


def _count(pictures: Sequence[Picture]) -> dict[str, Any]:
    parts = [PurePosixPath(picture.path).parts for picture in pictures]
    return {
        "images_per_split": Counter(place[0] if len(place) == 3 else "all" for place in parts),
        "class_count": len({place[-2] for place in parts}),
    }


def _write_pictures(pictures: Sequence[Picture], output: Path, reporter: Reporter) -> None:
    """Write every image that is not there yet; it gets its name when all of it is written."""
    with reporter.progress("Writing images", len(pictures)) as advance:
        for picture in pictures:
            content, target = picture.read(), output / picture.path
            if not (target.is_file() and target.read_bytes() == content):  # a power cut may have left less
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.part")
                temporary.write_bytes(content)
                temporary.replace(target)
            advance(1, "")


@contextmanager
def _torchvision_root(cache: Path) -> Iterator[Path]:
    """Yield an empty folder for torchvision to unpack archives in, and hold the data set against a second process.

    It does not outlive the call: torchvision takes a folder for complete that an interrupted unpacking has left.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"another process is writing from {cache}", "wait for it, or stop it first") from error
        root = cache / "unpacked"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        try:
            yield root
        finally:
            shutil.rmtree(root, ignore_errors=True)


def _place_archives(named: NamedSet, cache: Path, root: Path, reporter: Reporter) -> None:
    """Bring the archives into the cache and link them where torchvision looks, which checks and unpacks them."""
    archives = named.archives()
    for archive in archives:
        kept, place = cache / archive.place, root / archive.place
        failures: list[DataError] = []
        for url in archive.urls:
            try:
                fetch(url, kept, md5=archive.md5, progress=reporter.progress)
                break
            except DataError as error:
                failures.append(error)
        else:
            raise failures[0]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(kept.absolute())
    if archives:
        reporter.say("Unpacking …")


def _place_idx_files(source: Path, raw: Path) -> None:
    """Copy the IDX files of `source`, unpacked, to where torchvision looks for them.

    Raises:
        DataError: one is absent or damaged.
    """
    names = [file.removesuffix(".gz") for file, _ in _dataset("MNIST").resources]
    found: dict[str, Path] = {}
    for folder in (source, source / "raw", source / "MNIST" / "raw"):
        files = {name: file for end in (".gz", "") for name in names if (file := folder / f"{name}{end}").is_file()}
        found = max(found, files, key=len)
    if missing := [name for name in names if name not in found]:
        raise DataError(
            f"{source} lacks {', '.join(missing)}",
            "--source takes a folder with the four IDX files of MNIST, gzipped or not, in it, in raw or in MNIST/raw",
        )
    raw.mkdir(parents=True)
    for name, file in found.items():
        try:
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file} cannot be read: {error}", "get this file anew") from error
        (raw / name).write_bytes(content)
    _check_idx_files(found, raw)


def _check_idx_files(found: Mapping[str, Path], raw: Path) -> None:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    counts: dict[str, int] = {}
    for name, file in found.items():
        is_images = "images" in name
        try:
            values = (read_image_file if is_images else read_label_file)(str(raw / name))
        except _IDX_FAULTS as error:
            kind = "images" if is_images else "labels"
            raise DataError(f"{file} is damaged or holds no IDX {kind}", "get this file anew") from error
        if not len(values) or (is_images and min(values.shape[1:]) < 1):
            raise DataError(f"{file} is empty", "get this file anew")
        if not is_images and int(values.max()) > 9:
            raise DataError(f"{file} holds the label {int(values.max())}, MNIST has 0 to 9", "get this file anew")
        other = counts.setdefault(name.partition("-")[0], len(values))
        if other != len(values):
            raise DataError(
                f"{file} holds {len(values)} labels for {other} images", "get the images and labels of one set"
            )


def _dataset(kind: str) -> Any:
    """Return torchvision's class of that name."""
    from torchvision import datasets

    return getattr(datasets, kind)


def _numbered_names(kind: str, first: int) -> dict[str, str]:
    return {str(number): name for number, name in enumerate(_dataset(kind).classes, start=first)}


def _digit_pictures(_root: Path) -> list[Picture]:
    """Enlarge scikit-learn's 8×8 scans to LeNet-5's input by repeating pixels, so that nothing is invented."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    times = _DIGIT_SIDE_PX // digits.images.shape[1]
    grey_NHW = (digits.images * 255 / _DARKEST).round().astype(np.uint8).repeat(times, axis=1).repeat(times, axis=2)
    return [
        Picture(f"{digit}/{number:04d}.png", partial(_encode_png, grey_HW))
        for number, (grey_HW, digit) in enumerate(zip(grey_NHW, digits.target, strict=True))
    ]


def _idx_set(kind: str, label_names: Callable[[], Mapping[str, str]] = dict) -> NamedSet:
    """Describe MNIST or a set in its format; the folders are the label numbers."""

    def archives() -> list[Archive]:
        dataset = _dataset(kind)
        return [
            Archive(tuple(f"{mirror}{file}" for mirror in dataset.mirrors), f"{kind}/raw/{file}", md5)
            for file, md5 in dataset.resources
        ]

    def pictures(root: Path) -> list[Picture]:
        found = []
        for split in ("train", "test"):
            data = _dataset(kind)(root, train=split == "train", download=True)
            labels = [str(label) for label in data.targets.tolist()]
            found += _png_pictures(split, data.data.numpy(), labels)
        return found

    return NamedSet(archives=archives, pictures=pictures, label_names=label_names)


def _cifar_set(kind: str) -> NamedSet:
    def archives() -> list[Archive]:
        dataset = _dataset(kind)
        return [Archive((dataset.url,), dataset.filename, dataset.tgz_md5)]

    def pictures(root: Path) -> list[Picture]:
        found = []
        for split in ("train", "test"):
            data = _dataset(kind)(root, train=split == "train", download=True)
            found += _png_pictures(split, data.data, [data.classes[label] for label in data.targets])
        return found

    return NamedSet(archives=archives, pictures=pictures)


def _flowers_archives() -> list[Archive]:
    dataset = _dataset("Flowers102")
    prefix = dataset._download_url_prefix
    return [Archive((f"{prefix}{file}",), f"flowers-102/{file}", md5) for file, md5 in dataset._file_dict.values()]


def _flowers_pictures(root: Path) -> list[Picture]:
    found = []
    for split, official in (("train", "train"), ("valid", "val"), ("test", "test")):
        data = _dataset("Flowers102")(root, split=official, download=True)
        found += _original_pictures(split, data._image_files, [str(label + 1) for label in data._labels])
    return found


def _pets_archives() -> list[Archive]:
    resources = _dataset("OxfordIIITPet")._RESOURCES
    return [Archive((url,), f"oxford-iiit-pet/{PurePosixPath(url).name}", md5) for url, md5 in resources]


def _pets_pictures(root: Path) -> list[Picture]:
    found = []
    for split, official in (("train", "trainval"), ("test", "test")):
        data = _dataset("OxfordIIITPet")(root, split=official, download=True)
        found += _original_pictures(split, data._images, [data.classes[label] for label in data._labels])
    return found


def _food_archives() -> list[Archive]:
    dataset = _dataset("Food101")
    return [Archive((dataset._URL,), PurePosixPath(dataset._URL).name, dataset._MD5)]


def _food_pictures(root: Path) -> list[Picture]:
    found = []
    for split in ("train", "test"):
        data = _dataset("Food101")(root, split=split, download=True)
        found += _original_pictures(split, data._image_files, [data.classes[label] for label in data._labels])
    return found


def _png_pictures(split: str, images: npt.NDArray[np.uint8], class_names: Sequence[str]) -> list[Picture]:
    """Number the images of a split, arrays of shape NHW or NHWC."""
    return [
        Picture(f"{split}/{class_name}/{number:05d}.png", partial(_encode_png, image))
        for number, (image, class_name) in enumerate(zip(images, class_names, strict=True))
    ]


def _original_pictures(split: str, files: Sequence[Path], class_names: Sequence[str]) -> list[Picture]:
    """Keep the published files, bytes and names."""
    return [
        Picture(f"{split}/{class_name}/{file.name}", file.read_bytes)
        for file, class_name in zip(files, class_names, strict=True)
    ]


def _encode_png(image: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Translate what a disk raises while `folder` is read or written."""
    try:
        yield
    except FinetuneError:  # StorageError is an OSError too
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or folder}: {error.strerror}", "free some space or choose another folder"
        ) from error


SETS: Mapping[str, NamedSet] = {
    "digits": NamedSet(archives=tuple, pictures=_digit_pictures),
    "mnist": _idx_set("MNIST"),
    "fashion-mnist": _idx_set("FashionMNIST", partial(_numbered_names, "FashionMNIST", 0)),
    "cifar10": _cifar_set("CIFAR10"),
    "cifar100": _cifar_set("CIFAR100"),
    "flowers102": NamedSet(
        archives=_flowers_archives,
        pictures=_flowers_pictures,
        label_names=partial(_numbered_names, "Flowers102", 1),
    ),
    "pets": NamedSet(archives=_pets_archives, pictures=_pets_pictures),
    "food101": NamedSet(archives=_food_archives, pictures=_food_pictures),
}
"""The data sets by name."""
