"""The records refuse what contradicts itself and keep the order of classes."""

from dataclasses import replace

import pytest

from finetune.errors import ConfigError, DataError
from finetune.runs.records import ClassProbability, InputSpec, LabelMap, Prediction

SPEC = InputSpec(image_size_px=224, resize_px=256, interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (112, 128), (320, 366), (1, 1), (448, 512)])
def test_other_image_size_keeps_the_margin_in_proportion(size: int, resize: int) -> None:
    changed = SPEC.at_size(size)
    assert (changed.image_size_px, changed.resize_px) == (size, resize)
    assert replace(changed, image_size_px=224, resize_px=256) == SPEC


def test_image_size_without_a_margin_stays_without() -> None:
    assert replace(SPEC, resize_px=224).at_size(100).resize_px == 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size_px": 0}, "must be positive"),
        ({"image_size_px": 300}, "at most the resize of 256"),
        ({"mean": (0.5,)}, "1 or 3 channels"),
        ({"mean": (0.5,) * 2, "std": (0.5,) * 2}, "1 or 3 channels"),
        ({"std": (0.5, 0.5, 0.0)}, "std positive"),
        ({"std": (0.5, 0.5, float("inf"))}, "finite"),
        ({"mean": (0.5, 0.5, float("nan"))}, "finite"),
    ],
)
def test_input_spec_refuses_what_cannot_be_computed(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SPEC, **values)


def test_image_size_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        SPEC.at_size(0)


def test_channels_are_counted() -> None:
    assert SPEC.channels == 3
    assert replace(SPEC, mean=(0.1,), std=(0.3,)).channels == 1


def test_classes_are_sorted_as_text_and_shown_by_folder_name() -> None:
    label_map = LabelMap.from_names(["2", "1", "10"], {"10": "rose", "2": "lily", "99": "nobody"})
    assert label_map.class_names == ("1", "10", "2")
    assert label_map.display_names == ("1", "rose", "lily")
    assert len(label_map) == 3
    assert [label_map.index(name) for name in ("1", "10", "2")] == [0, 1, 2]


def test_label_map_refuses_duplicates_and_uneven_lists() -> None:
    with pytest.raises(DataError, match="stands twice"):
        LabelMap.from_names(["a", "b", "a"], {})
    with pytest.raises(DataError, match="2 classes but 1 display names"):
        LabelMap(class_names=("a", "b"), display_names=("a",))


def test_two_classes_may_be_shown_alike() -> None:
    assert LabelMap.from_names(["a", "b"], {"a": "rose", "b": "rose"}).display_names == ("rose", "rose")


def test_prediction_speaks_for_its_first_class() -> None:
    top = tuple(
        ClassProbability(class_name=name, display_name=name.upper(), class_index=index, probability=probability)
        for index, (name, probability) in enumerate((("a", 0.75), ("b", 0.25)))
    )
    prediction = Prediction(image="x.jpg", abstained=False, top=top)
    assert (prediction.class_name, prediction.display_name, prediction.probability) == ("a", "A", 0.75)
