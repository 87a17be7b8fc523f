"""The graph of a network by torch.fx: what `dense` rebuilds and features/cut divides."""

import math
from typing import Any

import torchvision
from torch import fx, nn

from finetune.errors import ModelError
from finetune.models.neighbours import NeighbourHead
from finetune.models.stage_outputs import StageOutputs, find_stage_outputs, pool


class NetworkTracer(fx.Tracer):
    """Traces as torchvision and timm do for their feature extractors, with every head as one step.

    What a head on all stages looks at, which hooks keep for it when the network runs, are arguments in the graph.
    """

    def __init__(self) -> None:
        from timm.layers import get_notrace_functions, get_notrace_modules

        super().__init__(autowrap_modules=(math, torchvision.ops), autowrap_functions=tuple(get_notrace_functions()))
        self.whole_modules = (nn.Linear, NeighbourHead, StageOutputs, *get_notrace_modules())
        self.ends: tuple[str, ...] = ()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether `m` is one step of the graph."""
        is_whole = isinstance(m, self.whole_modules) or module_qualified_name in self.ends
        return is_whole or super().is_leaf_module(m, module_qualified_name)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of `root`; a ModelError if its head looks at what is no step of it."""
        attached = find_stage_outputs(root)
        self.ends = attached[1].paths if attached else ()
        graph: fx.Graph = super().trace(root, concrete_args)
        calls = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
        pooled = []
        for end in self.ends:
            if end not in calls:
                raise ModelError(f"{end}, at whose output its head looks, is no step of the graph")
            with graph.inserting_after(calls[end]):
                pooled.append(graph.call_function(pool, (calls[end],)))
        if attached:
            calls[attached[0]].args = (*calls[attached[0]].args, *pooled)
        return graph
