"""Draw a class map over the picture it belongs to. Shapes: H × W pixels or positions, C channels."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from finetune.errors import ConfigError
from finetune.report.charts import save_figure, shown, style

PANEL_INCHES = 4.2
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # luma of RGB, ITU-R BT.601


def draw_class_map(
    picture_HWC: npt.NDArray[np.uint8],
    map_HW: npt.NDArray[np.float32],
    path: Path,
    *,
    stride_px: float,
    display_name: str,
    probability: float,
) -> None:
    """Write the class map of `class_map_figure` as a PNG file at `path`.

    Raises:
        StorageError: The disk is full or refuses.
    """
    figure = class_map_figure(
        picture_HWC, map_HW, stride_px=stride_px, display_name=display_name, probability=probability
    )
    save_figure(figure, path)


def class_map_figure(
    picture_HWC: npt.NDArray[np.uint8],
    map_HW: npt.NDArray[np.float32],
    *,
    stride_px: float,
    display_name: str,
    probability: float,
) -> Figure:
    """Build the picture, and beside it the same picture in grey under the map, with a scale for its colours.

    Args:
        picture_HWC: The picture, uint8 RGB.
        map_HW: The score of the class at each position of the map.
        stride_px: Distance between the positions; their grid is centred on the picture.
        display_name: Name of the class.
        probability: Probability of the class in the picture, 0..1.
    """
    height, width = picture_HWC.shape[:2]
    scores_HW = spread_map(map_HW, height, width, stride_px=stride_px)
    with style():
        panel_height = PANEL_INCHES * min(height / width, 2.0)
        figure = Figure(figsize=(2 * PANEL_INCHES + 0.9, panel_height + 0.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.imshow(picture_HWC)
        left.set_title("picture")
        right.imshow(picture_HWC @ np.array(GREY_WEIGHTS), cmap="gray", vmin=0, vmax=255)
        heat = right.imshow(scores_HW, cmap="inferno", alpha=0.6)
        right.set_title(f"{shown(display_name)} {probability:.1%}")
        for axes in (left, right):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        bar = figure.colorbar(heat, ax=right, shrink=0.9, aspect=25)
        bar.set_label("score of the class at this place (logit)")
        bar.outline.set_visible(False)
    return figure


def spread_map(
    map_HW: npt.NDArray[np.float32], height: int, width: int, *, stride_px: float
) -> npt.NDArray[np.float64]:
    """Interpolate a map linearly between the pixels that its positions are centred on, (height, width).

    Beyond the outermost positions the scores go on as they are.
    """
    scores_HW = np.asarray(map_HW, dtype=np.float64)
    for axis, length in enumerate((height, width)):
        interpolate = partial(np.interp, np.arange(length), _centres(scores_HW.shape[axis], length, stride_px))
        scores_HW = np.asarray(np.apply_along_axis(interpolate, axis, scores_HW), dtype=np.float64)
    return scores_HW


def require_new_picture(output: Path, image: Path) -> None:
    """Refuse an `output` that is no PNG file, or that is the explained `image` itself.

    Raises:
        ConfigError: It is one of these.
    """
    if output.suffix.lower() != ".png":
        raise ConfigError(f"the output {output} is no PNG file", "give it a name that ends in .png")
    if output.exists() and image.exists() and output.samefile(image):
        raise ConfigError(f"the output {output} would overwrite the image", "choose another --output")


def _centres(count: int, length_px: int, stride_px: float) -> npt.NDArray[np.floating[Any]]:
    """Return the pixels on which `count` positions are centred, along a side of `length_px` pixels."""
    return (length_px - 1) / 2 + (np.arange(count) - (count - 1) / 2) * stride_px
