"""The solved head equals scikit-learn's, on raw features, for classes and images in any number."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from finetune.errors import ModelError
from finetune.features import probe as probe_module
from finetune.features import solver
from finetune.features.extract import Features
from finetune.features.probe import FOLDS, SHRINKAGE, STRENGTHS, Probe, deal_folds, solve_probe
from finetune.features.solver import Problems, solve
from finetune.runs import strict_json


def blobs(counts: list[int], *, dimensions: int, spread: float = 1.0, seed: int = 0) -> Features:
    """Return `counts[k]` points around the centre of each class k; features lie far off and vary in size."""
    rng = np.random.default_rng(seed)
    centres_KD = rng.normal(size=(len(counts), dimensions))
    class_indices_N = np.repeat(np.arange(len(counts)), counts)
    points_ND = centres_KD[class_indices_N] + spread * rng.normal(size=(len(class_indices_N), dimensions))
    points_ND = points_ND * np.logspace(-0.5, 0.5, dimensions) + np.linspace(-50, 50, dimensions)
    return Features(features_ND=points_ND.astype(np.float32), class_indices_N=class_indices_N)


def digits() -> Features:
    """Return 1,797 real digits of 8 × 8 raw pixels, some of which never change."""
    found = load_digits()
    return Features(features_ND=found.data.astype(np.float32), class_indices_N=found.target.astype(np.int64))


def whitened(train: Features, is_kept_N: np.ndarray | None = None) -> np.ndarray:
    """Return the features (N, D) such that the kept images scatter alike within the classes, mostly; mean square 1."""
    kept_N = np.ones(len(train), dtype=bool) if is_kept_N is None else is_kept_N
    centred_ND = train.features_ND.astype(np.float64) - train.features_ND.astype(np.float64).mean(axis=0)
    classes_N, size = train.class_indices_N, centred_ND.shape[1]
    means_ND = np.stack([centred_ND[kept_N & (classes_N == own)].mean(axis=0) for own in classes_N[kept_N]])
    scatter_DD = np.cov((centred_ND[kept_N] - means_ND).T, bias=True).reshape(size, size)
    shrunk_DD = SHRINKAGE * np.trace(scatter_DD) / size * np.eye(size) + (1 - SHRINKAGE) * scatter_DD
    squares_D, axes_DD = np.linalg.eigh(shrunk_DD if shrunk_DD.any() else np.eye(size))
    white_ND = centred_ND @ axes_DD / np.sqrt(squares_D)
    return white_ND / np.sqrt(np.square(white_ND[kept_N]).mean())


def oracle(train: Features, strength: float, class_weights: dict[int, float] | None = None) -> np.ndarray:
    """Return the probabilities (N, K) that scikit-learn gives the training images."""
    white_ND = whitened(train)
    judge = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000, class_weight=class_weights)
    return judge.fit(white_ND, train.class_indices_N).predict_proba(white_ND)


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


def shuffled(train: Features) -> Features:
    """Return the same features under labels that have nothing to do with them."""
    return replace(train, class_indices_N=np.random.default_rng(0).permutation(train.class_indices_N))


@pytest.mark.parametrize(
    "train",
    [
        digits(),
        blobs([150, 150, 150, 150], dimensions=20, spread=20.0),
        shuffled(blobs([40, 40, 40], dimensions=30)),
        blobs([30, 30, 30], dimensions=20, spread=1e-3),
        blobs([400, 20, 5], dimensions=15, spread=3.0),
        Features(
            features_ND=np.repeat(blobs([9, 9, 9], dimensions=12, spread=4.0).features_ND, 5, axis=0),
            class_indices_N=np.random.default_rng(3).integers(0, 3, 135),
        ),
        blobs([1, 1], dimensions=7),
    ],
    ids=["digits", "badly separated", "nothing to learn", "separable", "imbalanced", "duplicates at odds", "2 images"],
)
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_every_strength_is_solved_to_the_optimum(
    train: Features, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.features.probe.STRENGTHS", (strength,))
    monkeypatch.setattr("finetune.features.probe.USUAL_STRENGTH", strength)
    probe = solve_probe(train, class_count=int(train.class_indices_N.max()) + 1, seed=0)
    assert probe.strength == strength
    probabilities_NK = softmax(probe.logits(train.features_ND), axis=1)
    np.testing.assert_allclose(probabilities_NK, oracle(train, strength), atol=2e-4)


@pytest.mark.parametrize("counts", [[300, 20, 5], [100, 4]], ids=str)
def test_class_weights_are_those_of_scikit_learn(counts: list[int]) -> None:
    train = blobs(counts, dimensions=15, spread=2.0)
    weights_K = sum(counts) / (len(counts) * np.array(counts))  # "balanced"
    plain = solve_probe(train, class_count=len(counts), seed=0)
    weighted = solve_probe(train, class_count=len(counts), seed=0, class_weights_K=weights_K)
    probabilities_NK = softmax(weighted.logits(train.features_ND), axis=1)
    expected_NK = oracle(train, weighted.strength, dict(enumerate(weights_K)))
    np.testing.assert_allclose(probabilities_NK, expected_NK, atol=5e-4)
    recall, plain_recall = ((one.predict(train.features_ND)[-4:] == len(counts) - 1).sum() for one in (weighted, plain))
    assert recall >= plain_recall


def test_class_weights_of_one_change_nothing() -> None:
    train = blobs([12, 9, 5], dimensions=6, spread=2.0)
    plain, weighted = (
        solve_probe(train, class_count=3, seed=0, class_weights_K=weights_K) for weights_K in (None, np.ones(3))
    )
    assert plain.summary() == weighted.summary()
    assert np.array_equal(plain.weight_KD, weighted.weight_KD)


@pytest.mark.parametrize("has_own_features", [True, False], ids=["own features", "shared features"])
def test_problems_solved_together_are_solved_as_alone(has_own_features: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    train = blobs([30, 20, 25], dimensions=6, spread=2.0)
    features_ND = train.features_ND - train.features_ND.mean(axis=0)
    features_ND /= features_ND.std(axis=0)
    features_NR = torch.nn.functional.pad(torch.from_numpy(features_ND), (0, 1), value=1.0)
    together = Problems(
        features_BNR=torch.stack([features_NR] * 4) if has_own_features else features_NR[None],
        class_indices_N=torch.from_numpy(train.class_indices_N),
        image_weights_BN=torch.rand(4, len(train), generator=torch.Generator().manual_seed(0)).round(decimals=1),
        class_count=3,
    )
    weight_BKR = solve(together, strength=1.0, start_BKR=together.start())
    monkeypatch.setattr(solver, "MOST_LOGITS", 1)
    alone_BKR = solve(together, strength=1.0, start_BKR=together.start())
    assert not torch.equal(weight_BKR[0], weight_BKR[1])
    for weights in (weight_BKR, alone_BKR):
        assert weights.shape == (4, 3, 7)
    probabilities_BKN, alone_BKN = (together.logits(weights).softmax(dim=1) for weights in (weight_BKR, alone_BKR))
    torch.testing.assert_close(probabilities_BKN, alone_BKN, atol=2e-4, rtol=0)


def test_folds_of_very_many_images_share_one_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    train = blobs([60, 50, 55], dimensions=6, spread=2.0)
    own = solve_probe(train, class_count=3, seed=0)
    monkeypatch.setattr(probe_module, "MOST_FOLD_NUMBERS", 0)
    shared = solve_probe(train, class_count=3, seed=0)
    assert own.accuracy is not None
    assert shared.accuracy == pytest.approx(own.accuracy, abs=0.02)
    assert shared.strength == own.strength
    probabilities_NK, own_NK = (softmax(probe.logits(train.features_ND), axis=1) for probe in (shared, own))
    np.testing.assert_allclose(probabilities_NK, own_NK, atol=1e-3)


def held_out_scores(train: Features, held_out_N: np.ndarray, strength: float) -> tuple[float, float]:
    """Return accuracy and log loss of scikit-learn on images that took no part in anything."""
    white_ND, labels_N = whitened(train, ~held_out_N), train.class_indices_N
    judge = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000).fit(white_ND[~held_out_N], labels_N[~held_out_N])
    probabilities_HK = judge.predict_proba(white_ND[held_out_N])
    return judge.score(white_ND[held_out_N], labels_N[held_out_N]), log_loss(labels_N[held_out_N], probabilities_HK)


@pytest.mark.parametrize("dimensions", [5, 80], ids=["more images", "more features"])
def test_accuracy_is_that_of_a_stratified_cross_validation(dimensions: int) -> None:
    train = blobs([9, 7, 8], dimensions=dimensions, spread=2.0)
    probe = solve_probe(train, class_count=3, seed=4)
    fold_N = deal_folds(train.class_indices_N, fold_count=FOLDS, seed=4)
    scores_SF = [[held_out_scores(train, fold_N == fold, strength) for fold in range(FOLDS)] for strength in STRENGTHS]
    accuracy_SF, loss_SF = np.moveaxis(np.array(scores_SF), -1, 0)
    best = int(loss_SF.mean(axis=1).argmin())
    assert probe.strength == STRENGTHS[best]
    assert probe.accuracy == pytest.approx(accuracy_SF[best].mean())
    assert probe.spread == pytest.approx(accuracy_SF[best].std())


@pytest.mark.parametrize("counts", [[9, 7, 8], [20, 3, 41, 6], [5, 5], [2, 1, 30]], ids=str)
def test_folds_are_balanced_as_those_of_scikit_learn(counts: list[int]) -> None:
    labels_N = np.repeat(np.arange(len(counts)), counts)
    fold_count = min(FOLDS, max(2, *counts[1:2]))
    fold_N = deal_folds(labels_N, fold_count=fold_count, seed=0)
    dealt = [np.bincount(labels_N[fold_N == fold], minlength=len(counts)) for fold in range(fold_count)]
    assert np.ptp(dealt, axis=0).max() <= 1, "each class evenly"
    assert np.ptp(np.sum(dealt, axis=1)) <= 1, "folds of one size"
    if min(counts) >= fold_count:  # below, scikit-learn warns
        splits = StratifiedKFold(fold_count, shuffle=True, random_state=0).split(labels_N, labels_N)
        others = [np.bincount(labels_N[held_out], minlength=len(counts)) for _, held_out in splits]
        assert sorted(map(tuple, dealt)) == sorted(map(tuple, others))
    assert not np.array_equal(fold_N, deal_folds(labels_N, fold_count=fold_count, seed=1))


def test_an_image_and_its_views_count_as_one_image() -> None:
    train = blobs([9, 7, 8], dimensions=20, spread=2.0)
    alone = solve_probe(train, class_count=3, seed=4)
    repeated = solve_probe(train, views=[train.features_ND] * 3, class_count=3, seed=4)
    assert repeated.summary() == pytest.approx(alone.summary())
    probabilities_NK, alone_NK = (softmax(probe.logits(train.features_ND), axis=1) for probe in (repeated, alone))
    np.testing.assert_allclose(probabilities_NK, alone_NK, atol=1e-3)


def test_a_head_that_learns_from_views_equals_that_of_scikit_learn() -> None:
    train = blobs([9, 7, 8], dimensions=20, spread=2.0)
    noise_VND = np.random.default_rng(0).normal(size=(2, *train.features_ND.shape)).astype(np.float32)
    views = list(train.features_ND + noise_VND)
    every = Features(
        features_ND=np.concatenate([train.features_ND, *views]), class_indices_N=np.tile(train.class_indices_N, 3)
    )
    probe = solve_probe(train, views=views, class_count=3, seed=0)
    probabilities_NK = softmax(probe.logits(every.features_ND), axis=1)
    np.testing.assert_allclose(probabilities_NK, oracle(every, probe.strength / 3), atol=1e-3)


def test_no_view_of_an_image_is_learned_from_where_it_is_held_out() -> None:
    train = shuffled(blobs([40, 40, 40], dimensions=100))
    probe = solve_probe(train, views=[train.features_ND] * 4, class_count=3, seed=0)
    assert probe.accuracy is not None
    assert probe.accuracy < 0.5, "its label could only be known from a view"


def test_features_that_tell_nothing_are_regularised_most() -> None:
    train = shuffled(blobs([200, 200, 200], dimensions=100))
    assert max(solve_probe(train, class_count=3, seed=seed).strength for seed in range(3)) <= STRENGTHS[1]


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
    assert probe.predict(train.features_ND).tolist() == train.class_indices_N.tolist()
    assert np.isfinite(probe.weight_KD).all()


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
    held_out_FN = probe_module._held_out(train.class_indices_N, 0)
    assert held_out_FN.sum(axis=0).tolist() == [1] * 32
    assert held_out_FN[:, :2].sum(axis=1).tolist() == [1, 1]
    assert solve_probe(train, class_count=2, seed=0).accuracy == 1.0


def test_classes_that_a_fold_cannot_know_do_not_choose_the_strength() -> None:
    """Ten classes of one image each: every fold that holds one out is wrong about it, at any strength."""
    train = blobs([20, 20, *[1] * 10], dimensions=30, spread=0.3)
    weights_K = np.array([0.1, 0.1, *[3.0] * 10])
    probe = solve_probe(train, class_count=12, seed=0, class_weights_K=weights_K)
    assert probe.strength > STRENGTHS[0]
    assert (probe.predict(train.features_ND) == train.class_indices_N).all()


def test_summary_is_plain() -> None:
    unknown = {"accuracy": None, "spread": None, "loss": None}
    probe = Probe(weight_KD=np.eye(2), bias_K=np.zeros(2), strength=0.1, **unknown)
    assert strict_json.parse(strict_json.dump(probe.summary())) == {**unknown, "strength": 0.1}
    assert probe.logits(np.array([[1.0, 2.0]])).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    train = blobs([5, 5], dimensions=4)
    train.features_ND[3, 2] = value
    with pytest.raises(ModelError, match="not all finite"):
        solve_probe(train, class_count=2, seed=0)


def test_features_that_may_only_be_read_are_left_alone() -> None:
    train = blobs([6, 6], dimensions=4)
    before_ND = train.features_ND.copy()
    train.features_ND.setflags(write=False)
    train.class_indices_N.setflags(write=False)
    solve_probe(train, class_count=2, seed=0)
    assert np.array_equal(train.features_ND, before_ND)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dimensions", [10, 300], ids=["more images", "more features"])
def test_gpu_finds_the_same_optimum(dimensions: int) -> None:
    train = blobs([60, 50, 40], dimensions=dimensions, spread=3.0)
    probe = solve_probe(train, class_count=3, seed=0, device=torch.device("cuda"))
    probabilities_NK = softmax(probe.logits(train.features_ND), axis=1)
    np.testing.assert_allclose(probabilities_NK, oracle(train, probe.strength), atol=1e-3)


def test_no_slow_library_is_imported() -> None:
    program = (
        "import sys, finetune.features.probe, finetune.features.neighbours\n"
        "print(*(name for name in ('sklearn', 'scipy.stats') if name in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == ""
