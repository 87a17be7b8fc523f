"""What the tests of layer tables share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

LayerTable = dict[str, tuple[tuple[int, ...], int]]


@pytest.fixture(scope="session")
def layer_table() -> Callable[..., LayerTable]:
    """Send one image through a network on torch's meta device: by path, output shape and number of parameters."""

    def trace(build: Callable[..., nn.Module], shape_CHW: tuple[int, int, int], **options: Any) -> LayerTable:
        table: LayerTable = {}
        with torch.device("meta"):
            network = build(**options).eval()
            image_BCHW = torch.empty(1, *shape_CHW)

        def record(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(module: nn.Module, _: Any, output: Tensor) -> None:
                table[path] = (tuple(output.shape[1:]), sum(p.numel() for p in module.parameters()))

            return hook

        for path, module in network.named_modules():
            module.register_forward_hook(record(path))
        network(image_BCHW)
        return table

    return trace
