"""A batch size that is "auto": as large as makes an image cheaper."""

from pathlib import Path

import pytest
import torch

from finetune import train
from finetune.config import TrainConfig, from_yaml
from finetune.errors import ConfigError
from finetune.models.initialize import Backbone, build_backbone
from finetune.training import batch_size
from finetune.training.batch_size import fastest_batch_size
from finetune.training.plan import make_plan


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build_backbone("lenet5", num_classes=3)


def found(backbone: Backbone, *, optimizer: str = "adamw", images: int = 10_000, processes: int = 1) -> int:
    plan = make_plan(
        TrainConfig(data="x", batch_size="auto", optimizer=optimizer),  # type: ignore[arg-type]
        scenario="large-different",
        frozen_stages=(),
        can_solve_head=True,
        has_batch_norm=False,
        images=images,
    )
    assert plan.batch_size == 32
    cpu = torch.device("cpu")
    return fastest_batch_size(backbone, plan, images=images, processes=processes, device=cpu, precision="fp32")


def pretend(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> None:
    """Let an image of a share take so many seconds; a share that is not named does not fit into memory."""

    def measured(_backbone: object, share: int, *_: object) -> float:
        if share not in seconds:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
        return seconds[share]

    monkeypatch.setattr(batch_size, "_seconds_an_image", measured)


@pytest.mark.parametrize(
    ("seconds", "size"),
    [
        ({32: 1.0, 64: 0.95, 128: 0.1}, 32),
        ({32: 1.0, 64: 0.8, 128: 0.79}, 64),
        ({32: 1.0, 64: 0.8, 128: 0.6, 256: 0.1}, 128),
        ({32: 1.0}, 32),
        ({32: 1.0, 64: 0.5}, 64),
        ({}, 32),
    ],
)
def test_it_doubles_while_an_image_gets_cheaper_and_fits(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], size: int
) -> None:
    pretend(monkeypatch, seconds)
    assert found(backbone) == size


def test_it_ends_where_the_rates_or_the_steps_of_an_epoch_do(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {size: 1 / size for size in (32, 64, 128, 256)})
    assert found(backbone, optimizer="sgd") == 64
    assert found(backbone, images=2_559) == 64
    assert found(backbone, images=100) == 32


def test_several_processes_are_measured_by_their_share(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {16: 1.0, 32: 0.5})
    assert found(backbone, processes=2) == 64


def test_measuring_leaves_no_trace(backbone: Backbone) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}
    backbone.module.train()
    drawn = torch.get_rng_state()
    assert found(backbone) in (32, 64, 128)
    assert backbone.module.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.module.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.module.parameters())


def test_a_run_says_what_was_found_and_goes_on_with_it(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "FEWEST_STEPS", 1)
    pretend(monkeypatch, {32: 1.0, 64: 0.5})
    options = {"model": "lenet5", "scenario": "large-different", "output": tmp_path / "run"}
    train(flowers, **options, batch_size="auto", epochs=1)
    assert from_yaml(tmp_path / "run" / "config.yaml").batch_size == 64
    pretend(monkeypatch, {})
    run = train(flowers, output=tmp_path / "run", resume=True, epochs=2)
    assert from_yaml(run.folder / "config.yaml").batch_size == 64


def test_what_goes_by_the_clock_is_not_deterministic() -> None:
    for clock in ({"batch_size": "auto"}, {"budget": "10m"}):
        with pytest.raises(ConfigError, match="--deterministic decides nothing by the clock"):
            TrainConfig(data="x", deterministic=True, **clock)  # type: ignore[arg-type]
