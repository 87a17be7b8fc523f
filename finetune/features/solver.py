"""Multinomial logistic regression brought to its optimum, for several weightings of the same images at once."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

# Shapes: B problems, N images, R features with a last column of ones for the bias, K classes.
# Logits are (B, K, N): a softmax over few classes runs many times faster where the images lie next to each other.

TOLERANCE = 1e-7  # no probability of an image that counts 1 is then off by more than about 2e-4
MOST_STEPS = 1_000
PATIENCE = 20  # steps without progress, after which float32 can tell no more
MOST_TRIALS = 10  # of the length of a step
MOST_LOGITS = 2**20  # in each of about eight arrays, so that they stay in the caches; one problem may take more
BARRED = -1e4  # bias of a class without images: its probability is exactly zero, so that it takes no part


@dataclass(frozen=True, kw_only=True)
class Problems:
    """B logistic regressions that differ in how much each image counts.

    Args:
        features_NR: Float32, around zero and best uncorrelated (their principal axes); the last column is all ones.
        class_indices_N: Int64, on the same device.
        image_weights_BN: Float32, not negative; 0 holds an image out.
        class_count: K.
    """

    features_NR: Tensor
    class_indices_N: Tensor
    image_weights_BN: Tensor
    class_count: int

    def start(self) -> Tensor:
        """Return weights (B, K, R) of zero, and biases that give the frequencies of the classes."""
        images_BK = self.image_weights_BN.new_zeros(len(self.image_weights_BN), self.class_count)
        images_BK.index_add_(1, self.class_indices_N, self.image_weights_BN)
        return pad(images_BK.log().clamp_min(BARRED)[:, :, None], (self.features_NR.shape[1] - 1, 0))

    def logits(self, weight_BKR: Tensor) -> Tensor:
        """Return the logits of every image in every problem, (B, K, N)."""
        return (weight_BKR.flatten(0, 1) @ self.features_NR.T).view(*weight_BKR.shape[:2], -1)


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
    parts = zip((strength_B1 * problems.image_weights_BN).split(at_once), start_BKR.split(at_once), strict=True)
    return torch.cat(
        [_descend(replace(problems, image_weights_BN=part), start, strength * tolerance) for part, start in parts]
    )


def _descend(problems: Problems, weight_BKR: Tensor, tolerance: float) -> Tensor:
    """Go down by conjugate gradients, preconditioned with the diagonal of the Hessian.

    The diagonal is nearly all of the Hessian where features do not correlate, and it follows the probabilities.

    Source: Hager & Zhang 2005, A new conjugate gradient method with guaranteed descent and an efficient line search.
    """
    spread_R = problems.features_NR.square().mean(dim=0)
    penalty_R = pad(torch.ones_like(spread_R[1:]), (0, 1))  # none on the bias
    logits_BKN = problems.logits(weight_BKR)
    probabilities_BKN, residual_BKN = _residual(problems, logits_BKN)
    direction_BKR, previous_BKR = torch.zeros_like(weight_BKR), torch.zeros_like(weight_BKR)
    least, waited = torch.inf, 0
    for _ in range(MOST_STEPS):
        gradient_BKR = (residual_BKN.flatten(0, 1) @ problems.features_NR).view_as(weight_BKR) + penalty_R * weight_BKR
        variance_BKN = (probabilities_BKN - probabilities_BKN.square()) * problems.image_weights_BN[:, None]
        hessian_BKR = variance_BKN.sum(dim=2, keepdim=True) * spread_R + penalty_R.clamp_min(1e-6)
        downhill_BKR = -gradient_BKR / hessian_BKR
        error_B = -_dot(gradient_BKR, downhill_BKR)
        worst = float(error_B.max())
        least, waited = (worst, 0) if worst < least else (least, waited + 1)
        if worst <= tolerance or waited == PATIENCE:
            break
        beta_B = _beta(direction_BKR, downhill_BKR, gradient_BKR, gradient_BKR - previous_BKR, hessian_BKR)
        direction_BKR = beta_B[:, None, None] * direction_BKR + downhill_BKR
        direction_BKR *= (error_B > tolerance)[:, None, None]
        previous_BKR = gradient_BKR
        along_BKN = problems.logits(direction_BKR)
        decay_BKR = penalty_R * direction_BKR
        decay_B2 = torch.stack([_dot(decay_BKR, weight_BKR), _dot(decay_BKR, direction_BKR)], dim=1)
        length_B, probabilities_BKN, residual_BKN = _search(
            problems, logits_BKN, along_BKN, probabilities_BKN, _dot(gradient_BKR, direction_BKR), decay_B2
        )
        weight_BKR = weight_BKR + length_B[:, None, None] * direction_BKR
        logits_BKN += length_B[:, None, None] * along_BKN
    return weight_BKR


def _beta(
    direction_BKR: Tensor, downhill_BKR: Tensor, gradient_BKR: Tensor, change_BKR: Tensor, hessian_BKR: Tensor
) -> Tensor:
    """Return how much of the last direction the next one keeps; equation 1.3 of the source, preconditioned."""
    along_B = _dot(direction_BKR, change_BKR)
    turn_B = 2 * _dot(change_BKR, change_BKR / hessian_BKR) * _dot(direction_BKR, gradient_BKR) / along_B
    return torch.where(along_B > 0, -(_dot(change_BKR, downhill_BKR) + turn_B) / along_B, 0)  # 0 before the first step


def _search(
    problems: Problems,
    logits_BKN: Tensor,
    along_BKN: Tensor,
    probabilities_BKN: Tensor,
    slope_B: Tensor,
    decay_B2: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the length of the step after which the slope is flat, and probabilities and residual there.

    Newton's method on the slope, kept between a length that is too short and one that is too long. Logits are linear
    in the length, so that no product with the features is needed.
    """
    enough_B = 0.3 * slope_B.abs()
    length_B = low_B = torch.zeros_like(slope_B)
    high_B = torch.full_like(slope_B, torch.inf)
    is_flat_B = torch.zeros_like(slope_B, dtype=torch.bool)
    for _ in range(MOST_TRIALS):
        low_B, high_B = torch.where(slope_B < 0, length_B, low_B), torch.where(slope_B < 0, high_B, length_B)
        weighted_BKN = probabilities_BKN * along_BKN
        mean_square_BN, mean_BN = (weighted_BKN * along_BKN).sum(dim=1), weighted_BKN.sum(dim=1)
        bend_B = (problems.image_weights_BN * (mean_square_BN - mean_BN.square())).sum(dim=1) + decay_B2[:, 1]
        newton_B = length_B - slope_B / bend_B.clamp_min(1e-30)
        middle_B = torch.where(high_B.isinf(), 2 * low_B + 1, (low_B + high_B) / 2)
        next_B = torch.where((newton_B > low_B) & (newton_B < high_B), newton_B, middle_B)
        length_B = torch.where(is_flat_B, length_B, next_B)
        probabilities_BKN, residual_BKN = _residual(problems, logits_BKN + length_B[:, None, None] * along_BKN)
        slope_B = _dot(residual_BKN, along_BKN) + decay_B2[:, 0] + length_B * decay_B2[:, 1]
        is_flat_B = slope_B.abs() <= enough_B
        if bool(is_flat_B.all()):
            break
    return length_B, probabilities_BKN, residual_BKN


def _residual(problems: Problems, logits_BKN: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities, and by how much each exceeds the truth times what its image counts."""
    probabilities_BKN = logits_BKN.softmax(dim=1)
    residual_BKN = probabilities_BKN * problems.image_weights_BN[:, None]
    truth_B1N = problems.class_indices_N.expand(len(logits_BKN), 1, -1)
    return probabilities_BKN, residual_BKN.scatter_add_(1, truth_B1N, -problems.image_weights_BN[:, None])


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=(1, 2))
