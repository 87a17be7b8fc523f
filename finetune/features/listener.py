"""The modules that a trunk is made of besides the network's own: they need no graph of it, and can be traced.

Shapes: B images, C channels, H × W pixels or positions, D features.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from finetune.errors import ModelError
from finetune.models.stage_outputs import pool


class FrozenTrunk(nn.Module):
    """A network that stays in eval mode, keeps no gradients and gives a row for each image."""

    def __init__(self, network: nn.Module, boundary: str) -> None:
        super().__init__()
        self.network = network
        self.boundary = boundary
        self.eval()

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Any:
        """Return what the network gives; a ModelError if that is other than tensors with a row for each image."""
        crossing = self.network(images_BCHW)
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            return crossing  # a comparison of sizes would warn that it becomes a constant
        for value in crossing if isinstance(crossing, tuple) else (crossing,):
            if not isinstance(value, Tensor) or value.shape[:1] != images_BCHW.shape[:1]:
                found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ModelError(
                    f"the network cannot be cut behind {self.boundary}: {found} crosses there, "
                    f"not a tensor with a row for each of {images_BCHW.shape[0]} images",
                    "cut it at the pooled features",
                )
        return crossing


class Listener(nn.Module):
    """What enters the layer `first` of a network, which is run as a whole.

    With `last`, the output of that layer must be what the network returns. The `outputs` of other modules, pooled, are
    put behind what enters.
    """

    def __init__(self, network: nn.Module, first: str, last: str | None = None, *, outputs: Sequence[str] = ()) -> None:
        super().__init__()
        self.network = network
        self.first = first
        self.last = last
        self.outputs = tuple(outputs)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor]:
        """Return what enters, alone in a tuple as what crosses a cut."""
        entering: list[Tensor] = []
        leaving: list[Any] = []
        pooled: dict[str, Tensor] = {}
        first, last = map(self.network.get_submodule, (self.first, self.last or self.first))
        with (
            ExitStack() as hooks,
            first.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0])),
            last.register_forward_hook(lambda _, __, output: leaving.append(output)),
        ):
            for path in self.outputs:
                module = self.network.get_submodule(path)
                hooks.enter_context(
                    module.register_forward_hook(lambda _, __, output, path=path: pooled.update({path: pool(output)}))
                )
            output = self.network(images_BCHW)
        if len(entering) != 1 or (self.last is not None and output is not leaving[0]):
            raise ModelError(
                f"the network cannot be cut at its output layer {self.first}: "
                f"that runs {len(entering)} times, or code that is no module follows it"
            )
        return (torch.cat([entering[0], *(pooled[path] for path in self.outputs)], dim=1),)


class MeanOverPositions(nn.Module):
    """The mean of a map (B, D, H, W) over its positions; vectors (B, D) as they are."""

    def forward(self, crossing: tuple[Tensor]) -> Tensor:
        """Take what a `Listener` gives."""
        (features,) = crossing
        return features.mean(dim=(2, 3)) if features.ndim == 4 else features
