"""Training from what frozen layers gave once is the training that runs them in every epoch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finetune
import finetune.training.boundary as boundary_module
from finetune.data.csv_files import read_csv
from finetune.data.listing import list_images
from finetune.data.scan import scan_images
from finetune.errors import ConfigError, ModelError
from finetune.features.cut import cut_model
from finetune.models.freezing import freeze_stages
from finetune.models.initialize import build_backbone
from finetune.runs.cache_folder import clear_cache
from finetune.training.boundary import Costs, measure_costs

pytestmark = pytest.mark.usefixtures("fresh_cache")


def train(folder: Path, output: str, **options: Any) -> dict[str, torch.Tensor]:
    settings = {
        "model": "resnet18",
        "use_pretrained": False,
        "scenario": "small-different",
        "image_size": 32,
        "epochs": 2,
        "batch_size": 10,
        "augmentation": "none",
        "workers": 0,
    }
    run = finetune.train(folder, output=folder.parent / output, **{**settings, **options})
    return load_file(run.folder / "model.safetensors")


def last_weights(folder: Path, output: str) -> dict[str, torch.Tensor]:
    """Return the weights of the last epoch: the model file has those of the best, which may be the start."""
    return load_file(max((folder.parent / output / "checkpoints").glob("step-*")) / "model.safetensors")


def events(folder: Path, output: str) -> list[dict[str, Any]]:
    lines = (folder.parent / output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_an_epoch_from_the_cache_gives_the_weights_of_one_that_runs_the_frozen_layers(folder: Path) -> None:
    options = {"epochs": 1, "precision": "fp32", "trunk_learning_rate": 1.0}  # random features are small
    train(folder, "cached", boundary_cache="always", **options)
    train(folder, "plain", boundary_cache="never", **options)
    start = train(folder, "start", boundary_cache="never", **{**options, "epochs": 0})
    cached, plain = last_weights(folder, "cached"), last_weights(folder, "plain")
    assert cached.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(cached[name], tensor, rtol=0, atol=1e-5)
    assert (plain["layer4.0.conv1.weight"] - start["layer4.0.conv1.weight"]).abs().max() > 1e-4
    assert torch.equal(plain["layer1.0.conv1.weight"], start["layer1.0.conv1.weight"])


def test_the_frozen_layers_run_once_for_an_image_however_many_epochs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    close = boundary_module.TrunkPass.close
    monkeypatch.setattr(
        boundary_module.TrunkPass, "close", lambda self: (computed.append(self.computed), close(self))[1]
    )
    train(folder, "cached", boundary_cache="always", epochs=3)
    train(folder, "again", boundary_cache="always", epochs=3)
    assert computed == [40, 28, 12, 0, 0, 0]  # features of all, then maps of the training and validation images


def test_views_are_taken_in_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    close = boundary_module.TrunkPass.close
    monkeypatch.setattr(
        boundary_module.TrunkPass, "close", lambda self: (computed.append(self.computed), close(self))[1]
    )
    train(folder, "views", boundary_cache="always", augmentation="light", views=2, epochs=3)
    assert computed[-3:] == [28, 28, 12]
    read: list[int] = []
    row = boundary_module.ActivationDataset._row
    monkeypatch.setattr(
        boundary_module.ActivationDataset,
        "_row",
        lambda self, view, index: (read.append(view) if len(self.caches) == 2 else None, row(self, view, index))[1],
    )
    train(folder, "again", boundary_cache="always", augmentation="light", views=2, epochs=3)
    assert read == [0] * 28 + [1] * 28  # and held for the third epoch
    monkeypatch.setattr(boundary_module, "HELD_BYTES", 0)
    read.clear()
    train(folder, "not held", boundary_cache="always", augmentation="light", views=2, epochs=3)
    assert read == [0, *[0] * 28, 1, *[1] * 28, *[0] * 28]
    again, not_held = last_weights(folder, "again"), last_weights(folder, "not held")
    assert all(torch.equal(not_held[name], tensor) for name, tensor in again.items())


def test_activations_that_find_no_room_are_refused_before_they_are_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_GB", "0.00001")
    with pytest.raises(ConfigError, match="there is room for"):
        train(folder, "cached", boundary_cache="always")


def test_a_cache_that_is_cleared_while_it_is_read_does_no_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(folder, "whole", boundary_cache="always", augmentation="light", views=2)
    datasets = boundary_module.activation_datasets
    monkeypatch.setattr(
        "finetune.training.batches.activation_datasets",
        lambda *words, **options: (datasets(*words, **options), clear_cache())[0],
    )
    cut = train(folder, "cut", boundary_cache="always", augmentation="light", views=2)
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


def test_a_head_trained_from_the_cache_leaves_the_body_untouched(folder: Path) -> None:
    options = {"scenario": "small-similar", "head_start": "random", "seed": 3}
    train(folder, "head", epochs=3, **options)
    start = train(folder, "start", epochs=0, **options)
    trained = last_weights(folder, "head")
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_a_resume_from_the_cache_gives_the_weights_of_a_training_in_one_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(folder, "whole", boundary_cache="always", epochs=3, schedule="constant")
    train(folder, "parts", boundary_cache="always", epochs=1, schedule="constant")
    begun = last_weights(folder, "parts")
    finetune.train(output=folder.parent / "parts", resume=True, epochs=3)
    whole, resumed = last_weights(folder, "whole"), last_weights(folder, "parts")
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    (head,) = (name for name in begun if name.startswith("fc.") and name.endswith("weight"))
    assert not torch.equal(begun[head], resumed[head])


def test_a_saved_model_predicts_what_was_scored(folder: Path) -> None:
    train(folder, "cached", boundary_cache="always")
    classifier = finetune.load(folder.parent / "cached", device="cpu")
    for _, row in read_csv(folder.parent / "cached" / "predictions.csv", required=("image_path",)):
        found = classifier.predict(folder / row["image_path"])
        assert found.class_name == row["predicted"]
        assert found.probability == pytest.approx(float(row["probability"]), abs=2e-3)  # maps have half precision


def test_an_augmentation_or_cost_that_cannot_be_meant_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--views must be 0 or more"):
        train(folder, "bad", views=-1)


def test_always_is_refused_where_the_network_cannot_be_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("it cannot be cut", "")

    monkeypatch.setattr(boundary_module, "cut_model", refuse)
    with pytest.raises(ModelError, match="cannot be cut"):
        train(folder, "always", boundary_cache="always", epochs=1)
    train(folder, "auto", boundary_cache="auto", epochs=1)  # goes on without


def test_the_cheaper_plan_is_taken() -> None:
    costs = Costs(decode_seconds=0.01, trunk_seconds=0.02, rest_seconds=0.03, row_bytes=500_000)
    assert costs.read_seconds == pytest.approx(0.001)
    assert costs.epoch_ratio == pytest.approx(0.06 / 0.031)
    assert costs.saves(epochs=2, views=1)
    assert not costs.saves(epochs=1, views=1)
    assert not costs.saves(epochs=4, views=4)
    slow_disk = Costs(decode_seconds=0.001, trunk_seconds=0.001, rest_seconds=0.03, row_bytes=5_000_000)
    assert not slow_disk.saves(epochs=100, views=1)


def test_measuring_moves_nothing(folder: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", num_classes=2, use_pretrained=False, image_size=32)
    freeze_stages(backbone.module, backbone.stages, 3)
    backbone.module.train()
    before = {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}
    modes = [module.training for module in backbone.module.modules()]
    random_state = torch.get_rng_state()
    table = scan_images(list_images(folder)).table
    costs = measure_costs(cut_model(backbone.module, backbone.stages, 3), backbone, table)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.module.state_dict().items())
    assert [module.training for module in backbone.module.modules()] == modes
    assert all(parameter.grad is None for parameter in backbone.module.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert costs.row_bytes == 2 * 128 * 4 * 4
    assert min(costs.decode_seconds, costs.trunk_seconds, costs.rest_seconds) > 0
