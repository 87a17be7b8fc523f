"""A folder of small images that any network learns, and what keeps watch over it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = {"1": (200, 40, 40), "2": (40, 200, 40), "10": (40, 40, 200)}
NAMES = {"10": "blue", "2": "green", "1": "red"}


def draw(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """Write a noisy picture of one colour."""
    noise = np.random.default_rng(seed).normal(0, 30, (40, 48, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def coloured(tmp_path: Path) -> Iterator[Path]:
    """Folders "1", "2" and "10" of ten images each with their label names; the test must leave them as they are."""
    folder = tmp_path / "coloured"
    for number, (name, colour) in enumerate(COLOURS.items()):
        for index in range(10):
            draw(folder / name / f"{index}.png", colour, seed=100 * number + index)
    (folder / "cat_to_name.json").write_text(json.dumps(NAMES))
    before = hashes(folder)
    yield folder
    assert hashes(folder) == before
