from collections import defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.copies import find_copies

# Few words, so that hashes share some of them, and all of them.
HASHES = st.lists(st.lists(st.sampled_from([0, 1, 2**63]), min_size=4, max_size=4), max_size=30)


@given(HASHES)
def test_copies_are_the_rows_with_an_equal_that_are_not_zero(hashes):
    expected = defaultdict(list)
    for place, words in enumerate(hashes):
        if any(words):
            expected[tuple(words)].append(place)
    found = defaultdict(list)
    places, numbers = find_copies(np.array(hashes, np.uint64).reshape(-1, 4).view(np.uint8))
    for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
        found[number].append(place)
    assert list(found.values()) == [together for together in expected.values() if len(together) > 1]
    assert places.tolist() == sorted(places)
    assert set(found) == set(range(len(found)))
