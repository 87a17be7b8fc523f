"""Weight files load under every usual wrapping, and bad ones are refused without running anything."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import densenet121, googlenet, resnet18

from finetune.errors import ModelError
from finetune.models import weights as weights_module
from finetune.models.weights import bundled_state, load_exact, load_weights_file

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def source() -> State:
    torch.manual_seed(1)
    return {name: tensor.contiguous() for name, tensor in resnet18().state_dict().items()}


@pytest.fixture
def model() -> nn.Module:
    return resnet18()


def assert_loaded(model: nn.Module, source: State, *, but: str = "no such name") -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source[name]) or name.startswith(but), name


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "prefix": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {}},
    "nested prefix": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "no batch counts": lambda state: {name: t for name, t in state.items() if not name.endswith("batches_tracked")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_usual_wrappings_are_unwrapped(wrapping: str, source: State, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](source), path)
    report = load_weights_file(model, path, ignore_head=False)
    assert_loaded(model, source)
    assert report.dropped == ()
    assert report.loaded == len(source) - 20 * (wrapping == "no batch counts")


def test_safetensors_load(source: State, model: nn.Module, tmp_path: Path) -> None:
    save_file(source, tmp_path / "weights.safetensors")
    load_weights_file(model, tmp_path / "weights.safetensors", ignore_head=False)
    assert_loaded(model, source)


def test_head_of_another_size_is_dropped_and_reported(source: State, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(source | {"fc.weight": torch.zeros(5, 512), "fc.bias": torch.zeros(5)}, path)
    report = load_weights_file(model, path, ignore_head=True)
    assert set(report.dropped) == {"fc.weight", "fc.bias"}
    assert_loaded(model, source, but="fc.")
    with pytest.raises(ModelError, match=r"fc\.weight \(5, 512\) instead of \(1000, 512\)"):
        load_weights_file(model, path, ignore_head=False)


def test_renamed_keys_are_listed_in_both_directions(source: State, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({name.replace("layer", "stage"): tensor for name, tensor in source.items()}, path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"missing: layer1.*and \d+ more; unexpected: stage1.*and \d+ more") as caught:
        load_weights_file(model, path, ignore_head=True)
    assert str(path) in caught.value.message
    assert_loaded(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(value: float, source: State, model: nn.Module, tmp_path: Path) -> None:
    broken = source["layer1.0.conv1.weight"].clone()
    broken[0, 0, 0, 0] = value
    torch.save(source | {"layer1.0.conv1.weight": broken}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"NaN or infinity in layer1\.0\.conv1\.weight"):
        load_weights_file(model, tmp_path / "weights.pth", ignore_head=True)


class Malicious:
    """Writes a marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin", "weights.safetensors", "weights"])
def test_pickle_that_runs_code_is_refused(name: str, model: nn.Module, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / name
    torch.save({"fc.weight": Malicious(marker)}, path)
    with pytest.raises(ModelError, match="damaged, or more than plain tensors"):
        load_weights_file(model, path, ignore_head=True)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"no"]
)
def test_damaged_file_is_refused(
    suffix: str, damage: Callable[[bytes], bytes], source: State, model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(source, path) if suffix == ".safetensors" else torch.save(source, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match="damaged"):
        load_weights_file(model, path, ignore_head=True)


def test_absent_file_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such weight file"):
        load_weights_file(model, tmp_path / "weights.pth", ignore_head=True)


@pytest.mark.parametrize(
    "content",
    [{}, [1, 2], torch.zeros(3), {"a": 1}, {1: torch.zeros(1)}, {"a": torch.empty(2, device="meta")}],
    ids=["empty", "list", "tensor", "number", "numbered", "meta"],
)
def test_anything_but_a_state_dict_is_refused(content: Any, model: nn.Module, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="state dict"):
        load_weights_file(model, tmp_path / "weights.pth", ignore_head=True)


def test_torchvisions_own_old_files_load(tmp_path: Path) -> None:
    torch.manual_seed(1)
    dense = {name: tensor.clone() for name, tensor in densenet121().state_dict().items()}
    old = {name.replace("norm1", "norm.1").replace("conv2", "conv.2"): tensor for name, tensor in dense.items()}
    assert old.keys() != dense.keys()
    torch.save(old, tmp_path / "densenet.pth")
    model = densenet121()
    load_weights_file(model, tmp_path / "densenet.pth", ignore_head=False)
    assert_loaded(model, dense)

    google = googlenet(init_weights=False, aux_logits=True).state_dict()
    torch.save(google, tmp_path / "googlenet.pth")
    model = googlenet(init_weights=False, aux_logits=False)
    load_weights_file(model, tmp_path / "googlenet.pth", ignore_head=False)
    assert_loaded(model, google)


def test_exact_loading_takes_every_key_or_none(source: State, model: nn.Module) -> None:
    load_exact(model, source, "model.safetensors")
    assert_loaded(model, source)
    with pytest.raises(ModelError, match=r"model\.safetensors: .* missing: bn1\.num_batches_tracked"):
        load_exact(
            model, {name: t for name, t in source.items() if name != "bn1.num_batches_tracked"}, "model.safetensors"
        )
    with pytest.raises(ModelError, match="unexpected: extra"):
        load_exact(model, source | {"extra": torch.zeros(1)}, "model.safetensors")


def test_bundled_weights_compute_what_timm_computes_with_them() -> None:
    reference = timm.create_model("tf_efficientnet_lite0").eval()
    path = Path(weights_module.local_weights(weights_module.resolve("efficientnet_lite0")) or "")
    tensors = torch.load(path, weights_only=True)
    reference.load_state_dict(dict(zip(reference.state_dict(), tensors.values(), strict=True)))
    model = timm.create_model("tf_efficientnet_lite0").eval()
    load_exact(model, bundled_state(model), "bundled")
    images_BCHW = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        logits_NK = model(images_BCHW)
        assert torch.equal(logits_NK, reference(images_BCHW))
    # The names pair up, not only the shapes: the file's own names say the same layers.
    state = bundled_state(model)
    assert torch.equal(state["classifier.weight"], tensors["_fc.weight"])
    assert torch.equal(state["conv_stem.weight"], tensors["_conv_stem.weight"])
    assert torch.equal(state["blocks.0.0.conv_dw.weight"], tensors["_blocks.0._depthwise_conv.weight"])
    assert torch.equal(state["bn2.running_var"], tensors["_bn1.running_var"])


def test_bundled_file_that_was_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "efficientnet.pth"
    torch.save({}, fake)
    monkeypatch.setattr(weights_module, "local_weights", lambda _: fake)
    with pytest.raises(ModelError, match="not the published weights"):
        bundled_state(nn.Identity())
    fake.unlink()
    with pytest.raises(ModelError, match="not installed"):
        bundled_state(nn.Identity())
