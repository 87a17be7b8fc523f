"""Frozen means frozen: gradients, statistics and dropout, through train(), deepcopy and pickle."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn
from torchvision.models import get_model, resnet18

from finetune.models.freezing import (
    amount,
    freeze_stages,
    frozen_count,
    frozen_stage_names,
    learnable_parameters,
    stage_summary,
)
from finetune.models.stages import find_stages


@pytest.fixture
def model() -> nn.Module:
    return resnet18(num_classes=7)


def training_modules(model: nn.Module) -> set[str]:
    """The top-level parts in train mode."""
    return {name for name, module in model.named_children() if any(part.training for part in module.modules())}


def test_frozen_stages_stay_in_eval_mode_and_freed_ones_follow_the_model(model: nn.Module) -> None:
    stages = find_stages(model)
    freeze_stages(model, stages, 3)
    for _ in range(2):
        model.train()
        assert training_modules(model) == {"layer3", "layer4", "avgpool", "fc"}
    model.layer1[0].bn1.train()
    assert not model.layer1[0].bn1.training
    assert frozen_stage_names(model, stages) == ("stem", "layer1", "layer2")
    assert learnable_parameters(model)[0].startswith("layer3.")

    freeze_stages(model, stages, 1)
    assert training_modules(model) == {"layer1", "layer2", "layer3", "layer4", "avgpool", "fc"}
    assert frozen_stage_names(model, stages) == ("stem",)
    freeze_stages(model, stages, 0)
    assert len(learnable_parameters(model)) == len(list(model.parameters()))
    assert training_modules(model.eval()) == set()
    assert training_modules(model.train()) == {name for name, _ in model.named_children()}
    assert not any("train" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_frozen_model_stay_frozen_and_are_independent(model: nn.Module, copy) -> None:  # type: ignore[no-untyped-def]
    stages = find_stages(model)
    freeze_stages(model, stages, len(stages) - 1)
    twin = copy(model).train()
    assert training_modules(twin) == {"fc"}
    assert learnable_parameters(twin) == ["fc.weight", "fc.bias"]
    freeze_stages(twin, stages, 0)
    assert training_modules(twin.train()) == {name for name, _ in twin.named_children()}
    assert training_modules(model.train()) == {"fc"}


def test_frozen_model_on_its_state_dict_is_unchanged(model: nn.Module) -> None:
    before = list(model.state_dict())
    freeze_stages(model, find_stages(model), 2)
    assert list(model.state_dict()) == before


def test_amount_rule() -> None:
    assert [amount(images) for images in (1, 49, 50, 499, 500, 10_000)] == ["little"] * 2 + ["medium"] * 2 + [
        "much"
    ] * 2


def test_scenarios(model: nn.Module) -> None:
    stages = find_stages(model)
    for images in (10, 100, 1000):
        assert frozen_count("small-similar", model, stages, images) == len(stages) - 1
        assert frozen_count("large-similar", model, stages, images) == 0
        assert frozen_count("large-different", model, stages, images) == 0
    assert [frozen_count("small-different", model, stages, images) for images in (10, 100, 1000)] == [4, 3, 0]


@pytest.mark.parametrize(
    ("name", "convolutions", "of", "share"),
    [
        ("resnet50", 43, 53, 0.363),
        ("resnet152", 36, 155, 0.044),
        ("inception_v3", 72, 96, 0.473),
        ("squeezenet1_0", 19, 25, 0.475),
        ("vgg16", 7, 13, 0.118),
        ("densenet121", 39, 120, 0.206),
    ],
)
def test_small_different_freezes_what_its_docstring_says(name: str, convolutions: int, of: int, share: float) -> None:
    with torch.device("meta"):
        model = get_model(name, **({"init_weights": False} if name == "inception_v3" else {}))
    stages = find_stages(model)
    count = frozen_count("small-different", model, stages, 10)

    def count_convolutions(part: tuple[object, ...]) -> int:
        paths = [path for stage in part for path in stage.modules]  # type: ignore[attr-defined]
        return sum(isinstance(m, nn.Conv2d) for path in paths for m in model.get_submodule(path).modules())

    body = tuple(stage for stage in stages if stage.is_body)
    assert count_convolutions(stages[:count]) == convolutions
    assert count_convolutions(body) == of
    sizes = [row.parameters for row in stage_summary(model, body)]
    assert sum(sizes[:count]) / sum(sizes) == pytest.approx(share, abs=5e-4)


def test_stem_is_frozen_even_where_it_is_the_larger_part() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 7), nn.MaxPool2d(2), nn.Conv2d(64, 2, 1), nn.MaxPool2d(2), nn.Linear(2, 7))
    stages = find_stages(model)
    assert [frozen_count("small-different", model, stages, images) for images in (10, 100, 1000)] == [1, 1, 0]


def test_summary_counts_what_learns(model: nn.Module) -> None:
    stages = find_stages(model)
    freeze_stages(model, stages, 1)
    rows = stage_summary(model, stages)
    assert (rows[0].stage, rows[0].parameters, rows[0].learning) == ("stem", 9_536, 0)
    assert rows[-1].parameters == rows[-1].learning == 512 * 7 + 7
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
