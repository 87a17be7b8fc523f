"""The graph of a network by torch.fx: what `dense` rebuilds and features/cut divides."""

import copy
import math
from itertools import chain

import torchvision
from torch import fx, nn

from finetune.models.neighbours import NeighbourHead


class NetworkTracer(fx.Tracer):
    """Traces as torchvision and timm do for their feature extractors, with every head as one step."""

    def __init__(self) -> None:
        from timm.layers import get_notrace_functions, get_notrace_modules

        super().__init__(autowrap_modules=(math, torchvision.ops), autowrap_functions=tuple(get_notrace_functions()))
        self.whole_modules = (nn.Linear, NeighbourHead, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether `m` is one step of the graph."""
        return isinstance(m, self.whole_modules) or super().is_leaf_module(m, module_qualified_name)


def twin_of(model: nn.Module) -> nn.Module:
    """Copy the modules of `model` but not its tensors, so that eval mode and new layers do not reach the original."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
