"""A sweep of learning rates: undone, and pointing at where the loss falls fastest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from finetune.runs.folder import RunFolder
from finetune.runs.reporting import LoggingReporter
from finetune.training.rate_finder import STEPS, steepest, sweep_rates
from finetune.training.step import Learner


def test_a_sweep_goes_from_where_nothing_moves_to_where_all_is_lost_and_leaves_no_trace(
    make_learner: Callable[..., Learner], loaders: dict[str, DataLoader[Any]]
) -> None:
    learner = make_learner(optimizer="sgd", rate=0.05)
    before = {name: tensor.clone() for name, tensor in learner.network.state_dict().items()}
    random_state = torch.get_rng_state()
    sweep = sweep_rates(learner, loaders, reporter=LoggingReporter())
    assert 20 < len(sweep.rates) == len(sweep.losses) <= STEPS  # more steps than the 4 of an epoch
    assert sweep.rates[0] == pytest.approx(5e-6)
    assert list(sweep.rates) == sorted(sweep.rates)
    assert sweep.suggestion is not None
    assert 1e-3 < sweep.suggestion < 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    rates = np.geomspace(1e-5, 1, 100)
    losses = 2 - np.tanh(2 * np.log10(rates / 1e-2)) + 5 * (rates > 0.5)
    assert steepest(list(rates), list(losses)) == pytest.approx(1e-2, rel=0.1)


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    rates = list(np.geomspace(1e-5, 1, 50))
    assert steepest(rates, list(np.linspace(1, 5, 50))) is None
    assert steepest([], []) is None


def test_the_command_prints_a_rate_and_draws_the_sweep(finetune: Callable[..., Any], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "data" / ("red", "blue")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 120, (40, 40, 3), dtype=np.uint8)
        pixels[:, :, 2 * (number % 2)] += 100
        Image.fromarray(pixels).save(path)
    words = ["--model", "resnet18", "--no-use-pretrained", "--image-size", "32", "--batch-size", "8", "--workers", "0"]
    outcome = finetune(
        "train", str(tmp_path / "data"), "--find-learning-rate", *words, "--output", str(tmp_path / "run")
    )
    assert outcome.code == 0, outcome.err
    assert float(outcome.out) > 0
    with Image.open(tmp_path / "run" / "plots" / "learning_rates.png") as picture:
        assert picture.width > 500
    sweep = next(event for event in RunFolder(tmp_path / "run").events() if event["event"] == "rate_sweep")
    assert sweep["suggestion"] == float(outcome.out)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    outcome = finetune("predict", str(tmp_path / "run"), str(path))
    assert (outcome.code, "train one first" in outcome.err) == (4, True)
    outcome = finetune("train", str(tmp_path / "data"), "--find-learning-rate", "--folds", "2")
    assert (outcome.code, "without --folds" in outcome.err) == (2, True)
    for words in (["train", "--resume", "--output", str(tmp_path / "typo")], ["tune", "--resume", "--output", "typo"]):
        outcome = finetune(*words)
        assert (outcome.code, "there is no run to resume in" in outcome.err) == (4, True)
