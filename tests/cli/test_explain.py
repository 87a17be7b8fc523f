"""`finetune explain` and `predict --dense`: the drawing, the lines, the exit codes."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import api
from finetune.models.initialize import build_backbone
from finetune.runs.model_file import ModelMetadata, save_model_file
from finetune.runs.records import LabelMap


@pytest.fixture
def lily(tmp_path: Path, flowers: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fire lily in a folder of its own, and an empty one to work in."""
    image = tmp_path / "photos" / "lily one.jpg"
    image.parent.mkdir()
    shutil.copy(min(flowers.glob("valid/21/*.jpg")), image)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return image


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a model with random weights."""

    def write(name: str) -> Path:
        torch.manual_seed(0)
        backbone = build_backbone(name, num_classes=2, use_pretrained=False)
        metadata = ModelMetadata(
            architecture=backbone.name,
            head="logits",
            label_map=LabelMap.from_names(["a", "b"], {}),
            input_spec=backbone.input_spec,
            frozen_stages=(),
            scenario="small-similar",
            pretrained_weights="none",
            metrics={},
            data_fingerprint="x",
        )
        path = tmp_path_factory.mktemp(name.replace("/", "_")) / "model.safetensors"
        save_model_file(path, backbone.module.state_dict(), metadata)
        return path

    return write


def test_the_drawing_lies_in_the_current_folder(finetune: Callable[..., Any], flowers_run: Path, lily: Path) -> None:
    before = lily.read_bytes()
    outcome = finetune("explain", flowers_run, lily)
    assert (outcome.code, outcome.err) == (0, "")
    predicted, drawn = outcome.out.splitlines()
    assert re.match(r"predicted: fire lily (9\d\.\d|100\.0)%", predicted)
    assert re.match(r"drawn: fire lily (9\d\.\d|100\.0)%", drawn)
    assert drawn.endswith("at 7 × 7 places: lily one-explained.png")
    assert [path.name for path in Path().iterdir()] == ["lily one-explained.png"]
    assert [path.name for path in lily.parent.iterdir()] == [lily.name]
    assert lily.read_bytes() == before
    with Image.open("lily one-explained.png") as image:
        assert image.format == "PNG"
        assert image.width > image.height > 400


def test_the_map_shows_where_the_flower_is(flowers_run: Path, flowers: Path) -> None:
    """On a picture of two flowers side by side, each class is found on its own side."""
    sides = [Image.open(min(flowers.glob(f"valid/{name}/*.jpg"))).resize((224, 224)) for name in ("21", "1")]
    both = Image.new("RGB", (448, 224))
    for number, side in enumerate(sides):
        both.paste(side, (224 * number, 0))
    path = flowers_run.parent / "both.png"
    both.save(path)
    found = {name: api.explain(flowers_run, path, class_name=name, dense=True) for name in ("fire lily", "daisy")}
    half = found["daisy"].map_HW.shape[1] // 2
    left, right = (
        {name: one.map_HW[:, part].mean() for name, one in found.items()}
        for part in (
            np.s_[:half],
            np.s_[half:],
        )
    )
    assert left["fire lily"] > left["daisy"] + 3
    assert right["daisy"] > right["fire lily"] + 3


def test_another_class_and_the_whole_picture(finetune: Callable[..., Any], flowers_run: Path, lily: Path) -> None:
    words = ("--class", "daisy", "--dense", "--output", "new/map.PNG")
    outcome = finetune("explain", flowers_run, lily, *words)
    assert outcome.code == 0
    predicted, drawn = outcome.out.splitlines()
    assert predicted.startswith("predicted: fire lily")
    assert drawn.startswith("drawn: daisy 0.")
    assert "at 9 × 8 places" in drawn
    assert Path("new/map.PNG").is_file()


def test_the_verb_is_the_command(flowers_run: Path, lily: Path) -> None:
    found = api.explain(flowers_run, lily, output="map.png")
    assert (found.output, found.class_name, found.map_HW.shape) == (Path("map.png"), "21", (7, 7))
    assert found.output.is_file()
    assert found.prediction.image == str(lily)
    assert api.explain(flowers_run, lily).output is None


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--class", "dasiy"), 2, "nearest are: daisy"),
        (("--output", "map.jpg"), 2, "no PNG file"),
        (("--device", "mps"), 2, "not available"),
        (("--output", "taken/map.png"), 6, "cannot write"),
    ],
)
def test_what_cannot_be_meant(
    finetune: Callable[..., Any], flowers_run: Path, lily: Path, words: tuple[str, ...], code: int, text: str
) -> None:
    Path("taken").touch()
    outcome = finetune("explain", flowers_run, lily, *words)
    assert outcome.code == code
    assert text in outcome.err
    assert [path.name for path in Path().iterdir()] == ["taken"]


@pytest.mark.parametrize(("content", "reason"), [(None, "missing"), (b"\xff\xd8\xff\xe0", "truncated"), (b"", "empty")])
def test_an_unreadable_image(
    finetune: Callable[..., Any], flowers_run: Path, lily: Path, content: bytes | None, reason: str
) -> None:
    image = lily.parent / "other.jpg"
    if content is not None:
        image.write_bytes(content)
    outcome = finetune("explain", flowers_run, image)
    assert outcome.code == 3
    assert reason in outcome.err
    assert not list(Path().iterdir())


def test_the_image_is_not_drawn_over(finetune: Callable[..., Any], flowers_run: Path, lily: Path) -> None:
    image = lily.with_suffix(".png")
    Image.open(lily).save(image)
    before = image.read_bytes()
    outcome = finetune("explain", flowers_run, image, "--output", image)
    assert outcome.code == 2
    assert "overwrite" in outcome.err
    assert image.read_bytes() == before


def test_a_network_without_a_map_says_why(finetune: Callable[..., Any], model_file: Any, lily: Path) -> None:
    outcome = finetune("explain", model_file("torchvision/mobilenet_v3_small"), lily)
    assert outcome.code == 4
    assert "classifier.1 (Hardswish)" in outcome.err
    assert len(outcome.err.splitlines()) == 2


def test_a_map_of_one_place_is_warned_of(finetune: Callable[..., Any], model_file: Any, lily: Path) -> None:
    file = model_file("lenet5_relu")
    outcome = finetune("explain", file, lily)
    assert outcome.code == 0
    assert "at 1 × 1 places" in outcome.out
    assert "--dense" in outcome.err


def test_predict_dense_has_the_same_formats(finetune: Callable[..., Any], flowers_run: Path, lily: Path) -> None:
    (lily.parent / "torn.jpg").write_bytes(lily.read_bytes()[:900])
    outcome = finetune("predict", flowers_run, lily.parent, "--dense", "--format", "json")
    assert outcome.code == 3
    whole, torn = json.loads(outcome.out)["predictions"]
    assert torn["error"]["code"] == "truncated"
    assert whole["display_name"] == "fire lily"
    central = json.loads(finetune("predict", flowers_run, lily, "--format", "json").out)["predictions"][0]
    assert whole["probability"] != central["probability"]
    rows = list(csv.DictReader(io.StringIO(finetune("predict", flowers_run, lily, "--dense", "--format", "csv").out)))
    assert [row["class_name"] for row in rows] == ["21"]
    [found] = api.predict(flowers_run, [str(lily)], dense=True)
    assert found.probability == pytest.approx(whole["probability"], abs=1e-5)
