"""A head without weights: the nearest training images vote, and their vectors are what the model keeps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from finetune.errors import ModelError
from finetune.models.heads import averages_heads, head_layers, head_module

# Shapes: N images, M images remembered, D features, K classes, J neighbours.

NEIGHBOURS = (1, 3, 5, 9, 15)
"""Numbers of neighbours tried; few images decide for few, noisy labels for many."""
BLOCK = 1024  # images compared at once, so that N × M similarities never fill the memory


class NeighbourHead(nn.Module):
    """k nearest neighbours by cosine similarity, in the place of an output layer.

    It returns the logarithm of the share of votes, smoothed so that no class is impossible: (votes + 1/K) / (J + 1).
    Ties go to the class whose voters are nearer. Source: Cover & Hart 1967, Nearest neighbor pattern classification.

    Args:
        vectors_MD: What entered the output layer for each training image.
        class_indices_M: Its class, int64.
        class_count: K.
        neighbours: J, how many vote.
    """

    vectors_MD: Tensor
    class_indices_M: Tensor
    neighbours: Tensor

    def __init__(self, vectors_MD: Tensor, class_indices_M: Tensor, *, class_count: int, neighbours: int) -> None:
        super().__init__()
        self.class_count = class_count
        self.register_buffer("vectors_MD", normalize(vectors_MD))
        self.register_buffer("class_indices_M", class_indices_M)
        self.register_buffer("neighbours", torch.tensor(neighbours))
        self.normalise = nn.LogSoftmax(dim=1)  # also tells the loss what comes out of this head

    def forward(self, features_ND: Tensor) -> Tensor:
        """Return log-probabilities (N, K)."""
        nearest_NJ = (normalize(features_ND) @ self.vectors_MD.T).topk(int(self.neighbours)).indices
        votes_NK = _count_votes(self.class_indices_M[nearest_NJ], self.class_count)
        return torch.as_tensor(self.normalise((votes_NK + 1 / self.class_count).log()))


def choose_neighbours(vectors_MD: Tensor, class_indices_M: Tensor) -> int:
    """Return the number of `NEIGHBOURS` that is most often right about a training image left out; a tie takes fewer."""
    unit_MD = normalize(vectors_MD)
    possible = [count for count in NEIGHBOURS if count < len(unit_MD)] or [1]
    class_count = int(class_indices_M.max()) + 1
    right = dict.fromkeys(possible, 0)
    for start in range(0, len(unit_MD), BLOCK):
        similarity_BM = unit_MD[start : start + BLOCK] @ unit_MD.T
        similarity_BM.diagonal(offset=start).fill_(-torch.inf)
        nearest_BJ = similarity_BM.topk(min(max(possible), len(unit_MD) - 1)).indices
        for count in possible:
            guess_B = _count_votes(class_indices_M[nearest_BJ[:, :count]], class_count).argmax(dim=1)
            right[count] += int((guess_B == class_indices_M[start : start + BLOCK]).sum())
    return max(possible, key=lambda count: right[count])


def _count_votes(voters_NJ: Tensor, class_count: int) -> Tensor:
    """Count the votes (N, K) of neighbours given by their classes, the nearest first; a nearer voice weighs more.

    By a trifle, which decides ties: even over all voters it does not make up one voice.
    """
    nearness_J1 = 1 - 1e-3 * torch.linspace(0, 1, voters_NJ.shape[1], device=voters_NJ.device)[:, None]
    return (one_hot(voters_NJ, class_count).float() * nearness_J1).sum(dim=1)


def attach_neighbours(model: nn.Module, head: NeighbourHead) -> None:
    """Put `head` in the place of the output layer of `model`.

    Raises:
        ModelError: The output layer is a convolution or one of several, or takes vectors of another length.
    """
    require_vectors(model)
    layer = head_module(model)
    if head.vectors_MD.ndim != 2 or head.vectors_MD.shape[1] != layer.weight.shape[1]:
        raise ModelError(
            f"the neighbours have shape {tuple(head.vectors_MD.shape)}, the output layer takes {layer.weight.shape[1]}"
        )
    model.set_submodule(head_layers(model)[0], head.to(layer.weight.device))


def require_vectors(model: nn.Module) -> None:
    """Refuse a network whose output layer cannot be replaced by neighbours.

    Raises:
        ModelError: The output layer is a convolution, or one of several.
    """
    if not isinstance(head_module(model), nn.Linear) or averages_heads(model):
        raise ModelError(
            f"the head of {type(model).__name__} is not a single linear layer, so no vectors enter it",
            "use --head logits, or another --model",
        )


def attach_saved_neighbours(model: nn.Module, tensors: Mapping[str, Tensor], *, class_count: int, source: str) -> None:
    """Make room in `model` for the neighbours that a model file holds among its `tensors`.

    Raises:
        ModelError: They are absent, of another kind, or name classes that there are not.
    """
    path = head_layers(model)[0]
    vectors_MD, classes_M, count = (
        tensors.get(f"{path}.{name}", torch.empty(0)) for name in ("vectors_MD", "class_indices_M", "neighbours")
    )
    is_sound = (
        vectors_MD.ndim == 2
        and classes_M.shape == vectors_MD.shape[:1]
        and classes_M.dtype == count.dtype == torch.int64
        and count.ndim == 0
        and 1 <= int(count) <= len(classes_M)
        and bool(((classes_M >= 0) & (classes_M < class_count)).all())
    )
    if not is_sound:
        raise ModelError(
            f"{source}: the nearest neighbours in it are absent or damaged", "take another copy of the file"
        )
    attach_neighbours(model, NeighbourHead(vectors_MD, classes_M, class_count=class_count, neighbours=int(count)))
