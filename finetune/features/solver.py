"""Multinomial logistic regression brought to its optimum, for several weightings of the same images at once."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Shapes: B problems, N images, R features with a last column of ones for the bias, K classes.
# Logits are (B, K, N): a softmax over few classes runs many times faster where the images lie next to each other.

TOLERANCE = 1e-7  # no probability of an image that counts 1 is then off by more than about 2e-4
MOST_STEPS = 1_000
PATIENCE = 10  # steps that gain next to nothing, after which float32 can tell no more
MOST_TRIALS = 10  # of the length of a step
MOST_LOGITS = 2**17  # in each of about eight arrays, so that they stay in the caches; one problem may take more
BARRED = -1e4  # bias of a class without images: its probability is exactly zero, so that it takes no part


@dataclass(frozen=True, kw_only=True)
class Problems:
    """B logistic regressions that differ in how much each image counts, and perhaps in its features.

    Args:
        features_BNR: Float32, around zero and best uncorrelated (as on principal axes), the last column all ones. One
            for each problem, or a single one for all of them.
        class_indices_N: Int64, on the same device.
        image_weights_BN: Float32, not negative; 0 holds an image out.
        class_count: K.
    """

    features_BNR: Tensor
    class_indices_N: Tensor
    image_weights_BN: Tensor
    class_count: int

    def start(self) -> Tensor:
        """Return weights (B, K, R) of zero, and biases that give the frequencies of the classes."""
        images_BK = self.image_weights_BN.new_zeros(len(self.image_weights_BN), self.class_count)
        images_BK.index_add_(1, self.class_indices_N, self.image_weights_BN)
        return pad(images_BK.log().clamp_min(BARRED)[:, :, None], (self.features_BNR.shape[2] - 1, 0))

    def logits(self, weight_BKR: Tensor) -> Tensor:
        """Return the logits of every image in every problem, (B, K, N)."""
        return weight_BKR @ self.features_BNR.mT

    def some(self, part: slice) -> "Problems":
        """Return some of the problems, without the images that count in none of them."""
        image_weights_BN = self.image_weights_BN[part]
        features_BNR = self.features_BNR[part] if len(self.features_BNR) > 1 else self.features_BNR
        kept_N = image_weights_BN.any(dim=0)
        if bool(kept_N.all()):
            return replace(self, features_BNR=features_BNR, image_weights_BN=image_weights_BN)
        return replace(
            self,
            features_BNR=features_BNR[:, kept_N],
            class_indices_N=self.class_indices_N[kept_N],
            image_weights_BN=image_weights_BN[:, kept_N],
        )


def solve(problems: Problems, *, strength: float, start_BKR: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Minimise strength · Σ image weight · cross-entropy + ½ ‖W‖² over the weights and free biases, (B, K, R).

    This is the optimum of scikit-learn's `LogisticRegression(C=strength)`. Of two classes that one penalises only the
    difference of our two rows, which doubles the penalty; so it is doubled here.

    Args:
        problems: The images and what each counts.
        strength: Inverse regularisation, above 0.
        start_BKR: Where to begin: `problems.start()`, or the solution for another strength.
        tolerance: What is left of Σ weight · p (1 - p) · (error of the logit)², about, when a problem counts as solved.
    """
    class_counts_B = (start_BKR[:, :, -1] > BARRED).sum(dim=1)
    strength_B1 = torch.where(class_counts_B == 2, strength / 2, strength)[:, None]
    at_once = max(1, MOST_LOGITS // (len(problems.class_indices_N) * problems.class_count))
    weighted = replace(problems, image_weights_BN=strength_B1 * problems.image_weights_BN)
    parts = [slice(first, first + at_once) for first in range(0, len(start_BKR), at_once)]
    if not parts:
        return start_BKR
    return torch.cat([_descend(weighted.some(part), start_BKR[part], strength * tolerance) for part in parts])


def _descend(problems: Problems, weight_BKR: Tensor, tolerance: float) -> Tensor:
    """Go down by conjugate gradients, preconditioned with the diagonal of the Hessian.

    The diagonal is nearly all of the Hessian where features do not correlate, and it follows the probabilities.

    Source: Hager & Zhang 2005, A new conjugate gradient method with guaranteed descent and an efficient line search.
    """
    spread_B1R = problems.features_BNR.square().mean(dim=1, keepdim=True)
    penalty_R = pad(torch.ones_like(weight_BKR[0, 0, 1:]), (0, 1))  # none on the bias
    point = _point(problems, problems.logits(weight_BKR))
    direction_BKR, previous_BKR = torch.zeros_like(weight_BKR), torch.zeros_like(weight_BKR)
    waited = 0
    for _ in range(MOST_STEPS):
        gradient_BKR = point.residual_BKN @ problems.features_BNR + penalty_R * weight_BKR
        variance_BK = (point.weighted_BKN * (1 - point.probabilities_BKN)).sum(dim=2)
        hessian_BKR = variance_BK[:, :, None] * spread_B1R + penalty_R.clamp_min(1e-6)
        downhill_BKR = -gradient_BKR / hessian_BKR
        error_B = -_dot(gradient_BKR, downhill_BKR)
        is_open_B = error_B > tolerance
        if not bool(is_open_B.any()) or waited == PATIENCE:
            break
        beta_B = _beta(direction_BKR, downhill_BKR, gradient_BKR, gradient_BKR - previous_BKR, hessian_BKR)
        direction_BKR = beta_B[:, None, None] * direction_BKR + downhill_BKR
        direction_BKR *= is_open_B[:, None, None]
        previous_BKR = gradient_BKR
        decay_BKR = penalty_R * direction_BKR
        decay_B2 = torch.stack([_dot(decay_BKR, weight_BKR), _dot(decay_BKR, direction_BKR)], dim=1)
        slope_B = _dot(gradient_BKR, direction_BKR)
        length_B, point = _search(problems, point, problems.logits(direction_BKR), slope_B, decay_B2)
        weight_BKR = weight_BKR + length_B[:, None, None] * direction_BKR
        waited = waited + 1 if bool((-slope_B * length_B < 0.01 * tolerance).all()) else 0
    return weight_BKR


class _Point(NamedTuple):
    """Where the descent stands: what the images' probabilities are there, and how far from the truth.

    `weighted_BKN` are the probabilities times what each image counts, `residual_BKN` is that less the weighted truth.
    """

    logits_BKN: Tensor
    probabilities_BKN: Tensor
    weighted_BKN: Tensor
    residual_BKN: Tensor


def _point(problems: Problems, logits_BKN: Tensor) -> _Point:
    weights_B1N = problems.image_weights_BN[:, None]
    probabilities_BKN = logits_BKN.softmax(dim=1)
    weighted_BKN = probabilities_BKN * weights_B1N
    truth_B1N = problems.class_indices_N.expand_as(weights_B1N)
    return _Point(logits_BKN, probabilities_BKN, weighted_BKN, weighted_BKN.scatter_add(1, truth_B1N, -weights_B1N))


def _beta(
    direction_BKR: Tensor, downhill_BKR: Tensor, gradient_BKR: Tensor, change_BKR: Tensor, hessian_BKR: Tensor
) -> Tensor:
    """Return how much of the last direction the next one keeps; equation 1.3 of the source, preconditioned."""
    along_B = _dot(direction_BKR, change_BKR)
    turn_B = 2 * _dot(change_BKR, change_BKR / hessian_BKR) * _dot(direction_BKR, gradient_BKR) / along_B
    return torch.where(along_B > 0, -(_dot(change_BKR, downhill_BKR) + turn_B) / along_B, 0)  # 0 before the first step


def _search(
    problems: Problems, start: _Point, along_BKN: Tensor, slope_B: Tensor, decay_B2: Tensor
) -> tuple[Tensor, _Point]:
    """Return the length of the step after which the slope is nearly flat, and the point there.

    Newton's method on the slope, kept between a length that is too short and one that is too long. Logits are linear
    in the length, so that no product with the features is needed.
    """
    enough_B = 0.3 * slope_B.abs()
    length_B = low_B = torch.zeros_like(slope_B)
    high_B = torch.full_like(slope_B, torch.inf)
    is_flat_B = torch.zeros_like(slope_B, dtype=torch.bool)
    point = start
    for _ in range(MOST_TRIALS):
        low_B, high_B = torch.where(slope_B < 0, length_B, low_B), torch.where(slope_B < 0, high_B, length_B)
        apart_BKN = along_BKN - (point.probabilities_BKN * along_BKN).sum(dim=1, keepdim=True)
        bend_B = _dot(point.weighted_BKN * apart_BKN, apart_BKN) + decay_B2[:, 1]
        newton_B = length_B - slope_B / bend_B.clamp_min(1e-30)
        middle_B = torch.where(high_B.isinf(), 2 * low_B + 1, (low_B + high_B) / 2)
        next_B = torch.where((newton_B > low_B) & (newton_B < high_B), newton_B, middle_B)
        length_B = torch.where(is_flat_B, length_B, next_B)
        point = _point(problems, torch.addcmul(start.logits_BKN, along_BKN, length_B[:, None, None]))
        slope_B = _dot(point.residual_BKN, along_BKN) + decay_B2[:, 0] + length_B * decay_B2[:, 1]
        is_flat_B = slope_B.abs() <= enough_B
        if bool(is_flat_B.all()):
            break
    return length_B, point


def _dot(one_BXY: Tensor, other_BXY: Tensor) -> Tensor:
    return (one_BXY[:, None].flatten(2) @ other_BXY.flatten(1)[:, :, None]).flatten()
