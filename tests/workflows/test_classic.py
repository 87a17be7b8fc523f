"""Classic networks and baselines walk the same street: trained by name, saved, scored, predicted, inspected."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import load
from finetune.config import PRESETS, TrainConfig, starting_point, to_yaml
from finetune.errors import ConfigError, ModelError
from finetune.models.catalog import list_models
from finetune.runs.model_file import read_metadata
from finetune.training.checkpoint import Checkpointer


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fourth of scikit-learn's digits, written by the command, that training may take seconds."""
    from finetune.cli.main import main

    folder = tmp_path_factory.mktemp("data") / "digits"
    assert main(["data", "digits", "--output", str(folder), "--quiet"]) == 0
    for number, image in enumerate(sorted(folder.glob("*/*.png"))):
        if number % 4:
            image.unlink()
    return folder


def accuracy(run: Path) -> float:
    return read_metadata(run / "model.safetensors").metrics["accuracy"]


@pytest.mark.parametrize(
    ("words", "least"),
    [
        ("lenet5 --epochs 12", 0.85),
        ("lenet5_relu --epochs 12", 0.8),
        ("small_cnn", 0.85),
        ("mlp --shuffle-pixels", 0.8),
        ("linear --channels 1", 0.85),
        ("linear --channels 1 --loss hinge", 0.85),
        ("knn", 0.9),
        ("knn --channels 1 --shuffle-pixels", 0.9),
        ("small_cnn --head knn", 0.8),
        ("efficientnet_lite0 --head knn --image-size 64", 0.5),
    ],
)
def test_model_is_trained_saved_and_used_like_any_other(
    words: str, least: float, digits: Path, tmp_path: Path, finetune: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    outcome = finetune("train", digits, "--model", *words.split(), "--output", run, "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert accuracy(run) > least
    scored = finetune("evaluate", run, digits, "--format", "json", "--quiet")
    assert json.loads(scored.out)["accuracy"] == pytest.approx(accuracy(run), abs=1e-9)
    images = sorted((digits / "7").iterdir())[:6]
    command = [sys.executable, "-m", "finetune", "predict", run, *images, "--format", "json", "--quiet"]
    document = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    told = [found["top"][0]["probability"] for found in document["predictions"]]
    np.testing.assert_allclose(told, load(run).predict_proba(images).max(axis=1), atol=1e-5)
    seen = json.loads(finetune("inspect", run, "--format", "json", "--quiet").out)
    weights = load_file(run / "model.safetensors")
    if "knn" not in words:
        assert seen["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_shuffling_is_part_of_the_model(digits: Path, tmp_path: Path, finetune: Callable[..., Any]) -> None:
    """The same pixels in the same new places while training, evaluating and predicting; another seed, another order."""
    seeds = []
    for seed in (0, 1):
        run = tmp_path / f"run{seed}"
        words = ("--model", "linear", "--channels", 1, "--shuffle-pixels", "--seed", seed)
        assert finetune("train", digits, *words, "--output", run, "--quiet").code == 0
        seeds.append(read_metadata(run / "model.safetensors").input_spec.pixel_permutation_seed)
    assert seeds == [0, 1]
    image = next((digits / "3").iterdir())
    sorted_pixels = [load(tmp_path / f"run{seed}").preprocess(image) for seed in (0, 1)]
    assert not torch.equal(*sorted_pixels)
    assert torch.equal(*(pixels.flatten().sort().values for pixels in sorted_pixels))
    refused = finetune("explain", tmp_path / "run0", image, "--output", tmp_path / "map.png")
    assert refused.code == 4
    assert "pixels in another order" in refused.err


def test_interrupted_training_of_tiny_images_ends_at_the_same_bits(
    digits: Path, tmp_path: Path, finetune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--model", "lenet5_relu", "--augmentation", "affine", "--epochs", 3, "--quiet")
    assert finetune("train", digits, *words, "--output", tmp_path / "whole").code == 0

    def stop(self: Checkpointer, progress: Any) -> None:
        if progress.global_step == 9:  # in the second epoch
            self.save(progress)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "step_ended", stop)
        assert finetune("train", digits, *words, "--output", tmp_path / "parts").code == 130
    assert finetune("train", "--output", tmp_path / "parts", "--resume", "--quiet").code == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_tampered_neighbours_are_refused(digits: Path, tmp_path: Path, finetune: Callable[..., Any]) -> None:
    run = tmp_path / "run"
    assert finetune("train", digits, "--model", "knn", "--output", run, "--quiet").code == 0
    file = run / "model.safetensors"
    metadata = {"finetune": read_metadata(file).to_json()}
    tensors = load_file(file)
    tensors["classifier.class_indices_M"] = tensors["classifier.class_indices_M"] + 7
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ModelError, match="absent or damaged"):
        load(file)


def test_every_classic_network_brings_its_preset() -> None:
    classics = [entry.name for entry in list_models() if entry.source == "classic"]
    assert len(classics) == 12
    for name in classics:
        assert starting_point(name).model == name
    assert set(PRESETS) == {"default", "tutorial", *classics}
    assert starting_point("resnet18") == starting_point(None) == TrainConfig()


def test_preset_comes_with_the_name_through_every_door(
    digits: Path, tmp_path: Path, finetune: Callable[..., Any]
) -> None:
    """Flag, YAML and Python; what is said outright wins."""
    import finetune as package

    file = tmp_path / "mine.yaml"
    file.write_text("model: lenet5_sigmoid\n")
    fast = ("--epochs", 1, "--quiet")
    assert finetune("train", digits, "--model", "lenet5_sigmoid", *fast, "--output", tmp_path / "flag").code == 0
    assert finetune("train", digits, "--config", file, *fast, "--output", tmp_path / "yaml").code == 0
    package.train(digits, model="lenet5_sigmoid", epochs=1, output=tmp_path / "python")
    configs = {(tmp_path / name / "config.yaml").read_text() for name in ("flag", "yaml", "python")}
    assert len(configs) == 1
    assert "batch_size: 256" in configs.pop()
    assert (
        finetune("train", digits, "--config", file, "--batch-size", 32, *fast, "--output", tmp_path / "own").code == 0
    )
    assert "batch_size: 32" in (tmp_path / "own" / "config.yaml").read_text()


def test_run_of_the_first_version_is_still_loaded(flowers_run: Path, tmp_path: Path) -> None:
    """Format 1 knew no pixel permutation and no head on several stages."""
    tensors = load_file(flowers_run / "model.safetensors")
    values = json.loads(read_metadata(flowers_run / "model.safetensors").to_json())
    del values["input_spec"]["pixel_permutation_seed"], values["head_inputs"]
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"finetune": json.dumps(values | {"format_number": 1})})
    assert read_metadata(file).input_spec.pixel_permutation_seed is None
    save_file(tensors, file, metadata={"finetune": json.dumps(values)})
    with pytest.raises(ModelError, match="lacks"):
        read_metadata(file)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"model": "knn"}, "--model knn needs --head knn"),
        ({"head": "knn", "scenario": "large-similar"}, "freezes all"),
        ({"loss": "hinge", "head": "log_softmax"}, "--loss hinge needs --head logits"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "--loss cross-entropy"),
        ({"momentum": 1.0}, "--momentum must be"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        replace(TrainConfig(), **options)


def test_channels_of_a_pretrained_network_are_its_own(
    digits: Path, tmp_path: Path, finetune: Callable[..., Any]
) -> None:
    refused = finetune("train", digits, "--channels", 1, "--output", tmp_path / "run", "--quiet")
    assert refused.code == 4
    assert "takes images of 3 channels, not 1" in refused.err


def test_yaml_of_a_preset_is_read_back(tmp_path: Path) -> None:
    from finetune.config import from_yaml

    for name, build in PRESETS.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(to_yaml(build()))
        assert from_yaml(file) == build()
