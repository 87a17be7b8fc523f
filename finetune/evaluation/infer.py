"""A model's probabilities for every image of a loader."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.models.device import as_inputs
from finetune.runs.processes import ALONE, Processes

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
    processes: Processes = ALONE,
) -> Predictions:
    """Run `model` in eval mode over all batches, in their order; of several processes each over its share of them."""
    model.eval()
    own = []
    for batch, class_indices_B, paths in batches:
        probabilities_BK = probabilities_of(model, batch, device=device, temperature=temperature).cpu()
        own.append((probabilities_BK.numpy(), class_indices_B.numpy(), tuple(paths)))
        if advance:
            advance(len(class_indices_B), "")
    probabilities, class_indices, image_paths = zip(*processes.gather_shares(own), strict=True)
    return Predictions(
        probabilities_NK=np.concatenate(probabilities),
        class_indices_N=np.concatenate(class_indices),
        image_paths=tuple(itertools.chain.from_iterable(image_paths)),
    )
