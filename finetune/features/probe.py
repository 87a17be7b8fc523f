"""The linear probe: a multinomial logistic head on frozen features, solved to its optimum and scored honestly."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from finetune.features.extract import Features

# Shapes: N images, D features, R = min(N, D) directions that the features span, H held-out images, K classes,
# S strengths tried, F folds.

Array = np.ndarray[Any, Any]

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Inverse regularisation tried, on standardised features; weaker ones only sharpen what is told apart already."""
FOLDS = 5
MAX_ITERATIONS = 1_000


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A solved linear head: logits = features · weight_KDᵀ + bias_K, in the units of the raw features.

    `accuracy` is the mean over the folds of a stratified cross-validation, `spread` their standard deviation and
    `strength` the inverse regularisation chosen by it. Without two images in some class nothing can be held out: then
    both are None.
    """

    weight_KD: Array
    bias_K: Array
    strength: float
    accuracy: float | None
    spread: float | None

    def summary(self) -> dict[str, float | None]:
        """Return the numbers without the weights, for metrics.jsonl."""
        return {"accuracy": self.accuracy, "spread": self.spread, "strength": self.strength}

    def logits(self, features_ND: Array) -> Array:
        """Return the scores of each class before softmax, (N, K)."""
        logits_NK: Array = features_ND @ self.weight_KD.T + self.bias_K
        return logits_NK

    def predict(self, features_ND: Array) -> Array:
        """Return the class index of each row, (N,)."""
        indices_N: Array = self.logits(features_ND).argmax(axis=1)
        return indices_N


def solve_probe(train: Features, *, class_count: int, seed: int) -> Probe:
    """Solve the L2-regularised multinomial logistic regression on standardised features.

    Regularisation is chosen by the log loss in a stratified cross-validation: unlike the accuracy it still tells
    strengths apart when all are right, and its minimum gives honest probabilities. The problem is solved in the
    directions that the features span: with an L2 penalty the optimum lies in them (the representer theorem), and
    fewer images than features make it much smaller. Scale and rotation are folded back into the weights.
    """
    mean_D = train.features_ND.mean(axis=0, dtype=np.float64)
    scale_D = train.features_ND.std(axis=0, dtype=np.float64)
    scale_D[scale_D < 1e-8] = 1.0
    standard_ND = (train.features_ND - mean_D) / scale_D
    if len(standard_ND) < standard_ND.shape[1]:
        _, _, basis_RD = np.linalg.svd(standard_ND, full_matrices=False)
    else:
        basis_RD = np.eye(standard_ND.shape[1])
    rotated_NR = standard_ND @ basis_RD.T
    folds = _folds(train.class_indices_N, seed)
    best = STRENGTHS.index(1e-2)
    if folds:
        path_SF2 = _fold_scores(rotated_NR, train.class_indices_N, folds)
        best = int(path_SF2[:, :, 1].mean(axis=1).argmin())
    weight_KR, bias_K = _fit(_solver(STRENGTHS[best]), rotated_NR, train.class_indices_N, class_count=class_count)
    weight_KD = (weight_KR @ basis_RD) / scale_D
    return Probe(
        weight_KD=weight_KD.astype(np.float32),
        bias_K=(bias_K - weight_KD @ mean_D).astype(np.float32),
        strength=STRENGTHS[best],
        accuracy=float(path_SF2[best, :, 0].mean()) if folds else None,
        spread=float(path_SF2[best, :, 0].std()) if folds else None,
    )


def _folds(class_indices_N: Array, seed: int) -> list[tuple[Array, Array]]:
    """Split into stratified folds, as many as the smallest class has images but 2 to FOLDS.

    A fold whose remaining images are all of one class tells nothing and is left out; there may be none at all.
    """
    counts = np.unique(class_indices_N, return_counts=True)[1]
    if counts.max() < 2:
        return []
    splitter = StratifiedKFold(int(np.clip(counts.min(), 2, min(FOLDS, counts.max()))), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # such a class is not held out
        folds = splitter.split(class_indices_N, class_indices_N)
        return [fold for fold in folds if len(np.unique(class_indices_N[fold[0]])) > 1]


def _fold_scores(rotated_NR: Array, class_indices_N: Array, folds: Sequence[tuple[Array, Array]]) -> Array:
    """Return accuracy and log loss (nats) of each strength on what each fold holds out, (S, F, 2).

    The strengths are tried from the strongest regularisation on, each solution starting the next, until the log loss
    rises: behind its minimum lie the solutions that overfit, and they take the longest to find.
    """
    solvers = [_solver(STRENGTHS[0]) for _ in folds]
    path: list[list[tuple[float, float]]] = []
    for strength in STRENGTHS:
        scores = [
            _fold_score(solver.set_params(C=strength), rotated_NR, class_indices_N, fold)
            for solver, fold in zip(solvers, folds, strict=True)
        ]
        path.append(scores)
        if len(path) > 1 and np.mean(path[-1], axis=0)[-1] > np.mean(path[-2], axis=0)[-1]:
            break
    return np.array(path)


def _fold_score(
    solver: LogisticRegression, rotated_NR: Array, class_indices_N: Array, fold: tuple[Array, Array]
) -> tuple[float, float]:
    fitted, held_out = fold
    class_count = int(class_indices_N.max()) + 1
    weight_KR, bias_K = _fit(solver, rotated_NR[fitted], class_indices_N[fitted], class_count=class_count)
    logits_HK = rotated_NR[held_out] @ weight_KR.T + bias_K
    true_H = class_indices_N[held_out]
    losses_H = logsumexp(logits_HK, axis=1) - logits_HK[np.arange(len(true_H)), true_H]
    return float((logits_HK.argmax(axis=1) == true_H).mean()), float(losses_H.mean())


def _solver(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=MAX_ITERATIONS, warm_start=True)


def _fit(
    solver: LogisticRegression, features_NR: Array, class_indices_N: Array, *, class_count: int
) -> tuple[Array, Array]:
    """Return weight (K, R) and bias (K,); a class without images gets a bias far below the others."""
    solver.fit(features_NR, class_indices_N)
    weight, bias = solver.coef_, solver.intercept_
    if len(solver.classes_) == 2:  # scikit-learn keeps one row, the logit of the second class against the first
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight_KR = np.zeros((class_count, features_NR.shape[1]))
    bias_K = np.full(class_count, bias.min() - 10.0)
    weight_KR[solver.classes_], bias_K[solver.classes_] = weight, bias
    return weight_KR, bias_K
