"""What parts of a training cost, tried out without a trace: nothing learns, draws or counts."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from finetune.training.objectives import main_output

T = TypeVar("T")


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Do `work` on `device` and return the seconds it took, and what it made."""
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Keep `network` in eval mode for a while, and then put every part of it back into its own."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def compute_gradients(network: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Go forward and backward through `network`, for the parameters that learn."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        torch.autograd.grad(main_output(network(*inputs)).sum(), learning, allow_unused=True)
