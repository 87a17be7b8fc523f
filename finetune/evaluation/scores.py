"""Scores of predictions: NumPy and scikit-learn, no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import (
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

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
    probabilities_NK = probabilities_NK / probabilities_NK.sum(axis=1, keepdims=True, dtype=np.float64)
    all_K = np.arange(len(class_names))
    predicted_N = probabilities_NK.argmax(axis=1)
    right = int((predicted_N == class_indices_N).sum())
    interval = binomtest(right, len(class_indices_N)).proportion_ci(method="wilson")
    precision_K, recall_K, f1_K, support_K = precision_recall_fscore_support(
        class_indices_N, predicted_N, labels=all_K, zero_division=0.0
    )
    present_K = support_K > 0
    seen_K = present_K | np.isin(all_K, predicted_N)
    rows = zip(class_names, precision_K, recall_K, f1_K, support_K, strict=True)
    return Scores(
        images=len(class_indices_N),
        accuracy=right / len(class_indices_N),
        accuracy_interval=(float(interval.low), float(interval.high)),
        top5_accuracy=_top5(class_indices_N, probabilities_NK, all_K),
        balanced_accuracy=float(recall_K[present_K].mean()),
        macro_f1=float(f1_K[seen_K].mean()),
        log_loss=float(log_loss(class_indices_N, probabilities_NK, labels=all_K)),
        per_class=tuple(
            ClassScore(class_name=name, precision=float(p), recall=float(r), f1=float(f), support=int(n))
            for name, p, r, f, n in rows
        ),
        confusion=tuple(map(tuple, confusion_matrix(class_indices_N, predicted_N, labels=all_K).tolist())),
    )


def _top5(
    class_indices_N: np.ndarray[Any, Any], probabilities_NK: np.ndarray[Any, Any], all_K: np.ndarray[Any, Any]
) -> float | None:
    if len(all_K) < 5:
        return None
    if len(all_K) == 5:
        return 1.0  # scikit-learn warns that this says nothing
    return float(top_k_accuracy_score(class_indices_N, probabilities_NK, k=5, labels=all_K))
