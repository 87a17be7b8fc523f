"""The class map as a figure: where its cells lie on the picture, and what is written beside them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.errors import ConfigError, StorageError
from finetune.report.class_map import class_map_figure, draw_class_map, require_new_picture, spread_map

MAP_HW = np.array([[0.0, 4.0, 8.0], [2.0, 6.0, 10.0]], dtype=np.float32)


@pytest.fixture
def picture_HWC() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (65, 97, 3), dtype=np.uint8)


class TestSpread:
    def test_cells_lie_around_the_middle_a_stride_apart(self) -> None:
        scores_HW = spread_map(MAP_HW, 65, 97, stride_px=32)
        assert scores_HW.shape == (65, 97)
        assert scores_HW[np.ix_([16, 48], [16, 48, 80])].tolist() == MAP_HW.tolist()
        assert scores_HW[32, 32] == pytest.approx(3.0)  # half way between four cells
        assert scores_HW[20, 48] == pytest.approx(4 + 2 * 4 / 32)

    def test_scores_go_on_beyond_the_outermost_cells(self) -> None:
        scores_HW = spread_map(MAP_HW, 65, 97, stride_px=8)
        assert scores_HW[0, 0] == 0
        assert scores_HW[-1, -1] == 10

    def test_a_single_cell_is_everywhere(self) -> None:
        assert np.unique(spread_map(MAP_HW[:1, 2:], 20, 30, stride_px=32)).tolist() == [8]


class TestFigure:
    def test_shows_picture_map_name_and_probability(self, picture_HWC: np.ndarray) -> None:
        figure = class_map_figure(picture_HWC, MAP_HW, stride_px=32, display_name="$a$ lily", probability=0.983)
        left, right, bar = figure.axes
        assert np.array_equal(left.images[0].get_array(), picture_HWC)
        grey, heat = right.images
        assert grey.get_array().shape == heat.get_array().shape == (65, 97)
        assert np.array_equal(heat.get_array(), spread_map(MAP_HW, 65, 97, stride_px=32))
        assert heat.get_clim() == (0, 10)
        assert 0 < heat.get_alpha() < 1
        assert right.get_title(loc="left") == "$a$ lily 98.3%"
        assert "logit" in bar.get_ylabel()

    @pytest.mark.parametrize("shape", [(30, 300), (300, 30), (1, 1)])
    @pytest.mark.parametrize("map_HW", [MAP_HW, np.full((1, 1), -2.0, dtype=np.float32)])
    def test_every_shape_is_drawn(self, tmp_path: Path, shape: tuple[int, int], map_HW: np.ndarray) -> None:
        path = tmp_path / "new" / "map.png"
        picture_HWC = np.zeros((*shape, 3), dtype=np.uint8)
        draw_class_map(picture_HWC, map_HW, path, stride_px=32, display_name="花\n" * 30, probability=1)
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 800
            assert 100 < image.height < 1200


class TestOutput:
    def test_a_disk_that_refuses_is_a_storage_error(self, tmp_path: Path, picture_HWC: np.ndarray) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="cannot write"):
            draw_class_map(
                picture_HWC, MAP_HW, tmp_path / "file" / "a.png", stride_px=8, display_name="a", probability=1
            )

    def test_the_image_itself_is_never_the_output(self, tmp_path: Path) -> None:
        image = tmp_path / "a.png"
        image.touch()
        (tmp_path / "link.png").symlink_to(image)
        for output in (image, tmp_path / "link.png", tmp_path / "." / "a.png"):
            with pytest.raises(ConfigError, match="overwrite the image"):
                require_new_picture(output, image)
        require_new_picture(tmp_path / "b.png", image)
        require_new_picture(tmp_path / "B.PNG", tmp_path / "absent.png")

    def test_only_png_files(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no PNG file"):
            require_new_picture(tmp_path / "b.jpg", tmp_path / "a.png")
