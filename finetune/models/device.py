"""The device that a name means on this machine."""

import torch

from finetune.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the torch device called `name`; "auto" takes CUDA, else Apple's GPU, else the CPU.

    Raises:
        ConfigError: It is no device, or not there.
    """
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in is_there.items() if there))
    if not is_there.get(name, False):
        raise ConfigError(f"the device {name!r} is not available here", "use --device auto, or cpu")
    return torch.device(name)
