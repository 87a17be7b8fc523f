"""Whatever stands in the list of classic networks keeps the promises that the rest of the package relies on."""

from collections import Counter

import pytest
import torch
from torch import fx, nn

from finetune.models.classic.table import CLASSICS
from finetune.models.heads import head_layers, head_module
from finetune.models.stages import find_stages, stage_parameters

LARGE = ("alexnet2012", "vgg16_2014")
SMALL = [name for name in CLASSICS if name not in LARGE]
STAGES = {
    "lenet5": "stem block2 block3 hidden head",
    "lenet5_1998": "stem features.c3 block3 hidden head",
    "lenet5_relu": "stem block2 hidden head",
    "lenet5_sigmoid": "stem block2 hidden head",
    "alexnet2012": "stem block2 block3 hidden head",
    "vgg16_2014": "stem block2 block3 block4 block5 hidden head",
    "vgg16_cifar": "stem block2 block3 block4 block5 head",
    "vgg16_cifar_2048": "stem block2 block3 block4 block5 head",
    "small_cnn": "stem block2 head",
    "mlp": "stem head",
    "linear": "head",
    "knn": "head",
}


def build_without_memory(name: str, *, channels: int | None = None, num_classes: int = 7) -> nn.Module:
    with torch.device("meta"):
        return CLASSICS[name].build(num_classes, channels=channels or CLASSICS[name].input_spec.channels).eval()


def test_names_and_published_sizes_are_pinned() -> None:
    assert list(CLASSICS) == list(STAGES)
    sizes = {
        name: sum(p.numel() for p in build_without_memory(name, num_classes=network.classes).parameters())
        for name, network in CLASSICS.items()
    }
    assert sizes == {
        "lenet5": 61_706,
        "lenet5_1998": 60_850,
        "lenet5_relu": 61_706,
        "lenet5_sigmoid": 44_426,
        "alexnet2012": 62_378_344,
        "vgg16_2014": 138_357_544,
        "vgg16_cifar": 14_728_266,
        "vgg16_cifar_2048": 14_743_626,
        "small_cnn": 28_938,
        "mlp": 469_160,
        "linear": 30_730,
        "knn": 30_730,
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CLASSICS)
def test_two_images_give_two_rows_of_logits(name: str, channels: int) -> None:
    side_px = CLASSICS[name].input_spec.image_size_px
    network = build_without_memory(name, channels=channels)
    assert network(torch.empty(2, channels, side_px, side_px, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", CLASSICS)
def test_output_layer_is_linear_and_last(name: str) -> None:
    network = build_without_memory(name)
    layer = head_module(network)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is not None
    assert layer.out_features == 7
    assert head_layers(network) == [next(path for path, module in network.named_modules() if module is layer)]


@pytest.mark.parametrize("name", CLASSICS)
def test_network_falls_into_its_stages(name: str) -> None:
    network = build_without_memory(name)
    stages = find_stages(network)
    assert " ".join(stage.name for stage in stages) == STAGES[name]
    assert [stage.is_body for stage in stages] == [stage.name not in ("hidden", "head") for stage in stages]
    placed = Counter(parameter for stage in stages for parameter in stage_parameters(network, stage))
    assert placed == Counter(parameter for parameter, _ in network.named_parameters())


@pytest.mark.parametrize("name", CLASSICS)
def test_forward_is_a_chain_that_fx_can_trace(name: str) -> None:
    network = build_without_memory(name) if name in LARGE else CLASSICS[name].build(7, channels=1).eval()
    traced = fx.symbolic_trace(network)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    in_order = [path for path, module in network.named_modules() if not list(module.children())]
    assert called == [path for path in in_order if path in called]
    assert head_layers(network) == called[-1:]
    if name not in LARGE:
        side_px = CLASSICS[name].input_spec.image_size_px
        images_BCHW = torch.randn(2, 1, side_px, side_px, generator=torch.Generator().manual_seed(0))
        assert torch.equal(traced(images_BCHW), network(images_BCHW))


@pytest.mark.parametrize("name", SMALL)
def test_starting_weights_follow_the_seed(name: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(CLASSICS[name].build(7, channels=1).parameters())

    assert torch.equal(weights(0), weights(0))
    assert torch.equal(weights(0), weights(1)) == (name in ("linear", "knn"))


@pytest.mark.parametrize("name", ["lenet5", "lenet5_1998"])
def test_lenet_sees_black_as_minus_a_tenth_and_white_as_1_175(name: str) -> None:
    spec = CLASSICS[name].input_spec
    black, white = ((pixel - spec.mean[0]) / spec.std[0] for pixel in (0.0, 1.0))
    assert (black, white) == pytest.approx((-0.1, 1.175))
