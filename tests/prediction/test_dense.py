"""Dense evaluation and class maps against what the network says of whole pictures itself.

Shapes: C channels, H × W pixels or positions, K classes.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.errors import ConfigError, ModelError, PredictionInputError
from finetune.models.initialize import build_backbone
from finetune.prediction.batch import predict_many
from finetune.prediction.classifier import Classifier
from finetune.prediction.dense import explain_image, over_whole_pictures
from finetune.runs.model_file import ModelMetadata
from finetune.runs.records import FailedPrediction, InputSpec, LabelMap, Prediction

LABELS = LabelMap(class_names=("1", "10", "2", "3"), display_names=("daisy", "rose", "lily", "rose"))
SPEC = InputSpec(image_size_px=64, resize_px=80, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def make() -> Callable[..., Classifier]:
    """Build a classifier with random weights; its temperature spreads the probabilities."""

    def make(name: str = "timm/resnet18", spec: InputSpec = SPEC) -> Classifier:
        torch.manual_seed(0)
        backbone = build_backbone(name, num_classes=4, use_pretrained=False)
        metadata = ModelMetadata(
            architecture=name,
            head="logits",
            label_map=LABELS,
            input_spec=spec,
            frozen_stages=(),
            scenario="small-similar",
            pretrained_weights="none",
            metrics={},
            data_fingerprint="x",
            calibration=0.02,
        )
        return Classifier(backbone.module, metadata, device=torch.device("cpu"))

    return make


@pytest.fixture(scope="module")
def classifier(make: Callable[..., Classifier]) -> Classifier:
    """One that averages over its map, and so can be asked about pictures of any size."""
    return make()


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Pictures of several shapes; the third is torn."""
    random = np.random.default_rng(0)
    paths = [tmp_path / f"{name}.png" for name in ("wide", "tall", "torn", "square")]
    for path, shape in zip(paths, ((90, 150), (200, 90), (90, 90), (30, 30)), strict=True):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(shape[::-1], Image.Resampling.BICUBIC).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    return paths


def whole_picture(path: Path) -> torch.Tensor:
    """Bring a picture to the evaluation scale by Pillow, whole, (1, C, H, W)."""
    with Image.open(path) as image:
        factor = 80 / min(image.size)
        size = tuple(int(side * factor) for side in image.size)
        pixels_HWC = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    return torch.tensor(pixels_HWC).permute(2, 0, 1)[None] / 127.5 - 1


def test_a_whole_picture_gives_the_mean_over_its_map(classifier: Classifier, images: list[Path]) -> None:
    results = list(predict_many(over_whole_pictures(classifier), images, batch_size=1, top_k=4))
    assert [result.image for result in results] == [str(path) for path in images]
    failed = [result for result in results if isinstance(result, FailedPrediction)]
    assert [(Path(result.image).name, result.code) for result in failed] == [("torn.png", "truncated")]
    for path, result in zip(images, results, strict=True):
        if isinstance(result, Prediction):
            with torch.inference_mode():
                expected_K = (classifier.model(whole_picture(path))[0] / 0.02).softmax(dim=0)
            found = {other.class_index: other.probability for other in result.top}
            assert [found[index] for index in range(4)] == pytest.approx(expected_K.tolist(), abs=0.02)
            assert max(found.values()) < 0.9  # or the comparison would say nothing


def test_the_whole_picture_is_another_picture_than_its_centre(classifier: Classifier, images: list[Path]) -> None:
    wide = images[0]
    central, whole = (one.predict_proba([wide]) for one in (classifier, over_whole_pictures(classifier)))
    assert np.abs(central - whole).max() > 0.01


def test_the_map_of_the_crop_belongs_to_its_prediction(classifier: Classifier, images: list[Path]) -> None:
    found = explain_image(classifier, images[0])
    assert found.prediction == classifier.predict(images[0])
    assert (found.class_name, found.probability) == (found.prediction.class_name, found.prediction.probability)
    assert found.picture_HWC.shape == (64, 64, 3)
    assert found.picture_HWC.dtype == np.uint8
    assert (found.map_HW.shape, found.map_HW.dtype, found.stride_px) == ((2, 2), np.float32, 32)
    with torch.inference_mode():
        logits_K = classifier.model(classifier.preprocess(images[0])[None])[0]
    for index, name in enumerate(LABELS.class_names):
        other = explain_image(classifier, images[0], class_name=name)
        assert (other.class_name, other.display_name) == (name, LABELS.display_names[index])
        assert other.prediction == found.prediction
        assert float(other.map_HW.mean()) == pytest.approx(float(logits_K[index]), abs=1e-5)


def test_the_dense_map_covers_the_whole_picture(classifier: Classifier, images: list[Path]) -> None:
    found = explain_image(classifier, images[1], dense=True)
    assert found.picture_HWC.shape == (177, 80, 3)
    assert found.map_HW.shape == (6, 3)
    [same] = predict_many(over_whole_pictures(classifier), [images[1]], batch_size=1)
    assert found.prediction == same
    assert found.output is None


def test_a_class_is_found_by_either_of_its_names(classifier: Classifier, images: list[Path]) -> None:
    assert explain_image(classifier, images[0], class_name="lily").class_name == "2"
    with pytest.raises(ConfigError, match="no class 'lilly'") as caught:
        explain_image(classifier, images[0], class_name="lilly")
    assert "the nearest are: lily" in caught.value.hint
    with pytest.raises(ConfigError, match="several classes are shown as 'rose'") as caught:
        explain_image(classifier, images[0], class_name="rose")
    assert "10, 3" in caught.value.hint


def test_an_unreadable_image_says_why(classifier: Classifier, images: list[Path]) -> None:
    with pytest.raises(PredictionInputError, match="truncated"):
        explain_image(classifier, images[2])


def test_a_network_that_flattens_its_map(make: Callable[..., Classifier], images: list[Path]) -> None:
    spec = InputSpec(image_size_px=28, resize_px=28, interpolation="bilinear", mean=(0.5,), std=(0.5,))
    classifier = make("lenet5_relu", spec)
    found = explain_image(classifier, images[0])
    assert found.map_HW.shape == (1, 1)
    assert found.prediction == classifier.predict(images[0])
    assert found.picture_HWC.shape == (28, 28, 3)
    assert explain_image(classifier, images[0], dense=True).map_HW.shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("torchvision/mobilenet_v3_small", SPEC, "Hardswish"),
        ("timm/resnet18", replace(SPEC, pixel_permutation_seed=3), "pixels in another order"),
    ],
)
def test_what_gives_no_map_is_refused(
    make: Callable[..., Classifier], images: list[Path], name: str, spec: InputSpec, reason: str
) -> None:
    classifier = make(name, spec)
    with pytest.raises(ModelError, match=reason):
        over_whole_pictures(classifier)
    with pytest.raises(ModelError, match=reason):
        explain_image(classifier, images[0])


def test_the_classifier_is_left_as_it_was(classifier: Classifier, images: list[Path]) -> None:
    before = classifier.predict_proba(images[:2])
    over_whole_pictures(classifier)
    assert np.array_equal(classifier.predict_proba(images[:2]), before)
