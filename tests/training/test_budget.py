"""A training in time: epochs and image size that fit, and a stop before the end."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

import finetune
from finetune.config import TrainConfig
from finetune.config.durations import parse_seconds
from finetune.data.listing import list_images
from finetune.data.table import ImageTable
from finetune.errors import ConfigError
from finetune.runs.records import InputSpec
from finetune.training import budget as budget_module
from finetune.training.budget import ENDING_SECONDS, USABLE, Budget, Pace, decoding_pace, measure_pace
from finetune.training.progress import Progress
from finetune.training.step import Learner

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stand in for the clock of the budget."""
    clock = Clock()
    monkeypatch.setattr(budget_module, "time", clock)
    return clock


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), (" 2s ", 2)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-3s", "0s", "1d", "1e3s", "10 m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no duration"):
        parse_seconds(text)


def test_the_option_is_checked_before_anything_begins() -> None:
    with pytest.raises(ConfigError, match=r'--budget: \'ten\' is no duration; write "90s"'):
        TrainConfig(data="x", budget="ten")
    with pytest.raises(ConfigError, match="not of several --phases"):
        TrainConfig(data="x", budget="10m", phases="head:3")


def test_as_many_epochs_as_fit(stopped: Clock) -> None:
    pace = Pace(first_epoch=10, later_epoch=5, validation=1, scoring=2)
    budget = Budget(100, began=100)
    usable = (100 - ENDING_SECONDS - 1 - 2) * USABLE
    assert budget.fit(pace, most=50) == 1 + (usable - 10) // 5
    assert budget.fit(pace, most=3) == 3
    stopped.now += 85
    assert budget.fit(pace, most=50) == 0


def test_it_stops_while_there_is_time_to_end(stopped: Clock) -> None:
    budget, progress = Budget(60, began=100), Progress()
    stopped.now = 160 - ENDING_SECONDS
    budget.step_ended(progress)
    assert not progress.stop_reason
    stopped.now += 0.5
    budget.step_ended(progress)
    assert progress.stop_reason == "the budget of 60 s is used up"


class Slow(nn.Module):
    """A network that takes a second for an image of 224 px, by the stopped clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.clock.now += len(images_BCHW)
        return images_BCHW.flatten(1)


def spec_of(size_px: int, channels: int = 3) -> InputSpec:
    half = (0.5,) * channels
    return InputSpec(image_size_px=size_px, resize_px=size_px, interpolation="bilinear", mean=half, std=half)


def test_what_decoding_takes_counts_too_and_a_look_only_if_there_is_one(stopped: Clock) -> None:
    """Of 10 images: 10 s for the network to see all, and 120 s left when that is known."""
    arguments = {"images": 10, "device": CPU}

    def size(decode_seconds: float, **options: bool) -> int:
        budget = Budget(140, began=stopped.now)
        return budget.image_size(Slow(stopped), spec_of(224), decode_seconds=decode_seconds, **options, **arguments)

    assert size(3.9) == 224  # 2 × 39 + 4 × 10 s
    assert size(4.1) == 160
    assert size(4.1, is_studied=False) == 224
    with pytest.raises(ConfigError, match=r"a look at each of the 10 images takes about 1[23]\d s"):
        size(12.0)


def test_the_pace_of_decoding_is_taken_from_images_that_can_be_read(folder: Path) -> None:
    next(folder.rglob("*.png")).write_bytes(b"no image")
    table = ImageTable(folder, list_images(folder).rows)
    assert 0 < decoding_pace(table, spec_of(32)) < 1
    assert decoding_pace(ImageTable(folder, table.rows[:1]), spec_of(32)) > 0


@pytest.mark.parametrize(("images", "size_px"), [(10, 224), (40, 160), (80, 128), (350, 128)])
def test_the_largest_size_is_taken_for_which_there_is_time(stopped: Clock, images: int, size_px: int) -> None:
    budget = Budget(140, began=100)
    found = budget.image_size(Slow(stopped), spec_of(224), images=images, decode_seconds=0.0, device=CPU)
    assert found == size_px


@pytest.mark.parametrize("size_px", [28, 32, 48])
def test_small_images_are_not_made_smaller_than_networks_can_take(stopped: Clock, size_px: int) -> None:
    network = Slow(stopped)
    spec = spec_of(size_px, channels=1)
    found = Budget(400, began=100).image_size(network, spec, images=100, decode_seconds=0.0, device=CPU)
    assert found in (size_px, 32)
    assert found <= size_px
    with pytest.raises(ConfigError, match="does not do"):
        Budget(50, began=stopped.now).image_size(network, spec, images=1000, decode_seconds=0.0, device=CPU)


def test_a_budget_that_does_not_do_for_one_look_is_refused(stopped: Clock) -> None:
    with pytest.raises(ConfigError, match=r"--budget 60s does not do: a look at each of the 1,000 images takes"):
        Budget(60, began=100).image_size(Slow(stopped), spec_of(224), images=1000, decode_seconds=0.0, device=CPU)


def test_a_budget_that_starting_has_used_up_says_so(stopped: Clock) -> None:
    with pytest.raises(ConfigError, match=r"--budget 5s does not do: to start took 19 s, and 4 s are kept for the end"):
        Budget(5, began=97).image_size(Slow(stopped), spec_of(224), images=0, decode_seconds=0.0, device=CPU)


def test_measuring_the_pace_leaves_no_trace(
    make_learner: Callable[..., Learner], loaders: dict[str, DataLoader[Any]]
) -> None:
    learner = make_learner()
    before = {name: tensor.clone() for name, tensor in learner.network.state_dict().items()}
    random_state = torch.get_rng_state()
    pace = measure_pace(learner, loaders, left=60)
    assert 0 < pace.validation < pace.later_epoch <= pace.first_epoch
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def train(folder: Path, output: str, **options: Any) -> finetune.Run:
    settings = {"model": "resnet18", "use_pretrained": False, "scenario": "large-similar", "epochs": 2, "workers": 0}
    return finetune.train(folder, output=folder.parent / output, batch_size=8, **{**settings, **options})


def test_measuring_needs_no_more_steps_than_a_schedule_has(
    make_learner: Callable[..., Learner], loaders: dict[str, DataLoader[Any]]
) -> None:
    learner = make_learner(schedule="one-cycle", epochs=1)
    assert measure_pace(learner, loaders, left=60).later_epoch > 0


@pytest.mark.usefixtures("fresh_cache")
def test_a_budget_that_is_ample_changes_nothing(folder: Path) -> None:
    runs = [train(folder, output, image_size=32, budget=budget) for output, budget in (("a", ""), ("b", "1h"))]
    one, other = (load_file(run.folder / "model.safetensors") for run in runs)
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("scenario", ["large-similar", "large-different"])
def test_the_size_that_fits_is_the_size_that_is_trained_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    monkeypatch.setattr(Budget, "image_size", lambda *_, **__: 64)
    run = train(
        folder, "run", scenario=scenario, budget="1h", epochs=1, use_pretrained=True, model="efficientnet_lite0"
    )
    assert run.classifier.metadata.input_spec.image_size_px == 64


@pytest.mark.usefixtures("fresh_cache")
def test_a_budget_that_is_used_up_leaves_a_run_that_predicts(folder: Path) -> None:
    run = train(folder, "run", image_size=32, budget="30s", began=time.monotonic() - 25.5)
    assert run.metrics["valid"].images == 12
    assert run.classifier.predict(next(folder.rglob("*.png"))).class_name in {"red", "blue"}
