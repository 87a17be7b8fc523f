import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "data_examples"
FLOWERS = FOLDER / "flowers"
STAMPS = Path("/usr/share/tuxpaint/stamps")
needs_stamps = pytest.mark.skipif(
    not STAMPS.is_dir() and "CI" not in os.environ, reason=f"tuxpaint-stamps-default is not installed: no {STAMPS}"
)


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"data_examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    return load_script("draw_flowers")


@pytest.fixture(scope="module")
def stamps() -> ModuleType:
    return load_script("stamps")


@pytest.fixture(scope="module")
def photos(stamps: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps") / "new"
    count = stamps.build_stamps(folder)
    assert count == sum(1 for path in folder.rglob("*") if path.is_file())
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


class TestFlowers:
    def test_stays_small_enough_to_commit(self) -> None:
        assert sum(path.stat().st_size for path in FLOWERS.rglob("*") if path.is_file()) < 2_000_000

    def test_holds_exactly_the_planned_images(self, drawing: ModuleType) -> None:
        present = {path.relative_to(FLOWERS).as_posix() for path in FLOWERS.rglob("*.jpg")}
        assert present == set(drawing.planned_images())

    @pytest.mark.parametrize("split", ["train", "valid"])
    def test_folders_sort_differently_as_text_and_as_numbers(self, split: str) -> None:
        names = [path.name for path in (FLOWERS / split).iterdir()]
        assert sorted(names) == ["1", "10", "100", "2", "21", "3"]
        assert sorted(names) != sorted(names, key=int)

    def test_every_folder_has_a_name_of_its_own(self) -> None:
        names = json.loads((FLOWERS / "cat_to_name.json").read_text(encoding="utf-8"))
        for split in ("train", "valid"):
            assert {path.name for path in (FLOWERS / split).iterdir()} == set(names)
        assert len(set(names.values())) == len(names)
        assert names["21"] == "fire lily"

    def test_images_differ_in_size_and_shape(self) -> None:
        sizes = set()
        for path in FLOWERS.rglob("*.jpg"):
            with Image.open(path) as image:
                assert (image.format, image.mode) == ("JPEG", "RGB")
                sizes.add(image.size)
        assert len(sizes) > 100
        assert min(min(size) for size in sizes) >= 200

    @pytest.mark.parametrize("path", ["valid/2/image_0003.jpg", "valid/21/image_0001.jpg"])
    def test_redrawing_gives_the_same_pixels(self, drawing: ModuleType, path: str, tmp_path: Path) -> None:
        redrawn = tmp_path / "redrawn.jpg"
        drawing.draw_image(*drawing.planned_images()[path]).save(redrawn, **drawing.JPEG)
        # Another release of Pillow or another processor may round a pixel differently; nobody would see it.
        difference = pixels(redrawn).astype(int) - pixels(FLOWERS / path).astype(int)
        assert np.abs(difference).mean() < 0.1


@needs_stamps
@pytest.mark.photos
class TestStamps:
    def test_has_eight_classes_of_photographs(self, photos: Path) -> None:
        counts = {path.name: len(list(path.iterdir())) for path in photos.iterdir()}
        assert set(counts) == {"birds", "flowers", "fruit", "insects", "mammals", "tools", "vegetables", "vehicles"}
        assert 200 <= sum(counts.values()) <= 220
        assert min(counts.values()) >= 8

    def test_leaves_cartoons_out(self, stamps: ModuleType, photos: Path) -> None:
        assert list(STAMPS.glob("vehicles/**/*cartoon*/*.png"))
        for source in stamps.SOURCES.values():
            assert not [path for path in stamps.photographs(STAMPS / source) if "cartoon" in str(path)]
        assert not list(photos.rglob("*cartoon*"))

    def test_every_fourth_is_a_png_and_all_are_opaque_rgb(self, photos: Path) -> None:
        paths = [path for path in photos.rglob("*") if path.is_file()]
        assert len([path for path in paths if path.suffix == ".png"]) == len(paths) // 4
        for path in paths[::10]:
            with Image.open(path) as image:
                assert image.mode == "RGB"
                assert image.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]

    def test_transparency_becomes_white(self, stamps: ModuleType) -> None:
        image = np.asarray(stamps.on_white(STAMPS / "food/fruit/apple_fuji.png"))
        assert (image[0, 0] == 255).all()

    def test_refuses_a_folder_that_is_not_empty(self, stamps: ModuleType, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("keep")
        with pytest.raises(FileExistsError, match="not empty"):
            stamps.build_stamps(tmp_path)


def test_stamps_name_the_missing_package(stamps: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt install tuxpaint-stamps-default"):
        stamps.build_stamps(tmp_path / "new", tmp_path / "absent")


class TestMnist10k:
    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        """A folder as npm unpacks it: five scans a digit, each of one grey, written with three decimals."""
        folder = tmp_path / "package" / "src" / "digits"
        folder.mkdir(parents=True)
        for digit in range(10):
            greys = [round((25 * digit + number) / 255, 3) for number in range(5)]
            (folder / f"{digit}.json").write_text(json.dumps({"data": [grey for grey in greys for _ in range(784)]}))
        return tmp_path / "package"

    def test_every_digit_is_in_one_split_with_its_exact_greys(self, package: Path, tmp_path: Path) -> None:
        assert load_script("mnist10k").build_mnist10k(package, tmp_path / "new") == 50
        for digit in range(10):
            files = {split: list((tmp_path / "new" / split / str(digit)).iterdir()) for split in ("train", "valid")}
            assert {split: len(found) for split, found in files.items()} == {"train": 4, "valid": 1}
            scans = [pixels(path) for found in files.values() for path in found]
            assert {scan.shape for scan in scans} == {(28, 28)}
            assert sorted(int(scan.max()) for scan in scans) == [25 * digit + number for number in range(5)]
            assert all(scan.min() == scan.max() for scan in scans)

    def test_the_split_is_always_the_same(self, package: Path, tmp_path: Path) -> None:
        for name in ("one", "two"):
            load_script("mnist10k").build_mnist10k(package, tmp_path / name)
        names = [
            sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*"))
            for name in ("one", "two")
        ]
        assert names[0] == names[1]

    def test_refuses_a_folder_that_is_not_empty(self, package: Path) -> None:
        with pytest.raises(FileExistsError, match="not empty"):
            load_script("mnist10k").build_mnist10k(package, package)
