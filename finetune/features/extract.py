"""One pass of the frozen network over the images: what enters its output layer, kept as plain arrays."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

# Shapes: N images, B batch, C channels, H height, W width, D features.


@dataclass(frozen=True, kw_only=True)
class Features:
    """Feature vectors (N, D) float32 with the class index of each image (N,) int64."""

    features_ND: np.ndarray[Any, np.dtype[np.float32]]
    class_indices_N: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.class_indices_N)


@torch.inference_mode()
def extract_features(
    model: nn.Module,
    output_layer: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, Any]],
    *,
    device: torch.device,
) -> Features:
    """Run `model` in eval mode over `batches` and keep the input of its `output_layer`.

    A convolutional output layer sees maps (B, C, H, W): their mean over the positions is kept, (B, C).
    Every module is put back into the mode it was in.
    """
    kept: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []

    def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        features = inputs[0].float()
        kept.append((features.mean(dim=(2, 3)) if features.ndim == 4 else features).cpu())

    in_training = [module for module in model.modules() if module.training]
    handle = output_layer.register_forward_pre_hook(keep)
    try:
        model.eval()
        for images_BCHW, class_indices_B, _ in batches:
            model(images_BCHW.to(device, memory_format=torch.channels_last))
            labels.append(class_indices_B.cpu())
    finally:
        handle.remove()
        for module in in_training:
            module.training = True
    return Features(features_ND=torch.cat(kept).numpy(), class_indices_N=torch.cat(labels).numpy())
