"""Receptive fields read off one forward pass: `FieldTracker` hands records from operation to operation.

What looks at several positions has its rule in `field_rules`; here are those that only put positions elsewhere, and
the table of all. An operation without a rule that keeps the shape works element by element; any other loses the field.
"""

import math
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from finetune.models import field_rules as rules
from finetune.models.field_rules import Call, Rule
from finetune.models.receptive_field import Record, join


class FieldTracker(TorchDispatchMode):
    """Follows what the tensors of a forward pass see of its images, which are on the meta device.

    Where one of several operands is, the others are taken there, so that a network may make constants where it likes.
    """

    def __init__(self, images_NCHW: Tensor) -> None:
        super().__init__()
        self._records = WeakTensorKeyDictionary()
        self._records[images_NCHW] = Record.of_images(images_NCHW.shape)

    def seen_by(self, tensor: Tensor) -> Record | None:
        """Return the record of `tensor`, or nothing where it does not depend on the images."""
        record: Record | None = self._records.get(tensor)
        return record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(tensor.is_meta for tensor in _tensors((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        operands = [(tensor, self._records.get(tensor)) for tensor in _tensors((args, kwargs))]
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        known = [(tensor, record) for tensor, record in operands if record is not None]
        if known and outputs:
            schema = func._schema
            defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
            name = schema.name.removeprefix("aten::").rstrip("_")  # in place or not
            call = Call(operation=name, arguments=defaults | given | kwargs, outputs=outputs, operands=known)
            found = RULES.get(name, rules.element_by_element)(known[0][1], call)
            if found is not None:
                records = found if isinstance(found, list) else [found] * len(outputs)
                self._records.update(zip(outputs, records, strict=True))
                base = outputs[0]._base if schema.name.endswith("_") else None
                if base is not None:  # what was written into is a part of another tensor
                    self._records[base] = records[0].lost("writing into a part of a tensor", base.shape)
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


def _reshape(record: Record, call: Call) -> Record:
    return record.reshaped(call.shape)


def _permute(record: Record, call: Call) -> Record:
    return Record(dims=tuple(record.dims[dim] for dim in call.dims(record, "dims")), views=record.views)


def _transpose(record: Record, call: Call) -> Record:
    dims = list(record.dims)
    first, second = call.arguments.get("dim0", 0), call.arguments.get("dim1", -1)
    dims[first], dims[second] = dims[second], dims[first]
    return Record(dims=tuple(dims), views=record.views)


def _pad(record: Record, call: Call) -> Record:
    given = call["pad" if "pad" in call.arguments else "padding"]
    for place in range(len(given) // 2):
        dim, before = len(record.dims) - 1 - place, given[2 * place]
        if any(given[2 * place : 2 * place + 2]):
            record = record.along(dim, call.shape[dim], rules.moved(-before), reason="")
    return record


def _roll(record: Record, call: Call) -> Record:
    """Shift a map as shifted windows do; what comes in at the other border is masked there, and not counted here."""
    if not call["dims"]:
        return rules.lost(record, call)
    for dim, shift in zip(call.dims(record, "dims"), call.numbers("shifts", len(call["dims"])), strict=True):
        record = record.along(dim, call.shape[dim], rules.moved(-shift), reason="roll of tokens out of order")
    return record


def _slice(record: Record, call: Call) -> Record:
    dim = call["dim"] % len(record.dims)
    length, start = call["self"].shape[dim], call["start"] or 0
    first = min(max(start + length if start < 0 else start, 0), length)
    return _part(record, dim, call.shape[dim], first, call["step"])


def _split(record: Record, call: Call) -> list[Record]:
    dim = call["dim"] % len(record.dims)
    parts, first = [], 0
    for output in call.outputs:
        parts.append(_part(record, dim, output.shape[dim], first))
        first += output.shape[dim]
    return parts


def _part(record: Record, dim: int, size: int, first: int, step: int = 1) -> Record:
    if size == math.prod(atom.size for atom in record.dims[dim]):
        return record
    return record.along(dim, size, rules.moved(first, step), moves=step, reason="")


def _select(record: Record, call: Call) -> Record:
    dim = call["dim"] % len(record.dims)
    return _entry(record, dim, call["index"] % call["self"].shape[dim])


def _unbind(record: Record, call: Call) -> list[Record]:
    dim = call["dim"] % len(record.dims)
    return [_entry(record, dim, index) for index in range(len(call.outputs))]


def _entry(record: Record, dim: int, index: int) -> Record:
    """Return one entry of a dimension, which vanishes."""
    if any(atom.axis for atom in record.dims[dim]):
        record = record.along(dim, 1, lambda _: (index, index), moves=0, reason="one token among others")
    return Record(dims=record.dims[:dim] + record.dims[dim + 1 :], views=record.views)


def _concatenate(_: Record, call: Call) -> Record:
    """Put channels side by side; along positions, as behind a class token, their order is lost."""
    dim = call["dim"] % len(call.shape)
    records = [
        operand.scattered(dim, call.shape[dim])
        if any(atom.axis for atom in operand.dims[dim])
        else operand.with_dim(dim, ())
        for _, operand in call.operands
    ]
    return join(records, call.shape)


def _stack(_: Record, call: Call) -> Record:
    dim = call["dim"] % len(call.shape)
    records = [
        Record(dims=(*operand.dims[:dim], (), *operand.dims[dim:]), views=operand.views) for _, operand in call.operands
    ]
    return join(records, call.shape)


def _copy(record: Record, call: Call) -> Record:
    source = call.record("src")
    return join([source], call.shape) if source is not None else record


def _take_shape(_: Record, __: Call) -> None:
    """Take nothing but shape and type from the operand."""


RULES: dict[str, Rule] = {
    "convolution": rules.convolution,
    "max_pool2d_with_indices": rules.pooling,
    "avg_pool2d": rules.pooling,
    "_adaptive_avg_pool2d": rules.adaptive_pooling,
    "adaptive_max_pool2d": rules.adaptive_pooling,
    "upsample_nearest2d": rules.nearest,
    "upsample_bilinear2d": rules.interpolation,
    "upsample_bicubic2d": rules.interpolation,
    "pixel_shuffle": rules.pixel_shuffle,
    "pixel_unshuffle": rules.pixel_unshuffle,
    "im2col": rules.im2col,
    "col2im": rules.col2im,
    "unfold": rules.unfold,
    "native_layer_norm": rules.layer_norm,
    "native_group_norm": rules.group_norm,
    "native_batch_norm": rules.batch_norm,
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax", "cumsum"), rules.along_dims),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "var", "var_mean", "linalg_vector_norm"), rules.reduction),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), rules.matrix_product),
    **dict.fromkeys(("view", "_unsafe_view", "squeeze", "unsqueeze"), _reshape),
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    **dict.fromkeys(("constant_pad_nd", "reflection_pad2d", "replication_pad2d"), _pad),
    "roll": _roll,
    "slice": _slice,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _split),
    "select": _select,
    "unbind": _unbind,
    "cat": _concatenate,
    "stack": _stack,
    "copy": _copy,
    **dict.fromkeys(("index", "index_select", "gather", "sort", "flip", "_fft_c2c"), rules.lost),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"), _take_shape),
}
