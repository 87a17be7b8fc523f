"""Named data sets, from tiny archives in the published formats: what is written is what was in them, to the bit."""

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits
from torchvision import datasets

from finetune.data import named
from finetune.data.labels import LABEL_NAMES_FILE, read_label_names
from finetune.data.listing import list_images
from finetune.data.named import MARK_FILE, SETS, WrittenData, write_named
from finetune.errors import ConfigError, DataError, StorageError
from finetune.runs.reporting import Advance, LoggingReporter
from tests.data.test_download import Site, serving

RNG = np.random.default_rng(0)
MNIST_TRAIN = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8)
MNIST_TEST = RNG.integers(0, 256, (10, 28, 28), dtype=np.uint8)
CIFAR_TRAIN = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
CIFAR_TEST = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(12) % 10
JPEGS = {number: b"\xff\xd8\xff" + RNG.bytes(50) + b"\xff\xd9" for number in range(1, 7)}


@pytest.fixture(autouse=True)
def cache(fresh_cache: Path) -> Path:
    return fresh_cache / "data"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_files() -> dict[str, bytes]:
    return {
        "train-images-idx3-ubyte": idx(MNIST_TRAIN),
        "train-labels-idx1-ubyte": idx(LABELS),
        "t10k-images-idx3-ubyte": idx(MNIST_TEST),
        "t10k-labels-idx1-ubyte": idx(LABELS[:10]),
    }


def tar_gz(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def mat(**values: Sequence[int]) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, {name: np.asarray([numbers], np.uint8) for name, numbers in values.items()})
    return buffer.getvalue()


def publish_idx(monkeypatch: pytest.MonkeyPatch, kind: str) -> dict[str, bytes]:
    files = {f"{name}.gz": gzip.compress(content) for name, content in idx_files().items()}
    monkeypatch.setattr(getattr(datasets, kind), "resources", [(name, md5(data)) for name, data in files.items()])
    return {f"{kind}/raw/{name}": content for name, content in files.items()}


def publish_cifar(monkeypatch: pytest.MonkeyPatch, kind: str) -> dict[str, bytes]:
    dataset = getattr(datasets, kind)
    labels_key, class_count = ("labels", 10) if kind == "CIFAR10" else ("fine_labels", 100)
    members = {}
    for name, images in (("some", CIFAR_TRAIN[:4]), ("more", CIFAR_TRAIN[4:]), ("held", CIFAR_TEST)):
        flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        members[name] = pickle.dumps({"data": flat, labels_key: [class_count - 1, *range(len(images) - 1)]})
    members["names"] = pickle.dumps({dataset.meta["key"]: [f"class_{number}" for number in range(class_count)]})
    archive = tar_gz({f"{dataset.base_folder}/{name}": content for name, content in members.items()})
    monkeypatch.setattr(dataset, "tgz_md5", md5(archive))
    monkeypatch.setattr(dataset, "train_list", [[name, md5(members[name])] for name in ("some", "more")])
    monkeypatch.setattr(dataset, "test_list", [["held", md5(members["held"])]])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "filename": "names", "md5": md5(members["names"])})
    return {dataset.filename: archive}


def publish_flowers(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    files = {
        "102flowers.tgz": tar_gz({f"jpg/image_{number:05d}.jpg": data for number, data in JPEGS.items()}),
        "imagelabels.mat": mat(labels=[77, 102, 1, 21, 54, 77]),
        "setid.mat": mat(trnid=[5, 2], valid=[1, 4], tstid=[6, 3]),
    }
    places = {key: (name, md5(files[name])) for key, (name, _) in datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", places)
    return {f"flowers-102/{name}": content for name, content in files.items()}


def publish_pets(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    names = ["Abyssinian_1", "Abyssinian_2", "american_bulldog_7", "american_bulldog_10"]
    images = tar_gz({f"images/{name}.jpg": JPEGS[number] for number, name in enumerate(names, start=1)})
    lists = {
        "annotations/trainval.txt": b"Abyssinian_2 1 1 1\namerican_bulldog_7 2 2 1\n",
        "annotations/test.txt": b"Abyssinian_1 1 1 1\namerican_bulldog_10 2 2 1\n",
    }
    files = {"images.tar.gz": images, "annotations.tar.gz": tar_gz(lists)}
    resources = [(url, md5(files[url.rpartition("/")[2]])) for url, _ in datasets.OxfordIIITPet._RESOURCES]
    monkeypatch.setattr(datasets.OxfordIIITPet, "_RESOURCES", resources)
    return {f"oxford-iiit-pet/{name}": content for name, content in files.items()}


def publish_food(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    archive = tar_gz(
        {
            "food-101/meta/train.json": json.dumps({"waffles": ["waffles/11"], "apple_pie": ["apple_pie/12"]}).encode(),
            "food-101/meta/test.json": json.dumps({"waffles": ["waffles/13"], "apple_pie": ["apple_pie/14"]}).encode(),
            "food-101/images/waffles/11.jpg": JPEGS[1],
            "food-101/images/apple_pie/12.jpg": JPEGS[2],
            "food-101/images/waffles/13.jpg": JPEGS[3],
            "food-101/images/apple_pie/14.jpg": JPEGS[4],
        }
    )
    monkeypatch.setattr(datasets.Food101, "_MD5", md5(archive))
    return {"food-101.tar.gz": archive}


def keep(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write(name: str, output: Path, source: Path | None = None) -> WrittenData:
    return write_named(name, output, source=source, reporter=LoggingReporter())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def assert_mnist(output: Path) -> None:
    for split, images in (("train", MNIST_TRAIN), ("test", MNIST_TEST)):
        assert len(list((output / split).rglob("*.png"))) == len(images)
        for number, image in enumerate(images):
            assert (pixels(output / split / str(LABELS[number]) / f"{number:05d}.png") == image).all()


class TestSets:
    def test_digits_are_every_scan_enlarged_without_new_greys(self, output: Path) -> None:
        written = write("digits", output)
        assert (dict(written.images_per_split), written.class_count) == ({"all": 1797}, 10)
        counts = Counter(row.label for row in list_images(output).rows)
        assert counts == Counter(map(str, load_digits().target))
        first = pixels(output / "0" / "0000.png")
        assert first.shape == (32, 32)
        assert (first == np.kron(first[::4, ::4], np.ones((4, 4), np.uint8))).all()
        assert first.max() == round(15 * 255 / 16)  # this digit's darkest block holds 15 of 16 ink pixels

    @pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
    def test_idx_sets_keep_every_pixel(
        self, name: str, kind: str, output: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keep(cache / name, publish_idx(monkeypatch, kind))
        written = write(name, output)
        assert (dict(written.images_per_split), written.class_count) == ({"train": 12, "test": 10}, 10)
        assert_mnist(output)

    @pytest.mark.parametrize(("name", "kind", "last"), [("cifar10", "CIFAR10", 9), ("cifar100", "CIFAR100", 99)])
    def test_cifar_keeps_every_pixel(
        self, name: str, kind: str, last: int, output: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keep(cache / name, publish_cifar(monkeypatch, kind))
        written = write(name, output)
        assert dict(written.images_per_split) == {"train": 6, "test": 3}
        assert {row.label for row in list_images(output).rows} == {f"class_{number}" for number in (0, 1, 2, last)}
        for number, (label, image) in enumerate(zip((last, 0, 1, 2, last, 0), CIFAR_TRAIN, strict=True)):
            assert (pixels(output / "train" / f"class_{label}" / f"{number:05d}.png") == image).all()
        assert (pixels(output / "test" / "class_1" / "00002.png") == CIFAR_TEST[2]).all()

    def test_flowers_keep_the_official_splits_their_bytes_and_their_names(
        self, output: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keep(cache / "flowers102", publish_flowers(monkeypatch))
        written = write("flowers102", output)
        assert dict(written.images_per_split) == {"train": 2, "valid": 2, "test": 2}
        found = files_of(output)
        shown = json.loads(found.pop(LABEL_NAMES_FILE))
        del found[MARK_FILE]
        assert found == {
            "train/54/image_00005.jpg": JPEGS[5],
            "train/102/image_00002.jpg": JPEGS[2],
            "valid/77/image_00001.jpg": JPEGS[1],
            "valid/21/image_00004.jpg": JPEGS[4],
            "test/77/image_00006.jpg": JPEGS[6],
            "test/1/image_00003.jpg": JPEGS[3],
        }
        assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in output.rglob("*.jpg"))
        assert (len(shown), shown["1"], shown["21"]) == (102, "pink primrose", "fire lily")
        assert (shown["54"], shown["77"], shown["102"]) == ("sunflower", "passion flower", "blackberry lily")

    def test_pets_are_sorted_by_breed(self, output: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keep(cache / "pets", publish_pets(monkeypatch))
        write("pets", output)
        found = files_of(output)
        del found[MARK_FILE]
        assert found == {
            "train/Abyssinian/Abyssinian_2.jpg": JPEGS[2],
            "train/American Bulldog/american_bulldog_7.jpg": JPEGS[3],
            "test/Abyssinian/Abyssinian_1.jpg": JPEGS[1],
            "test/American Bulldog/american_bulldog_10.jpg": JPEGS[4],
        }

    def test_food_is_sorted_by_dish(self, output: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keep(cache / "food101", publish_food(monkeypatch))
        write("food101", output)
        found = files_of(output)
        del found[MARK_FILE]
        assert found == {
            "train/waffles/11.jpg": JPEGS[1],
            "train/apple_pie/12.jpg": JPEGS[2],
            "test/waffles/13.jpg": JPEGS[3],
            "test/apple_pie/14.jpg": JPEGS[4],
        }

    def test_clothes_are_shown_by_name(self, output: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keep(cache / "fashion-mnist", publish_idx(monkeypatch, "FashionMNIST"))
        write("fashion-mnist", output)
        shown = read_label_names(output / LABEL_NAMES_FILE)
        assert (len(shown), shown["0"], shown["9"]) == (10, "T-shirt/top", "Ankle boot")

    @pytest.mark.parametrize("name", [name for name in SETS if name != "digits"])
    def test_torchvision_knows_a_secure_hash_and_address_of_every_archive(self, name: str) -> None:
        archives = SETS[name].archives()
        assert archives
        for archive in archives:
            assert len(bytes.fromhex(archive.md5)) == 16
            assert all(url.startswith(("https://", "http://")) for url in archive.urls)
            assert all(url.endswith(Path(archive.place).name) for url in archive.urls)


class TestDownloads:
    @pytest.fixture
    def site(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
        files = publish_idx(monkeypatch, "MNIST")
        with serving(Site({f"/good/{Path(place).name}": content for place, content in files.items()})) as site:
            monkeypatch.delenv("HF_HUB_OFFLINE")
            monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{site.url}/bad/", f"{site.url}/good/"])
            yield site

    def test_a_second_mirror_helps_and_archives_are_kept(self, site: Site, output: Path, tmp_path: Path) -> None:
        write("mnist", output)
        assert_mnist(output)
        assert len(site.asked) == 8
        write("mnist", tmp_path / "again")
        assert len(site.asked) == 8
        assert_mnist(tmp_path / "again")

    def test_no_mirror_is_told_by_the_first_and_leaves_no_folder(self, site: Site, output: Path) -> None:
        site.files.clear()
        with pytest.raises(DataError, match=f"{site.url}/bad/train-images-idx3-ubyte.gz: the server answers 404"):
            write("mnist", output)
        assert not output.exists()

    def test_only_archives_stay_in_the_cache(self, site: Site, output: Path, cache: Path) -> None:
        write("mnist", output)
        kept = {path.name for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".")}
        assert kept == {name for name, _ in datasets.MNIST.resources}

    def test_offline_by_switch(self, output: Path) -> None:
        with pytest.raises(DataError, match=r"cifar-10-python.tar.gz: HF_HUB_OFFLINE"):
            write("cifar10", output)
        assert not output.exists()


class _Interrupting(LoggingReporter):
    """Presses Ctrl-C after some images."""

    def __init__(self, after: int) -> None:
        self.after = after

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        done = 0

        def advance(count: int, _text: str) -> None:
            nonlocal done
            done += count
            if done >= self.after:
                raise KeyboardInterrupt

        yield advance


class TestWriting:
    @pytest.fixture(autouse=True)
    def few_digits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pictures = SETS["digits"].pictures(Path())[:40]
        monkeypatch.setitem(named.SETS, "digits", replace(SETS["digits"], pictures=lambda _root: pictures))

    def test_a_rerun_goes_on_and_leaves_alone_what_is_whole(self, output: Path, cache: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            write_named("digits", output, reporter=_Interrupting(after=5))
        first = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
        assert len(first) == 5
        half = next(iter(first))
        whole = half.read_bytes()
        half.write_bytes(whole[:20])  # as a power cut may leave it
        half.with_name(f".{half.name}.part").write_bytes(b"of a write that was killed")
        assert not write("digits", output).was_there
        assert half.read_bytes() == whole
        assert all(path.stat().st_mtime_ns == time for path, time in first.items() if path != half)
        assert len(list(output.rglob("*.png"))) == 40
        assert not list(output.rglob("*.part"))
        assert list((cache / "digits").iterdir()) == [cache / "digits" / ".lock"]

    def test_a_finished_folder_is_known_and_not_read_again(self, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = write("digits", output)
        monkeypatch.setattr(named, "SETS", {"digits": None})
        again = write("digits", output)
        assert (first.was_there, again.was_there) == (False, True)
        assert (again.images_per_split, again.class_count) == (first.images_per_split, first.class_count)

    def test_what_was_removed_from_a_finished_folder_comes_back(self, output: Path) -> None:
        write("digits", output)
        lost = next(output.rglob("*.png"))
        content = lost.read_bytes()
        lost.unlink()
        assert not write("digits", output).was_there
        assert lost.read_bytes() == content

    def test_the_mark_is_no_image(self, output: Path) -> None:
        write("digits", output)
        listing = list_images(output)
        assert len(listing.rows) == 40
        assert not listing.ignored_files
        assert not listing.problems

    def test_a_folder_of_the_users_is_refused_and_kept(self, output: Path) -> None:
        keep(output, {"mine.txt": b"keep"})
        with pytest.raises(ConfigError, match="not empty"):
            write("digits", output)
        assert files_of(output) == {"mine.txt": b"keep"}

    def test_an_empty_folder_is_used_even_after_the_write_of_its_mark_was_killed(self, output: Path) -> None:
        keep(output, {f".{MARK_FILE}.123.part": b"{"})
        assert sum(write("digits", output).images_per_split.values()) == 40

    def test_a_file_is_refused(self, output: Path) -> None:
        output.write_text("keep")
        with pytest.raises(ConfigError, match="is a file"):
            write("digits", output)
        assert output.read_text() == "keep"

    def test_the_folder_of_another_set_is_refused(self, output: Path) -> None:
        write("digits", output)
        with pytest.raises(ConfigError, match="holds digits, not mnist"):
            write("mnist", output)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "digits"}', '{"name": "digits", "counts": {"x": 3}}'])
    def test_a_damaged_mark_is_told(self, output: Path, text: str) -> None:
        keep(output, {MARK_FILE: text.encode()})
        with pytest.raises(DataError, match="damaged"):
            write("digits", output)

    def test_a_name_that_is_no_set_names_the_nearest(self, output: Path) -> None:
        with pytest.raises(ConfigError, match="flowres") as caught:
            write("flowres", output)
        assert caught.value.hint.startswith("the nearest are: flowers102, ")

    def test_a_full_disk_is_a_matter_of_storage(self, output: Path) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full on this system")
        (output / "0").mkdir(parents=True)
        (output / MARK_FILE).write_text('{"name": "digits", "counts": {}}')
        (output / "0" / ".0000.png.part").symlink_to("/dev/full")
        with pytest.raises(StorageError, match="No space left"):
            write("digits", output)

    @pytest.mark.parametrize("name", ["file/below", "n" * 300])
    def test_a_folder_that_cannot_be_made_is_a_matter_of_storage(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="cannot write"):
            write("digits", tmp_path / name)

    def test_a_second_process_is_refused(self, output: Path, cache: Path) -> None:
        with (
            named._torchvision_root(cache / "digits"),
            pytest.raises(StorageError, match="another process"),
        ):
            write("digits", output)
        write("digits", output)


class TestSource:
    @pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
    @pytest.mark.parametrize("is_gzipped", [True, False])
    def test_a_local_copy_is_read_where_it_lies(
        self, place: str, is_gzipped: bool, output: Path, tmp_path: Path
    ) -> None:
        source = tmp_path / "copy"
        for name, content in idx_files().items():
            keep(source / place, {f"{name}.gz": gzip.compress(content)} if is_gzipped else {name: content})
        before = files_of(source)
        write("mnist", output, source)
        assert_mnist(output)
        assert files_of(source) == before

    def test_it_is_for_mnist_alone(self, output: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cifar10 is not read from a local copy"):
            write("cifar10", output, tmp_path)

    @pytest.mark.parametrize("name", ["gone", ""])
    def test_a_folder_without_idx_files_is_told(self, output: Path, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError, match=r"lacks train-images-idx3-ubyte, .*t10k-labels-idx1-ubyte"):
            write("mnist", output, tmp_path / name)

    def test_a_single_file_that_is_missing_is_named(self, output: Path, tmp_path: Path) -> None:
        source = keep(tmp_path / "copy", idx_files())
        (source / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(DataError, match=r"copy lacks t10k-labels-idx1-ubyte\n"):
            write("mnist", output, source)

    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            ("train-images-idx3-ubyte", lambda data: b""),
            ("train-images-idx3-ubyte", lambda data: data[:3]),
            ("train-images-idx3-ubyte", lambda data: data[:12]),
            ("train-images-idx3-ubyte", lambda data: data[:16]),
            ("train-images-idx3-ubyte", lambda data: data[:-1]),
            ("train-images-idx3-ubyte", lambda data: data + b"\0"),
            ("train-images-idx3-ubyte", lambda data: b"\1" + data[1:]),
            ("train-images-idx3-ubyte", lambda data: data[:2] + b"\x0d" + data[3:]),
            ("train-images-idx3-ubyte", lambda data: b"\xff" * len(data)),
            ("train-images-idx3-ubyte", lambda data: idx(LABELS)),
            ("train-images-idx3-ubyte", lambda data: idx(MNIST_TRAIN[:11])),
            ("train-images-idx3-ubyte", lambda data: idx(MNIST_TRAIN[:0])),
            ("t10k-images-idx3-ubyte", lambda data: idx(MNIST_TEST[:, :0])),
            ("t10k-labels-idx1-ubyte", lambda data: idx(MNIST_TEST)),
            ("t10k-labels-idx1-ubyte", lambda data: idx(LABELS[:10] + 1)),
            ("t10k-labels-idx1-ubyte", lambda data: data[:-1]),
            ("t10k-labels-idx1-ubyte", lambda data: b"<html>not found</html>"),
        ],
    )
    def test_damage_is_told_with_the_file(
        self, name: str, damage: Callable[[bytes], bytes], output: Path, tmp_path: Path
    ) -> None:
        files = idx_files()
        source = keep(tmp_path / "copy", {**files, name: damage(files[name])})
        with pytest.raises(DataError, match=name.partition("-")[0]):
            write("mnist", output, source)
        assert not output.exists()

    @pytest.mark.parametrize("keep_bytes", [0, 5, 40, -1])
    def test_a_broken_gzip_is_told(self, keep_bytes: int, output: Path, tmp_path: Path) -> None:
        files = {f"{name}.gz": gzip.compress(content) for name, content in idx_files().items()}
        files["t10k-images-idx3-ubyte.gz"] = files["t10k-images-idx3-ubyte.gz"][:keep_bytes]
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz"):
            write("mnist", output, keep(tmp_path / "copy", files))
