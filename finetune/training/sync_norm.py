"""BatchNorm over the images of all processes, where torch's own is for GPUs only and takes the place of every layer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode

from finetune.runs.processes import Processes

# Shapes: B images of a process, C channels, P processes; "..." are the positions in an image.


class SharedStatistics(TorchFunctionMode):
    """While it is entered, BatchNorm in train mode takes mean and variance of the images of all `processes`.

    All must run the same layers in the same order, forward and backward; one that has no images does so with one that
    does not count. A loss is to be a sum over images, not a mean, for its gradient reaches those of others too.
    """

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes
        self.weight = 1.0

    @contextmanager
    def over(self, *, weight: float) -> Iterator[None]:
        """Enter it to compute images of this process of which each counts as so much of one.

        It is 0 for an image that does not count, and 1/2 for one beside its copy, whose outputs go into no loss.
        """
        self.weight = weight
        with self:
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute `func`, but for BatchNorm as torch does."""
        if func is batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        images_BC: Tensor,
        running_mean_C: Tensor | None,
        running_var_C: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Take the place of torch's function of this name, with its arguments."""
        if training:
            images, count, mean_C, squares_C = self._gather(images_BC.detach().float())
            training = images > 1 or running_mean_C is None  # one image has no variance to normalise or to remember
        if not training:
            return batch_norm(images_BC, running_mean_C, running_var_C, weight, bias, False, momentum, eps)
        if running_mean_C is not None and running_var_C is not None:
            running_mean_C.lerp_(mean_C, momentum)
            running_var_C.lerp_(squares_C / max(count - 1, 1), momentum)
        scale_C = (squares_C / count + eps).rsqrt()
        normal_BC: Tensor = _Normalise.apply(images_BC, mean_C, scale_C, count, self)
        shape = _along_channels(images_BC)
        if weight is not None:
            normal_BC = normal_BC * weight.view(shape)
        if bias is not None:
            normal_BC = normal_BC + bias.view(shape)
        return normal_BC.to(images_BC.dtype)

    def _gather(self, images_BC: Tensor) -> tuple[int, float, Tensor, Tensor]:
        """Return of all processes the images, their positions, the mean and the squares around it (Chan 1979)."""
        axes = _all_but_channels(images_BC)
        channels = images_BC.shape[1]
        count = images_BC.numel() / channels
        mean_C = images_BC.mean(axes)
        squares_C = (images_BC - mean_C.view(_along_channels(images_BC))).square().sum(axes)
        counts = mean_C.new_tensor([len(images_BC), count]) * self.weight
        own = torch.cat([counts, mean_C, squares_C * self.weight])
        images_P, counts_P, means_PC, squares_PC = self.processes.stack(own).split([1, 1, channels, channels], dim=1)
        whole = counts_P.sum()
        mean_C = (counts_P * means_PC).sum(dim=0) / whole
        squares_C = (squares_PC + counts_P * (means_PC - mean_C).square()).sum(dim=0)
        return int(images_P.sum()), float(whole), mean_C, squares_C


class _Normalise(torch.autograd.Function):
    """Bring images to mean 0 and variance 1; mean and variance are functions of them too (Ioffe 2015, section 3)."""

    @staticmethod
    def forward(
        ctx: Any, images_BC: Tensor, mean_C: Tensor, scale_C: Tensor, count: float, shared: SharedStatistics
    ) -> Tensor:
        shape = _along_channels(images_BC)
        normal_BC = (images_BC.float() - mean_C.view(shape)) * scale_C.view(shape)
        ctx.save_for_backward(normal_BC, scale_C)
        ctx.count, ctx.processes, ctx.dtype = count, shared.processes, images_BC.dtype
        ctx.weight = shared.weight
        return normal_BC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BC: Tensor) -> tuple[Tensor | None, ...]:
        normal_BC, scale_C = ctx.saved_tensors
        axes, shape = _all_but_channels(normal_BC), _along_channels(normal_BC)
        sums_2C = torch.stack([gradient_BC.sum(axes), (gradient_BC * normal_BC).sum(axes)])
        ctx.processes.sum(sums_2C)
        mean_C, slope_C = sums_2C / ctx.count
        through_statistics_BC = (mean_C.view(shape) + normal_BC * slope_C.view(shape)) * ctx.weight
        inputs_BC = (gradient_BC - through_statistics_BC) * scale_C.view(shape)
        return inputs_BC.to(ctx.dtype), None, None, None, None


def _all_but_channels(images_BC: Tensor) -> list[int]:
    return [axis for axis in range(images_BC.ndim) if axis != 1]


def _along_channels(images_BC: Tensor) -> list[int]:
    return [-1 if axis == 1 else 1 for axis in range(images_BC.ndim)]
