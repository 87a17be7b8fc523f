"""Whole pictures instead of their central crops, and where on them a class is seen.

Shapes: C channels, H × W pixels or positions, K classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune.data.transforms import unnormalize, whole_picture_transform
from finetune.errors import ConfigError, ModelError, nearest
from finetune.models.dense import DenseClassifier, to_dense
from finetune.prediction.classifier import Classifier, ImageSource
from finetune.runs.records import LabelMap, Prediction


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Where on a picture a model sees a class: the class activation map of Zhou et al. 2016, arXiv 1512.04150.

    `map_HW` holds the logit of the class at each position, float32; its mean is the logit of the prediction. It is
    centred on `picture_HWC`, the uint8 pixels that the network was given, with `stride_px` between neighbours.
    """

    prediction: Prediction
    class_name: str
    display_name: str
    probability: float
    map_HW: npt.NDArray[np.float32]
    picture_HWC: npt.NDArray[np.uint8]
    stride_px: float
    output: Path | None = None


def over_whole_pictures(classifier: Classifier) -> Classifier:
    """Return the same classifier for dense evaluation: it sees all of a picture instead of the central square.

    The picture is resized as for evaluation, the network slides over it, and the mean of its logits over all positions
    gives the prediction. Source: Simonyan and Zisserman 2014, arXiv 1409.1556, section 3.2. Pictures of different
    shapes cannot share a batch.

    Raises:
        ModelError: The network does not become a convolution, or was trained on pixels in another order.
    """
    return _average_map(classifier, _as_dense(classifier))


def explain_image(
    classifier: Classifier, image: ImageSource, *, class_name: str | None = None, dense: bool = False
) -> Explanation:
    """Map where on `image` the classifier sees a class, by default the one it predicts.

    Args:
        classifier: A trained model.
        image: One image.
        class_name: Folder name or display name of the class.
        dense: Map the whole picture instead of the crop that `predict` sees.

    Raises:
        ConfigError: No class has this name, or several have.
        ModelError: The network does not become a convolution, or was trained on pixels in another order.
        PredictionInputError: The image cannot be read.
    """
    labels = classifier.metadata.label_map
    class_index = None if class_name is None else _find_class(labels, class_name)
    network = _as_dense(classifier)
    if dense:
        classifier = _average_map(classifier, network)
    image_1CHW = classifier.preprocess(image)[None].to(classifier.device)
    probabilities_1K = classifier.probabilities(image_1CHW)
    if class_index is None:
        class_index = int(probabilities_1K[0].argmax())
    with torch.inference_mode():
        map_HW = network(image_1CHW)[0, class_index]
    return Explanation(
        prediction=classifier.describe([str(image)], probabilities_1K, top_k=5)[0],
        class_name=labels.class_names[class_index],
        display_name=labels.display_names[class_index],
        probability=float(probabilities_1K[0, class_index]),
        map_HW=map_HW.float().cpu().numpy(),
        picture_HWC=unnormalize(image_1CHW, classifier.metadata.input_spec)[0],
        stride_px=network.stride_px,
    )


class _MeanOfMap(nn.Module):
    """A dense classifier whose answer is the mean of its score map."""

    def __init__(self, dense: DenseClassifier) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        map_BKHW: torch.Tensor = self.dense(images_BCHW)
        return map_BKHW.mean(dim=(2, 3))


def _as_dense(classifier: Classifier) -> DenseClassifier:
    spec = classifier.metadata.input_spec
    if spec.pixel_permutation_seed is not None:
        raise ModelError(
            "the model was trained on pixels in another order, so no place in a picture is a place to it",
            "take a model that was trained without a pixel permutation",
        )
    return to_dense(classifier.model, (spec.channels, spec.image_size_px, spec.image_size_px))


def _average_map(classifier: Classifier, dense: DenseClassifier) -> Classifier:
    whole = Classifier(_MeanOfMap(dense), classifier.metadata, device=classifier.device)
    whole.transform = whole_picture_transform(classifier.metadata.input_spec)
    return whole


def _find_class(labels: LabelMap, name: str) -> int:
    """Return the index of the class with this folder name, else of the one that is shown by it."""
    if name in labels.class_names:
        return labels.index(name)
    shown = [index for index, display_name in enumerate(labels.display_names) if display_name == name]
    if len(shown) == 1:
        return shown[0]
    if shown:
        folders = ", ".join(labels.class_names[index] for index in shown)
        raise ConfigError(f"several classes are shown as {name!r}", f"name one of the folders {folders}")
    names = list(dict.fromkeys((*labels.display_names, *labels.class_names)))
    raise ConfigError(f"the model knows no class {name!r}", nearest(name, names))
