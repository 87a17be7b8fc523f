"""Scores of predictions, from the confusion matrix in NumPy; no torch.

scikit-learn is the oracle of the tests. It is not imported here, for that takes longer than scoring a million images,
and every command that trains or evaluates would wait for it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

# Shapes: N images, K classes.


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """Scores of one class; `support` counts its images."""

    class_name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How good predictions are, every value in 0..1 but `log_loss` (nats) and the counts.

    `accuracy_interval` is the 95 % Wilson interval (Wilson 1927): what the accuracy may be given so few images.
    `top5_accuracy` is None with fewer than five classes.
    """

    images: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    top5_accuracy: float | None
    balanced_accuracy: float
    macro_f1: float
    log_loss: float
    per_class: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for metrics.jsonl and `--format json`."""
        return asdict(self)

    def headline(self) -> dict[str, float]:
        """Return the single numbers, for a model file and a summary."""
        numbers = {
            "accuracy": self.accuracy,
            "top5_accuracy": self.top5_accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "log_loss": self.log_loss,
        }
        return {name: value for name, value in numbers.items() if value is not None}


def score(
    class_indices_N: np.ndarray[Any, Any], probabilities_NK: np.ndarray[Any, Any], class_names: Sequence[str]
) -> Scores:
    """Compare predicted probabilities with the true classes.

    Args:
        class_indices_N: True class of each image, int, (N,), N ≥ 1.
        probabilities_NK: One row an image, each summing to 1, (N, K).
        class_names: Names of the K classes in the order of the columns.

    As in scikit-learn, the balanced accuracy averages over the classes that have images, the macro F1 also over those
    that were predicted without having any.
    """
    images, classes = len(class_indices_N), len(class_names)
    probabilities_NK = probabilities_NK / probabilities_NK.sum(axis=1, keepdims=True, dtype=np.float64)
    predicted_N = probabilities_NK.argmax(axis=1)
    confusion_KK = np.bincount(class_indices_N * classes + predicted_N, minlength=classes**2).reshape(classes, classes)
    right_K, support_K, named_K = confusion_KK.diagonal(), confusion_KK.sum(axis=1), confusion_KK.sum(axis=0)
    precision_K, recall_K = right_K / np.maximum(named_K, 1), right_K / np.maximum(support_K, 1)
    f1_K = 2 * right_K / np.maximum(support_K + named_K, 1)
    true_N = probabilities_NK[np.arange(images), class_indices_N]
    rows = zip(class_names, precision_K, recall_K, f1_K, support_K, strict=True)
    return Scores(
        images=images,
        accuracy=float(right_K.sum() / images),
        accuracy_interval=_wilson_interval(int(right_K.sum()), images),
        top5_accuracy=float(((probabilities_NK > true_N[:, None]).sum(axis=1) < 5).mean()) if classes >= 5 else None,
        balanced_accuracy=float(recall_K[support_K > 0].mean()),
        macro_f1=float(f1_K[support_K + named_K > 0].mean()),
        log_loss=float(-np.log(np.clip(true_N, np.finfo(np.float64).eps, 1.0)).mean()),
        per_class=tuple(
            ClassScore(class_name=name, precision=float(p), recall=float(r), f1=float(f), support=int(n))
            for name, p, r, f, n in rows
        ),
        confusion=tuple(map(tuple, confusion_KK.tolist())),
    )


def _wilson_interval(right: int, images: int) -> tuple[float, float]:
    """Return the interval of shares that `right` of `images` do not reject at 5 %, two-sided (Wilson 1927, eq. 6)."""
    z = 1.959963984540054
    centre = (right + z * z / 2) / (images + z * z)
    half = z / (images + z * z) * math.sqrt(right * (images - right) / images + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)
