"""The head of nearest neighbours votes as scikit-learn's classifier does, and lives in a network like any other."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from finetune.errors import ModelError
from finetune.models.initialize import build_backbone
from finetune.models.neighbours import (
    NEIGHBOURS,
    NeighbourHead,
    attach_neighbours,
    attach_saved_neighbours,
    choose_neighbours,
)

VECTORS, CLASSES = load_digits(return_X_y=True)
TRAIN = (torch.from_numpy(VECTORS[:300]).float(), torch.from_numpy(CLASSES[:300]))


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_votes_are_those_of_scikit_learn(neighbours: int) -> None:
    head = NeighbourHead(*TRAIN, class_count=10, neighbours=neighbours)
    held_out = torch.from_numpy(VECTORS[300:800]).float()
    judge = KNeighborsClassifier(neighbours, metric="cosine").fit(VECTORS[:300], CLASSES[:300])
    votes_NK = judge.predict_proba(VECTORS[300:800]) * neighbours
    probabilities_NK = head(held_out).exp().numpy()
    np.testing.assert_allclose(probabilities_NK, (votes_NK + 0.1) / (neighbours + 1), atol=3e-3)
    np.testing.assert_allclose(probabilities_NK.sum(axis=1), 1, rtol=1e-5)


def test_tie_goes_to_the_nearer() -> None:
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 1.0]])
    head = NeighbourHead(vectors, torch.tensor([1, 0, 2]), class_count=3, neighbours=3)
    assert int(head(torch.tensor([[2.0, 0.1]])).argmax()) == 1
    assert int(head(torch.tensor([[2.0, 0.9]])).argmax()) == 0


def _left_out_is_right(place: int, classes: torch.Tensor, neighbours: int) -> bool:
    others = torch.arange(len(classes)) != place
    head = NeighbourHead(TRAIN[0][others], classes[others], class_count=10, neighbours=neighbours)
    return int(head(TRAIN[0][place : place + 1]).argmax()) == int(classes[place])


def test_number_of_neighbours_is_the_best_when_one_is_left_out() -> None:
    noisy = TRAIN[1].clone()
    noisy[::4] = (noisy[::4] + 1) % 10  # a single neighbour is then wrong too often
    scores = [np.mean([_left_out_is_right(place, noisy, count) for place in range(len(noisy))]) for count in NEIGHBOURS]
    assert choose_neighbours(TRAIN[0], noisy) == NEIGHBOURS[int(np.argmax(scores))] != 1
    assert choose_neighbours(TRAIN[0][:2], TRAIN[1][:2]) == 1


def test_head_takes_the_place_of_the_output_layer_and_comes_back_from_its_tensors() -> None:
    model = build_backbone("knn", num_classes=10, channels=1).module.eval()
    images = torch.rand(40, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    attach_neighbours(model, NeighbourHead(images.flatten(1), torch.arange(40) % 10, class_count=10, neighbours=1))
    assert torch.equal(model(images).argmax(dim=1), torch.arange(40) % 10)
    again = build_backbone("knn", num_classes=10, channels=1).module.eval()
    attach_saved_neighbours(again, model.state_dict(), class_count=10, source="file")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vectors_MD", torch.zeros(4, 7)),
        ("vectors_MD", torch.zeros(4)),
        ("class_indices_M", torch.tensor([0, 1, 0, 3])),
        ("class_indices_M", torch.tensor([0, -1, 0, 1])),
        ("class_indices_M", torch.tensor([0.0, 1.0, 0.0, 1.0])),
        ("class_indices_M", torch.tensor([0, 1])),
        ("neighbours", torch.tensor(0)),
        ("neighbours", torch.tensor(5)),
        ("neighbours", torch.tensor([1])),
    ],
)
def test_damaged_neighbours_are_refused(name: str, value: torch.Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    tensors = {
        "1.vectors_MD": torch.rand(4, 6),
        "1.class_indices_M": torch.tensor([0, 1, 2, 0]),
        "1.neighbours": torch.tensor(2),
    }
    with pytest.raises(ModelError):
        attach_saved_neighbours(model, tensors | {f"1.{name}": value}, class_count=3, source="file")
    assert isinstance(model[1], nn.Linear)
    with pytest.raises(ModelError, match="absent or damaged"):
        attach_saved_neighbours(model, {}, class_count=3, source="file")
    attach_saved_neighbours(model, tensors, class_count=3, source="file")
    assert isinstance(model[1], NeighbourHead)


def test_convolutional_head_has_no_vectors() -> None:
    model = build_backbone("squeezenet", num_classes=3, use_pretrained=False).module
    with pytest.raises(ModelError, match="not a single linear layer"):
        attach_neighbours(model, NeighbourHead(torch.rand(4, 512), torch.arange(4) % 3, class_count=3, neighbours=1))
