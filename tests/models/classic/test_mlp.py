"""The fully-connected network against its layer table."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch

from finetune.models.classic.mlp import mlp

TABLE = {
    "features.flatten": ((784,), 0),
    "features.hidden1": ((500,), 392_500),
    "features.hidden2": ((150,), 75_150),
    "classifier": ((10,), 1_510),
    "": ((10,), 469_160),
}


def test_layers_are_those_of_the_table(layer_table: Callable[..., dict]) -> None:
    table = layer_table(mlp, (1, 28, 28), num_classes=10, channels=1)
    assert {path: table[path] for path in TABLE} == TABLE


def test_starting_weights_are_he() -> None:
    torch.manual_seed(0)
    network = mlp(10, channels=1)
    assert network.get_parameter("features.hidden2.weight").std().item() == pytest.approx(sqrt(2 / 500), rel=0.05)
    assert not network.get_parameter("features.hidden2.bias").any()
