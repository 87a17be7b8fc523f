"""The linear probe: a multinomial logistic head on frozen features, solved to its optimum and scored honestly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from finetune.errors import ModelError
from finetune.features.extract import Features
from finetune.features.solver import BARRED, MOST_LOGITS, Problems, solve
from finetune.runs.processes import ALONE, Processes

# Shapes: N images (views of them too), D features, A axes that the features span, R = A and one for the bias,
# K classes, F folds.

Array = np.ndarray[Any, Any]

STRENGTHS = tuple(10 ** (exponent / 2) for exponent in range(-8, 3))
"""Inverse regularisation tried, on scaled features; weaker ones only sharpen what is told apart already."""
USUAL_STRENGTH = 1e-2  # where nothing can be held out to choose by
SHRINKAGE = 0.8
"""How far the scatter within the classes is drawn to one size in all directions; on few images it is mostly chance.

Measured by tests/benchmarks/probe_penalties.py, on images that no result is reported on: against no scatter at all it
gains 2 to 4 points where features were learned on other pictures than these, and nothing on photographs.
"""
FOLDS = 5
FOLD_TOLERANCE = 2e-6  # an image: the log loss is right to about 3e-4 then, which is enough to compare strengths by
FINE_LOSS = 0.1  # nats; where the log loss is greater, its error may be so in proportion
MOST_FOLD_NUMBERS = 2**28
"""In the features of all folds, a gigabyte. With more they share the basis of all images: what a fold holds out moves
the mean scatter of tens of thousands too little to matter."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A solved linear head: logits = features · weight_KDᵀ + bias_K, in the units of the raw features.

    `accuracy` and `loss` (nats) are the means over the folds of a stratified cross-validation, `spread` the standard
    deviation of the former and `strength` the inverse regularisation chosen by the latter. Without two images in some
    class nothing can be held out: then all but `strength` are None.
    """

    weight_KD: Array
    bias_K: Array
    strength: float
    accuracy: float | None
    spread: float | None
    loss: float | None

    def summary(self) -> dict[str, float | None]:
        """Return the numbers without the weights, for metrics.jsonl."""
        return {"accuracy": self.accuracy, "spread": self.spread, "loss": self.loss, "strength": self.strength}

    def logits(self, features_ND: Array) -> Array:
        """Return the scores of each class before softmax, (N, K)."""
        logits_NK: Array = features_ND @ self.weight_KD.T + self.bias_K
        return logits_NK

    def predict(self, features_ND: Array) -> Array:
        """Return the class index of each row, (N,)."""
        indices_N: Array = self.logits(features_ND).argmax(axis=1)
        return indices_N


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The principal axes of scaled features: where the probe is solved, and the way back to raw features.

    There the Hessian of the loss is nearly diagonal, which makes the solution quick. With an L2 penalty it lies in what
    the images span (the representer theorem), so that few images with many features are a small problem.
    """

    mean_D: Array
    scale: float
    basis_AD: Tensor
    features_NR: Tensor

    def within(self, class_indices_N: Tensor, is_kept_N: Tensor | None = None) -> Tensor:
        """Return a basis (R, R) in which the kept images scatter alike in all directions around their class's mean.

        The scatter is drawn to a multiple of the identity by SHRINKAGE (Ledoit & Wolf 2004), and the basis so long that
        the mean square of all features is one. The bias, the last of R, is apart from all others.

        Args:
            class_indices_N: Of the images that the axes were found on.
            is_kept_N: Which of them to look at; by default all.
        """
        features_NA, classes_N = self.features_NR[:, :-1], class_indices_N
        if is_kept_N is not None:
            features_NA, classes_N = features_NA[is_kept_N], classes_N[is_kept_N]
        counts_K = classes_N.bincount()
        sums_KA = features_NA.new_zeros(len(counts_K), features_NA.shape[1]).index_add_(0, classes_N, features_NA)
        residual_NA = features_NA - (sums_KA / counts_K.clamp_min(1)[:, None])[classes_N]
        scatter_AA = residual_NA.T @ residual_NA / len(features_NA)
        alike = scatter_AA.trace() / len(self.mean_D)
        identity_AA = torch.eye(len(scatter_AA)).to(scatter_AA)
        is_scattered = bool(alike > 1e-12)  # not where every class has one image
        shrunk_AA = SHRINKAGE * alike * identity_AA + (1 - SHRINKAGE) * scatter_AA if is_scattered else identity_AA
        root_AA = torch.linalg.cholesky(shrunk_AA)
        basis_AA = torch.linalg.solve_triangular(root_AA, identity_AA, upper=False).mT
        size = (features_NA @ basis_AA).square().sum() / (len(features_NA) * len(self.mean_D))
        basis_RR: Tensor = torch.block_diag(basis_AA / size.sqrt().clamp_min(1e-6), basis_AA.new_ones(1, 1))
        return basis_RR

    def raw_head(self, weight_KR: Tensor) -> tuple[Array, Array]:
        """Return the weights (K, D) and biases (K,) that do to raw features what `weight_KR` does to `features_NR`."""
        weight_KD = (weight_KR[:, :-1] @ self.basis_AD).cpu().double().numpy() / self.scale
        bias_K = weight_KR[:, -1].cpu().double().numpy() - weight_KD @ self.mean_D
        return weight_KD.astype(np.float32), bias_K.astype(np.float32)


class _Trial(NamedTuple):
    """A strength, solutions of folds for it, and the accuracy and log loss (nats) of each fold on what it holds out."""

    strength: float
    weight_FKR: Tensor
    accuracy_F: Array
    loss_F: Array


def solve_probe(
    train: Features,
    *,
    views: Sequence[Array] = (),
    class_count: int,
    seed: int,
    class_weights_K: Array | None = None,
    device: torch.device = CPU,
    processes: Processes = ALONE,
) -> Probe:
    """Solve the L2-regularised multinomial logistic regression on features that scatter alike within the classes.

    The penalty is on weights in the basis of `Axes.within`: what differs between images of one class, light or pose, is
    held against a direction, as in linear discriminant analysis (Fisher 1936), of which this is the regularised kin.

    Regularisation is chosen by the log loss in a stratified cross-validation: unlike the accuracy it still tells
    strengths apart when all are right, and its minimum gives honest probabilities.

    Args:
        train: Features of the training images.
        views: Features of augmented views of them, (N, D) each, to learn from too: an image and its views count as one
            image. A fold holds out an image with all its views, and is scored on the image itself.
        class_count: K; a class without images gets a bias far below the others.
        seed: Decides which images each fold holds out.
        class_weights_K: How much an image of each class counts, 0 or more, in the solution and in the log loss that
            chooses the strength; 1 by default. The accuracy counts every image once.
        device: Where to compute.
        processes: Those that share the folds; all of them call this, with the same features.

    Raises:
        ModelError: A feature is not a finite number.
    """
    copies = 1 + len(views)
    classes_N = np.tile(train.class_indices_N, copies)
    image_weights_N = (np.ones(class_count) if class_weights_K is None else class_weights_K)[classes_N] / copies
    axes = find_axes(np.concatenate([train.features_ND, *views]) if views else train.features_ND, device)
    class_indices_N = torch.tensor(classes_N, device=device)
    basis_RR = axes.within(class_indices_N)
    problem = Problems(
        features_BNR=(axes.features_NR @ basis_RR)[None],
        class_indices_N=class_indices_N,
        image_weights_BN=torch.tensor(image_weights_N[None], dtype=torch.float32, device=device),
        class_count=class_count,
    )
    held_out_FN = torch.from_numpy(_held_out(train.class_indices_N, seed)).to(device)
    best = _best_trial(problem, axes, held_out_FN, copies=copies, processes=processes) if len(held_out_FN) else None
    strength, start_1KR = (best.strength, _between(best.weight_FKR)) if best else (USUAL_STRENGTH, problem.start())
    weight_1KR = solve(problem, strength=strength, start_BKR=start_1KR)
    weight_KD, bias_K = axes.raw_head(_settle(weight_1KR)[0] @ basis_RR.T)
    return Probe(
        weight_KD=weight_KD,
        bias_K=bias_K,
        strength=strength,
        accuracy=float(best.accuracy_F.mean()) if best else None,
        spread=float(best.accuracy_F.std()) if best else None,
        loss=float(best.loss_F.mean()) if best else None,
    )


def find_axes(features_ND: Array, device: torch.device) -> Axes:
    """Centre and scale the features and turn them to their principal axes, at most as many as images or features.

    Raises:
        ModelError: A feature is not a finite number.
    """
    if not np.isfinite(features_ND).all():
        raise ModelError("the features that the network gives are not all finite numbers", "take other weights")
    mean_D = features_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
    scaled_ND = features_ND - mean_D
    scale = float(np.sqrt(np.square(scaled_ND).mean(dtype=np.float64))) or 1.0
    scaled_ND /= scale
    whole_ND = torch.from_numpy(scaled_ND).to(device)
    if len(whole_ND) >= whole_ND.shape[1]:
        basis_AD = torch.linalg.eigh((whole_ND.T @ whole_ND).cpu().double()).eigenvectors.T.to(whole_ND)
    else:
        exact_ND = whole_ND.cpu().double()  # the products of images are squares of what counts: float32 loses half
        squares_N, images_NN = torch.linalg.eigh(exact_ND @ exact_ND.T)
        is_kept_N = squares_N > 1e-10 * squares_N[-1]
        basis_AD = ((images_NN[:, is_kept_N] / squares_N[is_kept_N].sqrt()).T @ exact_ND).to(whole_ND)
    features_NR = pad(whole_ND @ basis_AD.T, (0, 1), value=1.0)
    return Axes(mean_D=mean_D, scale=scale, basis_AD=basis_AD, features_NR=features_NR)


def deal_folds(class_indices_N: Array, *, fold_count: int, seed: int) -> Array:
    """Return the fold (N,) that holds out each image: every class, in random order, is dealt evenly over the folds."""
    shuffled_N = np.random.default_rng(seed).permutation(len(class_indices_N))
    by_class_N = shuffled_N[np.argsort(class_indices_N[shuffled_N], kind="stable")]
    fold_N = np.empty(len(class_indices_N), dtype=np.int64)
    fold_N[by_class_N] = np.arange(len(class_indices_N)) % fold_count
    return fold_N


def _held_out(class_indices_N: Array, seed: int) -> Array:
    """Return which images each fold holds out, (F, N); as many folds as the smallest class has images but 2 to FOLDS.

    A fold whose remaining images are all of one class tells nothing and is left out; there may be none at all.
    """
    counts = np.unique(class_indices_N, return_counts=True)[1]
    fold_count = int(np.clip(counts.min(), 2, min(FOLDS, counts.max())))
    held_out_FN = deal_folds(class_indices_N, fold_count=fold_count, seed=seed) == np.arange(fold_count)[:, None]
    is_telling_F = [counts.max() > 1 and len(np.unique(class_indices_N[~held_out_N])) > 1 for held_out_N in held_out_FN]
    kept_FN: Array = held_out_FN[is_telling_F]
    return kept_FN


def are_folds_shared(images: int, class_count: int) -> bool:
    """Tell whether several processes share the folds of so many images, views of them included.

    They do where one fold is solved at a time anyway, so that the bits are those of one process.
    """
    return images * class_count > MOST_LOGITS // 2


def _best_trial(problem: Problems, axes: Axes, held_out_FN: Tensor, *, copies: int, processes: Processes) -> _Trial:
    """Try the strengths and return the one with the least log loss on the images that the folds hold out.

    They are the first of the `problem`, and held out is an image in all its `copies`.

    The strongest regularisation comes first, and each solution starts from the line through the two before it, until
    the log loss rises: behind its minimum lie the solutions that overfit, and they take the longest to find.
    """
    has_own_bases = len(held_out_FN) * axes.features_NR.numel() <= MOST_FOLD_NUMBERS
    held_out_FN = held_out_FN[processes.rank :: processes.count]
    left_out_FN = held_out_FN.tile(copies)
    scored_FN = pad(held_out_FN, (0, left_out_FN.shape[1] - held_out_FN.shape[1]))
    folds = replace(
        problem,
        features_BNR=_fold_features(problem, axes, left_out_FN) if has_own_bases else problem.features_BNR,
        image_weights_BN=problem.image_weights_BN * ~left_out_FN,
    )
    weight_FKR = before_FKR = folds.start()
    weight_sum = float(problem.image_weights_BN.sum())
    loss = math.log(problem.class_count)  # of knowing nothing
    # A class that a fold holds out whole says nothing about strengths: its images are wrong for certain.
    is_known_FN = (weight_FKR[:, :, -1] > BARRED)[:, problem.class_indices_N]
    best: _Trial | None = None
    for strength in STRENGTHS:
        start_FKR = 2 * weight_FKR - before_FKR
        tolerance = FOLD_TOLERANCE * max(loss / FINE_LOSS, 1) ** 2 * weight_sum
        before_FKR, weight_FKR = weight_FKR, solve(folds, strength=strength, start_BKR=start_FKR, tolerance=tolerance)
        counting_FN = problem.image_weights_BN * scored_FN * is_known_FN
        own = _score(replace(folds, image_weights_BN=counting_FN), scored_FN, weight_FKR)
        accuracy_F, loss_F = np.array(processes.gather_shares(own.tolist())).T
        trial = _Trial(strength, weight_FKR, accuracy_F, loss_F)
        if best and trial.loss_F.mean() > best.loss_F.mean():
            break
        best, loss = trial, float(trial.loss_F.mean())
    assert best
    solutions_FKR = processes.gather_shares(list(best.weight_FKR.cpu().numpy()))
    return best._replace(weight_FKR=torch.from_numpy(np.stack(solutions_FKR)).to(best.weight_FKR))


def _fold_features(problem: Problems, axes: Axes, held_out_FN: Tensor) -> Tensor:
    """Return the features of all images, (F, N, R), each fold's in a basis that its held-out images took no part in."""
    bases = (axes.within(problem.class_indices_N, ~held_out_N) for held_out_N in held_out_FN)
    features_FNR = axes.features_NR.new_empty(len(held_out_FN), *axes.features_NR.shape)
    for features_NR, basis_RR in zip(features_FNR, bases, strict=True):
        torch.mm(axes.features_NR, basis_RR, out=features_NR)
    return features_FNR


def _score(held_out: Problems, held_out_FN: Tensor, weight_FKR: Tensor) -> Array:
    """Return accuracy and log loss of each fold, (F, 2)."""
    logits_FKN = held_out.logits(_settle(weight_FKR))
    classes_FN = held_out.class_indices_N.expand(len(logits_FKN), -1)
    counting_FN = held_out.image_weights_BN
    loss_FN = counting_FN * cross_entropy(logits_FKN, classes_FN, reduction="none")
    is_right_FN = (logits_FKN.argmax(dim=1) == classes_FN) & held_out_FN
    right_F, held_out_F, loss_F, counting_F = (
        values_FN.sum(dim=1).cpu().numpy() for values_FN in (is_right_FN, held_out_FN, loss_FN, counting_FN)
    )
    return np.stack([right_F / held_out_F, loss_F / counting_F.clip(1e-12)], axis=1)


def _settle(weight_BKR: Tensor) -> Tensor:
    """Return the weights with biases around zero, and those of classes without images 10 below the lowest."""
    bias_BK = weight_BKR[:, :, -1]
    has_images_BK = bias_BK > BARRED
    mean_B1 = (bias_BK * has_images_BK).sum(dim=1, keepdim=True) / has_images_BK.sum(dim=1, keepdim=True)
    lowest_B1 = bias_BK.where(has_images_BK, torch.inf).amin(dim=1, keepdim=True)
    settled_BK1 = (bias_BK.where(has_images_BK, lowest_B1 - 10) - mean_B1)[:, :, None]
    return torch.cat([weight_BKR[:, :, :-1], settled_BK1], dim=2)


def _between(weight_FKR: Tensor) -> Tensor:
    """Return the mean solution of the folds, (1, K, R), near the one for all images.

    A fold may lack a class, whose bias is then far below: the greatest stands for all.
    """
    return torch.cat([weight_FKR[:, :, :-1].mean(dim=0), weight_FKR[:, :, -1:].amax(dim=0)], dim=1)[None]
