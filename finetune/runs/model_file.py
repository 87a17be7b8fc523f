"""model.safetensors: weights and one strict-JSON string that says all that predicting needs to know.

Reading runs no code: the metadata is data with a closed schema, and every name in it is looked up in a table.
"""

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from finetune.errors import FinetuneError, ModelError, RunError
from finetune.runs import strict_json
from finetune.runs.folder import write_whole
from finetune.runs.records import InputSpec, Interpolation, LabelMap

if TYPE_CHECKING:
    import torch

FORMAT_NUMBER = 3
"""Format 2 knows the fixed pixel permutation and the head of nearest neighbours, format 3 a head that looks at several
stages; files of earlier formats are read too."""

METADATA_KEY = "finetune"
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself

HeadKind = Literal["logits", "log_softmax", "knn"]
"""What a network puts out: logits, log-probabilities, or the log of the share of votes of the nearest neighbours."""


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """What a model file says of its weights."""

    architecture: str
    """Name that `models.catalog` resolves, with its zoo."""
    head: HeadKind
    label_map: LabelMap
    input_spec: InputSpec
    frozen_stages: tuple[str, ...]
    scenario: str
    pretrained_weights: str
    """Where the start came from, in words."""
    metrics: Mapping[str, float]
    """Validation scores of these weights."""
    data_fingerprint: str
    head_inputs: tuple[str, ...] = ()
    """Paths of the modules at whose outputs the head looks, beside the features of the last stage."""
    calibration: float | None = None
    """Temperature that the logits are divided by."""
    threshold: float | None = None
    """Probability under which the prediction abstains."""
    format_number: int = FORMAT_NUMBER

    def to_json(self) -> str:
        """Write the metadata as the one JSON string in the file's header."""
        return strict_json.dump(asdict(self))

    @classmethod
    def from_json(cls, text: str, *, source: Path) -> "ModelMetadata":
        """Read what `to_json` wrote.

        Raises:
            ModelError: The text is no strict JSON, a field is unknown, absent or of the wrong kind, or the format is
                newer than this version reads.
        """
        try:
            values = strict_json.parse(text)
            if isinstance(values, dict) and _is_newer(values.get("format_number")):
                raise ModelError(
                    f"{source} has format {values['format_number']}; this version reads up to {FORMAT_NUMBER}",
                    "update finetune",
                )
            if isinstance(values, dict) and values.get("format_number") in (1, 2):
                values.setdefault("head_inputs", [])
            _require_fields(values, cls, "metadata")
            _require_fields(values["label_map"], LabelMap, "label_map")
            if values["format_number"] == 1 and isinstance(values["input_spec"], dict):
                values["input_spec"].setdefault("pixel_permutation_seed", None)
            _require_fields(values["input_spec"], InputSpec, "input_spec")
            return cls(**_checked(values))
        except ModelError:
            raise
        except (ValueError, TypeError, FinetuneError) as error:
            raise ModelError(f"{source}: the metadata is not what finetune writes: {error}") from error


def save_model_file(path: Path, tensors: Mapping[str, "torch.Tensor"], metadata: ModelMetadata) -> None:
    """Write weights and metadata to `path`, whole or not at all.

    Raises:
        StorageError: The disk is full or refuses.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    write_whole(path, save(plain, metadata={METADATA_KEY: metadata.to_json()}))


def read_metadata(path: Path) -> ModelMetadata:
    """Return the metadata of the model file at `path` without reading a weight, or importing torch.

    Raises:
        RunError: There is no such file.
        ModelError: It is no model file of finetune, or is damaged.
    """
    header = _read_header(path)
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    if not isinstance(text, str):
        raise ModelError(
            f"{path} holds weights but does not say how to use them",
            "give bare weights to `finetune train --weights`; what that writes describes itself",
        )
    return ModelMetadata.from_json(text, source=path)


def load_model_file(path: Path) -> tuple[ModelMetadata, dict[str, "torch.Tensor"]]:
    """Return metadata and weights of the model file at `path`.

    Raises:
        RunError: There is no such file.
        ModelError: It is no model file of finetune, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    metadata = read_metadata(path)
    try:
        return metadata, load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is damaged: {error}", "take another copy of the file") from error


def _read_header(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ModelError(f"{path} is damaged: its header claims {length} bytes of {size}")
            header = strict_json.parse(file.read(length))
    except FileNotFoundError as error:
        raise RunError(f"there is no model file {path}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError) as error:
        raise ModelError(f"{path} is no safetensors file: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ModelError(f"{path} is no safetensors file: its header is no JSON object")
    return header


def _is_newer(number: object) -> bool:
    return type(number) is int and number > FORMAT_NUMBER


def _require_fields(values: object, record: type[Any], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is no object")
    expected = {field.name for field in fields(record)}
    unknown, absent = sorted(set(values) - expected), sorted(expected - set(values))
    if unknown or absent:
        raise ValueError(f"{where} has unknown fields {unknown} and lacks {absent}")


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` as the arguments of `ModelMetadata`, each of the kind it must be."""
    spec, labels = values["input_spec"], values["label_map"]
    wrong = [
        name
        for name, is_right in {
            "architecture": isinstance(values["architecture"], str),
            "head": values["head"] in get_args(HeadKind),
            "scenario": isinstance(values["scenario"], str),
            "pretrained_weights": isinstance(values["pretrained_weights"], str),
            "data_fingerprint": isinstance(values["data_fingerprint"], str),
            "frozen_stages": _is_list(values["frozen_stages"], str),
            "head_inputs": _is_list(values["head_inputs"], str),
            "class_names": _is_list(labels["class_names"], str) and len(labels["class_names"]) > 1,
            "display_names": _is_list(labels["display_names"], str),
            "mean": _is_list(spec["mean"], float, int),
            "std": _is_list(spec["std"], float, int),
            "image_size_px": type(spec["image_size_px"]) is int,
            "resize_px": type(spec["resize_px"]) is int,
            "interpolation": spec["interpolation"] in get_args(Interpolation),
            "pixel_permutation_seed": spec["pixel_permutation_seed"] is None
            or _is_in(spec["pixel_permutation_seed"], range(2**31)),
            "metrics": isinstance(values["metrics"], dict) and _is_list(list(values["metrics"].values()), float, int),
            "calibration": values["calibration"] is None or _is_positive(values["calibration"]),
            "threshold": values["threshold"] is None
            or (_is_positive(values["threshold"]) and values["threshold"] <= 1),
            "format_number": _is_in(values["format_number"], range(1, FORMAT_NUMBER + 1)),
        }.items()
        if not is_right
    ]
    if wrong:
        raise ValueError(f"wrong kind of value for {', '.join(wrong)}")
    return values | {
        "label_map": LabelMap(class_names=tuple(labels["class_names"]), display_names=tuple(labels["display_names"])),
        "input_spec": InputSpec(**spec | {"mean": tuple(spec["mean"]), "std": tuple(spec["std"])}),
        "frozen_stages": tuple(values["frozen_stages"]),
        "head_inputs": tuple(values["head_inputs"]),
    }


def _is_list(value: object, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(item) in kinds for item in value)


def _is_in(value: object, numbers: range) -> bool:
    return type(value) is int and value in numbers


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and value > 0  # type: ignore[operator]
