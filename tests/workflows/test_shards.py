"""The street from shards on: the same model as from a folder of the same images, resumed and by two processes too."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune.cli.main import main
from finetune.runs.folder import RunFolder
from finetune.training import checkpoint
from tests.training.exact_resume import Case, differences, write_images
from tests.workflows.test_processes import LOOP, launch, plain_rows


def write_shards(folder: Path, source: Path, *, images_per_shard: int) -> None:
    """Pack the images of `source` in the order of their paths, so that a table of either has one order."""
    folder.mkdir()
    for split in ("train", "valid"):
        images = sorted((source / split).glob("*/*.png"))
        for first in range(0, len(images), images_per_shard):
            with tarfile.open(folder / f"{split}-{first // images_per_shard:06d}.tar", "w") as tar:
                for image in images[first : first + images_per_shard]:
                    key = f"{image.parent.name}-{image.stem}"
                    for name, content in ((f"{key}.png", image.read_bytes()), (f"{key}.cls", image.parent.name)):
                        data = content.encode() if isinstance(content, str) else content
                        header = tarfile.TarInfo(name)
                        header.size = len(data)
                        tar.addfile(header, io.BytesIO(data))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def shards(tmp_path: Path, images: Path) -> Path:
    write_shards(tmp_path / "shards", images, images_per_shard=9)
    assert len(list((tmp_path / "shards").iterdir())) == 6
    return tmp_path / "shards"


def test_shards_train_the_model_that_their_images_train(shards: Path, images: Path, tmp_path: Path, capsys) -> None:
    runs = {}
    for data in (images, shards):
        runs[data] = RunFolder(tmp_path / f"run-{data.name}")
        command = ["train", str(data), *LOOP, "--workers", "2", "--output", str(runs[data].path), "--quiet"]
        assert main(command) == 0
    expected, found = (load_file(runs[data].model) for data in (images, shards))
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    with runs[shards].predictions.open(newline="") as file:
        paths = [row["image_path"] for row in csv.DictReader(file)]
    assert paths[0] == "valid-000000.tar/blue-33.png"
    assert len(paths) == 12
    capsys.readouterr()
    reports = []
    for data in (images, shards):
        assert main(["evaluate", str(runs[shards].path), str(data), "--format", "json", "--quiet"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]


def test_a_resume_in_the_middle_of_shards_is_exact(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "TRAINING_PER_SAVE", 0)
    case = Case(network="BatchNorm CNN", optimizer="sgd", schedule="cosine", has_ema=False, workers=2, accumulation=1)
    assert differences(case, "mid-epoch", shards, tmp_path / "runs") == []


def test_two_processes_share_shards(shards: Path, tmp_path: Path) -> None:
    runs = [RunFolder(tmp_path / name) for name in ("one", "two")]
    assert main(["train", str(shards), *LOOP, "--output", str(runs[0].path), "--quiet"]) == 0
    done = launch("-m", "finetune", "train", str(shards), *LOOP, "--output", str(runs[1].path), "--quiet")
    assert done.returncode == 0, done.stderr
    assert plain_rows(runs[0].predictions.read_text()) == plain_rows(runs[1].predictions.read_text())
