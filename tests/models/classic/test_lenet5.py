"""LeNet-5 against the layer table, the connection table and the starting weights of the paper."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from finetune.models.classic.lenet5 import (
    C3_INPUTS,
    ScaledTanh,
    SubSampling,
    TableConvolution,
    lenet5,
    lenet5_1998,
    lenet5_relu,
    lenet5_sigmoid,
)

TABLES = {
    lenet5: {
        "features.c1": ((6, 28, 28), 156),
        "features.s2": ((6, 14, 14), 0),
        "features.c3": ((16, 10, 10), 2_416),
        "features.s4": ((16, 5, 5), 0),
        "features.c5": ((120, 1, 1), 48_120),
        "classifier.f6": ((84,), 10_164),
        "classifier.output": ((10,), 850),
        "": ((10,), 61_706),
    },
    lenet5_1998: {
        "features.c1": ((6, 28, 28), 156),
        "features.s2": ((6, 14, 14), 12),
        "features.c3": ((16, 10, 10), 1_516),
        "features.s4": ((16, 5, 5), 32),
        "features.c5": ((120, 1, 1), 48_120),
        "classifier.f6": ((84,), 10_164),
        "classifier.output": ((10,), 850),
        "": ((10,), 60_000 + 850),
    },
    lenet5_relu: {
        "features.c1": ((6, 28, 28), 156),
        "features.s2": ((6, 14, 14), 0),
        "features.c3": ((16, 10, 10), 2_416),
        "features.s4": ((16, 5, 5), 0),
        "classifier.c5": ((120,), 48_120),
        "classifier.f6": ((84,), 10_164),
        "classifier.output": ((10,), 850),
        "": ((10,), 61_706),
    },
    lenet5_sigmoid: {
        "features.c1": ((6, 24, 24), 156),
        "features.s2": ((6, 12, 12), 0),
        "features.c3": ((16, 8, 8), 2_416),
        "features.s4": ((16, 4, 4), 0),
        "classifier.c5": ((120,), 30_840),
        "classifier.f6": ((84,), 10_164),
        "classifier.output": ((10,), 850),
        "": ((10,), 44_426),
    },
}

# Table I of the paper as printed: a row for each map of S2, a column for each map of C3.
CONNECTIONS = """
    X . . . X X X . . X X X X . X X
    X X . . . X X X . . X X X X . X
    X X X . . . X X X . . X . X X X
    . X X X . . X X X X . . X . X X
    . . X X X . . X X X X . X X . X
    . . . X X X . . X X X X . X X X
"""


@pytest.mark.parametrize("build", TABLES)
def test_layers_are_those_of_the_table(build: Callable[..., nn.Module], layer_table: Callable[..., dict]) -> None:
    side_px = 32 if build in (lenet5, lenet5_1998) else 28
    table = layer_table(build, (1, side_px, side_px), num_classes=10, channels=1)
    assert {path: table[path] for path in TABLES[build]} == TABLES[build]


def test_c3_sees_the_maps_of_table_one() -> None:
    rows = [line.split() for line in CONNECTIONS.split("\n") if line.strip()]
    layer = TableConvolution(C3_INPUTS)
    maps_BCHW = torch.zeros(1, 6, 5, 5)
    with torch.no_grad():
        empty_K = layer(maps_BCHW).flatten()
        for place, row in enumerate(rows):
            changed_BCHW = maps_BCHW.clone()
            changed_BCHW[:, place] = 1.0
            has_changed_K = layer(changed_BCHW).flatten() != empty_K
            assert ["X" if changed else "." for changed in has_changed_K] == row


def test_table_convolution_is_a_convolution_without_the_missing_kernels() -> None:
    torch.manual_seed(0)
    layer = TableConvolution(C3_INPUTS)
    kernels_OIHW, biases_O = torch.zeros(16, 6, 5, 5), torch.cat([part.bias for part in layer.convolutions])
    weights = [kernel for part in layer.convolutions for kernel in part.weight]
    for kernel_IHW, inputs, weight in zip(kernels_OIHW, C3_INPUTS, weights, strict=True):
        kernel_IHW[list(inputs)] = weight.detach()
    maps_BCHW = torch.randn(2, 6, 14, 14)
    torch.testing.assert_close(layer(maps_BCHW), conv2d(maps_BCHW, kernels_OIHW, biases_O))


def test_sub_sampling_adds_four_neighbours_then_scales_and_shifts_each_map() -> None:
    layer = SubSampling(2)
    with torch.no_grad():
        layer.coefficient.copy_(torch.tensor([0.5, -1.0]))
        layer.bias.copy_(torch.tensor([0.0, 3.0]))
    maps_BCHW = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2).expand(1, 2, 2, 2)
    assert layer(maps_BCHW).flatten().tolist() == [5.0, -7.0]


def test_squashing_keeps_one_and_saturates_at_its_amplitude() -> None:
    ends = ScaledTanh()(torch.tensor([-1.0, 0.0, 1.0, 100.0]))
    torch.testing.assert_close(ends, torch.tensor([-1.0, 0.0, 1.0, 1.7159]), atol=1e-4, rtol=0)


def test_1998_squashes_every_layer_up_to_f6_and_not_the_output() -> None:
    network = lenet5_1998(10, channels=1)
    names = [*network.get_submodule("features")._modules, *network.get_submodule("classifier")._modules]
    assert names[::2] == ["c1", "s2", "c3", "s4", "c5", "f6", "output"]
    assert {type(network.get_submodule(f"features.{name}")) for name in names[1:10:2]} == {ScaledTanh}
    assert isinstance(network.get_submodule("classifier.squash6"), ScaledTanh)


@pytest.mark.parametrize("channels", [1, 3])
def test_starting_weights_of_1998_are_uniform_within_2_4_over_fan_in(channels: int) -> None:
    torch.manual_seed(0)
    network = lenet5_1998(10, channels=channels)
    fan_in = {"features.c1": 25 * channels, "features.c5": 400, "classifier.f6": 120, "classifier.output": 84}
    fan_in |= {f"features.c3.convolutions.{run}": inputs for run, inputs in enumerate((75, 100, 150))}
    fan_in |= {"features.s2": 4, "features.s4": 4}
    parameters = {
        name: torch.cat([p.detach().flatten() for p in network.get_submodule(name).parameters()]) for name in fan_in
    }
    assert sum(p.numel() for p in parameters.values()) == sum(p.numel() for p in network.parameters())
    for name, values in parameters.items():
        bound = 2.4 / fan_in[name]
        assert 0.75 * bound < values.abs().max() <= bound, name
        if len(values) > 500:
            assert values.std().item() == pytest.approx(bound / sqrt(3), rel=0.05), name
    assert network.get_parameter("classifier.f6.bias").std() > 0


@pytest.mark.parametrize(("build", "c5"), [(lenet5, "features.c5"), (lenet5_relu, "classifier.c5")])
def test_relu_starts_with_he_weights_and_zero_biases(build: Callable[..., nn.Module], c5: str) -> None:
    torch.manual_seed(0)
    network = build(10, channels=1)
    for name, fan_in in (("features.c3", 150), (c5, 400), ("classifier.f6", 120)):
        assert network.get_parameter(f"{name}.weight").std().item() == pytest.approx(sqrt(2 / fan_in), rel=0.05)
    assert all(not bias.any() for name, bias in network.named_parameters() if name.endswith("bias"))


def test_sigmoid_starts_with_glorot_weights_and_zero_biases() -> None:
    torch.manual_seed(0)
    network = lenet5_sigmoid(10, channels=1)
    fans = {"features.c1": 25 + 6 * 25, "features.c3": 150 + 400, "classifier.c5": 256 + 120, "classifier.f6": 204}
    for name, fan_sum in fans.items():
        bound = sqrt(6 / fan_sum)
        assert 0.95 * bound < network.get_parameter(f"{name}.weight").abs().max() <= bound
    assert all(not bias.any() for name, bias in network.named_parameters() if name.endswith("bias"))
