"""The optimiser's state as tensors by the names of parameters, and its groups as plain values: what a save holds."""

from collections.abc import Mapping
from typing import Any

import torch

from finetune.errors import RunError
from finetune.training.sharding import divided_like, whole_tensor
from finetune.training.step import Learner

Tensors = dict[str, torch.Tensor]


def pack_tensors(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return copies as safetensors takes them: on the CPU, apart from each other, in the order of their dimensions."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def pack_optimizer(learner: Learner) -> Tensors:
    """Return to the main process the state tensors as "<parameter>/<state>"; the others add what they have of them."""
    names = {id(parameter): name for name, parameter in learner.trained.named_parameters()}
    tensors = {}
    for parameter, state in learner.optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                whole = whole_tensor(value)
                if learner.processes.is_main:
                    tensors[f"{names[id(parameter)]}/{key}"] = whole.cpu()
    return pack_tensors(tensors)


def named_groups(learner: Learner) -> list[dict[str, Any]]:
    """Return the optimiser's groups with parameters by name."""
    names = {id(parameter): name for name, parameter in learner.trained.named_parameters()}
    return [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [names[id(p)] for p in group["params"]]}
        for group in learner.optimizer.param_groups
    ]


def unpack_optimizer(learner: Learner, tensors: Mapping[str, torch.Tensor], groups: list[dict[str, Any]]) -> None:
    """Put the state tensors and the groups back into the optimiser, which has made no step.

    Raises:
        RunError: It moves other parameters than the saved one.
    """
    parameters = dict(learner.trained.named_parameters())
    order = [name for group in groups for name in group["params"]]
    if order != [name for group in named_groups(learner) for name in group["params"]]:
        raise RunError("the saved optimiser moves other parameters than this run's", "train anew with --overwrite")
    states: dict[int, Tensors] = {}
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        placed = divided_like(parameters[name], tensor.to(parameters[name].device))
        states.setdefault(order.index(name), {})[key] = placed
    plain = [group | {"params": [order.index(name) for name in group["params"]]} | _tuples(group) for group in groups]
    learner.optimizer.load_state_dict({"state": states, "param_groups": plain})


def _tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; Adam's betas are one."""
    return {"betas": tuple(group["betas"])} if "betas" in group else {}
