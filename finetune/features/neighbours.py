"""k nearest neighbours on features: what the images say of each other without any training."""

from typing import Any

import numpy as np
from sklearn.neighbors import NearestNeighbors

from finetune.features.extract import Features

NEIGHBOURS = 5  # enough to outvote one odd image, few enough for classes of ten


def leave_one_out_accuracy(train: Features) -> float:
    """Return the share of images whose nearest neighbours, itself left out, vote for their class; in 0..1."""
    index = _index(train, reserve=1)
    return _accuracy(train, train.class_indices_N, index.kneighbors(return_distance=False))


def neighbour_accuracy(train: Features, held_out: Features) -> float:
    """Return the share of `held_out` images whose nearest neighbours in `train` vote for their class; in 0..1."""
    index = _index(train, reserve=0)
    return _accuracy(train, held_out.class_indices_N, index.kneighbors(held_out.features_ND, return_distance=False))


def _index(train: Features, *, reserve: int) -> NearestNeighbors:
    count = min(NEIGHBOURS, len(train) - reserve)
    return NearestNeighbors(n_neighbors=count, metric="cosine").fit(train.features_ND)


def _accuracy(train: Features, class_indices_N: np.ndarray[Any, Any], neighbours_NJ: np.ndarray[Any, Any]) -> float:
    """Let the neighbours vote; a tie goes to the class of the nearest among the tied."""
    votes_NJ = train.class_indices_N[neighbours_NJ]
    agreeing_NJ = (votes_NJ[:, :, None] == votes_NJ[:, None, :]).sum(axis=2)
    winners_N = votes_NJ[np.arange(len(votes_NJ)), agreeing_NJ.argmax(axis=1)]
    return float((winners_N == class_indices_N).mean())
