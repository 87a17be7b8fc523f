"""A head that looks at every stage: the pooled outputs of the earlier ones beside the features of the last.

What a network computes last is the most particular to what it has learned first. For other images, and for few, what it
computes on the way tells as much again (Evci 2022, Head2Toe, arXiv 2201.03529).

Shapes: B images, C channels, H × W positions, T tokens, D features that enter the output layer, E of all stages.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import skip_init

from finetune.errors import ModelError
from finetune.models.heads import can_load_linear_head, head_layers, head_module
from finetune.models.initialize import push_shapes
from finetune.models.stages import Stage
from finetune.models.twins import twin_of
from finetune.runs.records import InputSpec

NORM_EPS = 1e-5  # added to the variance
NOT_AN_END = (_BatchNorm, _DropoutNd)


class StageOutputs(nn.Module):
    """Puts what the modules at `paths` give, pooled, behind the features that enter the output layer.

    It stands before that layer. Hooks on the modules keep their outputs for it, those of every thread apart.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self.paths = tuple(paths)
        self._kept: dict[tuple[int, str], Tensor] = {}

    def keep(self, path: str, output: Tensor) -> None:
        """Take the output of the module at `path` for the pass that is going on."""
        self._kept[threading.get_ident(), path] = pool(output)

    def forget(self) -> None:
        """Let go of what a pass has left that did not come to its end."""
        self._kept.clear()

    def forward(self, features_BD: Tensor, *pooled: Tensor) -> Tensor:
        """Return all side by side, (B, E); `pooled` are the outputs where no hooks can keep them."""
        kept = [self._kept.pop((threading.get_ident(), path), None) for path in self.paths]
        return torch.cat([features_BD, *(pooled or cast(list[Tensor], kept))], dim=1)


def pool(output: Tensor) -> Tensor:
    """Return the mean over the positions of a stage's output, every image's brought to mean 0 and variance 1, (B, C).

    So the stages of a network have one scale without any constant of the data (layer normalisation, Ba 2016, arXiv
    1607.06450).

    Args:
        output: A map of a square image, (B, C, H, W) or (B, H, W, C), tokens (B, T, C) or vectors (B, C). A map with as
            many channels as rows and columns is taken for the former.
    """
    if output.ndim == 4:
        output = output.mean(dim=(2, 3) if output.shape[2] == output.shape[3] else (1, 2))
    elif output.ndim == 3:
        output = output.mean(dim=1)
    output = output.float()  # half precision has no room for the squares
    centred_BC = output - output.mean(dim=1, keepdim=True)  # torch's layer_norm wants sizes, which no tracer can give
    return centred_BC * torch.rsqrt(centred_BC.square().mean(dim=1, keepdim=True) + NORM_EPS)


def stage_ends(model: nn.Module, stages: Sequence[Stage], input_spec: InputSpec) -> dict[str, int]:
    """Return the paths of the modules whose outputs a head on all stages looks at, and how many numbers each gives.

    They are those at the end of each stage of the body but the stem, and but the one that only gives the features. A
    network whose output layer cannot be solved has none.
    """
    if not can_load_linear_head(model):
        return {}
    twin = twin_of(model)
    device = next(model.parameters()).device
    shape = (2, input_spec.channels, input_spec.image_size_px, input_spec.image_size_px)
    images_BCHW = torch.linspace(-1, 1, torch.Size(shape).numel(), device=device).view(shape)
    given: dict[str, Tensor] = {}
    maps: set[str] = set()  # and tokens: a vector behind them says the same again
    entering: list[Tensor] = []

    def keep(path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        is_tensor = isinstance(output, Tensor) and output.ndim in (2, 3, 4) and len(output) == len(images_BCHW)
        if is_tensor and not (output.ndim == 4 and len(set(output.shape[1:])) == 1):  # where are its channels?
            given[path] = pool(output)
            if output.ndim > 2:
                maps.add(path)

    for stage in stages[1:-1]:
        for path in stage.modules:
            twin.get_submodule(path).register_forward_hook(partial(keep, path))
    head_module(twin).register_forward_pre_hook(lambda _, inputs: entering.append(pool(inputs[0])))
    with torch.no_grad():
        twin(images_BCHW)
    ends = {}
    for stage in stages[1:-1]:
        # Not behind a norm, which gives way when it is folded into the convolution before it, nor behind a dropout.
        candidates = [path for path in stage.modules if not isinstance(model.get_submodule(path), NOT_AN_END)]
        is_last = any(path in given and _is_same(given[path], entering[0]) for path in stage.modules)
        end = next((path for path in reversed(candidates) if path in maps), None)
        if stage.is_body and end and not is_last:
            ends[end] = given[end].shape[1]
    return ends


def attach_stage_outputs(model: nn.Module, paths: Sequence[str], *, width: int) -> None:
    """Let the output layer of `model` look at the outputs at `paths` too; its weights (K, `width`) are to be filled.

    Raises:
        ModelError: The output layer is not linear.
    """
    layer, path = head_module(model), head_layers(model)[0]
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"the head of {type(model).__name__} is a convolution, which looks at the last stage alone")
    outputs = StageOutputs(paths)
    wide = skip_init(nn.Linear, width, layer.out_features, device=layer.weight.device)
    model.set_submodule(path, nn.Sequential(outputs, wide).train(layer.training))
    for end in paths:
        model.get_submodule(end).register_forward_hook(partial(_keep, outputs, end))


def attach_saved_stage_outputs(
    model: nn.Module, paths: Sequence[str], tensors: Mapping[str, Tensor], *, input_spec: InputSpec, source: str
) -> None:
    """Let the output layer of `model` look at what it did when the `tensors` of a model file were saved.

    Raises:
        ModelError: The network has no such modules, or the saved output layer is not as wide as what they give.
    """
    weight_KE = tensors.get(f"{head_layers(model)[0]}.1.weight", torch.empty(0))
    missing = set(paths) - {path for path, _ in model.named_modules()}
    try:
        if missing or weight_KE.ndim != 2:
            raise ValueError(f"no {', '.join(sorted(missing)) or 'such output layer'}")
        attach_stage_outputs(model, paths, width=weight_KE.shape[1])
        push_shapes(model, input_spec)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{source}: its head looks at stages that the network does not have: {str(error).partition(chr(10))[0]}",
            "take another copy of the file",
        ) from error


def find_stage_outputs(model: nn.Module) -> tuple[str, StageOutputs] | None:
    """Return what the output layer of `model` looks through, with its path; None if it sees the features alone."""
    return next(((path, module) for path, module in model.named_modules() if isinstance(module, StageOutputs)), None)


def head_inputs(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules whose outputs the head looks at beside the features."""
    found = find_stage_outputs(model)
    return found[1].paths if found else ()


def _keep(outputs: StageOutputs, path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    # A plain function in a partial: a deep copy of the network then binds it to the copy's own `outputs`.
    outputs.keep(path, output)


def _is_same(pooled_BC: Tensor, features_BD: Tensor) -> bool:
    return pooled_BC.shape == features_BD.shape and torch.allclose(pooled_BC, features_BD, rtol=1e-3, atol=1e-3)
