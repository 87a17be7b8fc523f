"""Activations come off the disk as they went on it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from finetune.features.cache import ActivationCache, View
from finetune.runs.row_store import open_store

KEY = "0f" * 32


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
@given(activations=st.lists(arrays(np.float16, array_shapes(max_dims=3, max_side=4)), min_size=1, max_size=3))
def test_arrays_of_any_shape_come_back(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, activations: list[np.ndarray]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    with open_store("activations", {"title": "test"}, folder=folder) as store:
        cache = ActivationCache(store, dtype=dtype)
        assert cache.get(KEY) is None
        assert KEY not in cache
        cache.put(KEY, tuple(activations))
    with open_store("activations", {"title": "test"}, folder=folder) as store:
        found = ActivationCache(store, dtype=dtype).get(KEY)
    assert found is not None
    for array, kept in zip(activations, found, strict=True):
        assert kept.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(kept, array)


def test_what_the_disk_refuses_stays_in_memory(tmp_path: Path) -> None:
    (tmp_path / "activations").write_text("a file where the folder should be")
    with open_store("activations", {"title": "test"}, folder=tmp_path) as store:
        cache = ActivationCache(store, dtype="<f4")
        cache.put(KEY, (np.arange(3.0),))
        assert store.write_error is not None
        assert KEY in cache
        found = cache.get(KEY)
    assert found is not None
    assert found[0].tolist() == [0.0, 1.0, 2.0]


def test_the_seed_of_a_view_depends_on_all_three() -> None:
    view = View(augmentation="light", seed=0, number=0)
    seeds = {
        view.seed_of(KEY),
        view.seed_of("ab" * 32),
        View(augmentation="light", seed=1, number=0).seed_of(KEY),
        View(augmentation="light", seed=0, number=1).seed_of(KEY),
    }
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_without_a_store_all_stays_in_memory() -> None:
    cache = ActivationCache(None, dtype="<f2")
    assert cache.get(KEY) is None
    cache.put(KEY, (np.arange(3.0), np.ones((2, 2))))
    found = cache.get(KEY)
    assert found is not None
    assert [array.dtype.str for array in found] == ["<f2", "<f2"]
    assert KEY in cache
