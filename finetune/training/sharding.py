"""FSDP: a network whose training does not fit on one device, divided among the processes of a job.

`accelerate launch` with a config that asks for it switches it on and says how to divide. A copy of the network learns
and is scored, of which each process has a part of every parameter, gradient and optimiser state (Zhao 2023, arXiv
2304.11277). The whole network waits in the memory of the CPU meanwhile, to be kept and saved.
"""

import os
from copy import deepcopy

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, get_module_children_bottom_up, str_to_bool
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from finetune.errors import ConfigError
from finetune.runs.processes import Processes

SWITCH = "ACCELERATE_USE_FSDP"


def is_sharding_asked(processes: Processes) -> bool:
    """Tell whether the launcher's config asks for FSDP, and there are processes to divide among."""
    return processes.count > 1 and bool(str_to_bool(os.environ.get(SWITCH, "false")))


class ShardedModel:
    """A copy of `whole` as `module`, with the parameters divided among `processes` on `device`.

    `whole` goes to the CPU, from where one part of the network after the other is divided: no device ever holds all of
    what learns, its copy and their gradients.

    Raises:
        ConfigError: The config names layers to divide at that the network has not.
    """

    def __init__(self, whole: nn.Module, *, processes: Processes, device: torch.device) -> None:
        self.whole = whole.cpu()
        self.module = deepcopy(whole).to(memory_format=torch.contiguous_format)  # else it cannot be divided
        config = FullyShardedDataParallelPlugin(fsdp_version=2)  # reads what the launcher has set
        try:
            config.set_auto_wrap_policy(self.module)
            is_part = fsdp2_prepare_auto_wrap_policy(config, self.module)
        except ValueError as error:
            raise ConfigError(f"FSDP cannot divide the network: {error}", "mend the launcher's config") from error
        mesh = init_device_mesh(device.type, (processes.count,))
        for part in get_module_children_bottom_up(self.module):
            if part is self.module or (is_part and is_part(part)):
                fully_shard(
                    part,
                    mesh=mesh,
                    reshard_after_forward=config.reshard_after_forward,
                    offload_policy=config.cpu_offload,
                )

    def give_to(self, optimizer: Optimizer) -> None:
        """Let `optimizer`, which has made no step, move the divided parameters in the place of the whole ones."""
        divided = dict(self.module.named_parameters())
        own = {id(parameter): divided[name] for name, parameter in self.whole.named_parameters()}
        for group in optimizer.param_groups:
            group["params"] = [own[id(parameter)] for parameter in group["params"]]

    def end_pass(self) -> None:
        """Let go of the whole parameters that a pass forward leaves on a device when none backward follows it."""
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    @torch.no_grad()
    def collect(self) -> None:
        """Bring the whole network up to date; to be called by all processes."""
        for whole, divided in zip(self.whole.parameters(), self.module.parameters(), strict=True):
            if divided.requires_grad:
                whole.copy_(whole_tensor(divided))
        for kept, own in zip(self.whole.buffers(), self.module.buffers(), strict=True):
            kept.copy_(own)

    @torch.no_grad()
    def spread(self) -> None:
        """Bring the divided parameters to what the whole network has; to be called by all processes."""
        for whole, divided in zip(self.whole.parameters(), self.module.parameters(), strict=True):
            divided.copy_(divided_like(divided, whole))
        for kept, own in zip(self.whole.buffers(), self.module.buffers(), strict=True):
            own.copy_(kept)


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that may be divided as a whole; all processes have to ask for one that is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` divided as `parameter` is, if it is and has its shape; what all have of it must be the same."""
    if not isinstance(parameter, DTensor) or parameter.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
