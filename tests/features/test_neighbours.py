"""The vote of the nearest neighbours, against a search written out in full."""

from collections import Counter

import numpy as np
import pytest

from finetune.features.extract import Features
from finetune.features.neighbours import NEIGHBOURS, leave_one_out_accuracy, neighbour_accuracy


def points(count: int, *, classes: int, seed: int, spread: float = 1.0) -> Features:
    centres_KD = np.random.default_rng(99).normal(size=(classes, 8))
    rng = np.random.default_rng(seed)
    class_indices_N = rng.integers(0, classes, count)
    features_ND = centres_KD[class_indices_N] + spread * rng.normal(size=(count, 8))
    return Features(features_ND=features_ND.astype(np.float32), class_indices_N=class_indices_N)


def given(features: list[list[float]], class_indices: list[int]) -> Features:
    return Features(features_ND=np.array(features, dtype=np.float32), class_indices_N=np.array(class_indices))


def vote(query_D: np.ndarray, others: list[tuple[np.ndarray, int]], count: int) -> int:
    """Return the class most of the `count` nearest have, a tie going to the nearest of the tied."""

    def distance(other: tuple[np.ndarray, int]) -> float:
        return 1 - float(query_D @ other[0]) / (np.linalg.norm(query_D) * np.linalg.norm(other[0]))

    classes = [label for _, label in sorted(others, key=distance)[:count]]
    votes = Counter(classes)
    return next(label for label in classes if votes[label] == max(votes.values()))


def brute_leave_one_out(train: Features, count: int) -> float:
    rows = list(zip(train.features_ND.astype(np.float64), train.class_indices_N.tolist(), strict=True))
    winners = [vote(query, rows[:i] + rows[i + 1 :], count) for i, (query, _) in enumerate(rows)]
    return float(np.mean(np.array(winners) == train.class_indices_N))


@pytest.mark.parametrize(("classes", "spread"), [(2, 0.5), (4, 1.0), (10, 2.0)])
def test_leave_one_out_equals_a_search_written_out(classes: int, spread: float) -> None:
    train = points(60, classes=classes, seed=classes, spread=spread)
    assert leave_one_out_accuracy(train) == pytest.approx(brute_leave_one_out(train, NEIGHBOURS))


def test_held_out_equals_a_search_written_out() -> None:
    train, held_out = points(50, classes=4, seed=1), points(20, classes=4, seed=2)
    rows = list(zip(train.features_ND.astype(np.float64), train.class_indices_N.tolist(), strict=True))
    winners = [vote(query, rows, NEIGHBOURS) for query in held_out.features_ND.astype(np.float64)]
    assert neighbour_accuracy(train, held_out) == pytest.approx(np.mean(np.array(winners) == held_out.class_indices_N))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_fewer_images_than_neighbours_let_all_others_vote(count: int) -> None:
    train = points(count, classes=2, seed=count)
    assert leave_one_out_accuracy(train) == pytest.approx(brute_leave_one_out(train, count - 1))


def test_an_image_does_not_vote_for_itself() -> None:
    assert leave_one_out_accuracy(given([[1, 0], [0, 1]], [0, 1])) == 0.0


def test_tie_goes_to_the_nearest_of_the_tied() -> None:
    train = given([[1, 0.1], [1, 0.2], [1, 0.3], [1, 0.4], [0, 1]], [1, 2, 2, 1, 3])
    assert neighbour_accuracy(train, given([[1, 0]], [1])) == 1.0
    assert neighbour_accuracy(train, given([[1, 0]], [2])) == 0.0


def test_direction_counts_and_length_does_not() -> None:
    train = given([[100, 1], [100, 2], [1, 100], [2, 100]], [0, 0, 1, 1])
    assert neighbour_accuracy(train, given([[0.01, 0], [0, 0.01]], [0, 1])) == 1.0
