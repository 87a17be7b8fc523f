"""The vote of the nearest neighbours, against a search written out in full."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from finetune.features import neighbours
from finetune.features.extract import Features
from finetune.features.neighbours import NEIGHBOURS, leave_one_out_accuracy, nearest_vectors, neighbour_accuracy

CPU = torch.device("cpu")


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


def nearest_others(vectors_ND: np.ndarray, count: int = NEIGHBOURS) -> np.ndarray:
    asked_Q = np.arange(len(vectors_ND))
    return nearest_vectors(vectors_ND, vectors_ND, asked_Q=asked_Q, count=count, leave_self_out=True, device=CPU)


@pytest.fixture(params=[(1024, 8192, 2**23), (7, 13, 2**23), (64, 1, 2**23), (1024, 8192, 300)], ids=str)
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("QUERIES_AT_ONCE", "VECTORS_AT_ONCE", "VALUES_AT_ONCE"), request.param, strict=True):
        monkeypatch.setattr(neighbours, name, value)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dimensions", [3, 40])
def test_neighbours_are_those_of_scikit_learn_whatever_the_blocks(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    vectors_ND, queries_QD = (rng.normal(size=(count, dimensions)).astype(np.float32) for count in (120, 50))
    judge = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(vectors_ND.astype(np.float64))
    assert np.array_equal(nearest_others(vectors_ND), judge.kneighbors(return_distance=False))
    asked_Q = np.array([3, 4, 49])
    found_QJ = nearest_vectors(
        vectors_ND, queries_QD, asked_Q=asked_Q, count=NEIGHBOURS, leave_self_out=False, device=CPU
    )
    assert np.array_equal(found_QJ, judge.kneighbors(queries_QD[asked_Q], return_distance=False))


def test_neighbours_of_digits_are_as_near_as_those_of_scikit_learn() -> None:
    pixels_ND = load_digits().data
    judge = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(pixels_ND)
    distance_NJ, expected_NJ = judge.kneighbors()
    found_NJ = nearest_others(pixels_ND.astype(np.float32))
    unit_ND = pixels_ND / np.linalg.norm(pixels_ND, axis=1, keepdims=True)
    np.testing.assert_allclose(1 - np.einsum("nd,njd->nj", unit_ND, unit_ND[found_NJ]), distance_NJ, atol=1e-6)
    assert (found_NJ == expected_NJ).all(axis=1).mean() > 0.99, "all but those equally near"


@pytest.mark.usefixtures("_blocks")
def test_of_equally_near_vectors_the_lower_row_comes_first() -> None:
    vectors_ND = np.tile(np.array([[3, 4], [0, 1]], dtype=np.float32), (10, 1))  # even rows alike, odd rows alike
    expected = [[row for row in range(place % 2, 20, 2) if row != place][:NEIGHBOURS] for place in range(20)]
    assert nearest_others(vectors_ND).tolist() == expected


@pytest.mark.usefixtures("_blocks")
def test_vector_without_length_is_as_far_from_all() -> None:
    vectors_ND = np.array([[1, 0], [0, 0], [2, 0.1], [3, 0.5]], dtype=np.float32)
    assert nearest_others(vectors_ND, count=3).tolist() == [[2, 3, 1], [0, 2, 3], [0, 3, 1], [2, 0, 1]]


def test_of_many_images_a_sample_is_asked_and_all_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = points(300, classes=4, seed=1), points(200, classes=4, seed=2)
    everyone = leave_one_out_accuracy(train), neighbour_accuracy(train, held_out)
    monkeypatch.setattr(neighbours, "MOST_QUERIES", 40)
    sampled = leave_one_out_accuracy(train), neighbour_accuracy(train, held_out)
    assert sampled == (leave_one_out_accuracy(train), neighbour_accuracy(train, held_out)), "the same sample again"
    for share, whole in zip(sampled, everyone, strict=True):
        assert share * 40 == pytest.approx(round(share * 40)), "a share of 40"
        assert share == pytest.approx(whole, abs=0.25)


def test_vectors_that_may_only_be_read_will_do() -> None:
    train = points(20, classes=2, seed=0)
    train.features_ND.setflags(write=False)
    train.class_indices_N.setflags(write=False)
    assert 0 <= leave_one_out_accuracy(train) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_finds_the_same_neighbours() -> None:
    train, held_out = points(300, classes=4, seed=1), points(200, classes=4, seed=2)
    device = torch.device("cuda")
    assert leave_one_out_accuracy(train, device=device) == leave_one_out_accuracy(train)
    assert neighbour_accuracy(train, held_out, device=device) == neighbour_accuracy(train, held_out)
