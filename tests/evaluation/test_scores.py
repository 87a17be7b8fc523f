"""Scores against scikit-learn and against numbers worked by hand."""

import numpy as np
import pytest
from sklearn import metrics

from finetune.evaluation.scores import score
from finetune.runs import strict_json

# Six images of three classes. Predicted: a a b | b | c a.
TRUE = np.array([0, 0, 0, 1, 2, 2])
PROBABILITIES = np.array(
    [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.5, 0.25, 0.25]]
)


def random_case(images: int, classes: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    probabilities_NK = rng.dirichlet(np.ones(classes), images).astype(np.float32)
    return rng.integers(0, classes, images), probabilities_NK, [f"class {k}" for k in range(classes)]


def test_three_classes_by_hand() -> None:
    found = score(TRUE, PROBABILITIES, ["a", "b", "c"])
    assert (found.images, found.accuracy) == (6, pytest.approx(4 / 6))
    assert found.confusion == ((2, 1, 0), (0, 1, 0), (1, 0, 1))
    rows = {row.class_name: (row.precision, row.recall, row.f1, row.support) for row in found.per_class}
    assert rows["a"] == (pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    assert rows["b"] == (0.5, 1.0, pytest.approx(2 / 3), 1)
    assert rows["c"] == (1.0, 0.5, pytest.approx(2 / 3), 2)
    assert found.balanced_accuracy == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert found.macro_f1 == pytest.approx(2 / 3)
    assert found.log_loss == pytest.approx(-np.log([0.8, 0.6, 0.2, 0.8, 0.6, 0.25]).mean())
    assert found.top5_accuracy is None


def test_interval_is_wilsons() -> None:
    low, high = score(TRUE, PROBABILITIES, ["a", "b", "c"]).accuracy_interval
    p, n, z = 4 / 6, 6, 1.959964
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (low, high) == pytest.approx(((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)), abs=1e-5)


@pytest.mark.parametrize("classes", [2, 4, 5, 6, 12])
def test_every_score_equals_that_of_scikit_learn(classes: int) -> None:
    true_N, probabilities_NK, names = random_case(200, classes)
    predicted_N = probabilities_NK.argmax(axis=1)
    exact_NK = probabilities_NK.astype(np.float64)
    exact_NK /= exact_NK.sum(axis=1, keepdims=True)
    found = score(true_N, probabilities_NK, names)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(true_N, predicted_N))
    assert found.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(true_N, predicted_N))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(true_N, predicted_N, average="macro"))
    assert found.log_loss == pytest.approx(metrics.log_loss(true_N, exact_NK))
    assert np.array_equal(found.confusion, metrics.confusion_matrix(true_N, predicted_N))
    assert [row.precision for row in found.per_class] == pytest.approx(
        metrics.precision_score(true_N, predicted_N, average=None)
    )
    assert [row.support for row in found.per_class] == np.bincount(true_N).tolist()


@pytest.mark.parametrize(("classes", "expected"), [(2, None), (4, None), (5, 1.0)])
def test_five_guesses_of_five_classes_or_fewer_say_nothing(classes: int, expected: float | None) -> None:
    found = score(*random_case(50, classes))
    assert found.top5_accuracy == expected
    assert ("top5_accuracy" in found.headline()) == (expected is not None)


def test_five_guesses_of_more_classes_are_counted() -> None:
    true_N, probabilities_NK, names = random_case(200, 12)
    best_N5 = np.argsort(probabilities_NK, axis=1)[:, -5:]
    expected = np.mean([true in best for true, best in zip(true_N, best_N5, strict=True)])
    assert score(true_N, probabilities_NK, names).top5_accuracy == pytest.approx(expected)


def test_absent_classes_count_as_in_scikit_learn() -> None:
    """Class 1 has images but is never named, 2 is named without having any, 3 and 4 are neither; six in all."""
    true_N = np.array([0, 0, 1, 5])
    probabilities_NK = np.full((4, 6), 0.02)
    probabilities_NK[np.arange(4), [0, 2, 0, 5]] = 0.9
    found = score(true_N, probabilities_NK, list("abcdef"))
    assert found.balanced_accuracy == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert found.macro_f1 == pytest.approx((1 / 2 + 0 + 0 + 1) / 4)
    assert found.macro_f1 == pytest.approx(metrics.f1_score(true_N, [0, 2, 0, 5], average="macro", zero_division=0))
    assert [row.support for row in found.per_class] == [2, 1, 0, 0, 0, 1]
    assert len(found.confusion) == 6
    assert (found.per_class[3].precision, found.per_class[3].recall, found.per_class[3].f1) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("right", range(8))
def test_interval_holds_the_accuracy(right: int) -> None:
    true_N = np.zeros(7, dtype=int)
    probabilities_NK = np.tile([0.3, 0.7], (7, 1))
    probabilities_NK[:right] = [0.7, 0.3]
    found = score(true_N, probabilities_NK, ["a", "b"])
    low, high = found.accuracy_interval
    assert found.accuracy == pytest.approx(right / 7)
    assert 0 <= low <= found.accuracy <= high <= 1
    assert high - low > 0.3, "seven images leave much open"


def test_one_image_is_enough_and_certainty_may_be_wrong() -> None:
    found = score(np.array([1]), np.array([[1.0, 0.0]], dtype=np.float32), ["a", "b"])
    assert found.accuracy == 0.0
    assert np.isfinite(found.log_loss)
    assert found.log_loss > 10


def test_rounding_of_float32_rows_is_no_matter() -> None:
    true_N, probabilities_NK, names = random_case(500, 102)
    found = score(true_N, (probabilities_NK * 1.001).astype(np.float32), names)
    assert found.log_loss == pytest.approx(score(true_N, probabilities_NK, names).log_loss, rel=1e-5)


def test_scores_are_plain_values() -> None:
    found = score(*random_case(30, 7))
    values = strict_json.parse(strict_json.dump(found.to_json()))
    assert values["accuracy"] == found.accuracy
    assert values["confusion"] == [list(row) for row in found.confusion]
    assert values["per_class"][0]["class_name"] == "class 0"
    assert set(found.headline()) == {"accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1", "log_loss"}
