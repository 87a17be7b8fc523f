"""Fitted pictures on disk, keyed by the content of their files: decoded in one epoch, read in every later one.

What a picture is fitted to is `fit_transform`'s to say; a training from kept pictures gives the same bits as one from
the files.
"""

import struct
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Self

import numpy as np
import torch

from finetune.data.decode import decode_image, read_scanned_file
from finetune.data.jpeg import SHRINK_TOLERANCE, decoder_key
from finetune.data.table import ImageRow, ImageTable
from finetune.data.transforms import fit_transform, to_tensor
from finetune.runs.cache_folder import cache_folder, cache_limit_bytes, is_inside, prune_cache
from finetune.runs.records import InputSpec
from finetune.runs.row_store import open_store

# Shapes: C channels, H height, W width.

FORMAT_NUMBER = 1  # raise it when decoding, fitting or the layout of a row changes
LIBRARIES = ("pillow", "torch", "torchvision")  # another version may decode or shrink a little differently
MIN_PIXELS = 128**2  # of the average picture; below, an epoch of decoding costs no more than writing once

_SIZE = struct.Struct("<II")  # height and width in pixels, before the bytes (H, W, C)


class PictureCache:
    """The fitted pictures for one `spec`, each from disk where it is known, else decoded and kept.

    Processes and threads may share the pictures, and a data set may take them along into worker processes. What the
    disk refuses is not kept: `write_error` says why.
    """

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        self._fit = fit_transform(spec)
        self._store = open_store(
            "pictures",
            {
                "title": f"pictures of {spec.resize_px} px, {'grey' if spec.channels == 1 else 'RGB'}",
                "resize_px": spec.resize_px,
                "interpolation": spec.interpolation,
                "channels": spec.channels,
                "shrink_tolerance": SHRINK_TOLERANCE,
                "libraries": {name: version(name) for name in LIBRARIES},
                "jpeg_decoder": decoder_key(),
                "format_number": FORMAT_NUMBER,
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def write_error(self) -> OSError | None:
        """Why this process keeps no more pictures, or None."""
        return self._store.write_error

    def picture(self, row: ImageRow, path: Path) -> torch.Tensor:
        """Return the fitted picture of `row`, whose file is `path`, as uint8 (C, H, W).

        A known picture is the one that was scanned, whatever has become of the file since.

        Raises:
            ImageError, DataError: The picture is not known, and the file cannot be read or has changed.
        """
        if row.sha256 and (kept := self._kept(row.sha256)) is not None:
            return kept
        data = read_scanned_file(path, row.sha256)
        image_HWC = decode_image(data, name=str(path), short_side_px=self.spec.resize_px)
        picture_CHW = torch.as_tensor(self._fit(to_tensor(image_HWC)))
        if row.sha256:
            height, width = picture_CHW.shape[-2:]
            self._store.put(row.sha256, _SIZE.pack(height, width) + picture_CHW.permute(1, 2, 0).numpy().tobytes())
        return picture_CHW

    def refresh(self) -> None:
        """See the pictures that other processes have put since; too slow to do for every picture that is missing."""
        self._store.refresh()

    def close(self) -> None:
        """Let go of what was being written, and keep the whole cache within its bound."""
        self._store.close()
        with suppress(OSError):
            prune_cache(cache_limit_bytes())  # of what worker processes wrote as well

    def _kept(self, sha256: str) -> torch.Tensor | None:
        row = self._store.get(sha256)
        if row is None:
            return None
        size = _SIZE.unpack_from(row)
        pixels = np.frombuffer(row, np.uint8, offset=_SIZE.size).copy()  # torch takes no memory that is read-only
        # The bytes lie as the decoder lays them, for a resize may round otherwise in another order.
        return to_tensor(pixels.reshape(*size, self.spec.channels))


def worth_caching(table: ImageTable, spec: InputSpec, epochs: int) -> bool:
    """Tell whether keeping the fitted pictures of `table` on disk pays for a training of so many epochs.

    It does from the second epoch on, for pictures that cost more to decode than to read, as long as they take no more
    than half of what the cache may hold. Where the cache lies among the images nothing is kept.

    Raises:
        ConfigError: The limit of the cache is no number.
    """
    if epochs < 2 or not len(table) or is_inside(cache_folder(), table.root):
        return False
    size_px = table.rows.own_pictures().size_px.astype(np.int64)
    scale_N = np.minimum(1.0, spec.resize_px / np.maximum(1, size_px.min(axis=1)))
    kept_bytes = int((size_px * scale_N[:, None]).round().prod(axis=1).sum()) * spec.channels
    return int(size_px.prod(axis=1).sum()) >= MIN_PIXELS * len(table) and kept_bytes <= cache_limit_bytes() // 2
