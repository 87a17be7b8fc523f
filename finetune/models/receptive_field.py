"""What each unit of a network sees of the image: the records that `field_tracker` hands from layer to layer.

A `Record` says which dimensions of a tensor enumerate the rows and columns of a map, a `View` from which pixel to which
each of those sees. Residual, dense and branching networks need no rule of their own: where paths meet, a unit sees
what it sees on any of them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple

Reach = Literal["local", "unknown", "image"]
"""How far a unit sees: what its span says, farther than can be told, or every pixel. The later one wins in a sum."""

Span = Callable[[int], tuple[int, int]]
"""For a new unit, the first and the last of the present units that it looks at."""


class Atom(NamedTuple):
    """A factor of a tensor dimension: what it counts, how many of them, and how far one is from the next.

    On the axis "rows" or "columns" it counts positions of a map; on "scattered" positions that lost their order, such
    as tokens behind a class token; on "" channels, images and the like.
    """

    axis: str
    size: int
    step: int


Dims = tuple[tuple[Atom, ...], ...]

_REACHES: tuple[Reach, ...] = ("local", "unknown", "image")
_MAP_AXES = ("rows", "columns")


@dataclass(frozen=True, kw_only=True)
class View:
    """What the units along one axis of a map see: unit i the pixels firsts[i] to lasts[i], both included.

    The pattern repeats: `advance` pixels further after each `len(firsts)` units. A chain of convolutions has a period
    of one unit, attention in windows one of a window. Pixels outside of the image, in the padding, count.
    """

    firsts: tuple[int, ...]
    lasts: tuple[int, ...]
    advance: int
    units: int
    image: int
    """Pixels of the image along this axis."""
    reach: Reach = "local"
    reason: str = ""
    """Why the reach is unknown."""

    @property
    def size(self) -> int:
        """The most pixels that a unit sees."""
        return max(last - first + 1 for first, last in zip(self.firsts, self.lasts, strict=True))

    @property
    def stride(self) -> Fraction | None:
        """Pixels from a unit to the next, None where there are no positions any more."""
        return Fraction(self.advance, len(self.firsts)) if self.advance else None

    @property
    def sees_all(self) -> bool:
        """Tell whether every unit sees the whole image."""
        return self.reach == "image" or (self.first(self.units - 1) <= 0 and self.last(0) >= self.image - 1)

    def first(self, unit: int) -> int:
        """Return the first pixel that `unit` sees."""
        return self.firsts[unit % len(self.firsts)] + unit // len(self.firsts) * self.advance

    def last(self, unit: int) -> int:
        """Return the last pixel that `unit` sees."""
        return self.lasts[unit % len(self.lasts)] + unit // len(self.lasts) * self.advance

    def through(self, span: Span, units: int, *, period: int = 1, moves: int = 1) -> "View":
        """Return what new units see that look at spans of these; each `period` of them, spans move on by `moves`."""
        old = len(self.firsts)
        repeats = old // math.gcd(old, moves)  # 1 where nothing moves
        spans = [span(unit) for unit in range(period * repeats)]
        return replace(
            self,
            firsts=tuple(self.first(first) for first, _ in spans),
            lasts=tuple(self.last(last) for _, last in spans),
            advance=repeats * moves // old * self.advance,
            units=units,
        )

    def everywhere(self) -> "View":
        """Return what a unit sees that looks at all of these."""
        return self.through(lambda _: (0, self.units - 1), 1, moves=0)

    def lost(self, reason: str) -> "View":
        """Return this view with a reach that cannot be told, unless it is the whole image already."""
        return self if self.reach != "local" else replace(self, reach="unknown", reason=reason)

    def joined(self, other: "View") -> "View":
        """Return what a sum of both sees."""
        periods = math.lcm(len(self.firsts), len(other.firsts))
        reach = max(self.reach, other.reach, key=_REACHES.index)
        common = replace(self, units=max(self.units, other.units), reach=reach, reason=self.reason or other.reason)
        if self.stride == other.stride:
            return replace(
                common,
                firsts=tuple(min(self.first(unit), other.first(unit)) for unit in range(periods)),
                lasts=tuple(max(self.last(unit), other.last(unit)) for unit in range(periods)),
                advance=periods // len(self.firsts) * self.advance,
            )
        moving, fixed = (self, other) if self.advance else (other, self)
        if fixed.advance:
            return common.lost("branches of different strides meet")
        if fixed.sees_all:
            return replace(moving, units=common.units, reach="image")
        return replace(moving.everywhere().joined(fixed), units=common.units, reach=reach, reason=common.reason)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a tensor: the factors of each of its dimensions, and the views along rows and columns."""

    dims: Dims
    views: Mapping[str, View]

    @classmethod
    def of_images(cls, shape: Sequence[int]) -> "Record":
        """Describe images (N, C, H, W), whose units see themselves."""
        axes = dict(zip(_MAP_AXES, shape[2:], strict=True))
        return cls(
            dims=(_free(shape[0]), _free(shape[1]), *((Atom(axis, size, 1),) for axis, size in axes.items())),
            views={
                axis: View(firsts=(0,), lasts=(0,), advance=1, units=size, image=size) for axis, size in axes.items()
            },
        )

    @property
    def is_scattered(self) -> bool:
        """Tell whether some positions have lost their order."""
        return any(atom.axis == "scattered" for dim in self.dims for atom in dim)

    @property
    def is_flattened(self) -> bool:
        """Tell whether positions stand in one dimension with the channels, as before a fully-connected layer."""
        return any(len({bool(atom.axis) for atom in dim}) == 2 for dim in self.dims[1:])

    def atoms(self, axis: str) -> list[Atom]:
        """Return the factors on `axis`, in the order of the dimensions."""
        return [atom for dim in self.dims for atom in dim if atom.axis == axis]

    def with_dim(self, dim: int, atoms: tuple[Atom, ...]) -> "Record":
        """Return this record with other factors in dimension `dim`."""
        return replace(self, dims=(*self.dims[:dim], atoms, *self.dims[dim + 1 :]))

    def lost(self, reason: str, shape: Sequence[int]) -> "Record":
        """Return what is known after an operation that nothing is known of."""
        views = {axis: view.everywhere().lost(reason) for axis, view in self.views.items()}
        return Record(dims=tuple(_free(size) for size in shape), views=views)

    def scattered(self, dim: int, size: int, reason: str = "") -> "Record":
        """Forget the order of the positions along `dim`, and with a `reason` also how far they see."""
        axes = {atom.axis for atom in self.dims[dim] if atom.axis}
        dims = tuple(_tidy(Atom("scattered", a.size, 0) if a.axis in axes else a for a in atoms) for atoms in self.dims)
        touched = axes if axes <= set(_MAP_AXES) else set(_MAP_AXES)
        views = {axis: view.lost(reason) if reason and axis in touched else view for axis, view in self.views.items()}
        return Record(dims=dims, views=views).with_dim(dim, (Atom("scattered", size, 0),))

    def along(self, dim: int, size: int, span: Span, *, reason: str, period: int = 1, moves: int = 1) -> "Record":
        """Let `size` new units along `dim` look at spans of the present ones; see `View.through`.

        Where `dim` does not enumerate exactly the positions of one axis, their order is lost, for `reason`.
        """
        atoms = [atom for atom in self.dims[dim] if atom.axis]
        if not atoms:
            return self.with_dim(dim, _free(size))
        axis = atoms[0].axis
        if axis == "scattered" or self.dims[dim] != (Atom(axis, self.views[axis].units, 1),):
            return self.scattered(dim, size, reason)
        views = {**self.views, axis: self.views[axis].through(span, size, period=period, moves=moves)}
        return replace(self.with_dim(dim, (Atom(axis, size, 1),)), views=views)

    def reduced(self, dims: Sequence[int], *, of_data: bool = True) -> "Record":
        """Let every unit look at all that stands in `dims`, which are then empty.

        Args:
            dims: The dimensions of a sum, a mean or a matrix product.
            of_data: Where the whole map is seen, say "image" instead of counting its pixels, padding included.
        """
        removed = [atom for dim in dims for atom in self.dims[dim]]
        left = tuple(() if place in dims else atoms for place, atoms in enumerate(self.dims))
        rest = replace(self, dims=left)
        views = dict(self.views)
        for axis, view in self.views.items():
            gone, kept = [atom for atom in removed if atom.axis == axis], rest.atoms(axis)
            if gone:
                reach = sum((atom.size - 1) * atom.step for atom in gone)
                scale = math.gcd(*(atom.step for atom in kept)) if kept else 0
                views[axis] = view.through(_spread(scale, reach), math.prod(a.size for a in kept), moves=scale)
                left = tuple(tuple(_scaled(atom, axis, scale) for atom in atoms) for atoms in left)
            elif not kept and any(atom.axis == "scattered" for atom in removed):
                views[axis] = view.lost("attention among scattered tokens") if rest.is_scattered else view.everywhere()
            if of_data and views[axis] is not view and not kept and views[axis].sees_all:
                views[axis] = replace(views[axis], reach="image")
        return Record(dims=left, views=views)

    def mixed(self, dims: Sequence[int]) -> "Record":
        """Let every unit look at all that stands in `dims` with it, as a softmax or a norm does, and keep its place."""
        if not any(atom.axis for dim in dims for atom in self.dims[dim]):
            return self
        shape = [math.prod(atom.size for atom in atoms) for atoms in self.dims]
        return join([self, self.reduced(dims)], shape)

    def reshaped(self, shape: Sequence[int]) -> "Record":
        """Share the factors out among the dimensions of a new shape."""
        atoms = [atom for dim in self.dims for atom in dim]
        dims: list[list[Atom]] = []
        for size in shape:
            dims.append([])
            room = size
            # A map of one position keeps its row and column, so that it is a map still; the first dimension is images.
            while atoms and (room > 1 or (size == 1 and len(dims) > 1 and not dims[-1] and atoms[0].size == 1)):
                atom = atoms.pop(0)
                if room % atom.size:
                    inner, uneven = divmod(atom.size, room)
                    if uneven:
                        return self.lost("positions are regrouped unevenly", shape)
                    atoms.insert(0, Atom(atom.axis, inner, atom.step))
                    atom = Atom(atom.axis, room, atom.step * inner)
                dims[-1].append(atom)
                room //= atom.size
        dims[-1:] = [dims[-1] + atoms] if dims else []
        return replace(self, dims=tuple(_tidy(dim) for dim in dims))


def join(records: Sequence[Record], shape: Sequence[int]) -> Record:
    """Return what a tensor of `shape` sees that is put together element by element, operands broadcast."""
    padded = [replace(record, dims=((),) * (len(shape) - len(record.dims)) + record.dims) for record in records]
    dims, is_torn = [], False
    for place, size in enumerate(shape):
        choices = [
            atoms
            for atoms in (record.dims[place] for record in padded)
            if any(atom.axis for atom in atoms) and math.prod(atom.size for atom in atoms) == size
        ]
        finest = max(choices, key=lambda atoms: sum(atom.step for atom in atoms), default=_free(size))
        is_torn = is_torn or any(_axes(atoms) != _axes(finest) for atoms in choices)
        dims.append(finest)
    joined = Record(dims=tuple(dims), views=padded[0].views)
    views = {}
    for axis in _MAP_AXES:
        aligned = [_aligned(record, joined, axis) for record in padded]
        view = aligned[0]
        for other in aligned[1:]:
            view = view.joined(other)
        views[axis] = view.lost("maps of different arrangement meet") if is_torn else view
    return replace(joined, views=views)


def _aligned(record: Record, target: Record, axis: str) -> View:
    """Return the view of `record` along `axis` by the positions of `target`, which may be finer."""
    view, own, all_ = record.views[axis], record.atoms(axis), target.atoms(axis)
    if own == all_:
        return view
    if all(atom.size == 1 for atom in own):
        is_one_unit = not record.is_scattered
        return view.through(lambda _: (0, 0), 1, moves=0) if is_one_unit else view
    group = math.prod(atom.size for atom in all_) // view.units
    if group and own == [Atom(axis, atom.size, atom.step // group) for atom in all_ if atom.step >= group]:
        return view.through(lambda unit: (unit // group,) * 2, view.units * group, period=group)
    return view.everywhere() if view.everywhere().sees_all else view.lost("maps of different arrangement meet")


def _spread(scale: int, reach: int) -> Span:
    return lambda unit: (unit * scale, unit * scale + reach)


def _scaled(atom: Atom, axis: str, scale: int) -> Atom:
    return Atom(axis, atom.size, atom.step // scale) if atom.axis == axis else atom


def _free(size: int) -> tuple[Atom, ...]:
    return (Atom("", size, 0),) if size > 1 else ()


def _axes(atoms: Sequence[Atom]) -> list[str]:
    return [atom.axis for atom in atoms if atom.axis and atom.size > 1]


def _tidy(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
    """Drop factors of one and join neighbours that count on."""
    tidy: list[Atom] = []
    for atom in atoms:
        before = tidy[-1] if tidy else None
        if atom.size == 1 and atom.axis not in _MAP_AXES:
            continue
        if before and before.axis == atom.axis and before.step == atom.size * atom.step:
            tidy[-1] = Atom(atom.axis, before.size * atom.size, atom.step)
        else:
            tidy.append(atom)
    return tuple(tidy)
