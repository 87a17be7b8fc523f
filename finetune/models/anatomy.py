"""The anatomy of any network: every layer with its output shape, parameters, multiply-adds and receptive field.

Nothing is computed for it: the network runs once on torch's meta device, on tensors that have shapes but no values.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from finetune.errors import ConfigError, ModelError
from finetune.models.field_tracker import FieldTracker
from finetune.models.receptive_field import Record

Number = int | float
State = Literal["frozen", "learning", "-"]

FIELD_NOTE = (
    "Pixels, height by width, that the widest-seeing unit of a layer depends on, padding included and the most over "
    "all paths; 'image' where a mean, an attention or a norm over positions makes it the whole image; null where it "
    "cannot be told"
)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a network, or a container with parameters or matrix products of its own."""

    name: str
    """Path of the module; "" for the network itself."""
    kind: str
    """Name of its class."""
    output_shape: tuple[int, ...] | None
    """Of one image, without the batch; None for a layer that does not run in eval mode, such as an auxiliary head."""
    parameters: int
    """Its own parameters; shared ones count with the first layer that has them."""
    multiply_adds: int
    receptive_field: tuple[int, int] | Literal["image"] | None
    """Height and width in pixels; see `FIELD_NOTE`."""
    stride: tuple[Number, Number] | None
    """Pixels from one unit to the next (the jump), None where no positions are left."""
    centre: tuple[float, float] | None
    """Where the first unit looks: the middle of its receptive field, row and column, pixels counted from 0."""
    state: State
    """Whether its parameters learn; "-" where it has none."""
    note: str = ""
    """Why the receptive field cannot be told."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The layers of a network in the order in which they are done, and their totals."""

    input_shape: tuple[int, int, int]
    """Channels, height and width of the images."""
    layers: tuple[Layer, ...]
    parameters: int
    learning: int
    """Parameters that are not frozen."""
    multiply_adds: int
    """Of one image."""

    @property
    def notes(self) -> tuple[str, ...]:
        """The reasons why receptive fields cannot be told, each once."""
        return tuple(dict.fromkeys(layer.note for layer in self.layers if layer.note))

    def to_json(self) -> dict[str, Any]:
        """Return the anatomy as plain values."""
        channels, height_px, width_px = self.input_shape
        return {
            "image_size_px": height_px if height_px == width_px else [height_px, width_px],
            "channels": channels,
            "parameters": self.parameters,
            "learning": self.learning,
            "multiply_adds": self.multiply_adds,
            "receptive_field_note": "; ".join((FIELD_NOTE, *self.notes)),
            "layers": [asdict(layer) for layer in self.layers],
        }


def output_size(size: int, kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Return the side of the map that a convolution or pooling makes: floor((n + 2p - d(k - 1) - 1) / s) + 1.

    Args:
        size: Side n of the input, 1 or more.
        kernel: Side k of the kernel, 1 or more.
        stride: Step s of the kernel, 1 or more.
        padding: Pixels p added on each side, 0 or more.
        dilation: Step d between the taps of the kernel, 1 or more.

    Raises:
        ConfigError: A number is out of range, or the kernel does not fit into the padded input.

    >>> output_size(227, 11, stride=4)
    55
    >>> output_size(224, 7, stride=2, padding=3)
    112
    """
    if min(size, kernel, stride, dilation) < 1 or padding < 0:
        raise ConfigError(
            f"size {size}, kernel {kernel}, stride {stride}, dilation {dilation} and padding {padding} make no layer",
            "all must be 1 or more, the padding 0 or more",
        )
    reach = dilation * (kernel - 1) + 1
    if reach > size + 2 * padding:
        raise ConfigError(f"a kernel that reaches over {reach} does not fit into {size} with padding {padding}")
    return (size + 2 * padding - reach) // stride + 1


def receptive_field(kernels: Sequence[int], strides: Sequence[int], dilations: Sequence[int] | None = None) -> int:
    """Return how many pixels, along one side, a unit at the end of a chain of layers depends on.

    r = 1 + sum over the layers of d(k - 1) times the product of the strides before. `inspect_network` gives it for
    networks that are no chains.

    Args:
        kernels: Sides of the kernels, from the first layer to the last, each 1 or more.
        strides: Their strides, as many, each 1 or more.
        dilations: Their dilations, as many; 1 by default.

    Raises:
        ConfigError: The lengths differ, or a number is below 1.

    Three layers of 3x3 see what one of 7x7 sees:

    >>> receptive_field([3, 3, 3], [1, 1, 1])
    7
    >>> receptive_field([7], [1])
    7
    """
    dilations = [1] * len(kernels) if dilations is None else dilations
    if not len(kernels) == len(strides) == len(dilations):
        raise ConfigError(f"{len(kernels)} kernels, {len(strides)} strides and {len(dilations)} dilations are no chain")
    if min((*kernels, *strides, *dilations), default=1) < 1:
        raise ConfigError("kernels, strides and dilations must be 1 or more")
    return 1 + sum(
        dilation * (kernel - 1) * math.prod(strides[:index])
        for index, (kernel, dilation) in enumerate(zip(kernels, dilations, strict=True))
    )


def count_parameters(module: nn.Module, *, learning_only: bool = False) -> int:
    """Count the parameters of `module`, a shared one once, with `learning_only` those that are not frozen."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning_only)


def inspect_network(module: nn.Module, input_shape: tuple[int, int, int]) -> Anatomy:
    """Describe every layer of `module` for images of `input_shape`, as it works in eval mode.

    Any network that maps a batch of images to tensors will do; it is left as it was. What the pass goes through
    without a module (an addition, an attention) belongs to the module that does it, which is listed if it has
    parameters or multiply-adds of its own. Multiply-adds are those of convolutions and matrix products.

    Args:
        module: The network, on any device, the meta device included.
        input_shape: Channels, height and width of an image.

    Raises:
        ModelError: The network cannot take such images, or asks for the values of a tensor to decide what to do.
    """
    observer = _Observer(module)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    images_NCHW = torch.empty(1, *input_shape, dtype=dtype, device="meta")
    # Single numbers keep their value, for a network may read one to know what to do.
    shapes = {
        name: torch.empty_like(tensor, device="meta") if tensor.ndim else tensor.detach().clone()
        for name, tensor in tensors.items()
    }
    try:
        with torch.no_grad(), _in_eval_mode(module), observer.watching(images_NCHW):
            functional_call(module, shapes, (images_NCHW,))
    except (AssertionError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"the network cannot be followed with images of {' × '.join(map(str, input_shape))}: {reason}",
            "check channels and image size; a network that decides by the values of a tensor cannot be inspected",
        ) from error
    return Anatomy(
        input_shape=input_shape,
        layers=tuple(observer.layers()),
        parameters=count_parameters(module),
        learning=count_parameters(module, learning_only=True),
        multiply_adds=observer.flops.get_total_flops() // 2,
    )


@dataclass(frozen=True, kw_only=True)
class _Visit:
    """What a module left behind on its first call."""

    output_shape: tuple[int, ...] | None
    seen: Record | None


class _Observer:
    """Looks on while a network runs: what every module puts out and sees, and the multiply-adds that are its own."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.paths = {module: path for path, module in network.named_modules()}
        self.visits: dict[str, _Visit] = {}
        self.own_flops: defaultdict[str, int] = defaultdict(int)
        self.flops = FlopCounterMode(display=False)
        self._running: list[list[int]] = []  # for each module under way: flops when it began, flops of its children

    @contextmanager
    def watching(self, images_NCHW: Tensor) -> Iterator[None]:
        """Follow the network for as long as the context lasts."""
        with ExitStack() as stack:
            stack.enter_context(self.flops)
            tracker = stack.enter_context(FieldTracker(images_NCHW))
            for module, path in self.paths.items():
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(partial(self._leave, tracker, path)).remove)
            yield

    def _enter(self, _module: nn.Module, _args: Any) -> None:
        self._running.append([self.flops.get_total_flops(), 0])

    def _leave(self, tracker: FieldTracker, path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        before, of_children = self._running.pop()
        flops = self.flops.get_total_flops() - before
        self.own_flops[path] += flops - of_children
        if self._running:
            self._running[-1][1] += flops
        tensor = next((value for value in tree_leaves(output) if isinstance(value, Tensor)), None)
        if path not in self.visits:
            self.visits[path] = _Visit(
                output_shape=None if tensor is None else tuple(tensor.shape[1:]),
                seen=None if tensor is None else tracker.seen_by(tensor),
            )

    def layers(self) -> Iterator[Layer]:
        """Yield what is worth a line: leaves, and containers that have or do something themselves."""
        parameters = self._parameters()
        modules = {path: module for module, path in self.paths.items()}
        idle = [path for path in modules if path not in self.visits and parameters[path]]
        for path in (*self.visits, *idle):
            is_leaf = not any(modules[path].children())
            if is_leaf or parameters[path] or self.own_flops[path]:
                yield self._layer(path, modules[path], parameters[path])

    def _parameters(self) -> dict[str, list[nn.Parameter]]:
        """Give every parameter to the first module that holds it, those of a layer that is not called to its user."""
        given: set[int] = set()
        held: dict[str, list[nn.Parameter]] = {}
        for module, path in self.paths.items():
            new = [parameter for parameter in module._parameters.values() if parameter is not None]
            new = list({id(parameter): parameter for parameter in new if id(parameter) not in given}.values())
            given.update(map(id, new))
            held[path] = new
            parent = path.rpartition(".")[0]
            # torch's attention layer has an output projection that it uses without calling it.
            if path not in self.visits and parent in self.visits and held[parent] and parent != path:
                held[parent] += held.pop(path)
                held[path] = []
        return held

    def _layer(self, path: str, module: nn.Module, parameters: list[nn.Parameter]) -> Layer:
        visit = self.visits.get(path, _Visit(output_shape=None, seen=None))
        states: dict[bool, State] = {True: "learning", False: "frozen"}
        return Layer(
            name=path,
            kind=type(module).__name__,
            output_shape=visit.output_shape,
            parameters=sum(parameter.numel() for parameter in parameters),
            multiply_adds=self.own_flops[path] // 2,
            state=states[any(parameter.requires_grad for parameter in parameters)] if parameters else "-",
            **_field(visit.seen),
        )


def _field(seen: Record | None) -> dict[str, Any]:
    """Put what a unit sees into the words of a `Layer`."""
    if seen is None:
        return {"receptive_field": None, "stride": None, "centre": None}
    views = [seen.views[axis] for axis in ("rows", "columns")]
    reaches = {view.reach for view in views}
    size: tuple[int, ...] | str | None = tuple(view.image if view.reach == "image" else view.size for view in views)
    if "unknown" in reaches:
        size = None
    elif reaches == {"image"}:
        size = "image"
    strides = [view.stride for view in views]
    has_positions = None not in strides and not seen.is_scattered and not seen.is_flattened
    return {
        "receptive_field": size,
        "stride": tuple(_number(stride) for stride in strides if stride is not None) if has_positions else None,
        "centre": tuple((view.first(0) + view.last(0)) / 2 for view in views) if has_positions else None,
        "note": next((view.reason for view in views if view.reach == "unknown"), ""),
    }


def _number(value: Fraction) -> Number:
    return int(value) if value.denominator == 1 else round(float(value), 4)


@contextmanager
def _in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Set every module to eval mode and back, not by `train`, which frozen stages do not listen to."""
    modes = {module: module.training for module in network.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training
