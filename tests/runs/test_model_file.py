"""model.safetensors describes itself, and whatever else bears its name is refused."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import ModelError, RunError
from finetune.runs.model_file import (
    FORMAT_NUMBER,
    METADATA_KEY,
    ModelMetadata,
    load_model_file,
    read_metadata,
    save_model_file,
)
from finetune.runs.records import InputSpec, LabelMap

METADATA = ModelMetadata(
    architecture="timm/tf_efficientnet_lite0",
    head="log_softmax",
    label_map=LabelMap.from_names(["2", "10", "=cmd"], {"10": "<script>", "2": "Knöterich 花"}),
    input_spec=InputSpec(
        image_size_px=224, resize_px=256, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1)
    ),
    frozen_stages=("stem", "blocks.0"),
    scenario="small-different",
    pretrained_weights="ImageNet-1k",
    metrics={"accuracy": 0.75, "log_loss": 1},
    data_fingerprint="ab" * 32,
    head_inputs=("blocks.0", "blocks.1"),
    calibration=1.25,
    threshold=0.4,
)
TENSORS = {"a": torch.arange(3.0), "b": torch.tensor([[1, 2], [3, 4]]), "scalar": torch.tensor(7.0)}

Fields = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_model_file(file, TENSORS, METADATA)
    return file


def rewrite(path: Path, change: Callable[[Fields], object], *, more_bytes: bytes = b"") -> None:
    """Change the header of the file at `path`, and nothing else unless `more_bytes` are given."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :] + more_bytes)


def changed_text(change: Callable[[Fields], object]) -> str:
    values = json.loads(METADATA.to_json())
    change(values)
    return json.dumps(values)


def from_json(text: str) -> ModelMetadata:
    return ModelMetadata.from_json(text, source=Path("m.safetensors"))


def test_round_trip(path: Path) -> None:
    metadata, tensors = load_model_file(path)
    assert metadata == read_metadata(path) == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_optional_fields_may_be_absent_values(path: Path) -> None:
    metadata = replace(METADATA, calibration=None, threshold=None, frozen_stages=(), metrics={})
    save_model_file(path, TENSORS, metadata)
    assert read_metadata(path) == metadata


def test_shared_and_strided_and_learning_tensors_are_saved(path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    save_model_file(path, {"a": weight, "b": weight, "transposed": weight.T}, METADATA)
    tensors = load_model_file(path)[1]
    assert torch.equal(tensors["transposed"], weight.detach().T)
    assert torch.equal(tensors["a"], tensors["b"])


def test_metadata_is_read_without_torch(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from finetune.runs.model_file import read_metadata;"
        "print(read_metadata(Path(sys.argv[1])).architecture, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [METADATA.architecture, "False", "False"]


@pytest.mark.parametrize("name", list(json.loads(METADATA.to_json())))
def test_absent_field_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=rf"m\.safetensors.*lacks \['{name}'\]"):
        from_json(changed_text(lambda values: values.pop(name)))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (lambda values: values, r"metadata has unknown fields \['hook'\]"),
        (lambda values: values["label_map"], r"label_map has unknown fields \['hook'\]"),
        (lambda values: values["input_spec"], r"input_spec has unknown fields \['hook'\]"),
    ],
)
def test_unknown_field_is_refused_by_name(where: Callable[[Fields], Fields], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_json(changed_text(lambda values: where(values).update(hook="os.system")))


def test_earlier_formats_know_no_head_on_several_stages() -> None:
    for number in (1, 2):
        text = changed_text(
            lambda values, number=number: (values.pop("head_inputs"), values.update(format_number=number))
        )
        assert from_json(text) == replace(METADATA, head_inputs=(), format_number=number)


def test_newer_format_says_so_even_with_fields_of_the_future() -> None:
    with pytest.raises(ModelError, match=f"has format {FORMAT_NUMBER + 1}") as caught:
        from_json(changed_text(lambda values: values.update(format_number=FORMAT_NUMBER + 1, future=1)))
    assert caught.value.hint == "update finetune"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architecture", 3),
        ("architecture", None),
        ("head", "softmax"),
        ("head", ["logits"]),
        ("scenario", {}),
        ("pretrained_weights", True),
        ("data_fingerprint", 12),
        ("frozen_stages", "stem"),
        ("frozen_stages", [1]),
        ("head_inputs", "blocks.0"),
        ("head_inputs", [None]),
        ("metrics", [0.5]),
        ("metrics", {"accuracy": "high"}),
        ("metrics", {"accuracy": True}),
        ("calibration", 0),
        ("calibration", -1.0),
        ("calibration", "1"),
        ("calibration", True),
        ("threshold", False),
        ("threshold", -0.1),
        ("format_number", "1"),
        ("format_number", 0),
        ("format_number", None),
    ],
)
def test_wrong_kind_of_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"wrong kind of value for {name}$"):
        from_json(changed_text(lambda values: values.update({name: value})))


@pytest.mark.parametrize(
    ("record", "name", "value", "message"),
    [
        ("label_map", "class_names", "abc", "wrong kind of value for class_names"),
        ("label_map", "class_names", [1, 2, 3], "wrong kind of value for class_names"),
        ("label_map", "class_names", ["a", "a", "b"], "stands twice"),
        ("label_map", "class_names", ["a", "b"], "2 classes but 3 display names"),
        ("label_map", "display_names", [None, "b", "c"], "wrong kind of value for display_names"),
        ("input_spec", "image_size_px", 224.0, "wrong kind of value for image_size_px"),
        ("input_spec", "image_size_px", True, "wrong kind of value for image_size_px"),
        ("input_spec", "image_size_px", 0, "must be positive"),
        ("input_spec", "image_size_px", 512, "at most the resize"),
        ("input_spec", "resize_px", "256", "wrong kind of value for resize_px"),
        ("input_spec", "interpolation", "magic", "wrong kind of value for interpolation"),
        ("input_spec", "mean", 0.5, "wrong kind of value for mean"),
        ("input_spec", "mean", [0.5, 0.5], "1 or 3 channels"),
        ("input_spec", "std", [0.5, 0.5, 0.0], "std positive"),
    ],
)
def test_wrong_value_inside_a_record_is_refused(record: str, name: str, value: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_json(changed_text(lambda values: values[record].update({name: value})))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "lacks"),
        ("[]", "metadata is no object"),
        ("null", "metadata is no object"),
        ("not JSON", "the metadata is not what finetune writes"),
        (changed_text(lambda values: values.update(label_map=[])), "label_map is no object"),
        (changed_text(lambda values: values.update(calibration=float("nan"))), "NaN is no JSON number"),
        (METADATA.to_json().replace('"scenario"', '"head": "logits", "scenario"'), "key 'head' stands twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_text_that_is_no_metadata_is_refused(text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("threshold", 5.0, id="a probability above 1"),
        pytest.param("format_number", True, id="true for 1"),
        pytest.param("label_map", {"class_names": [], "display_names": []}, id="no class"),
    ],
)
def test_value_without_a_meaning_is_refused(name: str, value: object) -> None:
    with pytest.raises(ModelError):
        from_json(changed_text(lambda values: values.update({name: value})))


def test_infinite_temperature_is_refused() -> None:
    with pytest.raises(ModelError):
        from_json(METADATA.to_json().replace("1.25", "1e999"))


def test_file_that_is_cut_off_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for size in (0, 7, 8, 8 + length // 2, 8 + length - 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            load_model_file(path)


def test_file_with_a_byte_too_many_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ModelError, match="is damaged"):
        load_model_file(path)


def test_header_longer_than_the_file_is_refused_without_reading_it(path: Path) -> None:
    content = path.read_bytes()
    for length in (len(content) - 7, 2**40, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + content[8:])
        with pytest.raises(ModelError, match=f"its header claims {length} bytes"):
            read_metadata(path)


@pytest.mark.parametrize(
    ("change", "more_bytes"),
    [
        pytest.param(lambda header: header["a"].update(data_offsets=header["b"]["data_offsets"]), b"", id="overlap"),
        pytest.param(lambda header: header["a"].update(data_offsets=[56, 68]), b"\0" * 20, id="gap"),
        pytest.param(lambda header: header["a"].update(data_offsets=[0, 10**9]), b"", id="beyond the end"),
        pytest.param(lambda header: header["a"].update(data_offsets=[-12, 0]), b"", id="negative"),
        pytest.param(lambda header: header["a"].update(shape=[4]), b"", id="shape that does not fit"),
        pytest.param(lambda header: header["a"].update(dtype="F77"), b"", id="unknown number format"),
        pytest.param(lambda header: header.update(a=3), b"", id="tensor that is a number"),
    ],
)
def test_offsets_that_do_not_tile_the_file_are_refused(
    path: Path, change: Callable[[Fields], object], more_bytes: bytes
) -> None:
    rewrite(path, change, more_bytes=more_bytes)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load_model_file(path)


def test_key_that_stands_twice_in_the_header_is_refused(path: Path) -> None:
    text = b'{"a": {}, "a": {}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ModelError, match="key 'a' stands twice"):
        read_metadata(path)


@pytest.mark.parametrize("text", [b"[]", b"3", b'{"__metadata__": []}', b'{"__metadata__": null}'])
def test_header_that_is_no_object_is_refused(path: Path, text: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ModelError, match="its header is no JSON object"):
        read_metadata(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_bare_weights_are_told_apart_from_damage(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    file = tmp_path / "bare.safetensors"
    save_file(TENSORS, file, metadata=metadata)
    with pytest.raises(ModelError, match="does not say how to use them") as caught:
        load_model_file(file)
    assert "--weights" in caught.value.hint


def test_metadata_entry_that_is_no_text_is_refused(path: Path) -> None:
    rewrite(path, lambda header: header["__metadata__"].update({METADATA_KEY: {"a": 1}}))
    with pytest.raises(ModelError, match="does not say how to use them"):
        read_metadata(path)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + b"\0" * 100, b"PK\x03\x04" * 40, b"plain text " * 20])
def test_other_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is"):
        read_metadata(path)


def test_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return marker.touch, ()

    file = tmp_path / "model.safetensors"
    torch.save({"a": Trap()}, file)
    with pytest.raises(ModelError):
        load_model_file(file)
    assert not marker.exists()


def test_absent_file_is_a_run_error_and_a_folder_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no model file"):
        read_metadata(tmp_path / "absent.safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        read_metadata(tmp_path)
