"""The table of images, which every later step of the street reads: the file, its label, its side of the split."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One image and what is known of it.

    `image_path` is POSIX text relative to the table's root. `split` is None until somebody decides it. Images that
    share a `group` (one patient, one film) must stay on one side of a split. The last four fields are known after a
    scan: the SHA-256 of the file, the 256-bit hash of the picture (None where it is flat), the size of the upright
    picture.
    """

    image_path: str
    label: str
    split: Split | None = None
    group: str | None = None
    sha256: str = ""
    perceptual_hash: int | None = None
    width_px: int = 0
    height_px: int = 0


@dataclass(frozen=True)
class ImageTable:
    """Images under one `root` folder, in a fixed order."""

    root: Path
    rows: tuple[ImageRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each row, in row order."""
        return tuple(row.label for row in self.rows)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The distinct labels sorted as text, the order of a model's outputs."""
        return tuple(sorted(set(self.labels)))

    def select(self, split: Split | None) -> "ImageTable":
        """Return the rows of one `split`, or those without a split for None."""
        return ImageTable(self.root, tuple(row for row in self.rows if row.split == split))

    def path(self, row: ImageRow) -> Path:
        """Return the absolute path of a row's image."""
        return self.root.absolute() / row.image_path

    def fingerprint(self) -> str:
        """Return a SHA-256 over what is learned from: path, label, split and content, whatever the order of rows."""
        facts = sorted((row.image_path, row.label, row.split or "", row.sha256) for row in self.rows)
        # JSON keeps the fields apart, and its ASCII form also holds file names that are not valid UTF-8.
        return hashlib.sha256(json.dumps(facts).encode("ascii")).hexdigest()
