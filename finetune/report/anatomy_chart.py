"""Draw the anatomy of a network: where its parameters and its multiply-adds are, and how far its layers see."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from finetune.models.anatomy import Anatomy, Layer
from finetune.report.charts import BLUE, DOTS_PER_INCH, FAINT, INK, ORANGE, style
from finetune.runs.folder import write_whole

NAMED_LAYERS = 70
"""Up to so many layers have a line of text each."""
MAX_HEIGHT_INCHES = 15.0
MAX_NAME_LENGTH = 32


def draw_anatomy(anatomy: Anatomy, path: Path, *, title: str) -> None:
    """Write the picture of `anatomy_figure` to `path`, in the format that its ending names: png, svg or pdf.

    Raises:
        StorageError: The disk is full or refuses.
    """
    picture = io.BytesIO()
    figure = anatomy_figure(anatomy, title=title)
    with style():
        figure.savefig(picture, format=path.suffix[1:].lower(), dpi=DOTS_PER_INCH, facecolor="white")
    write_whole(path, picture.getvalue())


def anatomy_figure(anatomy: Anatomy, *, title: str) -> Figure:
    """Build the picture of a network from its first layer, at the top, to its last.

    It shows the layers that have parameters or multiply-adds or change the size of the map (of very many only those
    with multiply-adds) in three panels: the parameters of each, frozen ones grey; its multiply-adds; and its receptive
    field, beside the size of the image.

    Args:
        anatomy: What `inspect_network` found.
        title: Name of the network.
    """
    layers = _telling(anatomy.layers)
    height = min(1.6 + 0.19 * len(layers), MAX_HEIGHT_INCHES)
    with style():
        figure = Figure(figsize=(9.5, height), layout="constrained")
        parameters, multiply_adds, fields = figure.subplots(1, 3, sharey=True)
        colours = [FAINT if layer.state == "frozen" else BLUE for layer in layers]
        total = f"{anatomy.parameters:,}"
        if anatomy.learning < anatomy.parameters:
            total += f", {anatomy.learning:,} learning (blue)"
        _plot_bars(parameters, [layer.parameters for layer in layers], colours, f"parameters\n{total}")
        _plot_bars(
            multiply_adds,
            [layer.multiply_adds for layer in layers],
            [ORANGE] * len(layers),
            f"multiply-adds\n{anatomy.multiply_adds:,}",
        )
        _plot_fields(fields, layers, max(anatomy.input_shape[1:]))
        _name_layers(parameters, layers)
        figure.suptitle(f"{title}, input {' × '.join(map(str, anatomy.input_shape))}", x=0.01, ha="left", color=INK)
    return figure


def _telling(layers: Sequence[Layer]) -> list[Layer]:
    """Leave out activations and the like, of which there is nothing to draw, and of many layers the norms too."""
    telling: list[Layer] = []
    for layer in layers:
        is_new_map = bool(telling and layer.stride and telling[-1].stride and layer.stride != telling[-1].stride)
        if layer.parameters or layer.multiply_adds or is_new_map:
            telling.append(layer)
    if len(telling) > NAMED_LAYERS:
        telling = [layer for layer in telling if layer.multiply_adds]
    return telling or list(layers)


def _plot_bars(axes: Axes, values: Sequence[int], colours: Sequence[str], title: str) -> None:
    """Draw a bar a layer on a logarithmic scale, for the largest is a million times the smallest."""
    axes.barh(range(len(values)), values, color=colours, height=0.8)
    axes.set_title(title)
    axes.set_xscale("log")
    axes.set_xlim(left=max(min((value for value in values if value), default=1) / 3, 0.5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.minorticks_off()
    axes.grid(visible=True, axis="x")
    axes.set_axisbelow(True)


def _plot_fields(axes: Axes, layers: Sequence[Layer], image_px: int) -> None:
    """Draw how far each layer sees, with marks of their own where it is the whole image or cannot be told."""
    places = range(len(layers))
    sizes = [max(layer.receptive_field) if isinstance(layer.receptive_field, tuple) else math.nan for layer in layers]
    whole = [place for place in places if layers[place].receptive_field == "image"]
    untold = [place for place in places if layers[place].note]
    marker = "o" if len(layers) <= NAMED_LAYERS else ""
    axes.axvline(image_px, color=FAINT, linestyle="--", linewidth=1, label=f"image, {image_px} px")
    axes.plot(sizes, places, color=BLUE, marker=marker, markersize=3, linewidth=1.2)
    if whole:
        axes.plot([image_px] * len(whole), whole, "s", color=BLUE, markersize=3.5, label="the whole image")
    if untold:
        axes.plot([0] * len(untold), untold, "x", color=ORANGE, markersize=4, label="cannot be told")
    axes.set_title("receptive field\npixels, padding included")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(visible=True, axis="x")
    axes.legend(fontsize=8)


def _name_layers(axes: Axes, layers: Sequence[Layer]) -> None:
    """Name every layer, or of many every n-th; the first is at the top."""
    every = math.ceil(len(layers) / NAMED_LAYERS)
    places = range(0, len(layers), every)
    axes.set_yticks(places, [short_name(layers[place].name or "(itself)") for place in places], fontsize=8)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_ylabel("layer" if every == 1 else f"layer, one in {every} named")


def short_name(name: str) -> str:
    """Return the end of a long path, which tells more than its start."""
    return name if len(name) <= MAX_NAME_LENGTH else "…" + name[1 - MAX_NAME_LENGTH :]


def _short(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g} {letter}"
    return f"{value:g}"
