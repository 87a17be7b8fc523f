"""A saved model, ready to predict: everything it needs comes from the one file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import nn

from finetune.data.decode import decode_image
from finetune.data.transforms import evaluation_transform, to_tensor
from finetune.errors import ImageError, PredictionInputError
from finetune.evaluation.infer import probabilities_of
from finetune.models.device import resolve_device
from finetune.models.initialize import build_backbone
from finetune.models.neighbours import attach_saved_neighbours
from finetune.models.stage_outputs import attach_saved_stage_outputs
from finetune.models.weights import load_exact
from finetune.runs.folder import find_model_file
from finetune.runs.model_file import ModelMetadata, load_model_file
from finetune.runs.records import ClassProbability, Prediction

# Shapes: N images, B batch, C channels, H height, W width, K classes.

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, np.dtype[np.uint8]]
"""A path, the bytes of a file, a PIL image, or pixels (H, W, 3) uint8."""

BATCH_SIZE = 32


class Classifier:
    """A trained network with its classes and its preprocessing, in scikit-learn's vocabulary.

    Args:
        model: The network, its head as wide as there are classes.
        metadata: What the model file says of it.
        device: Where to compute.
    """

    def __init__(self, model: nn.Module, metadata: ModelMetadata, *, device: torch.device) -> None:
        self.model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.metadata = metadata
        self.device = device
        self.transform = evaluation_transform(metadata.input_spec)

    @property
    def classes_(self) -> np.ndarray[Any, np.dtype[np.str_]]:
        """Class names in the order of the columns of `predict_proba`."""
        return np.array(self.metadata.label_map.class_names)

    @overload
    def predict(self, images: ImageSource, *, top_k: int = 5) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, images: Sequence[ImageSource], *, top_k: int = 5) -> list[Prediction]: ...
    def predict(self, images: ImageSource | Sequence[ImageSource], *, top_k: int = 5) -> Prediction | list[Prediction]:
        """Name the class of one image, or of each in a list.

        Args:
            images: One image, or a list or tuple of them.
            top_k: How many of the most probable classes to return, 1 or more.

        Raises:
            PredictionInputError: An image cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self.predict([images], top_k=top_k)[0]  # type: ignore[list-item]
        names = [str(image) if isinstance(image, str | os.PathLike) else f"image {n}" for n, image in enumerate(images)]
        return self.describe(names, self.predict_proba(images), top_k=top_k)

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the probability of each class for each image, (N, K) float32, columns in the order of `classes_`.

        Raises:
            PredictionInputError: An image cannot be read.
        """
        rows = [np.empty((0, len(self.metadata.label_map)), dtype=np.float32)]
        for start in range(0, len(images), BATCH_SIZE):
            tensors = [self.preprocess(image) for image in images[start : start + BATCH_SIZE]]
            rows.append(self.probabilities(torch.stack(tensors)))
        return np.concatenate(rows)

    def preprocess(self, image: ImageSource) -> torch.Tensor:
        """Decode one image and bring it to what the network expects, (C, H, W) float32.

        Raises:
            PredictionInputError: It cannot be read.
        """
        try:
            image_HWC = decode_image(image, short_side_px=self.metadata.input_spec.resize_px)
            return torch.as_tensor(self.transform(to_tensor(image_HWC)))
        except ImageError as error:
            raise PredictionInputError(error.message) from error

    def probabilities(self, images_BCHW: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the class probabilities (B, K) of preprocessed images."""
        temperature = self.metadata.calibration or 1.0
        probabilities_BK = probabilities_of(self.model, images_BCHW.to(self.device), temperature=temperature)
        array: np.ndarray[Any, np.dtype[np.float32]] = probabilities_BK.cpu().numpy()
        return array

    def describe(
        self, names: Sequence[str], probabilities_NK: np.ndarray[Any, np.dtype[np.float32]], *, top_k: int
    ) -> list[Prediction]:
        """Put the `top_k` classes of each row into words."""
        labels = self.metadata.label_map
        order_NK = np.argsort(-probabilities_NK, axis=1, kind="stable")[:, : max(1, top_k)]
        return [
            Prediction(
                image=name,
                abstained=self.metadata.threshold is not None and float(row_K.max()) < self.metadata.threshold,
                top=tuple(
                    ClassProbability(
                        class_name=labels.class_names[index],
                        display_name=labels.display_names[index],
                        class_index=int(index),
                        probability=float(row_K[index]),
                    )
                    for index in order
                ),
            )
            for name, row_K, order in zip(names, probabilities_NK, order_NK, strict=True)
        ]


def load_classifier(path: str | os.PathLike[str], *, device: str = "auto") -> Classifier:
    """Load a run folder or a model.safetensors; no code runs, no network is used.

    Raises:
        RunError: There is no such run or file.
        ModelError: The file is damaged, or does not fit the architecture it names.
        ConfigError: The device is not there.
    """
    file = find_model_file(Path(path))
    metadata, tensors = load_model_file(file)
    backbone = build_backbone(
        metadata.architecture,
        num_classes=len(metadata.label_map),
        use_pretrained=False,
        head=metadata.head,
        image_size=metadata.input_spec.image_size_px,
        channels=metadata.input_spec.channels,
    )
    if metadata.head == "knn":
        attach_saved_neighbours(backbone.module, tensors, class_count=len(metadata.label_map), source=str(file))
    if metadata.head_inputs:
        attach_saved_stage_outputs(
            backbone.module, metadata.head_inputs, tensors, input_spec=metadata.input_spec, source=str(file)
        )
    load_exact(backbone.module, tensors, str(file))
    return Classifier(backbone.module, metadata, device=resolve_device(device))
