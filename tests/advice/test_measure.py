"""The evidence counts images and holds the probe against always naming the largest class."""

from dataclasses import replace

import numpy as np
import pytest

from finetune.advice.measure import Evidence, measure
from finetune.features.extract import Features
from finetune.features.neighbours import leave_one_out_accuracy
from finetune.features.probe import Probe, solve_probe


def features(counts: dict[int, int]) -> Features:
    rng = np.random.default_rng(0)
    class_indices_N = np.repeat(list(counts), list(counts.values()))
    features_ND = np.eye(8)[class_indices_N] + 0.05 * rng.normal(size=(len(class_indices_N), 8))
    return Features(features_ND=features_ND.astype(np.float32), class_indices_N=class_indices_N)


def probe(accuracy: float | None, spread: float | None) -> Probe:
    return Probe(
        weight_KD=np.zeros((3, 8)), bias_K=np.zeros(3), strength=0.01, accuracy=accuracy, spread=spread, loss=None
    )


def test_images_are_counted_over_the_classes_that_have_any() -> None:
    train = features({0: 6, 2: 3, 5: 1})
    found = measure(train, probe(0.8, 0.1), class_indices_N=train.class_indices_N, is_pretrained=True)
    assert (found.images, found.classes, found.smallest_class) == (10, 3, 1)
    assert found.images_per_class == pytest.approx(10 / 3)
    assert found.majority_accuracy == pytest.approx(0.6)
    assert (found.probe_accuracy, found.probe_spread, found.is_pretrained) == (0.8, 0.1, True)
    assert found.knn_accuracy == leave_one_out_accuracy(train)
    assert all(type(value) in (int, float, bool) for value in vars(found).values())


def test_features_that_part_the_classes_are_similar() -> None:
    train = features({0: 10, 1: 10, 2: 10})
    found = measure(
        train, solve_probe(train, class_count=3, seed=0), class_indices_N=train.class_indices_N, is_pretrained=True
    )
    assert (found.similarity, found.probe_accuracy, found.knn_accuracy) == (1.0, 1.0, 1.0)


EVIDENCE = Evidence(
    images=100,
    classes=2,
    images_per_class=50.0,
    smallest_class=40,
    majority_accuracy=0.6,
    knn_accuracy=0.7,
    probe_accuracy=0.9,
    probe_spread=0.02,
    is_pretrained=True,
)


@pytest.mark.parametrize(
    ("values", "similarity"),
    [
        ({}, 0.75),
        ({"probe_accuracy": None}, 0.25),
        ({"probe_accuracy": 1.0}, 1.0),
        ({"probe_accuracy": 0.6}, 0.0),
        ({"probe_accuracy": 0.4}, 0.0),
        ({"majority_accuracy": 1.0, "probe_accuracy": 1.0}, 1.0),
    ],
)
def test_similarity_is_the_share_of_the_way_from_the_majority_to_perfection(
    values: dict[str, float | None], similarity: float
) -> None:
    assert replace(EVIDENCE, **values).similarity == pytest.approx(similarity)
