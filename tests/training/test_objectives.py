"""Losses against torch's own and hand-worked numbers."""

import pytest
import torch
from torch import nn

from finetune.training.objectives import balanced_class_weights, build_criterion, main_output, total_loss


def test_inception_weighs_its_auxiliary_output_by_two_fifths() -> None:
    main, auxiliary, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    criterion = nn.CrossEntropyLoss()
    expected = criterion(main, labels) + 0.4 * criterion(auxiliary, labels)
    assert total_loss((main, auxiliary), labels, criterion) == pytest.approx(expected)
    assert total_loss((main, None), labels, criterion) == pytest.approx(criterion(main, labels))
    assert main_output((main, auxiliary)) is main


def test_both_heads_have_the_same_loss() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    weights = torch.tensor([1.0, 2.0, 3.0])
    as_logits = build_criterion("logits", class_weights_K=weights)(logits, labels)
    as_logarithms = build_criterion("log_softmax", class_weights_K=weights)(logits.log_softmax(1), labels)
    assert as_logits == pytest.approx(as_logarithms)


def test_label_smoothing_reaches_the_loss() -> None:
    logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    smooth = build_criterion("logits", label_smoothing=0.2)(logits, labels)
    logarithms = logits.log_softmax(1)[0]
    assert smooth == pytest.approx(-(0.9 * logarithms[0] + 0.1 * logarithms[1]))


def test_balanced_weights_average_to_one_over_the_images() -> None:
    counts = torch.tensor([90, 10, 0])
    weights = balanced_class_weights(counts)
    assert weights.tolist() == pytest.approx([100 / (2 * 90), 100 / (2 * 10), 0.0])
    assert (weights * counts).sum() == pytest.approx(100)
