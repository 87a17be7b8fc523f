"""Layers, parameters and multiply-adds, against published numbers and networks made for the purpose."""

import copy

import pytest
import torch
from torch import Tensor, nn

from finetune.errors import ConfigError, ModelError
from finetune.models.anatomy import Anatomy, count_parameters, inspect_network, output_size, receptive_field
from finetune.models.freezing import freeze_stages
from finetune.models.initialize import build_as_published, build_backbone
from finetune.models.stages import find_stages


def published(name: str, *, image_size: int | None = None) -> Anatomy:
    module, spec = build_as_published(name, image_size=image_size)
    return inspect_network(module, (spec.channels, spec.image_size_px, spec.image_size_px))


def assert_adds_up(anatomy: Anatomy) -> None:
    assert sum(layer.parameters for layer in anatomy.layers) == anatomy.parameters
    assert sum(layer.multiply_adds for layer in anatomy.layers) == anatomy.multiply_adds


class TestOutputSize:
    @pytest.mark.parametrize(
        ("size", "kernel", "options"),
        [(227, 11, {"stride": 4}), (28, 5, {}), (14, 3, {"padding": 1}), (20, 3, {"dilation": 4}), (7, 7, {})],
    )
    def test_is_what_torch_makes(self, size: int, kernel: int, options: dict[str, int]) -> None:
        layer = nn.Conv2d(1, 1, kernel, **options)  # type: ignore[arg-type]
        assert output_size(size, kernel, **options) == layer(torch.zeros(1, 1, size, size)).shape[-1]

    @pytest.mark.parametrize(
        ("size", "kernel", "options"),
        [(0, 1, {}), (5, 0, {}), (5, 3, {"stride": 0}), (5, 3, {"padding": -1}), (5, 3, {"dilation": 0}), (4, 7, {})],
    )
    def test_refuses_what_is_no_layer(self, size: int, kernel: int, options: dict[str, int]) -> None:
        with pytest.raises(ConfigError):
            output_size(size, kernel, **options)


class TestReceptiveField:
    def test_of_nothing_is_the_pixel_itself(self) -> None:
        assert receptive_field([], []) == 1

    def test_multiplies_the_strides_before(self) -> None:
        assert receptive_field([5, 2, 5, 2], [1, 2, 1, 2]) == 16  # LeNet-5 up to S4
        assert receptive_field([3, 3], [2, 1], [1, 2]) == 3 + 2 * 2 * 2

    @pytest.mark.parametrize(("kernels", "strides"), [([3, 3], [1]), ([0], [1]), ([3], [0])])
    def test_refuses_what_is_no_chain(self, kernels: list[int], strides: list[int]) -> None:
        with pytest.raises(ConfigError):
            receptive_field(kernels, strides)


def test_vgg16_has_its_published_numbers() -> None:
    anatomy = published("vgg16")
    assert anatomy.parameters == anatomy.learning == 138_357_544
    assert anatomy.multiply_adds == 15_470_264_320
    assert_adds_up(anatomy)
    layers = {layer.name: layer for layer in anatomy.layers}
    assert [layer.name for layer in anatomy.layers][:3] == ["features.0", "features.1", "features.2"]
    assert layers["features.0"].kind == "Conv2d"
    assert layers["features.0"].output_shape == (64, 224, 224)
    assert layers["features.0"].multiply_adds == 64 * 224 * 224 * 3 * 9
    assert layers["features.1"].state == "-"
    assert layers["classifier.0"].parameters == 102_764_544


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        # torchvision's own table of parameters and GFLOPS (which are multiply-adds) of these weights.
        ("resnet50", 25_557_032, 4.09e9),
        ("vit_b_16", 86_567_656, 17.56e9),
        ("swin_t", 28_288_354, 4.49e9),
        ("inception_v3", 27_161_264, 5.71e9),
        ("efficientnet_b0", 5_288_548, 0.39e9),
        ("densenet121", 7_978_856, 2.83e9),
    ],
)
def test_other_families_have_their_published_numbers(name: str, parameters: int, multiply_adds: float) -> None:
    anatomy = published(name)
    assert anatomy.parameters == parameters
    assert anatomy.multiply_adds == pytest.approx(multiply_adds, abs=0.006e9)
    assert_adds_up(anatomy)


def test_another_image_size_changes_maps_and_not_parameters() -> None:
    small, large = published("squeezenet", image_size=64), published("squeezenet", image_size=224)
    assert small.parameters == large.parameters
    assert small.multiply_adds < large.multiply_adds / 8
    assert small.input_shape == (3, 64, 64)


def test_layers_that_only_training_uses_are_counted() -> None:
    idle = [layer for layer in published("inception_v3").layers if layer.output_shape is None]
    assert idle
    assert {layer.name.partition(".")[0] for layer in idle} == {"AuxLogits"}
    assert {layer.multiply_adds for layer in idle} == {0}


class Odd(nn.Module):
    """A parameter of its own, a layer used twice, one shared and one used without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, int]:
        x_NCHW = self.twice(self.twice(x_NCHW * self.scale.view(3, 1, 1)))
        tokens_NTD = x_NCHW.flatten(2).unflatten(2, (-1, 4)).flatten(1, 2)
        return self.second(self.first(self.attention(tokens_NTD, tokens_NTD, tokens_NTD)[0])), 1


def test_everything_is_counted_once() -> None:
    network = Odd()
    anatomy = inspect_network(network, (3, 8, 8))
    assert_adds_up(anatomy)
    assert anatomy.parameters == count_parameters(network) == 3 + 84 + (60 + 20) + 16 + 4 + 4
    layers = {layer.name: layer for layer in anatomy.layers}
    assert list(layers) == ["twice", "attention", "first", "second", ""]
    assert layers["twice"].multiply_adds == 2 * 64 * 81
    assert layers["attention"].parameters == 80
    assert layers["attention"].multiply_adds == 48 * 4 * 12 + 48 * 4 * 4 + 2 * 48 * 48 * 4
    assert layers["first"].parameters == 20
    assert layers["second"].parameters == 4
    assert layers[""].parameters == 3
    assert layers[""].kind == "Odd"


def test_frozen_layers_are_told_from_learning_ones() -> None:
    backbone = build_backbone("squeezenet", num_classes=5, use_pretrained=False)
    freeze_stages(backbone.module, backbone.stages, len(backbone.stages) - 1)
    anatomy = inspect_network(backbone.module, (3, 64, 64))
    states = {layer.name: layer.state for layer in anatomy.layers if layer.state != "-"}
    assert states.pop("classifier.1") == "learning"
    assert set(states.values()) == {"frozen"}
    assert anatomy.learning == count_parameters(backbone.module, learning_only=True) == 513 * 5


def test_the_network_is_left_as_it_was() -> None:
    network = build_backbone("resnet18", num_classes=5, use_pretrained=False).module.train()
    freeze_stages(network, find_stages(network), 2)
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    assert len(set(modes)) == 2
    inspect_network(network, (3, 64, 64))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert not network(torch.rand(2, 3, 64, 64)).is_meta


def test_a_network_that_cannot_take_the_image_is_refused_and_left_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(10, 2)).train()
    with pytest.raises(ModelError, match="3 × 9 × 9"):
        inspect_network(network, (3, 9, 9))
    assert all(module.training and not module._forward_hooks for module in network.modules())


def test_plain_values_say_it_all() -> None:
    document = published("lenet5").to_json()
    assert document["image_size_px"] == 32
    assert document["channels"] == 1
    assert document["parameters"] == 61_706
    assert document["layers"][0] == {
        "name": "features.c1",
        "kind": "Conv2d",
        "output_shape": (6, 28, 28),
        "parameters": 156,
        "multiply_adds": 6 * 28 * 28 * 25,
        "receptive_field": (5, 5),
        "stride": (1, 1),
        "centre": (2.0, 2.0),
        "state": "learning",
        "note": "",
    }
