"""The small convolutional network against its layer table."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch

from finetune.models.classic.small_cnn import small_cnn

TABLE = {
    "features.conv1": ((16, 28, 28), 416),
    "features.pool1": ((16, 14, 14), 0),
    "features.conv2": ((32, 14, 14), 12_832),
    "features.pool2": ((32, 7, 7), 0),
    "classifier": ((10,), 15_690),
    "": ((10,), 28_938),
}


def test_layers_are_those_of_the_table(layer_table: Callable[..., dict]) -> None:
    table = layer_table(small_cnn, (1, 28, 28), num_classes=10, channels=1)
    assert {path: table[path] for path in TABLE} == TABLE


def test_starting_weights_are_he() -> None:
    torch.manual_seed(0)
    network = small_cnn(10, channels=1)
    assert network.get_parameter("features.conv2.weight").std().item() == pytest.approx(sqrt(2 / 400), rel=0.05)
    assert not network.get_parameter("features.conv2.bias").any()
