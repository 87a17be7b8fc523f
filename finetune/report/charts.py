"""Draw what people look at in a run: learning curves, the confusion matrix and example images.

Every `*_figure` function builds a matplotlib Figure from plain values, and the `draw_*` function of the same name
writes it as a PNG file. Figures are objects of their own: no pyplot, no display, nothing shared between two charts.

Shapes: K classes, N images, H × W pixels, C channels (1 grey or 3 RGB).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from finetune.errors import StorageError

DOTS_PER_INCH = 120
PNG = {"compress_level": 1}  # files are half as large again as at the usual 6, and saved in two thirds of the time
FONT = "DejaVu Sans"  # the font that matplotlib itself carries, so that a chart looks the same everywhere
INK, FAINT, BLUE, ORANGE = "#333333", "#8a8a8a", "#1f5fa8", "#c7661b"
RIGHT, WRONG = "#1a7f37", "#b42318"
MAX_NAME_LENGTH = 24
MAX_COUNTED_CLASSES = 20
MAX_LABELLED_CLASSES = 110
NO_EPOCHS = "no epochs: the head was not trained by gradient"
STYLE: dict[str, Any] = {
    "font.family": FONT,
    "font.size": 9,
    "text.parse_math": False,  # a "$" in a class name is a dollar sign
    "text.usetex": False,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#e6e6e6",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def draw_curves(history: Mapping[str, Sequence[float]], path: Path, *, best_epoch: int | None = None) -> None:
    """Write the learning curves of `curves_figure` as a PNG file at `path`."""
    save_figure(curves_figure(history, best_epoch=best_epoch), path)


def draw_confusion_matrix(confusion_KK: npt.NDArray[Any], display_names: Sequence[str], path: Path) -> None:
    """Write the confusion matrix of `confusion_matrix_figure` as a PNG file at `path`."""
    save_figure(confusion_matrix_figure(confusion_KK, display_names), path)


def draw_samples(
    images_NHWC: Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8],
    true_names: Sequence[str],
    predicted_names: Sequence[str],
    probabilities: Sequence[float],
    path: Path,
) -> None:
    """Write the predictions of `samples_figure` as a PNG file at `path`."""
    save_figure(samples_figure(images_NHWC, true_names, predicted_names, probabilities), path)


def draw_image_grid(
    images_NHWC: Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8], titles: Sequence[str], path: Path
) -> None:
    """Write the images of `image_grid_figure` as a PNG file at `path`."""
    save_figure(image_grid_figure(images_NHWC, titles), path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG file at `path`, making its folder where there is none.

    Raises:
        StorageError: The disk is full or refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with style():
            figure.savefig(path, format="png", dpi=DOTS_PER_INCH, facecolor="white", pil_kwargs=PNG)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}", "free some space or choose another --output"
        ) from error


def curves_figure(history: Mapping[str, Sequence[float]], *, best_epoch: int | None = None) -> Figure:
    """Build the learning curves: loss and accuracy side by side, the learning rate beneath.

    Args:
        history: One number an epoch under each of `train_loss`, `valid_loss`, `train_accuracy`, `valid_accuracy` and
            `learning_rates`. A series may be shorter than the others, empty or absent; values that are not finite
            leave a gap.
        best_epoch: The epoch to mark, counted from 1, 0 for none; by default the first with the highest validation
            accuracy.
    """
    epochs = max((len(series) for series in history.values()), default=0)
    if epochs == 0:
        return _message_figure(NO_EPOCHS)
    best_epoch = _best_epoch(history) if best_epoch is None else best_epoch
    rates = history.get("learning_rates", ())
    rows = [["loss", "accuracy"], ["rate", "rate"]] if len(rates) else [["loss", "accuracy"]]
    with style():
        figure = Figure(figsize=(9, 4.4 if len(rates) else 3.4), layout="constrained")
        axes: dict[str, Axes] = figure.subplot_mosaic(rows, height_ratios=[4, 1][: len(rows)])
        _plot_phases(axes["loss"], history, "loss", best_epoch)
        _plot_phases(axes["accuracy"], history, "accuracy", best_epoch)
        axes["accuracy"].set_ylim(top=min(axes["accuracy"].get_ylim()[1], 1.005))  # room for a line at 1, for no tick
        if len(rates):
            _plot_learning_rate(axes["rate"], rates)
        for panel in axes.values():
            panel.set_xlim(0.5, epochs + 0.5)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            panel.grid(visible=True, axis="y")
            panel.set_axisbelow(True)
        for name in set(rows[-1]):
            axes[name].set_xlabel("epoch")
    return figure


def confusion_matrix_figure(confusion_KK: npt.NDArray[Any], display_names: Sequence[str]) -> Figure:
    """Build the confusion matrix: a row for each true class, a column for each predicted one.

    Colour is the share of the true class, so that rare classes show as well as frequent ones; up to 20 classes have
    their counts written in. Names are shortened, and with very many classes only every second or third is named.

    Args:
        confusion_KK: Counts, integers from 0, of images of class row that were predicted as class column.
        display_names: The K names, in class order.
    """
    counts_KK = np.asarray(confusion_KK)
    classes = len(display_names)
    if counts_KK.shape != (classes, classes):
        raise ValueError(f"confusion matrix of shape {counts_KK.shape} for {classes} names")
    shares_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    side_inches = min(max(1.6 + 0.42 * classes, 2.4), 11.0)
    every = math.ceil(classes / MAX_LABELLED_CLASSES)
    label_points = float(np.clip(0.62 * 72 * side_inches / classes * every, 4.5, 9))
    with style():
        figure = Figure(figsize=(side_inches + 2.6, side_inches + 1.6), layout="constrained")
        axes = figure.add_subplot()
        # The square root lifts a single mistake among many hits out of the white.
        image = axes.imshow(shares_KK, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
        ticks = range(0, classes, every)
        labels = [shown(display_names[tick]) for tick in ticks]
        slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(
            ticks, labels, fontsize=label_points, **(slant if classes <= MAX_COUNTED_CLASSES else {"rotation": 90})
        )
        axes.set_yticks(ticks, labels, fontsize=label_points)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"{int(np.trace(counts_KK)):,} of {int(counts_KK.sum()):,} images right")
        if classes <= MAX_COUNTED_CLASSES:
            _write_counts(axes, counts_KK, shares_KK)
        bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, ticks=[0, 0.05, 0.25, 0.5, 1])
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)
    return figure


def samples_figure(
    images_NHWC: Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8],
    true_names: Sequence[str],
    predicted_names: Sequence[str],
    probabilities: Sequence[float],
) -> Figure:
    """Build a grid of images titled with what was predicted: green and ✓ where it is right, red and ✗ where not.

    Args:
        images_NHWC: N images, uint8, of one size or of several.
        true_names: The N true display names.
        predicted_names: The N predicted display names.
        probabilities: The N probabilities of the predicted classes, 0..1.
    """
    titles, colours = [], []
    for true_name, predicted_name, probability in zip(true_names, predicted_names, probabilities, strict=True):
        is_right = true_name == predicted_name
        verdict = f"{'✓' if is_right else '✗'} {shown(predicted_name)} {probability:.2f}"
        titles.append(verdict if is_right else f"{verdict}\n(true: {shown(true_name)})")
        colours.append(RIGHT if is_right else WRONG)
    return _grid_figure(images_NHWC, titles, colours)


def image_grid_figure(
    images_NHWC: Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8], titles: Sequence[str]
) -> Figure:
    """Build a grid of N images, uint8 and of one size or of several, each titled with its class name."""
    return _grid_figure(images_NHWC, [shown(title) for title in titles], [INK] * len(titles))


@contextmanager
def style() -> Iterator[None]:
    """Use the common style, whatever the user's own matplotlib settings are; needed to build and to save alike."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@cache
def _drawable_characters() -> frozenset[int]:
    """Return the code points that the chart font has a glyph for."""
    return frozenset(font_manager.get_font(font_manager.findfont(FONT)).get_charmap())


def shown(name: str) -> str:
    """Return a name fit for a chart: one line, at most 24 characters, "□" for what the font cannot draw."""
    line = " ".join(name.split())
    drawable = "".join(character if ord(character) in _drawable_characters() else "□" for character in line)
    return drawable if len(drawable) <= MAX_NAME_LENGTH else drawable[: MAX_NAME_LENGTH - 1] + "…"


def _message_figure(message: str) -> Figure:
    """Build a figure that says why there is nothing to show."""
    with style():
        figure = Figure(figsize=(9, 1.6))
        figure.text(0.5, 0.5, message, ha="center", va="center", color=FAINT, fontsize=11)
    return figure


def _finite(series: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return a series with NaN, which matplotlib leaves out, for every value that is not finite."""
    values = np.asarray(series, dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _best_epoch(history: Mapping[str, Sequence[float]]) -> int | None:
    """Return the first epoch with the highest validation accuracy, counted from 1, or None where none was measured."""
    accuracies = _finite(history.get("valid_accuracy", ()))
    return None if np.isnan(accuracies).all() else int(np.nanargmax(accuracies)) + 1


def _plot_phases(axes: Axes, history: Mapping[str, Sequence[float]], measure: str, best_epoch: int | None) -> None:
    """Plot one measure of both phases, validation drawn solid and training dashed, and mark the best epoch."""
    axes.set_title(measure)
    for phase, colour, line in (("train", ORANGE, "--"), ("valid", BLUE, "-")):
        values = _finite(history.get(f"{phase}_{measure}", ()))
        if np.isfinite(values).any():
            marker = "o" if len(values) <= 30 else ""
            axes.plot(
                np.arange(1, len(values) + 1), values, line, color=colour, marker=marker, markersize=3, label=phase
            )
    values = _finite(history.get(f"valid_{measure}", ()))
    if best_epoch and best_epoch <= len(values) and np.isfinite(values[best_epoch - 1]):
        best = values[best_epoch - 1]
        axes.axvline(best_epoch, color=FAINT, linewidth=0.8, linestyle=":")
        label = f"best: epoch {best_epoch}, {best:.3g}"
        axes.plot([best_epoch], [best], "o", color=BLUE, markersize=8, markerfacecolor="none", label=label)
    if axes.lines:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=FAINT)


def _plot_learning_rate(axes: Axes, rates: Sequence[float]) -> None:
    """Plot the learning rate as steps, on a logarithmic scale where it spans more than a factor of 20."""
    values = _finite(rates)
    axes.set_title("learning rate")
    axes.plot(np.arange(1, len(values) + 1), values, color=FAINT, drawstyle="steps-mid", marker="o", markersize=2.5)
    positive = values[values > 0]
    if len(positive) == len(values) and positive.max() > 20 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))


def draw_rate_sweep(rates: Sequence[float], losses: Sequence[float], path: Path, *, suggestion: float | None) -> None:
    """Write the sweep of `rate_sweep_figure` as a PNG file at `path`."""
    save_figure(rate_sweep_figure(rates, losses, suggestion=suggestion), path)


def rate_sweep_figure(rates: Sequence[float], losses: Sequence[float], *, suggestion: float | None) -> Figure:
    """Build the loss over the learning rate, on a logarithmic scale, with the suggested rate marked.

    Args:
        rates: Rising, above 0.
        losses: The smoothed loss (nats) at each of `rates`.
        suggestion: One of `rates`, about; None marks nothing.
    """
    with style():
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(rates, losses, color=BLUE)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("learning rate of the head")
        axes.set_title("training loss while the rate rises")
        axes.grid(visible=True, axis="y")
        if losses:
            axes.set_ylim(top=max(losses[0], *losses[: max(len(losses) // 2, 1)]) * 1.3)
        if suggestion is not None:
            axes.axvline(suggestion, color=ORANGE, linewidth=1.2, label=f"falls fastest: {suggestion:g}")
            axes.legend(fontsize=8)
    return figure


def _write_counts(axes: Axes, counts_KK: npt.NDArray[Any], shares_KK: npt.NDArray[np.float64]) -> None:
    """Write every count that is not zero into its cell, white on dark cells."""
    points = 9 if len(counts_KK) <= 10 else 7.5
    for row, column in np.argwhere(counts_KK):
        colour = "white" if shares_KK[row, column] > 0.3 else INK
        axes.text(column, row, f"{counts_KK[row, column]}", ha="center", va="center", color=colour, fontsize=points)


def _grid_figure(
    images_NHWC: Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8], titles: Sequence[str], colours: Sequence[str]
) -> Figure:
    """Build a grid of images, each with its title and a frame in its colour."""
    if not titles:
        return _message_figure("no images")
    columns = min(math.ceil(math.sqrt(len(titles) * 1.5)), 6)
    rows = math.ceil(len(titles) / columns)
    with style():
        figure = Figure(figsize=(max(2.1 * columns, 3.2), 2.5 * rows), layout="constrained")
        for place, (image_HWC, title, colour) in enumerate(zip(images_NHWC, titles, colours, strict=True), start=1):
            axes = figure.add_subplot(rows, columns, place)
            axes.imshow(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC, cmap="gray", vmin=0, vmax=255)
            axes.set_title(title, color=colour, fontsize=8, loc="center")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set(visible=True, color=colour, linewidth=1.5)
    return figure
