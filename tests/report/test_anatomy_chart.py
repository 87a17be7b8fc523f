"""The picture of a network: what it shows, and that it stays readable from LeNet-5 to ResNet-152."""

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from finetune.models.anatomy import Anatomy, inspect_network
from finetune.models.freezing import freeze_stages
from finetune.models.initialize import build_as_published
from finetune.models.stages import find_stages
from finetune.report.anatomy_chart import NAMED_LAYERS, anatomy_figure, draw_anatomy
from finetune.report.charts import BLUE, FAINT


def anatomy_of(name: str, *, frozen: int = 0) -> Anatomy:
    module, spec = build_as_published(name)
    freeze_stages(module, find_stages(module), frozen)
    return inspect_network(module, (spec.channels, spec.image_size_px, spec.image_size_px))


def test_shows_what_each_layer_has_and_sees() -> None:
    figure = anatomy_figure(anatomy_of("vgg16"), title="vgg16")
    parameters, multiply_adds, fields = figure.axes
    names = [label.get_text() for label in parameters.get_yticklabels()]
    assert len(names) == 16 + 5  # layers with weights, and poolings
    assert names[:3] == ["features.0", "features.2", "features.4"]
    widths = [bar.get_width() for bar in parameters.patches]
    assert widths[names.index("classifier.0")] == 102_764_544
    assert multiply_adds.patches[0].get_width() == 86_704_128
    image, curve = fields.lines
    assert list(image.get_xdata()) == [224, 224]
    assert list(curve.get_xdata())[names.index("features.30")] == 212
    low, high = parameters.get_ylim()
    assert low > high  # the first layer is at the top
    assert "138,357,544" in parameters.get_title(loc="left")


def test_frozen_layers_are_grey() -> None:
    figure = anatomy_figure(anatomy_of("vgg16", frozen=2), title="vgg16")
    colours = [to_hex(bar.get_facecolor()) for bar in figure.axes[0].patches]
    assert colours[0] == FAINT
    assert colours[-1] == BLUE
    assert "learning" in figure.axes[0].get_title(loc="left")


def test_the_whole_image_and_the_unknown_have_marks_of_their_own() -> None:
    figure = anatomy_figure(anatomy_of("timm/coat_tiny"), title="coat")
    labels = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert labels == ["image, 224 px", "the whole image", "cannot be told"]


@pytest.mark.parametrize("name", ["lenet5", "resnet152"])
def test_stays_readable(name: str, tmp_path: Path) -> None:
    anatomy = anatomy_of(name)
    figure = anatomy_figure(anatomy, title=name)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert 5 <= len(boxes) <= NAMED_LAYERS
    assert all(above.y0 >= below.y1 - 1 for above, below in pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0
    draw_anatomy(anatomy, tmp_path / "a.PNG", title=name)
    with Image.open(tmp_path / "a.PNG") as image:
        assert image.height <= 1900
