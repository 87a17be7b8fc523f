"""The evidence for a scenario: how much data there is, and how far the frozen features already carry."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from finetune.features.extract import Features
from finetune.features.neighbours import CPU, leave_one_out_accuracy
from finetune.features.probe import Probe


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Numbers from one pass over the training images; accuracies in 0..1.

    `majority_accuracy` is what always naming the largest class would score, `knn_accuracy` the leave-one-out score of
    the nearest neighbours (None where a network with random weights was not asked), `probe_accuracy` the
    cross-validated score of the linear probe (None also where no class has two images, or no probe was solved) and
    `probe_spread` its standard deviation over the folds.
    """

    images: int
    classes: int
    images_per_class: float
    smallest_class: int
    majority_accuracy: float
    knn_accuracy: float | None
    probe_accuracy: float | None
    probe_spread: float | None
    is_pretrained: bool

    @property
    def similarity(self) -> float:
        """How much of the way from the majority baseline to perfection the frozen features go; in 0..1."""
        reached = self.knn_accuracy if self.probe_accuracy is None else self.probe_accuracy
        if reached is None:
            return 0.0
        if self.majority_accuracy >= 1:
            return 1.0
        return max(0.0, (reached - self.majority_accuracy) / (1 - self.majority_accuracy))


def measure(
    train: Features,
    probe: Probe | None,
    *,
    class_indices_N: np.ndarray[Any, Any],
    is_pretrained: bool,
    device: torch.device = CPU,
) -> Evidence:
    """Gather the evidence from the features of the training images and the probe solved on them.

    Args:
        train: Features of the training images, or of a sample of them.
        probe: The linear probe solved on `train`, if there is one.
        class_indices_N: Of all training images.
        is_pretrained: Whether the network that made the features had learned anything before.
        device: Where to look for neighbours.
    """
    return replace(
        count_images(class_indices_N),
        knn_accuracy=leave_one_out_accuracy(train, device=device),
        probe_accuracy=probe.accuracy if probe else None,
        probe_spread=probe.spread if probe else None,
        is_pretrained=is_pretrained,
    )


def count_images(class_indices_N: np.ndarray[Any, Any]) -> Evidence:
    """Gather what can be said without a pretrained network: how many images there are, of how many classes."""
    counts = np.unique(class_indices_N, return_counts=True)[1]
    return Evidence(
        images=len(class_indices_N),
        classes=len(counts),
        images_per_class=len(class_indices_N) / len(counts),
        smallest_class=int(counts.min()),
        majority_accuracy=float(counts.max() / counts.sum()),
        knn_accuracy=None,
        probe_accuracy=None,
        probe_spread=None,
        is_pretrained=False,
    )
