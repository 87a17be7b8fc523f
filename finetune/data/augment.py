"""Random changes that torchvision lacks or draws once for a whole batch; here every image has draws of its own.

Each takes the random numbers as an argument, so that a change is a function of (seed, epoch, image) and not of the
batch that the image happens to be in.
"""

import math
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import affine_grid, grid_sample, pad

# Shapes: B batch, C channels, H height, W width, P random numbers an image needs, S side after the change.


class BatchChange(Protocol):
    """A random change of pictures (B, C, H, W), float32 in 0..1; `draws` says how many random numbers each needs."""

    draws: int

    def __call__(self, images_BCHW: torch.Tensor, draws_BP: torch.Tensor) -> torch.Tensor:
        """Change each picture by its row of `draws_BP`, uniform in 0..1."""
        ...


class SmallAffine:
    """Rotate, shear, scale and shift a little, the border repeated outwards: nothing that turns a 6 into a 9.

    Source: the affine part of the distortions of Simard 2003 (Best practices for convolutional neural networks).
    """

    draws = 6
    degrees = 17.0
    shear = 0.2
    scale = 0.17
    shift = 0.12  # of the side

    def __call__(self, images_BCHW: torch.Tensor, draws_BP: torch.Tensor) -> torch.Tensor:
        """Return pictures of the same shape."""
        turn, shear, wide, high, right, down = (draws_BP * 2 - 1).unbind(dim=1)
        angle = turn * math.radians(self.degrees)
        cos, sin = angle.cos(), angle.sin()
        wide, high = 1 + self.scale * wide, 1 + self.scale * high
        # From a place in the result to the place in the source, in units of half the side.
        rows = (
            torch.stack([wide * cos, wide * (self.shear * shear * cos - sin), 2 * self.shift * right], dim=1),
            torch.stack([high * sin, high * (self.shear * shear * sin + cos), 2 * self.shift * down], dim=1),
        )
        grid_BHW2 = affine_grid(torch.stack(rows, dim=1), list(images_BCHW.shape), align_corners=False)
        return grid_sample(images_BCHW, grid_BHW2, mode="bilinear", padding_mode="border", align_corners=False)


class CropAndFlip:
    """Shift by up to an eighth of the side, black coming in, and mirror every other picture.

    The augmentation of nearly all results on CIFAR: 4 pixels of padding around 32 (Lee 2015, arXiv 1409.5185).
    """

    draws = 3

    def __call__(self, images_BCHW: torch.Tensor, draws_BP: torch.Tensor) -> torch.Tensor:
        """Return pictures of the same shape."""
        side = images_BCHW.shape[-1]
        margin = side // 8
        padded_BHWC = pad(images_BCHW, [margin] * 4).permute(0, 2, 3, 1)
        top_B, left_B = (draws_BP[:, :2] * (2 * margin + 1)).long().unbind(dim=1)
        place_S = torch.arange(side, device=images_BCHW.device)
        columns_BS = torch.where(draws_BP[:, 2:] < 0.5, place_S, place_S.flip(0)) + left_B[:, None]
        rows_BS = place_S + top_B[:, None]
        picture_B11 = torch.arange(len(images_BCHW), device=images_BCHW.device)[:, None, None]
        return padded_BHWC[picture_B11, rows_BS[:, :, None], columns_BS[:, None, :]].permute(0, 3, 1, 2)


class OneByOne(nn.Module):
    """A `BatchChange` as a transform of one picture (C, H, W), its numbers drawn from torch's default generator."""

    def __init__(self, change: BatchChange) -> None:
        super().__init__()
        self.change = change

    def forward(self, image_CHW: torch.Tensor) -> torch.Tensor:
        """Return the changed picture."""
        return self.change(image_CHW[None], torch.rand(1, self.change.draws).to(image_CHW.device))[0]


class Lighting(nn.Module):
    """Add to all pixels of an RGB picture (3, H, W) a random amount of the main colours of natural light.

    Along the eigenvectors of the covariance of ImageNet's pixels, by normal draws of deviation 0.1 times the root of
    their eigenvalues. Source: Krizhevsky 2012, section 4.1. Grey pictures are left as they are.
    """

    deviations = (0.2175, 0.0188, 0.0045)
    directions = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

    def forward(self, image_CHW: torch.Tensor) -> torch.Tensor:
        """Return the relit picture, float32; values may leave 0..1 a little."""
        if len(image_CHW) != 3:
            return image_CHW
        amounts = torch.randn(3) * 0.1 * torch.tensor(self.deviations)
        return image_CHW + (torch.tensor(self.directions) @ amounts).to(image_CHW.device)[:, None, None]


class ShufflePixels(nn.Module):
    """Put the pixels of square pictures (…, H, W) into another order, the same for every picture and channel."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the pictures with their pixels moved."""
        order = torch.randperm(images.shape[-2:].numel(), generator=torch.Generator().manual_seed(self.seed))
        return images.flatten(-2)[..., order].view(images.shape)
