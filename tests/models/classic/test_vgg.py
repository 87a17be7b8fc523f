"""VGG-16 against table 1 of the paper, and against torchvision bit for bit."""

from collections.abc import Callable
from math import sqrt
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from finetune.models.classic.vgg import vgg16_2014, vgg16_cifar, vgg16_cifar_2048

POOLED = {
    "features.4": (64, 112, 112),
    "features.9": (128, 56, 56),
    "features.16": (256, 28, 28),
    "features.23": (512, 14, 14),
    "features.30": (512, 7, 7),
}
BLOCKS = {"4": 38_720, "9": 221_440, "16": 1_475_328, "23": 5_899_776, "30": 7_079_424}  # parameters up to each pooling


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def test_layers_are_those_of_the_table(layer_table: Callable[..., dict]) -> None:
    table = layer_table(vgg16_2014, (3, 224, 224), num_classes=1000, channels=3)
    assert {path: table[path][0] for path in POOLED} == POOLED
    start = 0
    for end, parameters in BLOCKS.items():
        assert sum(table[f"features.{place}"][1] for place in range(start, int(end) + 1)) == parameters
        start = int(end) + 1
    linear = {name: table[f"classifier.{name}"] for name in ("0", "3", "6")}
    assert linear == {"0": ((4096,), 102_764_544), "3": ((4096,), 16_781_312), "6": ((1000,), 4_097_000)}
    assert table[""] == ((1000,), 138_357_544)


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [1000, 7])
def test_torchvision_weights_load_and_give_the_same_bits(tmp_path: Path, num_classes: int) -> None:
    torch.manual_seed(0)
    theirs = models.vgg16(weights=None, num_classes=num_classes).eval()
    save_file(theirs.state_dict(), tmp_path / "vgg16.safetensors")
    with torch.device("meta"):
        ours = vgg16_2014(num_classes, channels=3).eval()
    # Copied, not assigned: a tensor at an odd place of the file is multiplied by another kernel, with other last bits.
    ours.to_empty(device="cpu").load_state_dict(load_file(tmp_path / "vgg16.safetensors"), strict=True)
    images_BCHW = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        logits_NK = ours(images_BCHW)
        assert torch.equal(logits_NK, theirs(images_BCHW))
    assert logits_NK.std() > 0


def test_larger_images_are_averaged_to_seven_by_seven(layer_table: Callable[..., dict]) -> None:
    table = layer_table(vgg16_2014, (3, 288, 288), num_classes=5, channels=3)
    assert (table["features"][0], table["avgpool"][0], table[""][0]) == ((512, 9, 9), (512, 7, 7), (5,))


def test_small_form_leaves_one_pixel_for_the_output(layer_table: Callable[..., dict]) -> None:
    table = layer_table(vgg16_cifar, (3, 32, 32), num_classes=10, channels=3)
    assert table["features"] == ((512, 1, 1), 14_714_688 + 2 * 4_224)
    assert table["classifier"] == ((10,), 5_130)
    assert table[""] == ((10,), 14_728_266)


def test_small_form_without_the_last_pooling_has_2048_features(layer_table: Callable[..., dict]) -> None:
    table = layer_table(vgg16_cifar_2048, (3, 32, 32), num_classes=10, channels=3)
    assert table["features"] == ((512, 2, 2), 14_714_688 + 2 * 4_224)
    assert table["flatten"] == ((2048,), 0)
    assert table["classifier"] == ((10,), 20_490)
    assert table[""] == ((10,), 14_743_626)


def test_names_and_shapes_of_the_small_body_are_torchvisions() -> None:
    with torch.device("meta"):
        theirs = models.vgg16_bn(weights=None)
        for build in (vgg16_cifar, vgg16_cifar_2048):
            assert shapes(build(10, channels=3).get_submodule("features")) == shapes(theirs.features)


def test_starting_weights_are_he_in_the_body_and_small_in_the_output() -> None:
    torch.manual_seed(0)
    network = vgg16_cifar(10, channels=3)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(sqrt(2 / (9 * module.out_channels)), rel=0.05), name
            assert not module.bias.any()
    assert network.get_parameter("classifier.weight").std().item() == pytest.approx(0.01, rel=0.05)
    assert not network.get_parameter("classifier.bias").any()
