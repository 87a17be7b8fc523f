"""A run that is to be deterministic: nothing in it goes by the clock, and the same command gives the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import train
from finetune.config import from_yaml
from finetune.runs.folder import RunFolder
from finetune.training import boundary, loop


def test_the_same_command_gives_the_same_bits_and_measures_nothing(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_on = []
    take_step = loop.train_step

    def noted(*arguments: Any, **options: Any) -> Any:
        is_on.append(torch.are_deterministic_algorithms_enabled())
        return take_step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", noted)
    monkeypatch.setattr(boundary, "measure_costs", lambda *_: pytest.fail("the clock was asked"))
    runs = [
        train(flowers, scenario="small-different", epochs=1, deterministic=True, output=tmp_path / name)
        for name in ("one", "two")
    ]
    one, two = ((run.folder / "model.safetensors").read_bytes() for run in runs)
    assert one == two
    assert is_on
    assert all(is_on)
    assert not torch.are_deterministic_algorithms_enabled()
    engines = [event["engine"] for event in RunFolder(runs[0].folder).events() if event["event"] == "features"]
    assert engines == ["plain"]
    config = from_yaml(runs[0].folder / "config.yaml")
    assert config.deterministic
    assert config.boundary_cache == "never"
