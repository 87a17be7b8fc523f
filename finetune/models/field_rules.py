"""How receptive fields grow: a rule for each tensor operation that looks at several positions.

BatchNorm in eval mode does not; GroupNorm, InstanceNorm and squeeze-and-excitation do: through their means every unit
depends on the whole image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.models.receptive_field import Atom, Record, Span, join


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a tensor operation: its arguments by name, what it gave, and the records of its operands."""

    operation: str
    arguments: dict[str, Any]
    outputs: Sequence[Tensor]
    operands: Sequence[tuple[Tensor, Record]]

    @property
    def shape(self) -> torch.Size:
        """Shape of the first output."""
        return self.outputs[0].shape

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def record(self, name: str) -> Record | None:
        """Return the record of the operand called `name`."""
        return next((record for tensor, record in self.operands if tensor is self.arguments[name]), None)

    def numbers(self, name: str, count: int) -> list[int]:
        """Return `count` numbers, where one may stand for all."""
        values = self.arguments[name]
        numbers = list(values) if isinstance(values, list | tuple) else [values]
        return numbers * count if len(numbers) == 1 else numbers

    def dims(self, record: Record, name: str = "dim") -> list[int]:
        """Return the dimensions named by the argument `name`, counted from the left; by default all."""
        rank = len(record.dims)
        given = self.arguments.get(name)
        dims = [given] if isinstance(given, int) else given
        return [dim % rank for dim in dims] if dims else list(range(rank))


Rule = Callable[[Record, Call], Record | list[Record] | None]
"""Given the record of the first operand, return that of the outputs, or a list with one for each."""


def element_by_element(record: Record, call: Call) -> Record:
    """Join operands of one shape, or broadcast to it; any other operation loses the field, its name is the reason."""
    try:
        fits = torch.broadcast_shapes(*(tensor.shape for tensor, _ in call.operands), call.shape) == call.shape
    except RuntimeError:
        fits = False
    return join([operand for _, operand in call.operands], call.shape) if fits else lost(record, call)


def lost(record: Record, call: Call) -> Record:
    """Give up on an operation."""
    return record.lost(f"no rule for {call.operation}", call.shape)


def moved(offset: int, step: int = 1) -> Span:
    """Let unit i look at unit i · step + offset alone."""
    return lambda unit: (unit * step + offset,) * 2


def _sliding(kernel: int, stride: int, padding: int, dilation: int) -> Span:
    return lambda unit: (unit * stride - padding, unit * stride - padding + dilation * (kernel - 1))


def _spreading(kernel: int, stride: int, padding: int, dilation: int) -> Span:
    """Turn `_sliding` round. A unit that falls between two kernels, which touch no pixel there, gets the one before."""
    reach = dilation * (kernel - 1)
    return lambda unit: (
        min(-((reach - unit - padding) // stride), (unit + padding) // stride),
        (unit + padding) // stride,
    )


def _binned(old: int, new: int) -> Span:
    return lambda unit: (unit * old // new, -(-(unit + 1) * old // new) - 1)


def _nearest(old: int, new: int) -> Span:
    return lambda unit: (unit * old // new,) * 2


def _between(numerator: int, shift: int, denominator: int, extra: int) -> Span:
    """Let a unit look at the neighbours of the place (unit · numerator + shift) / denominator, and `extra` more."""
    return lambda unit: (
        (unit * numerator + shift) // denominator - extra,
        -(-(unit * numerator + shift) // denominator) + extra,
    )


def convolution(record: Record, call: Call) -> Record:
    """Slide a kernel over the positions, and see all channels."""
    images = call.record("input")
    if images is None:
        return record.lost("weights that depend on the image", call.shape)
    # Channels first, because among them may be positions, where pixels were moved to channels.
    images = images.reduced([1], of_data=False).with_dim(1, (Atom("", call.shape[1], 0),))
    kernel = call["weight"].shape[2:]
    record = _spread(images, call, kernel) if call["transposed"] else _windows(images, call, kernel)
    # Weights that are computed from the image bring along all that they see.
    others = [other.reduced(range(len(other.dims))) for tensor, other in call.operands if tensor is not call["input"]]
    return join([record, *(Record(dims=(), views=other.views) for other in others)], call.shape)


def pooling(record: Record, call: Call) -> Record:
    """Slide the window of a pooling."""
    return _windows(record, call, call.numbers("kernel_size", 2))


def _windows(record: Record, call: Call, kernel: Sequence[int]) -> Record:
    count = len(kernel)
    strides = call.numbers("stride", count) or list(kernel)  # a pooling without a stride takes its kernel's
    padding = call.numbers("padding", count)
    dilation = call.numbers("dilation", count) if "dilation" in call.arguments else [1] * count
    for place, numbers in enumerate(zip(kernel, strides, padding, dilation, strict=True)):
        dim = len(record.dims) - count + place
        if numbers[:3] != (1, 1, 0):
            record = record.along(
                dim,
                call.shape[dim],
                _sliding(*numbers),
                moves=strides[place],
                reason=f"{call.operation} over tokens out of order",
            )
    return record


def _spread(record: Record, call: Call, kernel: Sequence[int]) -> Record:
    count = len(kernel)
    strides, padding, dilation = (call.numbers(name, count) for name in ("stride", "padding", "dilation"))
    for place, numbers in enumerate(zip(kernel, strides, padding, dilation, strict=True)):
        record = record.along(
            2 + place,
            call.shape[2 + place],
            _spreading(*numbers),
            period=strides[place],
            reason="transposed convolution over tokens out of order",
        )
    return record


def im2col(record: Record, call: Call) -> Record:
    """Spread the windows of a convolution out over the channels."""
    names = ("kernel_size", "stride", "padding", "dilation")
    for place, numbers in enumerate(zip(*(call.numbers(name, 2) for name in names), strict=True)):
        kernel, stride, padding, dilation = numbers
        length = (call["self"].shape[2 + place] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        record = record.along(
            2 + place, length, _sliding(*numbers), moves=stride, reason="im2col over tokens out of order"
        )
    channels = (*record.dims[1], Atom("", math.prod(call.numbers("kernel_size", 2)), 0))
    return Record(dims=(record.dims[0], channels, record.dims[2] + record.dims[3]), views=record.views)


def col2im(record: Record, call: Call) -> Record:
    """Sum overlapping windows into a map, as a transposed convolution does."""
    places = record.dims[2]
    if [atom.axis for atom in places] != ["rows", "columns"]:
        return lost(record, call)
    record = Record(dims=(record.dims[0], (Atom("", call.shape[1], 0),), places[:1], places[1:]), views=record.views)
    return _spread(record, call, call.numbers("kernel_size", 2))


def unfold(record: Record, call: Call) -> Record:
    """Cut windows along one dimension; their insides become a new last one."""
    dim, size, step = call["dimension"] % len(record.dims), call["size"], call["step"]
    record = record.along(
        dim, call.shape[dim], _sliding(size, step, 0, 1), moves=step, reason="windows of tokens out of order"
    )
    return Record(dims=(*record.dims, (Atom("", size, 0),)), views=record.views)


def adaptive_pooling(record: Record, call: Call) -> Record:
    """Pool in bins; in a single one, everything."""
    for dim, old, new in _resized(record, call):
        record = record.reduced([dim]) if new == 1 else _resampled(record, dim, new, _binned(old, new))
    return record


def nearest(record: Record, call: Call) -> Record:
    """Repeat or leave out positions."""
    for dim, old, new in _resized(record, call):
        record = _resampled(record, dim, new, _nearest(old, new))
    return record


def interpolation(record: Record, call: Call) -> Record:
    """Resample linearly, from one unit to each side, or cubically, from two."""
    extra = 1 if "bicubic" in call.operation else 0
    for dim, old, new in _resized(record, call):
        if call["align_corners"]:
            moves, shift, period = old - 1, 0, max(new - 1, 1)
        else:  # the place of a unit is (unit + 1/2) · old / new - 1/2
            moves, shift, period = 2 * old, old - new, 2 * new
        common = math.gcd(period, moves)
        record = record.along(
            dim,
            new,
            _between(moves, shift, period, extra),
            period=period // common,
            moves=moves // common,
            reason="resampling of tokens out of order",
        )
    return record


def _resized(record: Record, call: Call) -> list[tuple[int, int, int]]:
    """Return each of the last two dimensions whose size changes, with the old size and the new."""
    rank = len(record.dims)
    sizes = [(dim, math.prod(atom.size for atom in record.dims[dim]), call.shape[dim]) for dim in (rank - 2, rank - 1)]
    return [(dim, old, new) for dim, old, new in sizes if old != new or new == 1]


def _resampled(record: Record, dim: int, new: int, span: Span) -> Record:
    old = math.prod(atom.size for atom in record.dims[dim])
    common = math.gcd(old, new)
    return record.along(
        dim, new, span, period=new // common, moves=old // common, reason="resampling of tokens out of order"
    )


def pixel_shuffle(record: Record, call: Call) -> Record:
    """Move channels to positions, which all see what the one before saw."""
    for dim, old, new in _resized(record, call):
        record = _resampled(record, dim, new, _nearest(old, new))
    return record.with_dim(len(record.dims) - 3, (Atom("", call.shape[-3], 0),))


def pixel_unshuffle(record: Record, call: Call) -> Record:
    """Move positions to channels; a unit then sees all those that came together."""
    for dim, old, new in _resized(record, call):
        record = _resampled(record, dim, new, _binned(old, new))
    return record.with_dim(len(record.dims) - 3, (Atom("", call.shape[-3], 0),))


def along_dims(record: Record, call: Call) -> Record:
    """Let all that stands in the given dimensions depend on each other, as a softmax does."""
    return record.mixed(call.dims(record))


def layer_norm(record: Record, call: Call) -> Record:
    """Normalise over the last dimensions, mostly channels."""
    rank = len(record.dims)
    return record.mixed(range(rank - len(call["normalized_shape"]), rank))


def group_norm(record: Record, call: Call) -> Record:  # noqa: ARG001
    """Normalise over groups of channels and all positions."""
    return record.mixed(range(1, len(record.dims)))


def batch_norm(record: Record, call: Call) -> Record:
    """Normalise with fixed statistics, or as InstanceNorm, which is built on it, with those of the map."""
    return record.mixed(range(2, len(record.dims))) if call.arguments.get("training") else record


def reduction(record: Record, call: Call) -> Record:
    """Sum, average or take the largest over dimensions."""
    dims = call.dims(record)
    record = record.reduced(dims)
    if len(call.shape) == len(record.dims):
        return record
    left = tuple(atoms for place, atoms in enumerate(record.dims) if place not in dims)
    return Record(dims=left, views=record.views)


def matrix_product(record: Record, call: Call) -> Record:  # noqa: ARG001
    """Sum over the inner dimension. A query keeps its place and sees what all keys see that it is compared with."""
    pairs = (("mat1", "mat2"), ("batch1", "batch2"), ("self", "mat2"))
    names = next(pair for pair in pairs if pair[0] in call.arguments)
    left, right = (call.record(name) for name in names)
    rank = len(call.shape)
    is_of_data = left is not None and right is not None
    sides = [operand for tensor, operand in call.operands if not any(tensor is call[name] for name in names)]  # a bias
    if left is not None:
        sides.append(left.reduced([rank - 1], of_data=is_of_data))
    if right is not None:
        has_queries = left is not None and any(atom.axis for atom in left.dims[rank - 2])
        keys = right.reduced([rank - 2], of_data=is_of_data)
        sides.append(keys.reduced([rank - 1]) if has_queries else keys)
    return join(sides, call.shape)
