"""A saved model predicts as the one in memory did, from its file alone."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune
from finetune.data.decode import decode_image
from finetune.data.transforms import evaluation_transform, to_tensor
from finetune.errors import ModelError, PredictionInputError, RunError
from finetune.evaluation.infer import probabilities_of
from finetune.models.initialize import build_backbone
from finetune.runs.model_file import METADATA_KEY, ModelMetadata, load_model_file, save_model_file
from finetune.runs.records import LabelMap


@pytest.fixture(scope="module")
def image(flowers: Path) -> Path:
    return sorted(flowers.glob("valid/21/*.jpg"))[0]


def test_bit_equal_alone_and_within_1e5_in_a_batch(tmp_path: Path, flowers: Path) -> None:
    """The model in memory, before it is saved, against the file in another process."""
    torch.manual_seed(3)
    backbone = build_backbone("efficientnet_lite0", num_classes=4)
    backbone.module.to(memory_format=torch.channels_last).eval()
    metadata = ModelMetadata(
        architecture=backbone.name,
        head="logits",
        label_map=LabelMap.from_names(["a", "b", "c", "d"], {}),
        input_spec=backbone.input_spec,
        frozen_stages=(),
        scenario="small-similar",
        pretrained_weights=backbone.weights,
        metrics={"accuracy": 0.5},
        data_fingerprint="x",
    )
    file = tmp_path / "model.safetensors"
    save_model_file(file, backbone.module.state_dict(), metadata)
    images = sorted(flowers.glob("valid/*/*.jpg"))[:5]
    transform = evaluation_transform(backbone.input_spec)
    tensors = [transform(to_tensor(decode_image(path))) for path in images]
    alone = np.concatenate([probabilities_of(backbone.module, tensor[None]).numpy() for tensor in tensors])
    script = (
        "import sys, numpy, finetune\n"
        "classifier = finetune.load(sys.argv[1], device='cpu')\n"
        "paths = sys.argv[3:]\n"
        "alone = numpy.concatenate([classifier.predict_proba([path]) for path in paths])\n"
        "numpy.savez(sys.argv[2], alone=alone, batch=classifier.predict_proba(paths))\n"
    )
    result = tmp_path / "probabilities.npz"
    subprocess.run([sys.executable, "-c", script, file, result, *images], check=True)
    found = np.load(result)
    assert found["alone"].dtype == np.float32
    np.testing.assert_array_equal(found["alone"], alone)
    np.testing.assert_allclose(found["batch"], alone, atol=1e-5)


def test_every_kind_of_image_gives_the_same_answer(flowers_run: Path, image: Path) -> None:
    classifier = finetune.load(flowers_run)
    pixels = decode_image(image)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    sources = [str(image), image, image.read_bytes(), png.getvalue(), Image.open(image), pixels]
    rows = classifier.predict_proba(sources)
    assert rows.shape == (6, 6)
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(rows, np.repeat(rows[:1], 6, axis=0), atol=1e-5)


def test_a_prediction_names_folder_and_flower(flowers_run: Path, image: Path) -> None:
    prediction = finetune.load(flowers_run).predict(image)
    assert (prediction.class_name, prediction.display_name) == ("21", "fire lily")
    assert prediction.probability == prediction.top[0].probability == max(c.probability for c in prediction.top)
    assert not prediction.abstained
    assert len(prediction.top) == 5
    assert finetune.load(flowers_run).predict([image], top_k=2)[0].top == prediction.top[:2]


def test_preprocessing_comes_from_the_file_alone(flowers_run: Path, image: Path, tmp_path: Path) -> None:
    """A file that states another preprocessing is preprocessed differently."""
    metadata, tensors = load_model_file(flowers_run / "model.safetensors")
    changed = tmp_path / "model.safetensors"
    text = metadata.to_json().replace('"mean": [0.5, 0.5, 0.5]', '"mean": [0.1, 0.1, 0.1]')
    save_file(tensors, changed, metadata={METADATA_KEY: text})
    first, second = finetune.load(flowers_run), finetune.load(changed)
    assert second.metadata.input_spec.mean == (0.1, 0.1, 0.1)
    assert torch.allclose(first.preprocess(image) + 0.8, second.preprocess(image), atol=1e-5)
    alone = tmp_path / "alone" / "renamed.safetensors"
    alone.parent.mkdir()
    shutil.copy(flowers_run / "model.safetensors", alone)
    np.testing.assert_array_equal(finetune.load(alone).predict_proba([image]), first.predict_proba([image]))


def test_an_empty_list_has_no_rows(flowers_run: Path) -> None:
    assert finetune.load(flowers_run).predict_proba([]).shape == (0, 6)
    assert finetune.load(flowers_run).predict([]) == []


def test_an_unreadable_image_is_named(flowers_run: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(PredictionInputError, match=r"torn\.jpg"):
        finetune.load(flowers_run).predict(tmp_path / "torn.jpg")


def test_classes_are_in_the_order_of_the_folder_texts(flowers_run: Path) -> None:
    assert finetune.load(flowers_run).classes_.tolist() == ["1", "10", "100", "2", "21", "3"]


class TestRefused:
    """Files that are not what finetune wrote."""

    def changed(self, flowers_run: Path, tmp_path: Path, **tensors: torch.Tensor) -> Path:
        metadata, before = load_model_file(flowers_run / "model.safetensors")
        file = tmp_path / "model.safetensors"
        kept = {
            name: tensor
            for name, tensor in (before | tensors).items()
            if tensor.numel() or tensors.get(name) is not tensor
        }
        save_file(kept, file, metadata={METADATA_KEY: metadata.to_json()})
        return file

    def test_no_such_run(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="no run folder"):
            finetune.load(tmp_path / "nothing")
        with pytest.raises(FileNotFoundError):
            finetune.load(tmp_path)

    def test_extra_and_missing_keys(self, flowers_run: Path, tmp_path: Path) -> None:
        file = self.changed(
            flowers_run, tmp_path, **{"strange.weight": torch.ones(1), "classifier.1.bias": torch.ones(0)}
        )
        with pytest.raises(ModelError) as caught:
            finetune.load(file)
        assert "strange.weight" in str(caught.value)
        assert "classifier.1.bias" in str(caught.value)

    def test_a_head_of_another_size(self, flowers_run: Path, tmp_path: Path) -> None:
        width = 1744  # of all stages of the default network
        file = self.changed(flowers_run, tmp_path, **{"classifier.1.weight": torch.ones(5, width)})
        with pytest.raises(ModelError, match=rf"classifier\.1\.weight.*5, {width}"):
            finetune.load(file)
        file = self.changed(flowers_run, tmp_path, **{"classifier.1.weight": torch.ones(6, 1280)})
        with pytest.raises(ModelError, match="its head looks at stages that the network does not have"):
            finetune.load(file)

    def test_weights_that_are_no_numbers(self, flowers_run: Path, tmp_path: Path) -> None:
        file = self.changed(flowers_run, tmp_path, **{"classifier.1.bias": torch.full((6,), torch.nan)})
        with pytest.raises(ModelError, match=r"classifier\.1\.bias"):
            finetune.load(file)

    @pytest.mark.parametrize("name", ["os.system", "../evil", "https://example.org/model", "builtins.eval"])
    def test_an_architecture_that_is_no_name_in_the_catalog(self, flowers_run: Path, tmp_path: Path, name: str) -> None:
        metadata, tensors = load_model_file(flowers_run / "model.safetensors")
        file = tmp_path / "model.safetensors"
        text = metadata.to_json().replace('"architecture": "efficientnet_lite0"', f'"architecture": "{name}"')
        save_file(tensors, file, metadata={METADATA_KEY: text})
        with pytest.raises(ModelError, match="no model is called"):
            finetune.load(file)

    def test_one_byte_short(self, flowers_run: Path, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        file.write_bytes((flowers_run / "model.safetensors").read_bytes()[:-1])
        with pytest.raises(ModelError, match="damaged"):
            finetune.load(file)

    def test_a_pickle_runs_nothing(self, tmp_path: Path) -> None:
        marker = tmp_path / "marker"

        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                import os

                return os.system, (f"touch {marker}",)

        for name in ("model.safetensors", "model.pth", "model.pkl", "checkpoint"):
            torch.save(Evil(), tmp_path / name)
            with pytest.raises(ModelError):
                finetune.load(tmp_path / name)
        assert not marker.exists()

    def test_bare_weights_do_not_describe_themselves(self, flowers_run: Path, tmp_path: Path) -> None:
        file = tmp_path / "bare.safetensors"
        save_file(load_file(flowers_run / "model.safetensors"), file)
        with pytest.raises(ModelError, match="does not say how to use them"):
            finetune.load(file)
