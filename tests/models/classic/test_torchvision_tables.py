"""torchvision's ResNets and GoogLeNet are the networks of the papers, layer for layer."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

# He et al. 2015, Deep residual learning for image recognition, table 1.
RESNETS = {
    18: (BasicBlock, (2, 2, 2, 2), 1.8e9),
    34: (BasicBlock, (3, 4, 6, 3), 3.6e9),
    50: (Bottleneck, (3, 4, 6, 3), 3.8e9),
    101: (Bottleneck, (3, 4, 23, 3), 7.6e9),
    152: (Bottleneck, (3, 8, 36, 3), 11.3e9),
}

# Szegedy et al. 2014, Going deeper with convolutions, table 1.
GOOGLENET = {
    "conv1": (64, 112, 112),
    "maxpool1": (64, 56, 56),
    "conv3": (192, 56, 56),
    "maxpool2": (192, 28, 28),
    "inception3a": (256, 28, 28),
    "inception3b": (480, 28, 28),
    "maxpool3": (480, 14, 14),
    "inception4a": (512, 14, 14),
    "inception4b": (512, 14, 14),
    "inception4c": (512, 14, 14),
    "inception4d": (528, 14, 14),
    "inception4e": (832, 14, 14),
    "maxpool4": (832, 7, 7),
    "inception5a": (832, 7, 7),
    "inception5b": (1024, 7, 7),
    "avgpool": (1024, 1, 1),
    "fc": (1000,),
}


@pytest.mark.parametrize("depth", RESNETS)
def test_resnet_has_the_blocks_of_the_table(depth: int, layer_table: Callable[..., dict]) -> None:
    block, counts, _ = RESNETS[depth]
    with torch.device("meta"):
        network = models.get_model(f"resnet{depth}", weights=None)
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    assert tuple(map(len, stages)) == counts
    assert {type(part) for stage in stages for part in stage} == {block}
    # The depth in the name counts the layers with weights on the longest path, so not the short cuts beside it.
    weighted = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len([name for name in weighted if "downsample" not in name]) == depth

    table = layer_table(models.get_model, (3, 224, 224), name=f"resnet{depth}", weights=None)
    widths = (64, 128, 256, 512) if block is BasicBlock else (256, 512, 1024, 2048)
    assert table["conv1"][0] == (64, 112, 112)
    for place, (width, side_px) in enumerate(zip(widths, (56, 28, 14, 7), strict=True), start=1):
        assert table[f"layer{place}"][0] == (width, side_px, side_px)


@pytest.mark.parametrize("depth", RESNETS)
def test_resnet_costs_what_the_table_says(depth: int) -> None:
    """The paper counts multiply-adds; within 8 %, because torchvision strides in the 3 × 3 layer of a bottleneck."""
    with torch.device("meta"):
        network = models.get_model(f"resnet{depth}", weights=None).eval()
        image_BCHW = torch.empty(1, 3, 224, 224)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(image_BCHW)
    assert counter.get_total_flops() / 2 == pytest.approx(RESNETS[depth][2], rel=0.08)


def test_googlenet_has_the_output_sizes_of_the_table(layer_table: Callable[..., dict]) -> None:
    table = layer_table(models.googlenet, (3, 224, 224), weights=None, aux_logits=False, init_weights=False)
    assert {path: table[path][0] for path in GOOGLENET} == GOOGLENET
    # In the table's order too, which a dictionary comparison does not see.
    assert [path for path in table if path in GOOGLENET] == list(GOOGLENET)
