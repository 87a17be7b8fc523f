"""Rates and decays by parameter; frozen parameters get no entry."""

from typing import Any

import pytest
import torch

from finetune.models.freezing import freeze_stages
from finetune.models.initialize import Backbone, build_backbone
from finetune.models.param_groups import parameter_groups
from finetune.models.stages import stage_parameters


def groups_of(backbone: Backbone, *, frozen: int, depth_ratio: float = 1.0) -> list[dict[str, Any]]:
    freeze_stages(backbone.module, backbone.stages, frozen)
    return parameter_groups(
        backbone.module,
        backbone.stages,
        learning_rate=0.1,
        trunk_learning_rate=0.01,
        depth_ratio=depth_ratio,
        weight_decay=0.5,
    )


@pytest.fixture
def backbone() -> Backbone:
    return build_backbone("resnet18", num_classes=4, use_pretrained=False)


def test_groups_hold_each_learning_parameter_once_with_its_rate_and_decay(backbone: Backbone) -> None:
    groups = groups_of(backbone, frozen=3)
    head = set(stage_parameters(backbone.module, backbone.stages[-1]))
    names = {id(parameter): name for name, parameter in backbone.module.named_parameters()}
    given = [names[id(parameter)] for group in groups for parameter in group["params"]]
    learning = {name for name, parameter in backbone.module.named_parameters() if parameter.requires_grad}
    assert len(given) == len(set(given))
    assert set(given) == learning
    assert not any(name.startswith(("conv1", "bn1", "layer1", "layer2")) for name in given)
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == (0.1 if names[id(parameter)] in head else 0.01)
            assert group["weight_decay"] == (0.5 if parameter.ndim > 1 else 0.0)
    assert groups[0]["name"] == "head weights"


def test_rates_fall_evenly_from_the_top_to_the_lowest_stage_that_learns(backbone: Backbone) -> None:
    rates = {group["name"].split()[0]: group["lr"] for group in groups_of(backbone, frozen=0, depth_ratio=0.0001)}
    assert list(rates) == ["head", "layer4", "layer3", "layer2", "layer1", "stem"]
    assert list(rates.values()) == pytest.approx([0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    upper = {group["name"].split()[0]: group["lr"] for group in groups_of(backbone, frozen=3, depth_ratio=0.01)}
    assert upper == pytest.approx({"head": 0.1, "layer4": 0.01, "layer3": 0.0001})


def test_a_single_stage_below_the_head_has_the_whole_rate(backbone: Backbone) -> None:
    rates = {group["name"].split()[0]: group["lr"] for group in groups_of(backbone, frozen=4, depth_ratio=0.01)}
    assert rates == {"head": 0.1, "layer4": 0.01}


def test_groups_without_parameters_are_left_out(backbone: Backbone) -> None:
    groups = groups_of(backbone, frozen=len(backbone.stages) - 1)
    assert [group["name"] for group in groups] == ["head weights", "head biases and norms"]
    torch.optim.SGD(groups)
