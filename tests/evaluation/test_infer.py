"""Probabilities of every image, in the order of the batches, whichever head the network has."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from finetune.evaluation.infer import predict_batches, probabilities_of

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_order_of_the_batches_is_kept() -> None:
    images_BCHW = images(7)
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    paths = [f"{index}.png" for index in range(7)]
    batches = [(images_BCHW[i : i + 3], labels[i : i + 3], paths[i : i + 3]) for i in (0, 3, 6)]
    moved: list[int] = []
    model = network()
    found = predict_batches(model, batches, device=CPU, advance=lambda count, _: moved.append(count))
    with torch.no_grad():
        expected_NK = torch.softmax(model.eval()(images_BCHW), dim=1)
    np.testing.assert_allclose(found.probabilities_NK, expected_NK, atol=1e-6)
    assert found.probabilities_NK.dtype == np.float32
    assert found.class_indices_N.tolist() == labels.tolist()
    assert found.image_paths == tuple(paths)
    assert moved == [3, 3, 1]


def test_network_predicts_in_eval_mode_and_is_not_changed() -> None:
    model = network().train()
    state = copy.deepcopy(model.state_dict())
    batch = (images(4), torch.zeros(4, dtype=torch.int64), ["x.png"] * 4)
    one, other = (predict_batches(model, [batch], device=CPU).probabilities_NK for _ in range(2))
    assert np.array_equal(one, other), "dropout was on"
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_log_softmax_head_gives_the_probabilities_of_the_logits_head(temperature: float) -> None:
    logits = network().eval()
    log_softmax = nn.Sequential(*copy.deepcopy(logits), nn.LogSoftmax(dim=1)).eval()
    torch.testing.assert_close(
        probabilities_of(log_softmax, images(5), temperature=temperature),
        probabilities_of(logits, images(5), temperature=temperature),
    )


def test_temperature_softens_without_changing_the_order() -> None:
    model = network().eval()
    sharp_BK, soft_BK = (probabilities_of(model, images(5), temperature=value) for value in (1.0, 4.0))
    assert torch.equal(sharp_BK.argsort(dim=1), soft_BK.argsort(dim=1))
    assert (soft_BK.amax(dim=1) < sharp_BK.amax(dim=1)).all()
    torch.testing.assert_close(soft_BK.sum(dim=1), torch.ones(5))
    with torch.no_grad():
        torch.testing.assert_close(soft_BK, torch.softmax(model(images(5)) / 4, dim=1))
