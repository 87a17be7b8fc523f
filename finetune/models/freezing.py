"""How many stages to hold fixed, and holding them fixed: the four scenarios and the amount rule between them.

Freezing works on stages from the bottom up, because what lies below the boundary is then a function of the image
alone and need be computed only once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.models.stages import Stage, count_stage_parameters, stage_parameters

Scenario = Literal["small-similar", "large-similar", "small-different", "large-different"]
Amount = Literal["little", "medium", "much"]

LITTLE_BELOW = 50
"""Images per class below which data counts as little. Kim et al. 2022 (arXiv 2205.07874) see fine-tuning overtake the
fixed trunk within this range; the Oxford flowers (10 to 20) and most folders made by hand lie below it."""

MEDIUM_BELOW = 500
"""Images per class below which data counts as medium. Half of what CIFAR-100 and a tenth of what CIFAR-10 give, the
sizes from which networks are commonly trained without any frozen layer."""

FROZEN_SHARE: dict[Amount, float] = {"little": 0.5, "medium": 0.1, "much": 0.0}
"""The share of the body's parameters that small-different freezes at most."""


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """One line of the table that says what learns: the parameters of a stage, and how many of them learn."""

    stage: str
    parameters: int
    learning: int


def amount(images_per_class: float) -> Amount:
    """Call the data little, medium or much."""
    if images_per_class < LITTLE_BELOW:
        return "little"
    return "medium" if images_per_class < MEDIUM_BELOW else "much"


def frozen_count(scenario: Scenario, model: nn.Module, stages: Sequence[Stage], images_per_class: float) -> int:
    """Return how many stages, counted from the stem, `scenario` freezes.

    - small-similar: all but the head.
    - large-similar and large-different: none. (That the latter starts from scratch is the caller's affair.)
    - small-different: the longest prefix of stages that holds at most a share of the body's parameters, given by the
      amount of data: half of them for little, a tenth for medium, none for much. The stem is frozen in the first two.

    Why by parameters: they concentrate at the top, so the lower half by weight is most of the convolutions, the
    general ones, while more than half of the weights stay free for what is specific to the new images. Convolutions
    frozen at "little", and their share of the body's weights: ResNet-50 43 of 53 (36 %), Inception v3 72 of 96
    (47 %), SqueezeNet 19 of 25 (48 %), EfficientNet-Lite0 33 of 49 (21 %), VGG-16 7 of 13 (12 %), DenseNet-121 39 of
    120 (21 %), ResNet-152 36 of 155 (4 %, for its third layer alone holds 70 %). Hidden fully-connected layers are
    neither counted (in VGG-16 they hold 86 % of all weights) nor frozen.
    """
    if scenario == "small-similar":
        return len(stages) - 1
    share = FROZEN_SHARE[amount(images_per_class)] if scenario == "small-different" else 0.0
    if share == 0:
        return 0
    body = [count_stage_parameters(model, stage) for stage in stages if stage.is_body]
    fitting = sum(sum(body[: count + 1]) <= share * sum(body) for count in range(len(body)))
    return max(1, fitting)


def freeze_stages(model: nn.Module, stages: Sequence[Stage], count: int) -> None:
    """Freeze the first `count` stages of `model` and free the others, whatever was frozen before.

    The parameters of a frozen stage ask for no gradient, and its modules are in eval mode and stay there when anybody
    calls `model.train()`: otherwise BatchNorm would go on moving its statistics and dropout would make the features
    random. A freed stage takes over the mode of `model`.
    """
    for index, stage in enumerate(stages):
        is_frozen = index < count
        for parameter in stage_parameters(model, stage).values():
            parameter.requires_grad_(not is_frozen)
        for path in stage.modules:
            for module in model.get_submodule(path).modules():
                _set_frozen(module, is_frozen)
            model.get_submodule(path).train(model.training)


def hold_batch_norm(model: nn.Module) -> None:
    """Keep every BatchNorm in eval mode, frozen or learning: its statistics stay, its scale and shift may learn.

    A small set's batches have other statistics than the millions of images that the network has seen, and a solved
    head fits the features made with the old ones. `freeze_stages` undoes it.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            _set_frozen(module, True)
            module.eval()


def frozen_stage_names(model: nn.Module, stages: Sequence[Stage]) -> tuple[str, ...]:
    """Return the names of the stages in which no parameter learns."""
    return tuple(row.stage for row in stage_summary(model, stages) if row.learning == 0)


def learnable_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that learn."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def stage_summary(model: nn.Module, stages: Sequence[Stage]) -> list[StageSummary]:
    """Count by stage how many parameters there are and how many learn."""
    return [
        StageSummary(
            stage=stage.name,
            parameters=count_stage_parameters(model, stage),
            learning=sum(p.numel() for p in stage_parameters(model, stage).values() if p.requires_grad),
        )
        for stage in stages
    ]


def _set_frozen(module: nn.Module, is_frozen: bool) -> None:
    if is_frozen:
        # A partial of a plain function, stored on the instance: deepcopy and pickle then bind it to the copy, where a
        # closure or a bound method would go on acting on the original.
        module.train = partial(_stay_in_eval, module)  # type: ignore[method-assign]
    else:
        vars(module).pop("train", None)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001
    """Stand in for `module.train` while it is frozen."""
    return type(module).train(module, False)
