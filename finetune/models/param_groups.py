"""Which rate and which weight decay each learning parameter gets."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from finetune.models.stages import Stage, stage_parameters


def parameter_groups(
    model: nn.Module,
    stages: Sequence[Stage],
    *,
    learning_rate: float,
    trunk_learning_rate: float,
    depth_ratio: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Sort the parameters that learn into groups for a torch optimiser, by stage; frozen ones get no entry.

    The head comes first, so that the first group's rate is the one shown. Below it the rates fall evenly in their
    logarithm from stage to stage: lower layers are more general and have less to learn (Howard 2018, arXiv 1801.06146,
    section 3.2). Biases and norms, all parameters of one dimension, are not decayed (He 2019, arXiv 1812.01187,
    section 3.1).

    Args:
        model: The network, its frozen parameters marked by `requires_grad`.
        stages: All stages of `model`; the last is the head.
        learning_rate: Rate of the head.
        trunk_learning_rate: Rate of the stage below the head.
        depth_ratio: Rate of the lowest stage that learns, as a share of `trunk_learning_rate`.
        weight_decay: Decay of the weights of two or more dimensions.
    """
    *trunk, head = (
        (stage.name, [parameter for parameter in stage_parameters(model, stage).values() if parameter.requires_grad])
        for stage in stages
    )
    learning = [(name, parameters) for name, parameters in trunk if parameters]
    groups = [*_stage_groups(*head, learning_rate, weight_decay)]
    for depth, (name, parameters) in enumerate(reversed(learning)):
        share = depth_ratio ** (depth / max(len(learning) - 1, 1))
        groups += _stage_groups(name, parameters, trunk_learning_rate * share, weight_decay)
    return groups


def _stage_groups(name: str, parameters: list[nn.Parameter], rate: float, decay: float) -> list[dict[str, Any]]:
    kinds = {
        "weights": ([parameter for parameter in parameters if parameter.ndim > 1], decay),
        "biases and norms": ([parameter for parameter in parameters if parameter.ndim <= 1], 0.0),
    }
    return [
        {"params": members, "lr": rate, "weight_decay": decay, "name": f"{name} {kind}"}
        for kind, (members, decay) in kinds.items()
        if members
    ]
