"""A frozen trunk computed in other ways is the same function, or is not used."""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import finetune.features.engine as engine_module
from finetune.features.engine import (
    BATCH_SIZE,
    Kind,
    TrunkEngine,
    agree,
    choose_kind,
    export_onnx,
    fold_batch_norm,
    onnx_runtime,
)
from finetune.features.trunk import pooled_trunk
from finetune.models.initialize import build_backbone
from finetune.models.stage_outputs import stage_ends
from finetune.runs.reporting import LoggingReporter
from finetune.runs.row_store import RowStore, open_store

CPU = torch.device("cpu")


class Said(LoggingReporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def exports(tmp_path: Path) -> Iterator[RowStore]:
    with open_store("exports", {"title": "exports of a test"}, folder=tmp_path) as store:
        yield store


def randomised(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and a scale that show when they are folded wrongly."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.1, generator=generator)
    return model.eval()


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, stride=2),
            nn.BatchNorm2d(6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    )


def images(count: int = BATCH_SIZE, size: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def engine_of(trunk: nn.Module, exports: RowStore | None = None, kind: Kind = "folded") -> tuple[TrunkEngine, Said]:
    said = Said()
    return TrunkEngine(trunk, device=CPU, kind=kind, exports=exports, export_key="ab" * 32, reporter=said), said


def expect_plain(engine: TrunkEngine, trunk: nn.Module, images_BCHW: torch.Tensor) -> None:
    (found,) = engine(images_BCHW)
    with torch.no_grad():
        torch.testing.assert_close(found, trunk(images_BCHW), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "densenet", "squeezenet", "vgg"])
def test_folding_leaves_no_norm_behind_a_convolution_and_the_outputs_as_they_were(name: str) -> None:
    torch.manual_seed(0)
    model = randomised(build_backbone(name, num_classes=3, use_pretrained=False).module)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        folded = fold_batch_norm(model, images(1, 64))
        expected, found = model(images(2, 64)), folded(images(2, 64))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    norms = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    left = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) - len(norms)
    assert left == {"resnet18": 20, "efficientnet_lite0": 49, "densenet": 59, "squeezenet": 0, "vgg": 0}[name]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_every_batch_gives_what_the_plain_trunk_gives() -> None:
    trunk = small_net()
    engine, said = engine_of(trunk)
    for seed in range(3):
        expect_plain(engine, trunk, images(seed=seed))
    assert engine.name == "folded"
    assert said.warnings == []


def test_the_outputs_of_all_stages_are_computed_by_onnx_runtime_too() -> None:
    backbone = build_backbone("efficientnet_lite0", num_classes=3, use_pretrained=False)
    ends = tuple(stage_ends(backbone.module, backbone.stages, backbone.input_spec))
    engine, said = engine_of(pooled_trunk(backbone, ends).module, kind="ONNX Runtime")
    engine(images(8, 224))
    assert engine.name == "ONNX Runtime"
    assert said.warnings == []


@pytest.mark.parametrize("kind", ["plain", "folded", "ONNX Runtime"])
@pytest.mark.parametrize("name", ["efficientnet_lite0", "timm/vit_tiny_patch16_224"])
def test_an_image_gives_the_same_bits_in_any_batch_and_in_the_first_of_any_pass(name: str, kind: Kind) -> None:
    trunk = build_backbone(name, num_classes=3, use_pretrained=False).module.eval()
    torch.manual_seed(0)
    images_BCHW = images(20, 224)
    (engine, _), (other, _), (third, _) = (engine_of(trunk, kind=kind) for _ in range(3))
    expected = torch.cat([engine(part)[0] for part in images_BCHW.split(BATCH_SIZE)])
    order = torch.randperm(20)
    mixed = torch.cat([other(part)[0] for part in images_BCHW[order].split(BATCH_SIZE)])
    assert torch.equal(mixed, expected[order])
    assert torch.equal(third(images_BCHW[17:])[0], expected[17:])
    assert engine.name == kind


def test_how_it_is_computed_depends_on_what_there_is_to_compute_and_not_on_the_clock() -> None:
    trunk = pooled_trunk(build_backbone("efficientnet_lite0", num_classes=2, use_pretrained=False))
    # EfficientNet-Lite0 has 407 million with a head of 1,000 classes, by its own page.
    assert trunk.multiply_adds == pytest.approx(384e6, rel=0.01)
    assert choose_kind(trunk, images=250, device=CPU) == "folded"
    assert choose_kind(trunk, images=270, device=CPU) == "ONNX Runtime"
    assert choose_kind(trunk, images=10_000, device=torch.device("cuda")) == "plain"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_kind(trunk, images=10_000, device=CPU) == "plain"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_closed_standard_output_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run that was started without one would compute other bits."""
    exported = export_onnx(small_net(), images())

    def closed(_: int) -> int:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(engine_module.os, "dup", closed)
    monkeypatch.setattr(sys, "stdout", None)
    assert export_onnx(small_net(), images()) == exported


def test_a_convolution_that_two_modules_read_is_not_folded_unseen() -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            maps_BCHW = self.conv(images_BCHW)
            return torch.cat([maps_BCHW, self.norm(maps_BCHW)], dim=1).mean(dim=(2, 3))

    torch.manual_seed(0)
    trunk = randomised(TwoReaders())
    engine, said = engine_of(trunk)
    engine(images())
    expect_plain(engine, trunk, images(seed=5))
    assert engine.name == "plain"
    assert "folded" in said.warnings[0]


def test_onnx_runtime_computes_full_and_other_batches_and_its_file_is_kept(exports: RowStore) -> None:
    trunk = small_net()
    engine, said = engine_of(trunk, exports, "ONNX Runtime")
    for seed in range(3):
        expect_plain(engine, trunk, images(seed=seed))
    expect_plain(engine, trunk, images(3, seed=9))  # a last batch that is not full
    assert engine.name == "ONNX Runtime"
    assert "ab" * 32 in exports
    assert said.warnings == []


def test_a_kept_export_is_used_again_and_a_wrong_one_is_refused_aloud(exports: RowStore) -> None:
    other = small_net()
    with torch.no_grad():
        other[0].weight.mul_(2)
    wrong = export_onnx(other, images())
    assert wrong is not None
    exports.put("ab" * 32, wrong)
    trunk = small_net()
    engine, said = engine_of(trunk, exports, "ONNX Runtime")
    for seed in range(3):
        expect_plain(engine, trunk, images(seed=seed))
    assert engine.name == "folded"
    assert "ONNX Runtime" in said.warnings[0]


def test_what_cannot_be_exported_or_loaded_is_none() -> None:
    class Unexportable(nn.Module):
        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(images_BCHW[:, 0] + 0j).abs()

    assert export_onnx(Unexportable().eval(), images(2)) is None
    assert onnx_runtime(b"no model") is None


def test_nothing_of_what_the_exporter_writes_past_python_reaches_standard_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As torch does with the whole graph of a network that it cannot export."""

    def export(*_: object, **__: object) -> None:
        ctypes.CDLL(None).puts(b"graph(%x.1")  # into the buffer of C, which is written out later
        os.write(1, b"at exception")
        raise RuntimeError

    monkeypatch.setattr(torch.onnx, "export", export)
    print("before")
    assert export_onnx(small_net(), images()) is None
    print("heard again")
    assert capfd.readouterr().out == "before\nheard again\n"


def test_agreement_is_relative_image_by_image_and_minds_the_largest_value() -> None:
    expected = torch.tensor([[1.0, 2.0], [100.0, 200.0]])
    assert agree((expected,), (expected * (1 + 5e-4),))
    assert not agree((expected,), (expected + torch.tensor([[0.01, 0.0], [0.0, 0.0]]),))
    assert not agree((expected,), (expected * torch.nan,))
    assert not agree((expected,), (expected[:1],))
    even, swapped = torch.ones(1, 100), torch.ones(1, 100)
    even[0, 0], swapped[0, 0], swapped[0, 1] = 1.01, 1.004, 1.005  # near in norm, and yet another place leads
    assert not agree((even,), (swapped,))
    tied = torch.tensor([[6.0, 6.0, 0.0]])
    assert agree((tied,), (torch.tensor([[6.0 - 1e-6, 6.0, 0.0]]),))
