"""A network and images small enough to train in a second."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from finetune.training.objectives import build_criterion
from finetune.training.schedules import build_schedule
from finetune.training.step import Learner, build_accelerator


class TinyNetwork(nn.Module):
    """A convolution with BatchNorm and dropout under a linear head."""

    def __init__(self, classes: int = 3, *, log_softmax: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(8, classes), nn.LogSoftmax(1)) if log_softmax else nn.Linear(8, classes)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.body(images_BCHW)).flatten(1))


def coloured_images(count: int, *, seed: int = 0) -> TensorDataset:
    """Noise with one bright channel, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    class_indices = torch.arange(count) % 3
    images = torch.randn(count, 3, 8, 8, generator=generator)
    images[torch.arange(count), class_indices] += 2.0
    return TensorDataset(images, class_indices)


@pytest.fixture
def loaders() -> dict[str, DataLoader[object]]:
    """31 training images in batches of 10, so that the last batch holds one."""
    return {
        "train": DataLoader(coloured_images(31), batch_size=10),
        "valid": DataLoader(coloured_images(12, seed=1), batch_size=5),
    }


@pytest.fixture
def make_learner() -> Callable[..., Learner]:
    """Build a learner around a tiny network, the same one for the same seed."""

    def make(
        *, seed: int = 0, schedule: str = "cosine", optimizer: str = "adamw", epochs: int = 4, rate: float = 0.05
    ) -> Learner:
        torch.manual_seed(seed)
        model = TinyNetwork().to(memory_format=torch.channels_last)
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
        optimiser = kind(model.parameters(), lr=rate, **({"momentum": 0.9} if optimizer == "sgd" else {}))
        return Learner(
            model=model,
            criterion=build_criterion("logits"),
            optimizer=optimiser,
            schedule=build_schedule(
                optimiser,
                schedule,
                epochs=epochs,
                steps_per_epoch=4,
                warmup_epochs=1,
                step_epochs=2,
                step_factor=0.1,
            ),
            accelerator=build_accelerator(torch.device("cpu"), "fp32"),
        )

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty noisy pictures of two colours, 28 to train and 12 held out."""
    generator = np.random.default_rng(0)
    for number in range(40):
        split = "train" if number < 28 else "valid"
        path = tmp_path / "data" / split / ("red", "blue")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 200, (40, 40, 3), dtype=np.uint8)
        pixels[:, :, 2 * (number % 2)] //= 2
        Image.fromarray(pixels).save(path)
    return tmp_path / "data"
