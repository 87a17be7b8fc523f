"""A network as a convolution: the score map of a whole picture instead of one answer to a crop.

The layers that make one answer of a map stand at a network's end, and there are two kinds of end:

- The map is flattened into linear layers (LeNet, AlexNet, VGG). The first of them is a convolution whose kernel is as
  large as the map, the others are convolutions of 1 × 1. On a larger picture they slide along.
- The map is averaged before a linear layer (ResNet, DenseNet, EfficientNet). An average and an affine layer may change
  places, so the layer is applied to every position and the average comes last.

Sources: Sermanet et al. 2013, OverFeat, arXiv 1312.6229; Simonyan and Zisserman 2014, arXiv 1409.1556, section 3.2;
Long et al. 2015, Fully convolutional networks, arXiv 1411.4038; for the second kind Zhou et al. 2016, Learning deep
features for discriminative localization, arXiv 1512.04150, whose class activation maps these are.

Shapes: B images, C channels, H × W pixels or positions, K classes, D features.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn import functional

from finetune.errors import ModelError
from finetune.models.stage_outputs import NORM_EPS, StageOutputs
from finetune.models.tracing import NetworkTracer
from finetune.models.twins import twin_of

ImageShape = tuple[int, int, int]
"""Channels, height and width."""

_Kind = Literal[
    "as_it_is", "reshape", "linear", "norm", "activation", "log_softmax", "pooling", "stages", "local", "other"
]
"""What a step of the network is to the conversion. "local" are the steps that slide over a picture already."""

_STEPS: dict[_Kind, tuple[object, ...]] = {
    "as_it_is": (
        *(nn.Identity, nn.Dropout, nn.Dropout2d, functional.dropout, nn.BatchNorm2d, "contiguous"),
        *(operator.mul, operator.truediv, operator.add, operator.sub),  # with a number
    ),
    "reshape": (nn.Flatten, torch.flatten, torch.squeeze, "flatten", "view", "reshape", "squeeze"),
    "norm": (nn.BatchNorm1d,),
    "activation": (
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardtanh, nn.Softplus),
        *(functional.relu, functional.gelu, functional.silu, functional.hardswish, torch.relu, "relu"),
        *(nn.Tanh, nn.Sigmoid, torch.tanh, torch.sigmoid, "tanh", "sigmoid"),
    ),
    "log_softmax": (nn.LogSoftmax, functional.log_softmax, torch.log_softmax, "log_softmax"),
    "pooling": (nn.AdaptiveAvgPool2d, functional.adaptive_avg_pool2d, nn.AvgPool2d, torch.mean, "mean"),
    "stages": (StageOutputs,),
    "local": (nn.Conv2d, nn.MaxPool2d, functional.conv2d, functional.max_pool2d, functional.avg_pool2d),
}
"""By the exact class, function or method: a subclass may do more, as timm's norms that carry an activation."""

_KINDS = {step: kind for kind, steps in _STEPS.items() for step in steps}

_HINT = (
    "choose a network that ends in linear layers, behind a flattened map or an average over it, "
    "such as efficientnet_lite0, resnet18 or vgg16"
)
_RELATIVE_TOLERANCE = 1e-3
_TALLER_PX, _WIDER_PX = 64, 37  # strides are powers of two, up to 64; the odd width is what photographs have


class DenseClassifier(nn.Module):
    """A network that gives the logits of every position of a picture; built by `to_dense`.

    Args:
        network: Images to score maps.
        input_shape: The smallest picture it takes, that of the network it was made from.
        stride_px: Distance in pixels between neighbouring positions of the map, which is centred on the picture.
    """

    def __init__(self, network: nn.Module, input_shape: ImageShape, *, stride_px: float) -> None:
        super().__init__()
        self.network = network
        self.input_shape = input_shape
        self.stride_px = stride_px

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the score map (B, K, H', W') of `images_BCHW`, logits at each position.

        Raises:
            ModelError: The pictures are smaller than the network's own input.
        """
        _, height, width = self.input_shape
        if images_BCHW.shape[2] < height or images_BCHW.shape[3] < width:
            raise ModelError(
                f"a picture of {images_BCHW.shape[2]} × {images_BCHW.shape[3]} px is too small for a score map",
                f"it takes at least {height} × {width} px",
            )
        map_BKHW: Tensor = self.network(images_BCHW)
        return map_BKHW


def to_dense(model: nn.Module, input_shape: ImageShape) -> DenseClassifier:
    """Turn the classifier `model` into one that maps pictures of any size to score maps.

    At the network's own size the mean over the map equals the logits of `model`, which is tried before it is returned.
    A log-softmax at the end is left out, so that the map holds logits there too. A network that flattens the pixels
    themselves becomes one convolution with the picture as its kernel. `model` keeps its mode, device and parameters.

    Args:
        model: A torchvision or timm classifier, or any network that torch.fx can trace, (B, C, H, W) → (B, K).
        input_shape: Channels, height and width of the images it was made for.

    Returns:
        The same network as a convolution, in eval mode. Its parameters are those of `model`, not copies.

    Raises:
        ModelError: There is no such convolution; the message names the layer that stands in the way.
    """
    twin = twin_of(model)
    network = _trace(twin)
    # A fixed picture of noise; the global random numbers are not touched.
    noise_1CHW = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
    noise_1CHW = noise_1CHW.to(next(filter(torch.is_floating_point, model.parameters())))
    with torch.inference_mode():
        expected_1K = _run(twin, noise_1CHW, f"it takes no images of {' × '.join(map(str, input_shape))}")
        _run(ShapeProp(network).propagate, noise_1CHW, "its trace fails")
        end = _find_end(network)
        _convolve(network, end)
        stride_px = _try_out(network, noise_1CHW, expected_1K, has_log_softmax="log_softmax" in end.steps.values())
    return DenseClassifier(network, input_shape, stride_px=stride_px).eval()


class _SlidingLinear(nn.Module):
    """A linear layer as a convolution: its weights are read as K kernels of the shape (D, H, W) of `window`."""

    def __init__(self, linear: nn.Linear, window: tuple[int, int, int]) -> None:
        super().__init__()
        self.linear = linear
        self.window = window

    def forward(self, maps_BDHW: Tensor) -> Tensor:
        kernels_KDHW: Tensor = self.linear.weight.unflatten(1, self.window)
        return functional.conv2d(maps_BDHW, kernels_KDHW, self.linear.bias)


class _SlidingNorm(nn.Module):
    """A batch normalisation of feature vectors, applied at every position."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, maps_BDHW: Tensor) -> Tensor:
        normed_BDN: Tensor = self.norm(maps_BDHW.flatten(2))
        normed_BDHW: Tensor = normed_BDN.unflatten(2, maps_BDHW.shape[2:])
        return normed_BDHW


class _SlidingStageOutputs(nn.Module):
    """The maps of several stages side by side, on the grid of the last; their mean is what `StageOutputs` gives."""

    def forward(self, map_BDHW: Tensor, *maps: Tensor) -> Tensor:
        height, width = map_BDHW.shape[2:]
        sides = []
        for side_BCHW in maps:
            mean_BC = side_BCHW.mean(dim=(2, 3))
            coarse_BCHW = functional.adaptive_avg_pool2d(side_BCHW, (height, width))
            coarse_BCHW = coarse_BCHW + (mean_BC - coarse_BCHW.mean(dim=(2, 3)))[:, :, None, None]  # of uneven windows
            variance_B111, centre_B111 = (each.view(-1, 1, 1, 1) for each in torch.var_mean(mean_BC, 1, correction=0))
            sides.append((coarse_BCHW - centre_B111) * (variance_B111 + NORM_EPS).rsqrt())
        return torch.cat([map_BDHW, *sides], dim=1)


@dataclass(frozen=True, kw_only=True)
class _End:
    """The end of a network: its steps behind the map, the last one first, and the map they make an answer of."""

    steps: dict[fx.Node, _Kind]
    window_size: tuple[int, int]
    """Height and width of the kernel of the first linear layer: those of the flattened map, or 1 × 1."""


def _trace(twin: nn.Module) -> fx.GraphModule:
    try:
        return fx.GraphModule(twin, NetworkTracer().trace(twin), class_name=type(twin).__name__)
    except Exception as error:  # whatever a forward raises when it computes with stand-ins for tensors
        raise _refusal(f"torch.fx cannot trace it: {_first_line(error)}") from error


def _find_end(network: fx.GraphModule) -> _End:
    """Walk back from the output to the map."""
    node = _only_tensor(network, network.graph.output_node())
    steps: dict[fx.Node, _Kind] = {}
    activation: fx.Node | None = None
    while (kind := _kind(network, node)) != "local":
        source = _only_tensor(network, node)
        if kind == "other" or (kind == "log_softmax" and "linear" in steps.values()):
            raise _step_refusal(network, node, source)
        if kind == "activation":
            activation = node
        if kind == "pooling" and activation is not None and _size(source) != (1, 1):
            if isinstance(_module(network, node), nn.AvgPool2d):
                break  # then it is a window that slides, like every other
            layer = _layer(network, activation)
            raise _refusal(f"{layer} stands between the global pooling and the output and is not affine")
        steps[node] = kind
        if kind == "pooling":
            break
        if kind == "reshape" and _size(source) != (1, 1):
            return _End(steps=steps | _idle_pooling(network, source), window_size=_size(source))
        node = source
    return _End(steps=steps, window_size=(1, 1))


def _idle_pooling(network: fx.GraphModule, node: fx.Node) -> dict[fx.Node, _Kind]:
    """Return the step of an adaptive pooling before the flattening, which changes nothing at the network's own size."""
    while _kind(network, node) == "as_it_is":
        node = _only_tensor(network, node)
    if _step(network, node) not in (nn.AdaptiveAvgPool2d, functional.adaptive_avg_pool2d):
        return {}
    before, after = _size(_only_tensor(network, node)), _size(node)
    if before != after:
        raise _refusal(
            f"{_layer(network, node)} makes {after[0]} × {after[1]} of a map of {before[0]} × {before[1]} before the "
            "linear layers, whose inputs then belong to no place in the picture"
        )
    return {node: "pooling"}


def _convolve(network: fx.GraphModule, end: _End) -> None:
    """Make the end of `network` slide: linear layers become convolutions, flattening and pooling go."""
    first_linear = next((node for node in reversed(end.steps) if end.steps[node] == "linear"), None)
    for node, kind in end.steps.items():
        module = _module(network, node)
        if isinstance(module, nn.Linear):
            height, width = end.window_size if node is first_linear else (1, 1)
            window = (module.in_features // (height * width), height, width)
            network.set_submodule(str(node.target), _SlidingLinear(module, window))
        elif isinstance(module, nn.BatchNorm1d):
            network.set_submodule(str(node.target), _SlidingNorm(module))
        elif kind == "stages":
            _lay_out(network, node)
        elif kind in ("reshape", "pooling", "log_softmax"):
            source = _only_tensor(network, node)
            if kind == "pooling" and _pools_channels_last(network, node):
                with network.graph.inserting_before(node):
                    source = network.graph.call_method("permute", (source, 0, 3, 1, 2))
            node.replace_all_uses_with(source)
            network.graph.erase_node(node)
    network.graph.eliminate_dead_code()
    network.recompile()


def _lay_out(network: fx.GraphModule, node: fx.Node) -> None:
    """Let a head on all stages see their maps, instead of what is pooled of them."""
    features, *pooled = node.all_input_nodes
    maps = []
    for source in (step.all_input_nodes[0] for step in pooled):
        shape = _shape(source)
        if len(shape) != 4:
            raise _refusal(f"its head looks at {_layer(network, source)}, which gives no map")
        if shape[2] != shape[3]:
            with network.graph.inserting_after(source):
                source = network.graph.call_method("permute", (source, 0, 3, 1, 2))  # noqa: PLW2901
        maps.append(source)
    network.set_submodule(str(node.target), _SlidingStageOutputs())
    node.args = (features, *maps)


def _try_out(network: fx.GraphModule, noise_1CHW: Tensor, expected_1K: Tensor, *, has_log_softmax: bool) -> float:
    """Compare `network` with what is expected at its own size, run a larger picture, and return the map's stride."""
    _, channels, height, width = noise_1CHW.shape
    # Not by calling the module: a traced one prints a traceback of its own before it raises.
    map_1KHW = _run(network.forward, noise_1CHW, "it fails as a convolution")
    found_1K = map_1KHW.flatten(2).mean(dim=2)
    if has_log_softmax:
        found_1K = found_1K.log_softmax(dim=1)
    if found_1K.shape != expected_1K.shape:
        raise _refusal(f"it puts out a tensor of shape {tuple(expected_1K.shape)}")
    difference = (found_1K - expected_1K).abs().max() / expected_1K.abs().max().clamp(min=1e-6)
    if not difference <= _RELATIVE_TOLERANCE:
        raise _refusal(f"as a convolution its logits differ by {difference:.1%} of the largest")
    larger_1CHW = noise_1CHW.new_zeros(1, channels, height + _TALLER_PX, width + _WIDER_PX)
    larger_1KHW = _run(network.forward, larger_1CHW, "it does not take pictures of every size")
    growth = larger_1KHW.shape[2] - map_1KHW.shape[2]
    if growth < 1:
        raise _refusal("its map does not grow with the picture")
    return _TALLER_PX / growth


def _run(forward: Callable[[Tensor], Tensor], images_BCHW: Tensor, complaint: str) -> Tensor:
    try:
        return forward(images_BCHW)
    except Exception as error:  # whatever a network raises for a size it is not made for
        raise _refusal(f"{complaint}: {_first_line(error)}") from error


def _kind(network: fx.GraphModule, node: fx.Node) -> _Kind:
    """Tell what the step `node` is to the conversion."""
    if node.op == "placeholder":
        return "local"  # the picture itself
    module = _module(network, node)
    kind = "linear" if isinstance(module, nn.Linear) else _KINDS.get(_step(network, node), "other")
    if kind == "local" and isinstance(module, nn.Conv2d) and _is_per_position(module):
        return "as_it_is"
    if kind == "pooling" and not _is_global(network, node):
        return "local" if isinstance(module, nn.AvgPool2d) else "other"
    return kind


def _is_per_position(convolution: nn.Conv2d) -> bool:
    return convolution.kernel_size == (1, 1) and convolution.stride == (1, 1) and convolution.padding in (0, (0, 0))


def _is_global(network: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether the pooling `node` takes the mean over the whole map."""
    source = _only_tensor(network, node)
    module = _module(network, node)
    if isinstance(module, nn.AvgPool2d):
        kernel, padding = _pair(module.kernel_size), _pair(module.padding)
        return kernel == _size(source) and padding == (0, 0)
    if _step(network, node) in ("mean", torch.mean):
        return len(_shape(source)) == 4 and _mean_dims(node) in ({2, 3}, {1, 2})
    return _size(node) == (1, 1)


def _pools_channels_last(network: fx.GraphModule, node: fx.Node) -> bool:
    return _step(network, node) in ("mean", torch.mean) and _mean_dims(node) == {1, 2}


def _mean_dims(node: fx.Node) -> set[int]:
    """Return the dimensions, of the four of a map, that the mean `node` is taken over."""
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
    return {dim % 4 for dim in (dims if isinstance(dims, Iterable) else (dims,))}


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _only_tensor(network: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the step whose tensor `node` takes; one that takes several ends the walk."""
    sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
    if isinstance(_module(network, node), StageOutputs):
        return sources[0]  # the features; the stages beside them are maps of the same picture
    tensors = [source for source in sources if isinstance(source.meta.get("tensor_meta"), TensorMetadata)]
    if len(tensors) != 1:
        what = "its output" if node.op == "output" else _layer(network, node)
        raise _refusal(f"{what} comes from several tensors, as with several heads, and not from one map")
    return tensors[0]


def _module(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _step(network: fx.GraphModule, node: fx.Node) -> object:
    """Return what `_KINDS` is asked for: the class of a module, a function, or the name of a method."""
    module = _module(network, node)
    return node.target if module is None else type(module)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _size(node: fx.Node) -> tuple[int, int]:
    """Return height and width of a tensor (B, D, H, W); a feature vector has 1 × 1."""
    height, width = (*_shape(node)[2:], 1, 1)[:2]
    return height, width


def _layer(network: fx.GraphModule, node: fx.Node) -> str:
    """Name the layer that `node` belongs to, by path and class where it has one."""
    module = _module(network, node)
    if module is not None:
        return f"{node.target} ({type(module).__name__})"
    owners = list(node.meta.get("nn_module_stack", {}).values())
    if not owners:
        return str(getattr(node.target, "__name__", node.target))
    path, kind = owners[-1]
    return f"{path} ({kind.__name__})"


def _step_refusal(network: fx.GraphModule, node: fx.Node, source: fx.Node) -> ModelError:
    layer = _layer(network, node)
    if len(_shape(source)) == 3:
        return _refusal(f"its output comes from a sequence of tokens ({layer}), not from a map")
    return _refusal(f"{layer} stands before the output and cannot be applied to every position of a map")


def _refusal(reason: str) -> ModelError:
    return ModelError(f"this network gives no score map: {reason}", _HINT)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
