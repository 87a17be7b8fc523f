"""Which rate and which weight decay each learning parameter gets."""

from collections.abc import Collection
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module,
    head_parameters: Collection[str],
    *,
    learning_rate: float,
    trunk_learning_rate: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Sort the parameters that learn into groups for a torch optimiser; frozen ones get no entry.

    The head comes first, so that the first group's rate is the one shown. Biases and norms, all parameters of one
    dimension, are not decayed (He 2019, arXiv 1812.01187, section 3.1).

    Args:
        model: The network, its frozen parameters marked by `requires_grad`.
        head_parameters: Names of the parameters that make up the head.
        learning_rate: Rate of the head.
        trunk_learning_rate: Rate of everything below.
        weight_decay: Decay of the weights of two or more dimensions.
    """
    groups: dict[str, dict[str, Any]] = {}
    for part, rate in (("head", learning_rate), ("trunk", trunk_learning_rate)):
        for kind, decay in (("weights", weight_decay), ("biases and norms", 0.0)):
            groups[f"{part} {kind}"] = {"params": [], "lr": rate, "weight_decay": decay, "name": f"{part} {kind}"}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "head" if name in head_parameters else "trunk"
            kind = "weights" if parameter.ndim > 1 else "biases and norms"
            groups[f"{part} {kind}"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
