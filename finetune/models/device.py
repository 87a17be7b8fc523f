"""The device that a name means on this machine."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from finetune.errors import ConfigError

LARGE_NETWORK = 1_000_000  # weights


def resolve_device(name: str) -> torch.device:
    """Return the torch device called `name`; "auto" takes CUDA, else Apple's GPU, else the CPU.

    Raises:
        ConfigError: It is no device, or not there.
    """
    keep_freed_memory()
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in is_there.items() if there))
    if not is_there.get(name, False):
        raise ConfigError(f"the device {name!r} is not available here", "use --device auto, or cpu")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device, network: nn.Module) -> str:
    """Return the number format called `name` for training `network`; "auto" takes "bf16" where it is the faster one.

    That is on a GPU that has it, and on a processor with instructions for it for a large network whose convolutions are
    all dense: it trains up to twice as fast, one with depthwise convolutions slower, a small one no faster
    (tests/benchmarks/full_fine_tuning.py).

    Raises:
        ConfigError: It is "fp16" and the device a CPU, which would take float32 without a word.
    """
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("--precision fp16 needs a GPU", "use bf16 or fp32")
    if name != "auto":
        return name
    match device.type:
        case "cuda":
            is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            is_faster = torch.cpu._is_avx512_bf16_supported() and _is_large_and_dense(network)
        case _:
            is_faster = False
    return "bf16" if is_faster else "fp32"


def _is_large_and_dense(network: nn.Module) -> bool:
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    weights = sum(parameter.numel() for parameter in network.parameters())
    return weights >= LARGE_NETWORK and all(convolution.groups == 1 for convolution in convolutions)


@cache
def keep_freed_memory() -> None:
    """Tell glibc to keep the memory of freed tensors for the next ones, instead of handing every one back at once.

    By default each large activation is mapped anew and page by page, which takes up to half of the time a network
    spends on a CPU. The process keeps what it needed most, once. Elsewhere than on glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the top of the heap is not given back


@contextmanager
def deterministic_algorithms(*, is_asked: bool) -> Iterator[None]:
    """Let torch compute with deterministic algorithms alone for a while, if that `is_asked`.

    Raises:
        ConfigError: A layer has none on its device.
    """
    if not is_asked:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        raise ConfigError(
            f"--deterministic: {str(error).split('. ')[0]}", "train without it, on --device cpu, or another --model"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=only_warned)
        torch.backends.cudnn.benchmark = before[1]


def as_inputs(
    batch: torch.Tensor | tuple[torch.Tensor, ...], device: torch.device | None = None
) -> tuple[torch.Tensor, ...]:
    """Return a batch of images, or the tensors of a batch that cross a cut, as a network takes them fastest.

    Maps (B, C, H, W) get their channels last in memory; `device` is left as it is by default.
    """
    tensors = (batch,) if isinstance(batch, torch.Tensor) else batch
    placed = (tensor if device is None else tensor.to(device, non_blocking=True) for tensor in tensors)
    return tuple(
        tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor for tensor in placed
    )
