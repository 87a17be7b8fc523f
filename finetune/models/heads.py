"""The output layer of a network: finding it, replacing it for other classes, giving it solved weights.

Shapes: N images, K classes, D features that enter the output layer.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.errors import ModelError
from finetune.runs.model_file import HeadKind


def head_layers(model: nn.Module) -> list[str]:
    """Return the paths of the output layers, the main one first; a network without any gives an empty list.

    timm records the paths. Elsewhere the output layer is the last module with parameters in the order of registration,
    which holds for every torchvision classifier. Inception v3 has a second one, the auxiliary head.
    """
    if is_timm_model(model):
        return [_last_layer(model, path) for path in _timm_classifiers(model)]
    auxiliary = ["AuxLogits.fc"] if isinstance(getattr(model, "AuxLogits", None), nn.Module) else []
    return [_last_layer(model, path) for path in ("", *auxiliary)]


def head_module(model: nn.Module) -> nn.Linear | nn.Conv2d:
    """Return the main output layer. A forward pre-hook on it sees the features, shape (N, D) or (N, D, H, W).

    Raises:
        ModelError: the network has no output layer, or one that is neither linear nor a convolution.
    """
    paths = head_layers(model)
    layer = model.get_submodule(paths[0]) if paths else model
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ModelError(
            f"{type(model).__name__} has no linear or convolutional output layer", "choose a model that classifies"
        )
    return layer


def output_kind(model: nn.Module) -> HeadKind:
    """Tell what the network puts out: logits (for cross-entropy) or logarithms of probabilities (for NLLLoss)."""
    return "log_softmax" if any(isinstance(module, nn.LogSoftmax) for module in model.modules()) else "logits"


def replace_head(model: nn.Module, num_classes: int, *, head: HeadKind = "logits") -> None:
    """Give `model`, in place, a fresh output layer for `num_classes`, and Inception v3 a fresh auxiliary one too.

    The new layer has the old one's inputs, kernel and bias presence, and torch's default initialisation. Pretrained
    weights of the old head must be loaded before, and are gone after.

    Args:
        model: A torchvision or timm classifier, or any network whose last layer is linear or a convolution.
        num_classes: K, the outputs of the new layer.
        head: "log_softmax" puts `nn.LogSoftmax(dim=1)` behind it.

    Raises:
        ModelError: there is no output layer, or "log_softmax" is asked of a network that averages several heads.
    """
    if is_timm_model(model) and _timm_classifiers(model):
        cast(Any, model).reset_classifier(num_classes)  # also knows heads that are Identity or come in pairs
    else:
        head_module(model)
        for path in head_layers(model):
            model.set_submodule(path, _resized(model.get_submodule(path), num_classes))
    if head == "log_softmax":
        append_log_softmax(model)


def append_log_softmax(model: nn.Module) -> None:
    """Put a log-softmax behind every output layer.

    In a `Sequential` it goes to the end, which leaves the layer's path alone and, in SqueezeNet, comes after the
    ReLU and the pooling that turn the score map into (N, K, 1, 1). Elsewhere layer and log-softmax become a pair.
    """
    if averages_heads(model):
        raise ModelError(
            f"{type(model).__name__} averages several heads, so log-softmax outputs would not be probabilities",
            "use head=logits",
        )
    for path in head_layers(model):
        parent = model.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, nn.Sequential):
            parent.append(nn.LogSoftmax(dim=1))
        else:
            model.set_submodule(path, nn.Sequential(model.get_submodule(path), nn.LogSoftmax(dim=1)))


def can_load_linear_head(model: nn.Module) -> bool:
    """Tell whether the output of `model` is one linear layer with a bias, as `load_linear_head` needs it."""
    layer = head_module(model)
    return isinstance(layer, nn.Linear) and layer.bias is not None and not averages_heads(model)


def load_linear_head(model: nn.Module, weight_KD: Tensor, bias_K: Tensor) -> None:
    """Put solved weights into the linear output layer of `model`. Inception's auxiliary head is left as it is.

    Raises:
        ModelError: the output layer is a convolution, has no bias, has other sizes, or is one of several.
    """
    layer = head_module(model)
    name = type(model).__name__
    if not isinstance(layer, nn.Linear) or averages_heads(model):
        raise ModelError(f"the head of {name} is not a single linear layer", "train it instead of solving it")
    if layer.bias is None:
        raise ModelError(f"the linear head of {name} has no bias to load", "train it instead of solving it")
    if weight_KD.shape != layer.weight.shape or bias_K.shape != layer.bias.shape:
        raise ModelError(
            f"the head of {name} is {tuple(layer.weight.shape)} with bias {tuple(layer.bias.shape)}, "
            f"the solved weights are {tuple(weight_KD.shape)} with bias {tuple(bias_K.shape)}"
        )
    with torch.no_grad():
        layer.weight.copy_(weight_KD)
        layer.bias.copy_(bias_K)


def averages_heads(model: nn.Module) -> bool:
    """Tell whether several output layers are combined into one output, as in distilled transformers."""
    return is_timm_model(model) and len(_timm_classifiers(model)) > 1


def is_timm_model(model: nn.Module) -> bool:
    """Tell whether timm built `model`, so that its `pretrained_cfg` names the output layers."""
    return hasattr(model, "pretrained_cfg")


def _timm_classifiers(model: nn.Module) -> list[str]:
    """Return the paths that timm records, less those this variant was built without (a distillation head)."""
    recorded = cast(Any, model).pretrained_cfg.get("classifier") or ()
    paths = (recorded,) if isinstance(recorded, str) else recorded
    existing = {path for path, _ in model.named_modules()}
    return [path for path in paths if path in existing]


def _last_layer(model: nn.Module, path: str) -> str:
    """Return the path of the last module with parameters of its own below `path`, or `path` where there is none."""
    modules = model.get_submodule(path).named_modules(prefix=path)
    owners = [name for name, module in modules if next(module.parameters(recurse=False), None) is not None]
    return owners[-1] if owners else path


def _resized(layer: nn.Module, num_classes: int) -> nn.Module:
    """Return a fresh layer like `layer`, on its device, with `num_classes` outputs."""
    if isinstance(layer, nn.Linear):
        bias, device = layer.bias is not None, layer.weight.device
        return nn.Linear(layer.in_features, num_classes, bias=bias, device=device)
    assert isinstance(layer, nn.Conv2d)
    return nn.Conv2d(
        layer.in_channels,
        num_classes,
        cast(tuple[int, int], layer.kernel_size),
        bias=layer.bias is not None,
        device=layer.weight.device,
    )
