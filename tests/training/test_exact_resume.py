"""A training stopped by a signal and resumed ends at the bits of one that was not; workers change nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune.data.listing import list_images
from finetune.data.loaders import labelled_dataset, training_loader
from finetune.data.scan import scan_images
from finetune.training import checkpoint
from tests.training.exact_resume import CLASSES, SPEC, STOPS, Case, Stop, differences, write_images

SOME = [
    Case(network="BatchNorm CNN", optimizer="sgd", schedule="cosine", has_ema=True, workers=0, accumulation=4),
    Case(network="BatchNorm CNN", optimizer="adamw", schedule="plateau", has_ema=False, workers=2, accumulation=1),
    Case(network="dropout ViT", optimizer="adamw", schedule="cosine", has_ema=True, workers=0, accumulation=1),
    Case(network="dropout ViT", optimizer="sgd", schedule="plateau", has_ema=False, workers=0, accumulation=4),
    Case(network="drop-path net", optimizer="adamw", schedule="cosine", has_ema=False, workers=0, accumulation=4),
    Case(network="drop-path net", optimizer="sgd", schedule="plateau", has_ema=True, workers=2, accumulation=1),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


@pytest.fixture
def _two_threads() -> Iterator[None]:
    """Let two threads share the work, as on a user's machine, however many the tests have."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_resume_is_exact(case: Case, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "TRAINING_PER_SAVE", 0)
    found: dict[Stop, list[str]] = {stop: differences(case, stop, data, tmp_path) for stop in STOPS}
    assert found == {stop: [] for stop in STOPS}


def test_workers_give_the_same_batches(data: Path) -> None:
    table = scan_images(list_images(data)).table.select("train")
    loaders = [
        training_loader(
            labelled_dataset(table, CLASSES, SPEC, augmentation="trivial", seed=3),
            batch_size=8,
            seed=3,
            workers=workers,
        )
        for workers in (0, 2)
    ]
    for (alone_BCHW, indices_B, paths), (other_BCHW, other_B, other_paths) in zip(*loaders, strict=True):
        assert torch.equal(alone_BCHW, other_BCHW)
        assert torch.equal(indices_B, other_B)
        assert list(paths) == list(other_paths)
