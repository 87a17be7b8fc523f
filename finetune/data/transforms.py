"""From decoded pixels to what a network expects, and back; every number comes from an InputSpec.

The order of steps is one: a picture is first *fitted*, shrunk to the `resize_px` of the network if it is larger, and
everything else, the random crops of training too, starts from the fitted picture. So fitted pictures are what a cache
holds, and every transform here takes a picture of any size or a fitted one and gives the same bits.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from finetune.data.augment import BatchChange, CropAndFlip, Lighting, OneByOne, ShufflePixels, SmallAffine
from finetune.data.decode import Pixels
from finetune.runs.records import InputSpec

# Shapes: B batch, C channels, H height, W width.

Augmentation = Literal["none", "light", "flowers", "trivial", "affine", "crop-flip", "alexnet"]

BATCH_CHANGES: dict[str, BatchChange | None] = {"none": None, "affine": SmallAffine(), "crop-flip": CropAndFlip()}
"""The augmentations that change what `still_transform` gives, so that a whole batch can be changed at once."""

SMALLEST_CROP = 0.35  # share of the picture that a random crop keeps at least; smaller ones often miss the object


def to_tensor(image_HWC: Pixels) -> torch.Tensor:
    """View a decoded picture (H, W, 3) as a uint8 tensor (3, H, W)."""
    return torch.from_numpy(image_HWC).permute(2, 0, 1)


def fit_transform(spec: InputSpec) -> v2.Compose:
    """Build the first step of all: uint8 (3, H, W) of any size → uint8 (C, H', W').

    It shrinks the short side to the `resize_px` of `spec` where it is longer, never enlarges, and makes the picture
    grey for a network that sees grey. A fitted picture stays as it is.
    """
    return v2.Compose([*_channels(spec), Shrink(spec)])


def evaluation_transform(spec: InputSpec) -> v2.Compose:
    """Build the transform of validation, prediction and serving: resize the short side, centre crop, normalise.

    It takes a uint8 tensor (3, H, W) of any size and returns a float32 tensor (C, size, size).
    """
    return v2.Compose([*_still(spec), *_finish(spec)])


def whole_picture_transform(spec: InputSpec) -> v2.Compose:
    """Build the transform of dense evaluation, which is that of evaluation without the crop: nothing is cut off.

    It takes a uint8 tensor (3, H, W) of any size and returns a float32 tensor (C, H', W') whose short side is the
    `resize_px` of `spec`.
    """
    return v2.Compose([*_channels(spec), _resize(spec), *_finish(spec)])


def still_transform(spec: InputSpec) -> v2.Compose:
    """Build the part of the preprocessing that is the same in every epoch: uint8 (3, H, W) → uint8 (C, size, size)."""
    return v2.Compose(_still(spec))


def batch_transform(
    spec: InputSpec, augmentation: Augmentation
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """Build what comes after `still_transform`, for a batch at once, for the augmentations in `BATCH_CHANGES`.

    It takes uint8 (B, C, size, size) and random numbers (B, P), or None where nothing is random, and returns float32.
    """
    change = BATCH_CHANGES[augmentation]
    to_unit, *finish = _finish(spec)

    def transform(images_BCHW: torch.Tensor, draws_BP: torch.Tensor | None) -> torch.Tensor:
        unit_BCHW = to_unit(images_BCHW)
        changed_BCHW = unit_BCHW if change is None or draws_BP is None else change(unit_BCHW, draws_BP)
        return torch.as_tensor(v2.Compose(finish)(changed_BCHW))

    return transform


def training_transform(spec: InputSpec, augmentation: Augmentation, *, random_erasing: float = 0.0) -> v2.Compose:
    """Build the transform of training: random changes of the fitted picture, then the normalisation of evaluation.

    Of a share `random_erasing` of the images a random rectangle is made grey, whatever the augmentation.

    - `none` is the evaluation transform.
    - `light` takes a random crop out of the fitted picture, not of a photograph at its own size, and flips it.
    - `trivial` is `light` with TrivialAugment (Müller 2021, arXiv 2103.10158).
    - `flowers` rotates by up to 45°, flips both ways and changes colours.
    - `affine` rotates, shears, scales and shifts a little: for digits, letters and whatever must not be mirrored.
    - `crop-flip` shifts and flips small pictures; `alexnet` does so with large ones and changes the light.
    """
    interpolation = InterpolationMode(spec.interpolation)
    to_unit, *finish = _finish(spec)
    if random_erasing:
        finish.append(v2.RandomErasing(random_erasing))
    if augmentation in BATCH_CHANGES:
        change = BATCH_CHANGES[augmentation]
        return v2.Compose([*_still(spec), to_unit, *([OneByOne(change)] if change else []), *finish])
    crop = [
        Shrink(spec),
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
    steps: dict[str, list[nn.Module]] = {
        "light": crop,
        "flowers": flowers,
        "trivial": [*crop, v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)],
        "alexnet": [_resize(spec), v2.RandomCrop(spec.image_size_px), v2.RandomHorizontalFlip()],
    }
    lighting = [Lighting()] if augmentation == "alexnet" else []
    return v2.Compose([*_channels(spec), *steps[augmentation], to_unit, *lighting, *finish])


class Shrink(nn.Module):
    """Resizes a picture to the `resize_px` of `spec` if its short side is longer, and leaves any other as it is."""

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.short_side_px = spec.resize_px
        self.resize = _resize(spec)

    def forward(self, image_CHW: torch.Tensor) -> torch.Tensor:
        """Take and return uint8 (C, H, W)."""
        return self.resize(image_CHW) if min(image_CHW.shape[-2:]) > self.short_side_px else image_CHW


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


def _still(spec: InputSpec) -> list[nn.Module]:
    return [*_channels(spec), _resize(spec), v2.CenterCrop(spec.image_size_px)]


def _finish(spec: InputSpec) -> list[nn.Module]:
    """Return the steps from uint8 pictures (…, C, size, size) to what the network sees, the scaling to 0..1 first."""
    seed = spec.pixel_permutation_seed
    shuffle = [] if seed is None else [ShufflePixels(seed)]
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(spec.mean), list(spec.std)), *shuffle]
