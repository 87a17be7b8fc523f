"""From decoded pixels to what a network expects, and back, by the numbers of an InputSpec."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from finetune.data.transforms import (
    Augmentation,
    Shrink,
    evaluation_transform,
    fit_transform,
    to_tensor,
    training_transform,
    unnormalize,
    whole_picture_transform,
)
from finetune.runs.records import InputSpec

IMAGENET = InputSpec(
    image_size_px=224, resize_px=256, interpolation="bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
SMALL = replace(IMAGENET, image_size_px=24, resize_px=28)
GREY = replace(SMALL, mean=(0.1307,), std=(0.3081,))
AUGMENTATIONS = ("none", "light", "flowers", "trivial")
SIZES = {"larger": (60, 90), "portrait": (91, 43), "as it is": (28, 40), "smaller": (20, 35), "one side": (27, 300)}


def noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def test_decoded_picture_is_seen_as_channels_first() -> None:
    image_HWC = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    tensor = to_tensor(image_HWC)
    assert tensor.shape == (3, 2, 4)
    assert tensor[:, 1, 2].tolist() == image_HWC[1, 2].tolist()


@pytest.mark.parametrize(("height", "width"), [(28, 28), (31, 200), (200, 31), (8, 9), (24, 24)])
def test_any_picture_becomes_a_square_of_the_size_asked_for(height: int, width: int) -> None:
    image_CHW = evaluation_transform(SMALL)(noise(height, width))
    assert image_CHW.shape == (3, 24, 24)
    assert image_CHW.dtype == torch.float32


def test_picture_of_the_right_size_is_cropped_and_normalised_exactly() -> None:
    picture = noise(28, 40)
    middle = picture[:, 2:26, 8:32].numpy() / 255.0
    expected = (middle - np.reshape(SMALL.mean, (3, 1, 1))) / np.reshape(SMALL.std, (3, 1, 1))
    np.testing.assert_allclose(evaluation_transform(SMALL)(picture).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_every_interpolation_keeps_a_flat_picture(interpolation: Any) -> None:
    picture = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 60, 90)
    image_CHW = evaluation_transform(replace(SMALL, interpolation=interpolation))(picture)
    expected = [
        (value / 255 - mean) / std for value, mean, std in zip((0, 128, 255), SMALL.mean, SMALL.std, strict=True)
    ]
    for channel, value in enumerate(expected):
        np.testing.assert_allclose(image_CHW[channel].numpy(), value, atol=1e-5)


def test_short_side_is_halved_by_averaging() -> None:
    picture = torch.zeros(3, 56, 56, dtype=torch.uint8)
    picture[:, :, ::2] = 200  # stripes one pixel wide become grey: without antialiasing they would stay or vanish
    pictures_BHWC = unnormalize(evaluation_transform(SMALL)(picture)[None], SMALL)
    assert abs(pictures_BHWC.astype(int) - 100).max() <= 30


def test_centre_is_kept_upright_and_unmirrored() -> None:
    picture = torch.zeros(3, 56, 56, dtype=torch.uint8)
    picture[:, :28, :28] = 255
    corner_CHW = evaluation_transform(SMALL)(picture)
    assert corner_CHW[0, :10, :10].min() > corner_CHW[0, 14:, :].max()
    assert corner_CHW[0, :10, :10].min() > corner_CHW[0, :, 14:].max()


def test_unnormalize_inverts() -> None:
    pictures = [noise(28, 40), noise(40, 28)]
    images_BCHW = torch.stack([evaluation_transform(SMALL)(picture) for picture in pictures])
    pictures_BHWC = unnormalize(images_BCHW, SMALL)
    assert pictures_BHWC.dtype == np.uint8
    np.testing.assert_array_equal(pictures_BHWC[0], pictures[0][:, 2:26, 8:32].permute(1, 2, 0))
    np.testing.assert_array_equal(pictures_BHWC[1], pictures[1][:, 8:32, 2:26].permute(1, 2, 0))


def test_unnormalize_clips_and_makes_three_channels_of_one() -> None:
    images_BCHW = torch.tensor([-100.0, 0.0, 100.0]).view(1, 1, 1, 3).requires_grad_()
    pictures_BHWC = unnormalize(images_BCHW, GREY)
    assert pictures_BHWC.tolist() == [[[[0] * 3, [33] * 3, [255] * 3]]]


def test_grey_spec_weighs_the_colours_as_the_eye_does() -> None:
    picture = torch.zeros(3, 28, 28, dtype=torch.uint8)
    picture[1] = 255
    image_CHW = evaluation_transform(GREY)(picture)
    assert image_CHW.shape == (1, 24, 24)
    luma = 0.587  # the share of green in ITU-R BT.601
    np.testing.assert_allclose(image_CHW.numpy(), (luma - 0.1307) / 0.3081, atol=0.005 / 0.3081)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("spec", [SMALL, GREY], ids=["colour", "grey"])
def test_every_augmentation_gives_what_the_network_expects(spec: InputSpec, augmentation: Any) -> None:
    transform = training_transform(spec, augmentation)
    lowest = min(-mean / std for mean, std in zip(spec.mean, spec.std, strict=True))
    highest = max((1 - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for height, width in [(30, 50), (50, 30), (9, 9)] * 5:
            image_CHW = transform(noise(height, width))
            assert image_CHW.shape == (spec.channels, 24, 24)
            assert image_CHW.dtype == torch.float32
            assert lowest - 1e-4 <= image_CHW.min()
            assert image_CHW.max() <= highest + 1e-4


def test_no_augmentation_is_the_evaluation_transform() -> None:
    picture = noise(40, 70)
    assert torch.equal(training_transform(SMALL, "none")(picture), evaluation_transform(SMALL)(picture))


@pytest.mark.parametrize(
    ("size", "fitted"), [((60, 90), (28, 42)), ((90, 60), (42, 28)), ((28, 40), (28, 40)), ((20, 35), (20, 35))]
)
@pytest.mark.parametrize("spec", [SMALL, GREY], ids=["colour", "grey"])
def test_fitting_shrinks_the_short_side_and_never_enlarges(
    spec: InputSpec, size: tuple[int, int], fitted: tuple[int, int]
) -> None:
    picture_CHW = fit_transform(spec)(noise(*size))
    assert picture_CHW.shape == (spec.channels, *fitted)
    assert picture_CHW.dtype == torch.uint8


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("spec", [SMALL, GREY], ids=["colour", "grey"])
def test_fitted_picture_gives_the_same_bits_as_the_picture(
    spec: InputSpec, interpolation: Any, size: tuple[int, int]
) -> None:
    spec = replace(spec, interpolation=interpolation)
    picture = to_tensor(noise(*size).permute(1, 2, 0).numpy())  # laid out as the decoder does
    fitted = fit_transform(spec)(picture)
    assert torch.equal(fit_transform(spec)(fitted), fitted)
    for transform in (evaluation_transform(spec), whole_picture_transform(spec)):
        assert torch.equal(transform(fitted), transform(picture))
    for augmentation in get_args(Augmentation):
        transform = training_transform(spec, augmentation)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(7)
            expected = transform(picture)
            torch.default_generator.manual_seed(7)
            assert torch.equal(transform(fitted), expected), augmentation


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_evaluation_resizes_the_picture_itself_once(size: tuple[int, int]) -> None:
    picture = noise(*size)
    once = v2.CenterCrop(24)(v2.Resize(28, InterpolationMode.BILINEAR, antialias=True)(picture))
    expected = v2.Normalize(list(SMALL.mean), list(SMALL.std))(v2.ToDtype(torch.float32, scale=True)(once))
    assert torch.equal(evaluation_transform(SMALL)(fit_transform(SMALL)(picture)), expected)


def test_random_crop_is_cut_out_of_the_fitted_picture() -> None:
    stripes = torch.zeros(3, 280, 280, dtype=torch.uint8)
    stripes[:, :, ::2] = 200  # one pixel wide: gone once the picture is shrunk to a tenth
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        crops = torch.stack([training_transform(SMALL, "light")(stripes) for _ in range(20)])
    assert abs(unnormalize(crops, SMALL).astype(int) - 100).max() <= 10


@pytest.mark.parametrize("augmentation", AUGMENTATIONS[1:])
def test_augmentation_changes_from_draw_to_draw(augmentation: Any) -> None:
    picture = noise(40, 40)
    transform = training_transform(SMALL, augmentation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(transform(picture), transform(picture))


def test_flowers_is_the_pipeline_of_the_tutorials() -> None:
    resize, rotation, crop, mirror, upside_down, colours, grey, scale, normalize = training_transform(
        IMAGENET, "flowers"
    ).transforms
    assert isinstance(resize, v2.Resize)
    assert resize.size == [256]
    assert isinstance(rotation, v2.RandomRotation)
    assert list(rotation.degrees) == [-45, 45]
    assert isinstance(crop, v2.CenterCrop)
    assert tuple(crop.size) == (224, 224)
    assert isinstance(mirror, v2.RandomHorizontalFlip)
    assert isinstance(upside_down, v2.RandomVerticalFlip)
    assert (mirror.p, upside_down.p) == (0.5, 0.5)
    assert isinstance(colours, v2.ColorJitter)
    assert colours.brightness == pytest.approx((0.8, 1.2))
    assert colours.contrast == pytest.approx((0.9, 1.1))
    assert colours.saturation == pytest.approx((0.9, 1.1))
    assert colours.hue == pytest.approx((-0.1, 0.1))
    assert isinstance(grey, v2.RandomGrayscale)
    assert grey.p == 0.025
    assert isinstance(scale, v2.ToDtype)
    assert isinstance(normalize, v2.Normalize)
    assert (normalize.mean, normalize.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_validation_resizes_and_crops_as_the_tutorials_do() -> None:
    resize, crop, _, _ = evaluation_transform(IMAGENET).transforms
    assert isinstance(resize, v2.Resize)
    assert resize.size == [256]
    assert resize.antialias
    assert resize.interpolation == InterpolationMode.BILINEAR
    assert isinstance(crop, v2.CenterCrop)
    assert tuple(crop.size) == (224, 224)
    assert evaluation_transform(IMAGENET)(noise(300, 400)).shape == (3, 224, 224)


def test_trivial_is_light_and_one_more_step() -> None:
    light, trivial = (training_transform(IMAGENET, name).transforms for name in ("light", "trivial"))
    assert [type(step) for step in trivial] == [
        *(type(step) for step in light[:3]),
        v2.TrivialAugmentWide,
        *(type(step) for step in light[3:]),
    ]
    shrink, crop = light[:2]
    assert isinstance(shrink, Shrink)
    assert shrink.short_side_px == 256
    assert isinstance(crop, v2.RandomResizedCrop)
    assert (tuple(crop.size), crop.scale) == ((224, 224), (0.35, 1.0))
