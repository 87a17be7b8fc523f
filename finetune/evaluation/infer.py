"""A model's probabilities for every image of a loader."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.models.device import as_inputs

# Shapes: N images, B batch, C channels, H height, W width, K classes.


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Probabilities (N, K) float32 with the true class index (N,) and the path of each image."""

    probabilities_NK: np.ndarray[Any, np.dtype[np.float32]]
    class_indices_N: np.ndarray[Any, np.dtype[np.int64]]
    image_paths: tuple[str, ...]


@torch.inference_mode()
def probabilities_of(
    model: nn.Module,
    batch: torch.Tensor | tuple[torch.Tensor, ...],
    *,
    device: torch.device | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return the class probabilities (B, K) float32 of a batch of images, or of the tensors that cross a cut.

    `model` must be in eval mode.

    The log-probabilities of a log_softmax head are logits too, their softmax is the probabilities: one rule does for
    both kinds of head.
    """
    outputs_BK = model(*as_inputs(batch, device)).float()
    return torch.softmax(outputs_BK / temperature, dim=1)


def predict_batches(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor, Iterable[str]]],
    *,
    device: torch.device,
    temperature: float = 1.0,
    advance: Callable[[int, str], None] | None = None,
) -> Predictions:
    """Run `model` in eval mode over all batches, in their order."""
    model.eval()
    probabilities: list[torch.Tensor] = []
    class_indices: list[torch.Tensor] = []
    paths: list[str] = []
    for batch, class_indices_B, batch_paths in batches:
        probabilities.append(probabilities_of(model, batch, device=device, temperature=temperature).cpu())
        class_indices.append(class_indices_B)
        paths += batch_paths
        if advance:
            advance(len(class_indices_B), "")
    return Predictions(
        probabilities_NK=torch.cat(probabilities).numpy(),
        class_indices_N=torch.cat(class_indices).numpy(),
        image_paths=tuple(paths),
    )
