"""From decoded pixels to what a network expects, and back; every number comes from an InputSpec."""

from typing import Any, Literal

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

from finetune.runs.records import InputSpec

# Shapes: B batch, C channels, H height, W width.

Augmentation = Literal["none", "light", "flowers", "trivial"]

SMALLEST_CROP = 0.35  # share of the picture that a random crop keeps at least; smaller ones often miss the object


def evaluation_transform(spec: InputSpec) -> v2.Compose:
    """Build the transform of validation, prediction and serving: resize the short side, centre crop, normalise.

    It takes a uint8 tensor (3, H, W) of any size and returns a float32 tensor (C, size, size).
    """
    return v2.Compose([*_channels(spec), _resize(spec), v2.CenterCrop(spec.image_size_px), *_normalize(spec)])


def training_transform(spec: InputSpec, augmentation: Augmentation) -> v2.Compose:
    """Build the transform of training: random changes, then the same normalisation as in evaluation.

    `none` is the evaluation transform. `light` takes a random crop and flips it. `flowers` rotates by up to 45°, flips
    both ways and changes colours. `trivial` is `light` with TrivialAugment (Müller 2021, arXiv 2103.10158).
    """
    interpolation = InterpolationMode(spec.interpolation)
    crop = [
        v2.RandomResizedCrop(spec.image_size_px, (SMALLEST_CROP, 1.0), interpolation=interpolation, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    # The tutorials cut the centre out of the picture at its own size; resizing first, as validation does, keeps the
    # object at one scale in both and loses none of a large photograph.
    flowers = [
        _resize(spec),
        v2.RandomRotation(45, InterpolationMode.BILINEAR),
        v2.CenterCrop(spec.image_size_px),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.ColorJitter(brightness=0.2, contrast=0.1, saturation=0.1, hue=0.1),
        v2.RandomGrayscale(0.025),
    ]
    steps: dict[Augmentation, list[v2.Transform]] = {
        "none": [_resize(spec), v2.CenterCrop(spec.image_size_px)],
        "light": crop,
        "flowers": flowers,
        "trivial": [*crop, v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)],
    }
    return v2.Compose([*_channels(spec), *steps[augmentation], *_normalize(spec)])


def unnormalize(images_BCHW: torch.Tensor, spec: InputSpec) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Turn normalised tensors (B, C, H, W) back into pictures (B, H, W, 3), uint8."""
    mean_C11 = torch.tensor(spec.mean).view(-1, 1, 1)
    std_C11 = torch.tensor(spec.std).view(-1, 1, 1)
    pixels_BCHW = (images_BCHW.detach().cpu().float() * std_C11 + mean_C11).clamp(0, 1) * 255
    pictures: np.ndarray[Any, np.dtype[np.uint8]] = (
        pixels_BCHW.round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    )
    return pictures


def _channels(spec: InputSpec) -> list[v2.Transform]:
    return [v2.Grayscale(1)] if spec.channels == 1 else []


def _resize(spec: InputSpec) -> v2.Transform:
    return v2.Resize(spec.resize_px, InterpolationMode(spec.interpolation), antialias=True)


def _normalize(spec: InputSpec) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(spec.mean), list(spec.std))]
