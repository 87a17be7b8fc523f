"""Rates and decays by parameter; frozen parameters get no entry."""

import torch

from finetune.models.freezing import freeze_stages
from finetune.models.initialize import build_backbone
from finetune.models.param_groups import parameter_groups
from finetune.models.stages import stage_parameters


def test_groups_hold_each_learning_parameter_once_with_its_rate_and_decay() -> None:
    backbone = build_backbone("resnet18", num_classes=4, use_pretrained=False)
    freeze_stages(backbone.module, backbone.stages, 3)
    head = set(stage_parameters(backbone.module, backbone.stages[-1]))
    groups = parameter_groups(backbone.module, head, learning_rate=0.1, trunk_learning_rate=0.01, weight_decay=0.5)
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


def test_groups_without_parameters_are_left_out() -> None:
    backbone = build_backbone("resnet18", num_classes=4, use_pretrained=False)
    freeze_stages(backbone.module, backbone.stages, len(backbone.stages) - 1)
    groups = parameter_groups(
        backbone.module, {"fc.weight", "fc.bias"}, learning_rate=0.1, trunk_learning_rate=0.01, weight_decay=0.5
    )
    assert [group["name"] for group in groups] == ["head weights", "head biases and norms"]
    torch.optim.SGD(groups)
