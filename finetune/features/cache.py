"""Activations of frozen layers on disk: computed once for an image, whichever run or command asks."""

import hashlib
import struct
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.jpeg import decoder_key
from finetune.data.transforms import Augmentation
from finetune.errors import ModelError, StorageError
from finetune.features.engine import BATCH_SIZE, Kind
from finetune.features.trunk import Trunk, map_dtype
from finetune.runs.cache_folder import cache_folder, is_inside
from finetune.runs.row_store import RowStore, open_store

Activations = tuple[np.ndarray[Any, Any], ...]
"""What crosses the cut for one image, each array of any shape."""

FORMAT_NUMBER = 2
NEVER = "train with --boundary-cache never"
LIBRARIES = ("torch", "torchvision", "timm", "pillow", "onnxruntime")
"""Another version of these may compute or decode a little differently."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One random change of every image: a function of (seed, number, image) and nothing else."""

    augmentation: Augmentation
    seed: int
    number: int

    def seed_of(self, sha256: str) -> int:
        """Return the seed of all that is random about the image with this hash."""
        text = f"{self.seed}/{self.number}/{sha256}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class ActivationCache:
    """The activations of one cut of one network, by the SHA-256 of the image file.

    Vectors are kept as float32, maps in the format of `map_dtype`.
    What the disk refuses, or everything without a `store`, is kept in memory.
    """

    def __init__(self, store: RowStore | None, *, dtype: str) -> None:
        self.store = store
        self.dtype = np.dtype(dtype)
        self._unstored: dict[str, Activations] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._unstored or (self.store is not None and key in self.store)

    def get(self, key: str) -> Activations | None:
        """Return the activations of an image, read-only; None if they are not there or were damaged."""
        row = self.store.get(key) if self.store else None
        return self._unstored.get(key) if row is None else _unpack(row, self.dtype)

    def put(self, key: str, activations: Activations) -> None:
        """Keep the activations of an image.

        Raises:
            ModelError: A map holds numbers that float16 has not.
        """
        with np.errstate(over="ignore"):
            # Copies: an array may be a view of a whole batch, which would then stay in memory with it.
            rounded = tuple(np.array(array, dtype=self.dtype, order="C") for array in activations)
        pairs = zip(rounded, activations, strict=True)
        if any(np.isinf(kept).any() and np.isfinite(array).all() for kept, array in pairs):
            raise ModelError("the frozen layers give numbers above 65,504, too large to be kept", NEVER)
        if self.store:
            self.store.put(key, _pack(rounded))
        if self.store is None or self.store.write_error is not None:
            self._unstored[key] = rounded

    @property
    def write_error(self) -> OSError | None:
        """Why the disk keeps no more, or None."""
        return self.store.write_error if self.store else None

    def refresh(self) -> None:
        """See what other processes have computed."""
        if self.store:
            self.store.refresh()

    def close(self) -> None:
        """End writing; what is kept can still be read."""
        if self.store:
            self.store.close()


def present(activations: Activations | None) -> Activations:
    """Return activations that a pass has put into the cache or found there.

    Raises:
        StorageError: They are gone: another process has deleted them before this one could read them.
    """
    if activations is None:
        raise StorageError("activations have vanished from the cache", "start again, with a larger FINETUNE_CACHE_GB")
    return activations


def open_activations(
    trunk: Trunk, data_root: Path, *, engine: Kind, view: View | None = None, precision: str = "fp32"
) -> ActivationCache:
    """Open the cache of what `trunk` makes of images, or of a `view` of them, computed by `engine` in `precision`.

    Where the cache folder lies in `data_root`, among the user's images, everything stays in memory.
    """
    dtype = "<f4" if trunk.is_pooled else map_dtype(trunk.backbone.module)
    made_by = {
        "title": trunk.title + (f", view {view.number} ({view.augmentation})" if view else ""),
        **trunk.key(),
        "input": asdict(trunk.backbone.input_spec),
        "view": asdict(view) if view else None,
        "engine": engine,
        "precision": precision,
        "dtype": dtype,
        "libraries": {name: version(name) for name in LIBRARIES},
        "jpeg_decoder": decoder_key(),
        "format_number": FORMAT_NUMBER,
    }
    store = None if is_inside(cache_folder(), data_root) else open_store("activations", made_by)
    return ActivationCache(store, dtype=dtype)


def open_exports(trunk: Trunk, data_root: Path) -> RowStore | None:
    """Open the cache of exports of `trunk`, each under the hash of its weights; None where it lies in `data_root`."""
    if is_inside(cache_folder(), data_root):
        return None
    made_by = {
        "title": f"{trunk.title}, exported",
        **trunk.key(),
        "image_size_px": trunk.backbone.input_spec.image_size_px,
        "batch_size": BATCH_SIZE,
        "libraries": {name: version(name) for name in LIBRARIES},
        "format_number": FORMAT_NUMBER,
    }
    return open_store("exports", made_by)


def _pack(activations: Activations) -> bytes:
    """Write arrays as their count, then for each its dimensions (count and sizes), then all of their bytes."""
    header = [struct.pack("<I", len(activations))]
    header += [struct.pack(f"<{1 + array.ndim}I", array.ndim, *array.shape) for array in activations]
    return b"".join([*header, *(array.tobytes() for array in activations)])


def _unpack(row: memoryview, dtype: np.dtype[Any]) -> Activations:
    (count,), place = struct.unpack_from("<I", row), 4
    shapes: list[tuple[int, ...]] = []
    for _ in range(count):
        (ndim,) = struct.unpack_from("<I", row, place)
        shapes.append(struct.unpack_from(f"<{ndim}I", row, place + 4))
        place += 4 + 4 * ndim
    arrays = []
    for shape in shapes:
        size = int(np.prod(shape, dtype=np.int64))
        arrays.append(np.frombuffer(row, dtype=dtype, count=size, offset=place).reshape(shape))
        place += size * dtype.itemsize
    return tuple(arrays)
