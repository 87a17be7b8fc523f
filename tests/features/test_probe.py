"""The solved head equals scikit-learn's, on raw features, for classes and images in any number."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.preprocessing import StandardScaler

from finetune.features.extract import Features
from finetune.features.probe import STRENGTHS, Probe, solve_probe
from finetune.runs import strict_json


def blobs(counts: list[int], *, dimensions: int, spread: float = 1.0, seed: int = 0) -> Features:
    """Return `counts[k]` points around the centre of each class k, in units that differ from feature to feature."""
    rng = np.random.default_rng(seed)
    centres_KD = rng.normal(size=(len(counts), dimensions))
    class_indices_N = np.repeat(np.arange(len(counts)), counts)
    points_ND = centres_KD[class_indices_N] + spread * rng.normal(size=(len(class_indices_N), dimensions))
    points_ND = points_ND * np.logspace(-2, 2, dimensions) + np.linspace(-50, 50, dimensions)
    return Features(features_ND=points_ND.astype(np.float32), class_indices_N=class_indices_N)


def oracle(train: Features, strength: float) -> np.ndarray:
    """Return the probabilities (N, K) that scikit-learn gives the training images."""
    standard_ND = StandardScaler().fit_transform(train.features_ND.astype(np.float64))
    solver = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000).fit(standard_ND, train.class_indices_N)
    return solver.predict_proba(standard_ND)


@pytest.mark.parametrize(
    ("counts", "dimensions"),
    [([30, 20, 25], 6), ([30, 20], 6), ([8, 6, 7], 60), ([9, 7], 60), ([10, 11], 21)],
    ids=["3 classes", "2 classes", "3 classes, few images", "2 classes, few images", "as many images as features"],
)
def test_probabilities_equal_those_of_scikit_learn_on_raw_features(counts: list[int], dimensions: int) -> None:
    train = blobs(counts, dimensions=dimensions, spread=2.0)
    probe = solve_probe(train, class_count=len(counts), seed=0)
    assert (probe.weight_KD.shape, probe.weight_KD.dtype) == ((len(counts), dimensions), np.float32)
    assert (probe.bias_K.shape, probe.bias_K.dtype) == ((len(counts),), np.float32)
    probabilities_NK = softmax(probe.logits(train.features_ND), axis=1)
    np.testing.assert_allclose(probabilities_NK, oracle(train, probe.strength), atol=1e-3)


@pytest.mark.parametrize("dimensions", [5, 80], ids=["more images", "more features"])
def test_accuracy_is_that_of_a_stratified_cross_validation(dimensions: int) -> None:
    train = blobs([9, 7, 8], dimensions=dimensions, spread=3.0)
    probe = solve_probe(train, class_count=3, seed=4)
    standard_ND = StandardScaler().fit_transform(train.features_ND.astype(np.float64))
    folds = StratifiedKFold(5, shuffle=True, random_state=4)
    scores_S = [
        cross_validate(
            LogisticRegression(C=strength, max_iter=10_000),
            standard_ND,
            train.class_indices_N,
            cv=folds,
            scoring=("accuracy", "neg_log_loss"),
            error_score="raise",
        )
        for strength in STRENGTHS
    ]
    best = int(np.argmax([scores["test_neg_log_loss"].mean() for scores in scores_S]))
    assert probe.strength == STRENGTHS[best]
    assert probe.accuracy == pytest.approx(scores_S[best]["test_accuracy"].mean())
    assert probe.spread == pytest.approx(scores_S[best]["test_accuracy"].std())


def test_classes_that_are_told_apart_at_once_are_predicted_with_confidence() -> None:
    train = blobs([10, 10], dimensions=30, spread=0.01)
    probe = solve_probe(train, class_count=2, seed=0)
    assert (probe.accuracy, probe.spread) == (1.0, 0.0)
    assert softmax(probe.logits(train.features_ND), axis=1).max(axis=1).min() > 0.95


def test_prediction_is_the_class_of_the_largest_logit() -> None:
    train = blobs([12, 12, 12], dimensions=10, spread=0.1)
    probe = solve_probe(train, class_count=3, seed=0)
    assert probe.predict(train.features_ND).tolist() == train.class_indices_N.tolist()


def test_same_seed_solves_the_same_head() -> None:
    train = blobs([12, 12, 12], dimensions=10, spread=3.0)
    one, other = (solve_probe(train, class_count=3, seed=5) for _ in range(2))
    assert one.summary() == other.summary()
    assert np.array_equal(one.weight_KD, other.weight_KD)


def test_feature_that_never_changes_is_ignored() -> None:
    train = blobs([12, 12], dimensions=6)
    train.features_ND[:, 2] = 7.0
    probe = solve_probe(train, class_count=2, seed=0)
    assert np.isfinite(probe.weight_KD).all()
    np.testing.assert_allclose(probe.weight_KD[:, 2], 0, atol=1e-6)
    np.testing.assert_allclose(
        softmax(probe.logits(train.features_ND), axis=1), oracle(train, probe.strength), atol=1e-3
    )


@pytest.mark.parametrize("dimensions", [4, 40], ids=["more images", "more features"])
def test_class_without_images_is_never_predicted(dimensions: int) -> None:
    some = blobs([10, 10, 10], dimensions=dimensions, spread=2.0)
    train = Features(features_ND=some.features_ND, class_indices_N=np.array([0, 2, 4])[some.class_indices_N])
    probe = solve_probe(train, class_count=6, seed=0)
    assert probe.weight_KD.shape == (6, dimensions)
    far_ND = np.random.default_rng(1).normal(scale=1e4, size=(500, dimensions)).astype(np.float32)
    assert set(probe.predict(np.concatenate([train.features_ND, far_ND])).tolist()) <= {0, 2, 4}
    probabilities_NK = softmax(probe.logits(train.features_ND), axis=1)
    assert probabilities_NK[:, [1, 3, 5]].max() < 1e-3
    np.testing.assert_allclose(probabilities_NK[:, [0, 2, 4]], oracle(train, probe.strength), atol=1e-3)


def test_two_classes_in_the_middle_of_more() -> None:
    some = blobs([10, 10], dimensions=5, spread=0.1)
    train = Features(features_ND=some.features_ND, class_indices_N=np.array([3, 1])[some.class_indices_N])
    assert solve_probe(train, class_count=5, seed=0).predict(train.features_ND).tolist() == [3] * 10 + [1] * 10


@pytest.mark.parametrize("dimensions", [3, 30], ids=["more images", "more features"])
def test_class_with_one_image_is_solved_beside_others(dimensions: int) -> None:
    train = blobs([10, 10, 1], dimensions=dimensions, spread=0.1)
    probe = solve_probe(train, class_count=3, seed=0)
    assert probe.accuracy is not None
    assert 0.8 <= probe.accuracy < 1, "the one image cannot be held out and known"
    np.testing.assert_allclose(
        softmax(probe.logits(train.features_ND), axis=1), oracle(train, probe.strength), atol=1e-3
    )


@pytest.mark.parametrize("counts", [[5, 1], [1, 40], [2, 1]], ids=str)
def test_one_image_of_one_of_two_classes(counts: list[int]) -> None:
    train = blobs(counts, dimensions=4, spread=0.1)
    probe = solve_probe(train, class_count=2, seed=0)
    assert set(probe.predict(train.features_ND).tolist()) <= {0, 1}


def test_nothing_can_be_held_out_where_every_class_has_one_image() -> None:
    train = blobs([1, 1, 1], dimensions=5)
    probe = solve_probe(train, class_count=3, seed=0)
    assert (probe.accuracy, probe.spread) == (None, None)
    assert probe.predict(train.features_ND).tolist() == [0, 1, 2]
    np.testing.assert_allclose(
        softmax(probe.logits(train.features_ND), axis=1), oracle(train, probe.strength), atol=1e-3
    )


def test_small_classes_get_fewer_folds() -> None:
    train = blobs([2, 30], dimensions=4, spread=0.1)
    assert solve_probe(train, class_count=2, seed=0).accuracy is not None


def test_summary_is_plain() -> None:
    probe = Probe(weight_KD=np.eye(2), bias_K=np.zeros(2), strength=0.1, accuracy=None, spread=None)
    assert strict_json.parse(strict_json.dump(probe.summary())) == {"accuracy": None, "spread": None, "strength": 0.1}
    assert probe.logits(np.array([[1.0, 2.0]])).tolist() == [[1.0, 2.0]]
