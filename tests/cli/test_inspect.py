"""`finetune inspect`: the table, JSON, CSV and the picture, of a name and of a run."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.cli.inspect import _table
from finetune.models.anatomy import inspect_network
from finetune.models.initialize import build_as_published


def test_the_table_shows_each_layer_and_the_totals(finetune: Callable[..., Any]) -> None:
    outcome = finetune("inspect", "lenet5")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert next(line.split() for line in lines if "features.c3" in line) == [
        *["features.c3", "Conv2d", "16×10×10", "2,416", "240,000", "14", "2", "6.5", "learning"]
    ]
    assert "61,706 parameters" in lines[-1]
    assert "416,520 multiply-adds" in lines[-1]
    assert "frozen" not in outcome.out


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_the_table_keeps_to_the_terminal(width: int) -> None:
    module, spec = build_as_published("resnet18")
    anatomy = inspect_network(module, (spec.channels, spec.image_size_px, spec.image_size_px))
    text = _table(anatomy, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "435" in text
    assert ("multiply-" in text.split("11,689,512")[0]) == (width >= 70)


def test_json_is_one_document(finetune: Callable[..., Any]) -> None:
    document = json.loads(finetune("inspect", "resnet18", "--image-size", "96", "--format", "json").out)
    assert document["model"] == "resnet18"
    assert document["image_size_px"] == 96
    assert document["channels"] == 3
    assert document["parameters"] == 11_689_512
    assert "padding included" in document["receptive_field_note"]
    layers = {layer["name"]: layer for layer in document["layers"]}
    assert layers["layer4.1.conv2"]["output_shape"] == [512, 3, 3]
    assert layers["layer4.1.conv2"]["receptive_field"] == [435, 435]
    assert layers["avgpool"]["receptive_field"] == "image"
    assert layers["avgpool"]["stride"] is None


def test_csv_has_a_row_a_layer(finetune: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "layers.csv"
    outcome = finetune("inspect", "lenet5", "--format", "csv", "--output", file)
    assert outcome.out == ""
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert rows[0]["name"] == "features.c1"
    assert rows[0]["output_shape"] == "6x28x28"
    assert rows[0]["receptive_field"] == "5x5"
    assert sum(int(row["parameters"]) for row in rows) == 61_706


def test_the_ending_decides_on_the_picture(finetune: Callable[..., Any], tmp_path: Path) -> None:
    assert finetune("inspect", "lenet5", "--output", tmp_path / "a.png").code == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
    assert finetune("inspect", "lenet5", "--output", tmp_path / "a.svg").code == 0
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert finetune("inspect", "lenet5", "--output", tmp_path / "a.pdf").code == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_a_run_is_the_trained_network_with_what_it_froze(finetune: Callable[..., Any], flowers_run: Path) -> None:
    document = json.loads(finetune("inspect", flowers_run, "--format", "json").out)
    states = {layer["name"]: layer["state"] for layer in document["layers"] if layer["state"] != "-"}
    assert states.pop("classifier.1") == "learning"
    assert set(states.values()) == {"frozen"}
    assert document["layers"][-1]["output_shape"] == [6]
    assert document["learning"] == 1745 * 6
    table = finetune("inspect", flowers_run / "model.safetensors", "--image-size", "128").out
    assert "frozen" in table
    assert "input 3×128×128" in table


def test_what_cannot_be_inspected_is_refused(finetune: Callable[..., Any], tmp_path: Path) -> None:
    unknown = finetune("inspect", "resnt18")
    assert unknown.code == 4
    assert "resnet18" in unknown.err
    assert finetune("inspect", tmp_path).code == 4
    assert finetune("inspect", "vit_b_16", "--image-size", "100").code == 4
    assert finetune("inspect", "lenet5", "--image-size", "0").code == 2
    assert finetune("inspect", "lenet5", "--format", "json", "--output", tmp_path / "a.png").code == 2
    assert finetune("inspect", "lenet5", "--output", tmp_path / "a.jpg").code == 2
    assert finetune("inspect", "lenet5", "--output", tmp_path / "no" / "folder" / "a.png").code == 6
