"""The global random generators, of torch, NumPy and Python, as tensors that a training state can hold."""

import random
from collections.abc import Sequence

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


def pack_generators() -> Tensors:
    """Return the states of torch's, NumPy's and Python's global generators as integer tensors."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([int(position), int(has_gauss), *map(int, keys)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        **{f"cuda{index}": state for index, state in enumerate(_cuda_states())},
    }


def _cuda_states() -> list[torch.Tensor]:
    return list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else []


def by_rank(generators: Sequence[Tensors]) -> Tensors:
    """Return the states of the generators of every process under one name each."""
    return {f"{rank}/{name}": state for rank, states in enumerate(generators) for name, state in states.items()}


def unpack_generators(states_by_rank: Tensors, *, rank: int) -> None:
    """Put the global generators back; in a process that was not there when they were saved they stay as they are."""
    states = {name.partition("/")[2]: state for name, state in states_by_rank.items() if name.startswith(f"{rank}/")}
    if not states:
        return
    torch.set_rng_state(states["torch"])
    position, has_gauss, *keys = states["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(states["numpy_gauss"][0]))
    )
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    for index in range(len(_cuda_states())):
        if f"cuda{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda{index}"], index)
