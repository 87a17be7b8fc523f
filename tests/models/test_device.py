"""Which number format "auto" means, and algorithms that are deterministic."""

import pytest
import torch
from torch import nn

from finetune.errors import ConfigError
from finetune.models.device import deterministic_algorithms, resolve_precision

CPU = torch.device("cpu")
DENSE = nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Conv2d(512, 512, 3))
DEPTHWISE = nn.Sequential(DENSE, nn.Conv2d(512, 512, 3, groups=512))
SMALL = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_format_that_was_asked_for_is_taken(name: str) -> None:
    assert resolve_precision(name, CPU, DEPTHWISE) == name


def test_a_processor_has_no_fp16() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        resolve_precision("fp16", CPU, DENSE)
    assert resolve_precision("fp16", torch.device("cuda"), DENSE) == "fp16"


@pytest.mark.parametrize(
    ("network", "has_instructions", "expected"),
    [(DENSE, True, "bf16"), (DENSE, False, "fp32"), (DEPTHWISE, True, "fp32"), (SMALL, True, "fp32")],
    ids=["dense", "dense, old processor", "depthwise", "small"],
)
def test_a_processor_takes_bf16_where_that_is_faster(
    network: nn.Module, has_instructions: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    assert resolve_precision("auto", CPU, network) == expected


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_takes_bf16_where_it_has_it(has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )
    assert resolve_precision("auto", torch.device("cuda"), DEPTHWISE) == expected


def test_deterministic_algorithms_are_for_a_while() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(is_asked=True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(is_asked=False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_caller_that_only_wants_warnings_still_gets_them() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_algorithms(is_asked=True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_layer_that_is_not_deterministic_is_refused() -> None:
    unpool, places = torch.nn.MaxUnpool2d(2), torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    with (
        pytest.raises(ConfigError, match="--deterministic: max_unpooling2d") as caught,
        deterministic_algorithms(is_asked=True),
    ):
        unpool(torch.zeros(1, 1, 1, 1), places)
    assert "--device cpu" in caught.value.hint
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_fault_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="something else"), deterministic_algorithms(is_asked=True):
        raise RuntimeError("something else")
