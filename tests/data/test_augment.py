"""Random changes do what they say, to each picture by its own numbers."""

import pytest
import torch

from finetune.data.augment import CropAndFlip, Lighting, OneByOne, ShufflePixels, SmallAffine
from finetune.data.transforms import BATCH_CHANGES


def pictures(count: int, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_crop_in_the_middle_without_a_flip_changes_nothing() -> None:
    images_BCHW = pictures(2)
    middle = 4.5 / 9  # the fifth of nine places
    assert torch.equal(CropAndFlip()(images_BCHW, torch.tensor([[middle, middle, 0.1]] * 2)), images_BCHW)


def test_crop_shifts_each_picture_by_its_own_numbers() -> None:
    images_BCHW = pictures(2)
    changed_BCHW = CropAndFlip()(images_BCHW, torch.tensor([[0.0, 0.999, 0.1], [0.5, 0.5, 0.9]]))
    assert torch.equal(changed_BCHW[0, :, 4:, :-4], images_BCHW[0, :, :-4, 4:])
    assert not changed_BCHW[0, :, :4].any()
    assert not changed_BCHW[0, :, :, -4:].any()
    assert torch.equal(changed_BCHW[1], images_BCHW[1].flip(-1))


def test_affine_with_middling_numbers_changes_nothing() -> None:
    images_BCHW = pictures(3)
    change = SmallAffine()
    torch.testing.assert_close(change(images_BCHW, torch.full((3, change.draws), 0.5)), images_BCHW)


@pytest.mark.parametrize(("place", "axis"), [(4, -1), (5, -2)])
def test_affine_shifts_along_one_axis(place: int, axis: int) -> None:
    change = SmallAffine()
    images_BCHW = pictures(1, side=25)  # 0.12 of 25 pixels are 3
    draws_BP = torch.full((1, change.draws), 0.5)
    draws_BP[0, place] = 1.0
    shifted_BCHW = change(images_BCHW, draws_BP)
    size = 22
    torch.testing.assert_close(shifted_BCHW.narrow(axis, 0, size), images_BCHW.narrow(axis, 3, size), atol=1e-4, rtol=0)
    border = shifted_BCHW.narrow(axis, size, 3)
    torch.testing.assert_close(border, images_BCHW.narrow(axis, 24, 1).expand_as(border), atol=1e-4, rtol=0)


def test_affine_turns_by_degrees() -> None:
    """A dot on the right edge, turned by the most there is, goes up or down by its sine."""
    change = SmallAffine()
    side = 65
    images_BCHW = torch.zeros(1, 1, side, side)
    images_BCHW[0, 0, 31:34, 59:62] = 1.0  # 28 to the right of the centre
    draws_BP = torch.full((1, change.draws), 0.5)
    draws_BP[0, 0] = 1.0
    turned_HW = change(images_BCHW, draws_BP)[0, 0]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    row = (turned_HW * rows).sum() / turned_HW.sum() - 32
    column = (turned_HW * columns).sum() / turned_HW.sum() - 32
    angle = torch.atan2(row, column).abs().rad2deg()
    assert float(angle) == pytest.approx(change.degrees, abs=0.5)
    assert float(torch.hypot(row, column)) == pytest.approx(28, abs=0.5)


@pytest.mark.parametrize("name", [name for name, change in BATCH_CHANGES.items() if change])
def test_change_is_moderate_and_each_picture_gets_its_own(name: str) -> None:
    change = BATCH_CHANGES[name]
    assert change is not None
    same_BCHW = torch.zeros(64, 1, 32, 32)
    same_BCHW[:, :, 12:20, 12:20] = 1.0
    draws_BP = torch.rand(64, change.draws, generator=torch.Generator().manual_seed(0))
    changed_BCHW = change(same_BCHW, draws_BP)
    assert changed_BCHW.shape == same_BCHW.shape
    assert len({image.numpy().tobytes() for image in changed_BCHW}) > 32
    assert bool((changed_BCHW.sum(dim=(1, 2, 3)) > 40).all())  # of 64 bright pixels; none is lost over the edge


def test_one_by_one_draws_from_the_default_generator() -> None:
    change = SmallAffine()
    image_CHW = pictures(1)[0]
    torch.manual_seed(3)
    draws_BP = torch.rand(1, change.draws)
    torch.manual_seed(3)
    assert torch.equal(OneByOne(change)(image_CHW), change(image_CHW[None], draws_BP)[0])


def test_lighting_shifts_whole_channels_and_leaves_grey_alone() -> None:
    torch.manual_seed(0)
    image_CHW = pictures(1)[0]
    shifts = Lighting()(image_CHW) - image_CHW
    torch.testing.assert_close(shifts, shifts[:, :1, :1].expand_as(shifts))
    amounts = torch.stack([Lighting()(torch.zeros(3, 1, 1)).flatten() for _ in range(4000)])
    expected = sum(
        (0.1 * size) ** 2 * torch.outer(axis, axis)
        for size, axis in zip(Lighting.deviations, torch.tensor(Lighting.directions).T, strict=True)
    )
    torch.testing.assert_close(amounts.T.cov(), torch.as_tensor(expected), atol=3e-5, rtol=0.1)
    grey = image_CHW[:1]
    assert torch.equal(Lighting()(grey), grey)


def test_shuffled_pixels_keep_their_values_and_their_order() -> None:
    images_BCHW = pictures(2, side=8)
    shuffled_BCHW = ShufflePixels(5)(images_BCHW)
    assert not torch.equal(shuffled_BCHW, images_BCHW)
    assert torch.equal(shuffled_BCHW.flatten(2).sort().values, images_BCHW.flatten(2).sort().values)
    assert torch.equal(ShufflePixels(5)(images_BCHW[0]), shuffled_BCHW[0])  # one picture as in a batch
    places = ShufflePixels(5)(torch.arange(64).view(1, 8, 8)).flatten()
    assert torch.equal(shuffled_BCHW.flatten(2), images_BCHW.flatten(2)[..., places])
    assert not torch.equal(ShufflePixels(6)(images_BCHW), shuffled_BCHW)
