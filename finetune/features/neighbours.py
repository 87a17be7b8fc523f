"""k nearest neighbours on features: what the images say of each other without any training."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from finetune.features.extract import Features

# Shapes: N vectors, M of them in a block, Q queries, T queries with equally near vectors, D features, J neighbours.

Array = np.ndarray[Any, Any]

NEIGHBOURS = 5  # enough to outvote one odd image, few enough for classes of ten
MOST_QUERIES = 20_000  # a sample of so many tells the share of right ones to 0.4 points (standard error)
QUERIES_AT_ONCE = 1024
VECTORS_AT_ONCE = 8192  # 32 MB of similarities
VALUES_AT_ONCE = 2**23  # 32 MB, which long vectors fill with fewer rows
CPU = torch.device("cpu")


def leave_one_out_accuracy(train: Features, *, device: torch.device = CPU) -> float:
    """Return the share of images whose nearest neighbours, itself left out, vote for their class; in 0..1.

    The `NEIGHBOURS` nearest by cosine similarity vote, the first among equals; a tie goes to the class of the nearest
    of the tied. Of more than `MOST_QUERIES` images a sample, always the same, is asked, while all may be neighbours.
    """
    asked_Q = _asked(len(train))
    nearest_QJ = nearest_vectors(
        train.features_ND, train.features_ND, asked_Q=asked_Q, count=NEIGHBOURS, leave_self_out=True, device=device
    )
    return _accuracy(train, train.class_indices_N[asked_Q], nearest_QJ)


def neighbour_accuracy(train: Features, held_out: Features, *, device: torch.device = CPU) -> float:
    """Return the share of `held_out` images whose nearest neighbours in `train` vote for their class; in 0..1.

    Neighbours vote, and many images are sampled, as in `leave_one_out_accuracy`.
    """
    asked_Q = _asked(len(held_out))
    nearest_QJ = nearest_vectors(
        train.features_ND, held_out.features_ND, asked_Q=asked_Q, count=NEIGHBOURS, leave_self_out=False, device=device
    )
    return _accuracy(train, held_out.class_indices_N[asked_Q], nearest_QJ)


def nearest_vectors(
    vectors_ND: Array, queries_ND: Array, *, asked_Q: Array, count: int, leave_self_out: bool, device: torch.device
) -> Array:
    """Return the rows (Q, J) of the vectors most similar to each query by cosine, the nearest first.

    Of equally similar vectors the lower row comes first. Blocks are compared by float32 matrix products: beside its
    arguments and result it holds about 200 MB, for any number of vectors.

    Args:
        vectors_ND: Float32.
        queries_ND: Float32.
        asked_Q: The rows of `queries_ND` for which to search.
        count: J, where there are so many vectors.
        leave_self_out: A query is the vector of the same row, and no neighbour of itself.
        device: Where to compute.
    """
    count = min(count, len(vectors_ND) - leave_self_out)
    rows = max(1, VALUES_AT_ONCE // vectors_ND.shape[1])
    similarity_QJ = torch.full((len(asked_Q), count), -torch.inf, device=device)
    nearest_QJ = torch.zeros((len(asked_Q), count), dtype=torch.int64, device=device)
    for first in range(0, len(vectors_ND), min(VECTORS_AT_ONCE, rows)):
        block_MD = _unit(vectors_ND[first : first + min(VECTORS_AT_ONCE, rows)], device)
        for start in range(0, len(asked_Q), min(QUERIES_AT_ONCE, rows)):
            part = slice(start, start + min(QUERIES_AT_ONCE, rows))
            similarity_QM = _unit(queries_ND[asked_Q[part]], device) @ block_MD.T
            if leave_self_out:
                places_Q = asked_Q[part] - first
                here = np.flatnonzero((places_Q >= 0) & (places_Q < len(block_MD)))
                similarity_QM[torch.from_numpy(here), torch.from_numpy(places_Q[here])] = -torch.inf
            best_QJ, place_QJ = _largest(similarity_QM, count)
            known_QJ = torch.cat([similarity_QJ[part], best_QJ], dim=1).sort(descending=True, stable=True)
            similarity_QJ[part] = known_QJ.values[:, :count]
            rows_QJ = torch.cat([nearest_QJ[part], first + place_QJ], dim=1)
            nearest_QJ[part] = rows_QJ.gather(1, known_QJ.indices[:, :count])
    return nearest_QJ.cpu().numpy()


def _asked(image_count: int) -> Array:
    if image_count <= MOST_QUERIES:
        return np.arange(image_count)
    return np.sort(np.random.default_rng(0).choice(image_count, MOST_QUERIES, replace=False))


def _unit(rows_ND: Array, device: torch.device) -> Tensor:
    return normalize(torch.tensor(rows_ND, device=device))


def _largest(similarity_QM: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return values and places of the `count` largest of each row, in order; of equals the first comes first."""
    found = similarity_QM.topk(min(count + 1, similarity_QM.shape[1]))
    values_QJ, places_QJ = found.values, found.indices
    tied_T = (values_QJ[:, 1:] == values_QJ[:, :-1]).any(dim=1).nonzero().flatten()  # topk takes any of equals
    rest_TM = similarity_QM[tied_T]
    for rank in range(min(count, values_QJ.shape[1])):
        values_QJ[tied_T, rank], places_T = rest_TM.max(dim=1)
        places_QJ[tied_T, rank] = places_T
        rest_TM.scatter_(1, places_T[:, None], -torch.inf)
    return values_QJ[:, :count], places_QJ[:, :count]


def _accuracy(train: Features, class_indices_Q: Array, nearest_QJ: Array) -> float:
    """Let the neighbours vote; a tie goes to the class of the nearest among the tied."""
    votes_QJ = train.class_indices_N[nearest_QJ]
    agreeing_QJ = (votes_QJ[:, :, None] == votes_QJ[:, None, :]).sum(axis=2)
    winners_Q = votes_QJ[np.arange(len(votes_QJ)), agreeing_QJ.argmax(axis=1)]
    return float((winners_Q == class_indices_Q).mean())
