"""Every parameter and buffer of every network belongs to exactly one stage."""

from collections import Counter

import pytest
import timm
import torch
from accelerate import init_empty_weights
from torch import nn
from torchvision import models

from finetune.models.heads import head_layers, replace_head
from finetune.models.stages import Stage, count_stage_parameters, find_stages, stage_tensors


def build_torchvision(name: str) -> nn.Module:
    """Build without memory; RegNet computes its widths with tensors, so `torch.device("meta")` will not do."""
    options = {"inception_v3": {"init_weights": False}, "googlenet": {"init_weights": False, "aux_logits": False}}
    with init_empty_weights():
        return models.get_model(name, **options.get(name, {}))


def check_partition(model: nn.Module) -> tuple[Stage, ...]:
    stages = find_stages(model)
    everything = [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]
    placed = Counter(name for stage in stages for name in stage_tensors(model, stage))
    assert placed == Counter(everything)
    assert stages[0].name == "stem"
    assert stages[-1].name == "head"
    assert not stages[-1].is_body
    assert len({stage.name for stage in stages}) == len(stages) >= 3
    assert len({path for stage in stages for path in stage.modules}) == sum(len(stage.modules) for stage in stages)
    heads = tuple(f"{path}." for path in head_layers(model))
    assert all(name.startswith(heads) for name in stage_tensors(model, stages[-1]))
    return stages


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_torchvision_models_are_partitioned(name: str) -> None:
    check_partition(build_torchvision(name))


@pytest.mark.parametrize("module", timm.list_modules())
def test_timm_models_are_partitioned(module: str) -> None:
    """One architecture of every kind that timm has, about ninety."""
    names = timm.list_models(module=module)
    name = next((name for name in names if timm.models.get_pretrained_cfg(name).classifier), None)
    if name is None:
        pytest.skip(f"timm's {module} holds encoders only, which have no output layer")
    with torch.device("meta"):
        model = timm.create_model(name)
        replace_head(model, 7)
    stages = check_partition(model)
    assert count_stage_parameters(model, stages[-1]) < sum(p.numel() for p in model.parameters()) / 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", "stem layer1 layer2 layer3 layer4 head"),
        ("alexnet", "stem block2 block3 hidden head"),
        ("vgg16", "stem block2 block3 block4 block5 hidden head"),
        (
            "densenet121",
            "stem features.denseblock1 features.transition1 features.denseblock2 features.transition2 "
            "features.denseblock3 features.transition3 features.denseblock4 head",
        ),
        (
            "inception_v3",
            "stem block2 Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e AuxLogits "
            "Mixed_7a Mixed_7b Mixed_7c head",
        ),
        (
            "squeezenet1_0",
            "stem features.3 features.4 features.5 features.7 features.8 features.9 features.10 features.12 head",
        ),
    ],
)
def test_families_fall_into_their_known_parts(name: str, expected: str) -> None:
    assert " ".join(stage.name for stage in find_stages(build_torchvision(name))) == expected


def test_modules_without_tensors_belong_to_the_stage_before() -> None:
    stages = {stage.name: stage for stage in find_stages(build_torchvision("resnet50"))}
    assert stages["stem"].modules == ("conv1", "bn1", "relu", "maxpool")
    assert stages["layer4"].modules == ("layer4", "avgpool")
    mobilenet = find_stages(build_torchvision("mobilenet_v2"))
    assert mobilenet[-2].modules == ("features.18", "classifier.0")  # the dropout before the head


def test_hidden_layers_are_no_body() -> None:
    model = build_torchvision("vgg16")
    hidden = find_stages(model)[-2]
    assert (hidden.name, hidden.is_body) == ("hidden", False)
    assert count_stage_parameters(model, hidden) == 119_545_856


def test_tokens_and_position_embeddings_stand_in_the_stem() -> None:
    stem = find_stages(build_torchvision("vit_b_16"))[0]
    assert stem.tensors == ("class_token", "encoder.pos_embedding")
    with torch.device("meta"):
        stem = find_stages(timm.create_model("vit_tiny_patch16_224"))[0]
    assert stem.tensors == ("cls_token", "pos_embed")


def test_auxiliary_body_learns_with_the_body_and_its_output_with_the_head() -> None:
    model = build_torchvision("inception_v3")
    stages = {stage.name: stage for stage in find_stages(model)}
    assert stages["AuxLogits"].modules == ("AuxLogits.conv0", "AuxLogits.conv1")
    assert stages["head"].modules == ("AuxLogits.fc", "fc")
