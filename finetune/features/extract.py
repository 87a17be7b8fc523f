"""One pass of the frozen layers over the images: what the cache holds is read, the rest computed and kept."""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from finetune.data.decode import Pixels, decode_image, read_scanned_file
from finetune.data.table import ImageRow, ImageTable
from finetune.data.transforms import evaluation_transform, to_tensor, training_transform
from finetune.features.cache import ActivationCache, View, open_activations, open_exports, present
from finetune.features.engine import TrunkEngine, choose_kind
from finetune.features.trunk import Trunk
from finetune.runs.processes import ALONE, Processes
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter

# Shapes: N images, C channels, H height, W width, D features.

_drawing = threading.Lock()  # random transforms draw from torch's one global generator
FILES_AT_ONCE = 64  # decoded by the threads before the network computes: both would want the same cores


@dataclass(frozen=True, kw_only=True)
class Features:
    """Feature vectors (N, D) float32 with the class index of each image (N,) int64."""

    features_ND: np.ndarray[Any, np.dtype[np.float32]]
    class_indices_N: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.class_indices_N)

    def first(self, width: int) -> "Features":
        """Return the first `width` features of every image."""
        return replace(self, features_ND=self.features_ND[:, :width])


class TrunkPass:
    """Computes the activations of images that the cache lacks; a scan may show it the pictures it decodes.

    Args:
        trunk: What is computed.
        data_root: Folder of the images, into which nothing is written.
        images: How many images there are, in the cache or not and of all processes, from which the engine is chosen.
        device: Where `trunk` is.
        reporter: Told of an engine that is refused and of a disk that refuses.
        view: A random change of every image, instead of the image as evaluation sees it.
        precision: What a GPU computes in: "fp32", "bf16" or "fp16". A CPU always takes float32.
        processes: Those that share the work.

    `computed` counts the images that were not in the cache, `seconds` is the time from the first of them to the last,
    decoding and all; `computing_seconds` the part of it that the trunk took.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        data_root: Path,
        images: int,
        device: torch.device,
        reporter: Reporter,
        view: View | None = None,
        precision: str = "fp32",
        processes: Processes = ALONE,
    ) -> None:
        spec = trunk.backbone.input_spec
        precision = "fp32" if device.type == "cpu" else precision
        self.short_side_px = spec.resize_px
        kind = choose_kind(trunk, images=images, device=device)
        self.cache: ActivationCache = open_activations(trunk, data_root, engine=kind, view=view, precision=precision)
        self.computed = 0
        self.seconds = 0.0
        self.computing_seconds = 0.0
        self._began = 0.0
        self.trunk = trunk
        self._data_root = data_root
        self._images = images
        self._view = view
        self._precision = precision
        self.processes = processes
        self._reporter = reporter
        self._transform = training_transform(spec, view.augmentation) if view else evaluation_transform(spec)
        self._exports = open_exports(trunk, data_root) if device.type == "cpu" else None
        self.engine = TrunkEngine(
            trunk.module,
            device=device,
            kind=kind,
            exports=self._exports,
            export_key=trunk.weights_sha256,
            reporter=reporter,
            precision=precision,
        )
        self._waiting: list[tuple[str, torch.Tensor]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End writing; the cache can still be read."""
        self.cache.close()
        if self._exports:
            self._exports.close()

    def of_view(self, view: View) -> "TrunkPass":
        """Return a pass over a view of the same images, by the same engine; it ends before this one does."""
        view_pass = TrunkPass(
            self.trunk,
            data_root=self._data_root,
            images=self._images,
            device=self.engine.device,
            reporter=self._reporter,
            view=view,
            precision=self._precision,
            processes=self.processes,
        )
        view_pass.engine = self.engine
        return view_pass

    def prepare(self, image_HWC: Pixels, sha256: str) -> torch.Tensor | None:
        """Return the picture as the network takes it, (C, H, W) float32; None if the cache has its activations."""
        if sha256 in self.cache:
            return None
        self._began = self._began or time.perf_counter()
        image_CHW = to_tensor(image_HWC)
        if self._view is None:
            return torch.as_tensor(self._transform(image_CHW))
        with _drawing, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._view.seed_of(sha256))
            return torch.as_tensor(self._transform(image_CHW))

    def take(self, sha256: str, prepared: torch.Tensor) -> None:
        """Compute a prepared picture, together with others as soon as they make a batch."""
        if sha256 not in self.cache and all(sha256 != key for key, _ in self._waiting):  # copies are one image
            self._waiting.append((sha256, prepared))
        if len(self._waiting) == self.engine.batch_size:
            self.flush()

    def flush(self) -> None:
        """Compute what waits for others to make a batch."""
        if not self._waiting:
            return
        started = time.perf_counter()
        keys, images = zip(*self._waiting, strict=True)
        self._waiting = []
        outputs = [output.numpy() for output in self.engine(torch.stack(images))]
        for place, key in enumerate(keys):
            self.cache.put(key, tuple(output[place] for output in outputs))
        self.computed += len(keys)
        ended = time.perf_counter()
        self.computing_seconds += ended - started
        self.seconds = ended - self._began

    def fill(self, table: ImageTable, reporter: Reporter) -> None:
        """Compute the images of `table` that the cache lacks, and read all others once, for a damaged one to be found.

        Of several processes each computes its share; what machines do not share on disk, each computes for itself.

        Raises:
            ImageError: A file can no longer be read.
            DataError: A file has changed since it was scanned.
        """
        self.flush()
        if self.processes.count > 1:
            for share in (self.processes.share, self.processes.local_share):
                self.processes.wait()  # until all others have put what they computed
                self._fill(table, share(table.rows), reporter)
            self.processes.wait()
        self._fill(table, table.rows, reporter)

    def _fill(self, table: ImageTable, rows: Sequence[ImageRow], reporter: Reporter) -> None:
        """Compute those of `rows` that the cache lacks."""
        self.cache.refresh()
        row_of = {row.sha256: row for row in rows}
        missing = [row for key, row in row_of.items() if self.cache.get(key) is None]
        if not missing:
            return
        with (
            reporter.progress("Computing features", len(missing)) as advance,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            for start in range(0, len(missing), FILES_AT_ONCE):
                rows = missing[start : start + FILES_AT_ONCE]
                for row, prepared in zip(rows, list(pool.map(lambda row: self._read(table, row), rows)), strict=True):
                    if prepared is not None:
                        self.take(row.sha256, prepared)
                    advance(1, "")
        self.flush()
        if self.cache.write_error:
            reporter.warn(f"The cache cannot be written ({self.cache.write_error}); what it lacks stays in memory.")

    def features(self, table: ImageTable, label_map: LabelMap, reporter: Reporter) -> Features:
        """Return the pooled features of every image of `table`, in its order; a trunk of fewer stages has none.

        Raises:
            ImageError: A file can no longer be read.
            DataError: A file has changed since it was scanned.
            StorageError: The cache is emptied faster than it is filled.
        """
        self.fill(table, reporter)
        found = [self.cache.get(row.sha256) for row in table.rows]
        return Features(
            features_ND=np.stack([present(activations)[0] for activations in found]),
            class_indices_N=table.class_indices(label_map),
        )

    def summary(self) -> dict[str, Any]:
        """Return what was computed and how, for metrics.jsonl."""
        return {
            "computed": self.computed,
            "seconds": self.seconds,
            "computing_seconds": self.computing_seconds,
            "engine": self.engine.name,
        }

    def _read(self, table: ImageTable, row: ImageRow) -> torch.Tensor | None:
        data = read_scanned_file(table.path(row), row.sha256)
        return self.prepare(decode_image(data, short_side_px=self.short_side_px, name=row.image_path), row.sha256)
