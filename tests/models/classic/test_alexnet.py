"""AlexNet against the layer table, the normalisation and the starting weights of the paper."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from finetune.models.classic.alexnet import alexnet2012

TABLE = {
    "features.conv1": ((96, 55, 55), 34_944),
    "features.pool1": ((96, 27, 27), 0),
    "features.conv2": ((256, 27, 27), 614_656),
    "features.pool2": ((256, 13, 13), 0),
    "features.conv3": ((384, 13, 13), 885_120),
    "features.conv4": ((384, 13, 13), 1_327_488),
    "features.conv5": ((256, 13, 13), 884_992),
    "features.pool5": ((256, 6, 6), 0),
    "flatten": ((9216,), 0),
    "classifier.fc6": ((4096,), 37_752_832),
    "classifier.fc7": ((4096,), 16_781_312),
    "classifier.output": ((1000,), 4_097_000),
    "": ((1000,), 62_378_344),
}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return alexnet2012(10, channels=3)


def test_layers_are_those_of_the_table(layer_table: Callable[..., dict]) -> None:
    table = layer_table(alexnet2012, (3, 227, 227), num_classes=1000, channels=3)
    assert {path: table[path] for path in TABLE} == TABLE


def test_response_normalisation_is_the_formula_of_the_paper(network: nn.Module) -> None:
    """b_i = a_i / (k + α · Σ a_j²)^β over the n = 5 maps around i; large values, or k would hide a wrong α."""
    maps_BCHW = torch.randn(1, 9, 2, 2, generator=torch.Generator().manual_seed(0)) * 200
    expected_BCHW = torch.empty_like(maps_BCHW)
    for i in range(9):
        around = maps_BCHW[:, max(0, i - 2) : min(8, i + 2) + 1]
        expected_BCHW[:, i] = maps_BCHW[:, i] / (2 + 1e-4 * around.square().sum(dim=1)) ** 0.75
    for name in ("features.norm1", "features.norm2"):
        torch.testing.assert_close(network.get_submodule(name)(maps_BCHW), expected_BCHW)


def test_normalisation_follows_the_relu_and_dropout_the_hidden_layers(network: nn.Module) -> None:
    kinds = [type(layer).__name__ for part in ("features", "classifier") for layer in network.get_submodule(part)]
    first_two = ["Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d"] * 2
    last_three = ["Conv2d", "ReLU"] * 3 + ["MaxPool2d"]
    assert kinds == first_two + last_three + ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    assert network.get_submodule("classifier.dropout6").p == network.get_submodule("classifier.dropout7").p == 0.5


def test_starting_weights_and_biases_are_those_of_section_five(network: nn.Module) -> None:
    for name, weight in network.named_parameters():
        if name.endswith("weight"):
            assert weight.std().item() == pytest.approx(0.01, rel=0.02), name
            assert abs(weight.mean().item()) < 2e-4, name
    ones = {"features.conv2", "features.conv4", "features.conv5", "classifier.fc6", "classifier.fc7"}
    for name, bias in network.named_parameters():
        if name.endswith("bias"):
            expected = torch.full_like(bias, float(name.removesuffix(".bias") in ones))
            assert torch.equal(bias, expected), name
