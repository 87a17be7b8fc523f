import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from finetune.report import charts

HISTORY = {
    "train_loss": [1.5, 0.9, 0.6, 0.4],
    "valid_loss": [1.6, 1.1, 0.9, 1.0],
    "train_accuracy": [0.4, 0.7, 0.8, 0.9],
    "valid_accuracy": [0.4, 0.7, 0.8, 0.8],
    "learning_rates": [1e-2, 1e-2, 1e-3, 1e-4],
}
HOSTILE_NAMES = [
    "$\\frac{1}$",
    "<script>alert(1)</script>",
    "rose 🌹",
    "two\nlines",
    "a$b",
    "\ud800",
    "花",
    "",
    "x" * 300,
]


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def shown_texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [text.get_text() for text in figure.texts]


def assert_png(path, *, at_least=(300, 150), at_most=(2000, 2000)):
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        assert all(low <= side <= high for low, side, high in zip(at_least, image.size, at_most, strict=True))
        assert len(np.unique(np.asarray(image.convert("L")))) > 2  # something is drawn on it


@pytest.fixture
def images_NHWC():
    return np.random.default_rng(0).integers(0, 256, (9, 24, 24, 3), dtype=np.uint8)


class TestCurves:
    def test_plots_every_series_against_epochs_from_one(self):
        figure = charts.curves_figure(HISTORY)
        for measure in ("loss", "accuracy"):
            lines = {line.get_label(): line for line in panel(figure, measure).lines}
            for phase in ("train", "valid"):
                assert list(lines[phase].get_xdata()) == [1, 2, 3, 4]
                assert list(lines[phase].get_ydata()) == HISTORY[f"{phase}_{measure}"]
            assert lines["train"].get_linestyle() != lines["valid"].get_linestyle()
        assert list(panel(figure, "learning rate").lines[0].get_ydata()) == HISTORY["learning_rates"]

    def test_marks_the_first_epoch_with_the_highest_validation_accuracy(self):
        figure = charts.curves_figure(HISTORY)
        marker = panel(figure, "loss").lines[-1]
        assert (list(marker.get_xdata()), list(marker.get_ydata())) == ([3], [0.9])
        assert panel(figure, "accuracy").lines[-1].get_label() == "best: epoch 3, 0.8"

    def test_marks_the_epoch_it_is_told(self):
        assert list(panel(charts.curves_figure(HISTORY, best_epoch=4), "loss").lines[-1].get_ydata()) == [1.0]

    def test_marks_nothing_where_the_start_is_best_or_nothing_is_held_back(self):
        for history, best_epoch in ((HISTORY, 0), ({**HISTORY, "valid_loss": [float("nan")] * 4}, 4)):
            labels = [
                line.get_label() for line in panel(charts.curves_figure(history, best_epoch=best_epoch), "loss").lines
            ]
            assert not [label for label in labels if "best" in label]
            assert ("valid" in labels) == (best_epoch == 0)

    def test_learning_rate_is_logarithmic_only_over_a_wide_span(self):
        assert panel(charts.curves_figure(HISTORY), "learning rate").get_yscale() == "log"
        narrow = charts.curves_figure({**HISTORY, "learning_rates": [1e-2, 5e-3]})
        assert panel(narrow, "learning rate").get_yscale() == "linear"

    @pytest.mark.parametrize("accuracies", [[1.0, 1.0, 1.0], [0.97, 1.0, 0.99], [0.2, 0.6, 1.0], [0.0, 0.0]])
    def test_the_axis_of_the_accuracy_has_no_tick_above_one(self, accuracies):
        axes = panel(charts.curves_figure({"valid_accuracy": accuracies}), "accuracy")
        low, high = axes.get_ylim()
        assert low < min(accuracies) <= max(accuracies) < high
        assert max(tick for tick in axes.get_yticks() if low <= tick <= high) <= 1 + 1e-9

    def test_one_epoch_shows_one_tick(self, tmp_path):
        charts.draw_curves({name: series[:1] for name, series in HISTORY.items()}, tmp_path / "one.png")
        figure = charts.curves_figure({name: series[:1] for name, series in HISTORY.items()})
        low, high = panel(figure, "loss").get_xlim()
        assert [tick for tick in panel(figure, "loss").get_xticks() if low <= tick <= high] == [1]
        assert_png(tmp_path / "one.png")

    @pytest.mark.parametrize("history", [{}, {"train_loss": [], "valid_accuracy": []}])
    def test_no_epochs_says_why(self, history, tmp_path):
        assert shown_texts(charts.curves_figure(history)) == ["no epochs: the head was not trained by gradient"]
        charts.draw_curves(history, tmp_path / "none.png")
        assert_png(tmp_path / "none.png")

    @pytest.mark.parametrize(
        "history",
        [
            {"train_loss": [1.0, float("nan"), float("inf")], "valid_accuracy": [float("nan")]},
            {"valid_accuracy": [0.5, 0.6], "train_loss": [1.0]},
            {"learning_rates": [0.0, 0.0]},
            {"train_loss": [1.0] * 500},
        ],
    )
    def test_gaps_and_missing_series_are_drawn(self, history, tmp_path):
        charts.draw_curves(history, tmp_path / "curves.png")
        assert_png(tmp_path / "curves.png")

    def test_a_measure_without_values_says_so(self):
        assert shown_texts(charts.curves_figure({"train_loss": [1.0]})) == ["not recorded"]


class TestConfusionMatrix:
    def test_rows_are_normalised_and_counts_written(self):
        confusion_KK = np.array([[3, 1, 0], [0, 0, 0], [0, 5, 5]])
        figure = charts.confusion_matrix_figure(confusion_KK, ["a", "b", "c"])
        axes = figure.axes[0]
        np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25, 0], [0, 0, 0], [0, 0.5, 0.5]])
        assert {text.get_position(): text.get_text() for text in axes.texts} == {
            (0, 0): "3",
            (1, 0): "1",
            (1, 2): "5",
            (2, 2): "5",
        }
        assert axes.get_title(loc="left") == "8 of 14 images right"
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]

    @pytest.mark.parametrize("classes", [1, 2, 20, 21, 102, 300])
    def test_any_number_of_classes_makes_a_png(self, classes, tmp_path):
        names = [f"class {number} with a name that is rather long" for number in range(classes)]
        charts.draw_confusion_matrix(np.eye(classes, dtype=int) * 7, names, tmp_path / "confusion.png")
        assert_png(tmp_path / "confusion.png")

    @pytest.mark.parametrize(("classes", "labels", "counts"), [(20, 20, 20), (21, 21, 0), (102, 102, 0), (300, 100, 0)])
    def test_labels_thin_and_counts_vanish_as_classes_grow(self, classes, labels, counts):
        names = [f"class {number}" for number in range(classes)]
        axes = charts.confusion_matrix_figure(np.eye(classes, dtype=int), names).axes[0]
        assert len(axes.get_xticklabels()) == len(axes.get_yticklabels()) == labels
        assert len(axes.texts) == counts

    def test_neighbouring_labels_do_not_overlap(self):
        names = [f"class number {number}" for number in range(102)]
        figure = charts.confusion_matrix_figure(np.eye(102, dtype=int), names)
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))

    def test_a_matrix_of_another_size_is_refused(self):
        with pytest.raises(ValueError, match=r"\(2, 2\) for 3 names"):
            charts.confusion_matrix_figure(np.eye(2), ["a", "b", "c"])

    def test_hostile_names(self, tmp_path):
        size = len(HOSTILE_NAMES)
        charts.draw_confusion_matrix(np.ones((size, size), int), HOSTILE_NAMES, tmp_path / "confusion.png")
        assert_png(tmp_path / "confusion.png")


class TestSamples:
    def test_titles_tell_right_from_wrong_in_words_and_colour(self, images_NHWC):
        figure = charts.samples_figure(images_NHWC[:2], ["daisy", "tulip"], ["daisy", "rose"], [0.934, 0.5])
        assert titles(figure) == ["✓ daisy 0.93", "✗ rose 0.50\n(true: tulip)"]
        assert [to_hex(axes.title.get_color()) for axes in figure.axes] == [charts.RIGHT, charts.WRONG]
        assert [to_hex(axes.spines["left"].get_edgecolor()) for axes in figure.axes] == [charts.RIGHT, charts.WRONG]
        np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), images_NHWC[1])

    def test_hostile_names_make_a_png(self, images_NHWC, tmp_path):
        path = tmp_path / "new" / "samples.png"
        charts.draw_samples(images_NHWC, HOSTILE_NAMES, HOSTILE_NAMES[::-1], [0.5] * 9, path)
        assert_png(path)

    def test_hostile_names_are_shown_as_plain_text(self, images_NHWC):
        first, second, third, fourth, *_, long = titles(charts.image_grid_figure(images_NHWC, HOSTILE_NAMES))
        assert first == "$\\frac{1}$"
        assert second == "<script>alert(1)</scrip…"
        assert third == "rose □"
        assert fourth == "two lines"
        assert long == "x" * 23 + "…"

    def test_a_dollar_is_not_mathematics(self, images_NHWC):
        figure = charts.image_grid_figure(images_NHWC[:1], ["$x^2$"])
        assert figure.axes[0].title.get_parse_math() is False

    def test_unequal_lengths_are_a_mistake(self, images_NHWC):
        with pytest.raises(ValueError):
            charts.samples_figure(images_NHWC[:2], ["a"], ["a"], [0.5])


class TestImageGrid:
    def test_titles_are_the_names(self, images_NHWC):
        assert titles(charts.image_grid_figure(images_NHWC[:3], ["a", "b", "c"])) == ["a", "b", "c"]

    def test_grey_images_of_several_sizes(self, tmp_path):
        images = [np.full((8, 8, 1), 200, np.uint8), np.zeros((40, 8, 3), np.uint8)]
        charts.draw_image_grid(images, ["grey", "tall"], tmp_path / "grid.png")
        assert_png(tmp_path / "grid.png")
        grey = charts.image_grid_figure(images, ["grey", "tall"]).axes[0].images[0]
        assert (grey.norm.vmin, grey.norm.vmax) == (0, 255)

    def test_no_images_says_so(self, tmp_path):
        charts.draw_image_grid([], [], tmp_path / "empty.png")
        assert_png(tmp_path / "empty.png")
        assert shown_texts(charts.image_grid_figure([], [])) == ["no images"]


def test_the_users_own_matplotlib_settings_neither_leak_in_nor_change(images_NHWC, tmp_path):
    import matplotlib

    charts.draw_image_grid(images_NHWC[:2], ["a", "b"], tmp_path / "plain.png")
    with matplotlib.rc_context({"figure.dpi": 30, "font.family": "serif", "font.size": 30, "axes.facecolor": "black"}):
        charts.draw_image_grid(images_NHWC[:2], ["a", "b"], tmp_path / "styled.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()


def test_charts_load_neither_torch_nor_pyplot():
    code = "import sys, finetune.report.charts; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(charts.__file__).parents[2], check=False)
    assert done.returncode == 0


class TestRateSweep:
    def test_the_rates_are_numbers_on_a_logarithmic_axis(self):
        figure = charts.rate_sweep_figure([1e-4, 1e-3, 1e-2, 1e-1], [2.0, 1.5, 1.0, 9.0], suggestion=1e-3)
        axes = figure.axes[0]
        assert axes.get_xscale() == "log"
        assert axes.xaxis.get_major_formatter()(0.001) == "0.001"
        assert [list(line.get_xdata()) for line in axes.lines] == [[1e-4, 1e-3, 1e-2, 1e-1], [1e-3, 1e-3]]
        assert axes.get_ylim()[1] < 9

    def test_nothing_is_marked_where_nothing_is_suggested(self, tmp_path):
        assert len(charts.rate_sweep_figure([1e-4, 1e-3], [1.0, 2.0], suggestion=None).axes[0].lines) == 1
        charts.draw_rate_sweep([], [], tmp_path / "empty.png", suggestion=None)
        assert (tmp_path / "empty.png").exists()
