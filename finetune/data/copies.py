"""Which images of a table are the same: by a hash of their bytes or of what they show."""

import numpy as np

from finetune.data.table import Array


def find_copies(hashes_M: Array) -> tuple[Array, Array]:
    """Return the rows of (M, 32) bytes that others equal, all zero not counted.

    Returns:
        Their places, in order, and for each a number from 0, the same for equal ones.
    """
    words_M = hashes_M.view(np.uint64)
    order = np.lexsort(words_M.T)  # of places, for a sorted copy of a million hashes is large
    is_like_last = np.zeros(len(order) + 1, bool)  # the one more is like nothing
    is_like_last[1:-1] = True
    for word_M in words_M.T:
        sorted_M = word_M[order]
        is_like_last[1:-1] &= sorted_M[1:] == sorted_M[:-1]
    is_copy = (is_like_last[1:] | is_like_last[:-1]) & np.any(words_M, axis=1)[order]
    places = order[is_copy]
    numbers = np.cumsum(~is_like_last[:-1][is_copy]) - 1
    by_place = np.argsort(places)
    return places[by_place], numbers[by_place]
