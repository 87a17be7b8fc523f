"""Pictures and folders of them. The folder watches that nothing in it is changed by what is tested."""

import hashlib
import os
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def draw(seed: int = 0, *, width: int = 64, height: int = 48) -> Image.Image:
    """Return smooth random colours, another picture for each seed, upright and mirrored ones all different."""
    blobs = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def encode_picture(picture: Image.Image, format_name: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format_name, **options)
    return buffer.getvalue()


class DataFolder:
    """A folder built entry by entry, which knows what it must still hold at the end of the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.expected: dict[str, str] = {}

    def add(self, name: str, content: bytes | str) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return self._note(file)

    def image(self, name: str, seed: int = 0) -> Path:
        """Add a picture, its format by the extension, PNG where there is none."""
        formats = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}
        extension = Path(name).suffix[1:].lower()
        return self.add(name, encode_picture(draw(seed), formats.get(extension, extension.upper() or "PNG")))

    def images(self, *names: str, first_seed: int = 0) -> None:
        for seed, name in enumerate(names, start=first_seed):
            self.image(name, seed)

    def folder(self, name: str) -> Path:
        (self.path / name).mkdir(parents=True)
        return self.path / name

    def link(self, name: str, target: Path) -> Path:
        link = self.path / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
        return self._note(link)

    def pipe(self, name: str) -> Path:
        pipe = self.path / name
        pipe.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(pipe)
        return self._note(pipe)

    def state(self) -> dict[str, str]:
        """Return what each file, link and pipe holds now."""
        found = {}
        for folder, subfolders, files in os.walk(self.path):
            for name in (*subfolders, *files):
                entry = Path(folder, name)
                if entry.is_symlink() or not entry.is_dir():
                    found[str(entry.relative_to(self.path))] = self._content(entry)
        return found

    def _note(self, entry: Path) -> Path:
        self.expected[str(entry.relative_to(self.path))] = self._content(entry)
        return entry

    @staticmethod
    def _content(entry: Path) -> str:
        if entry.is_symlink():
            return f"link to {entry.readlink()}"
        return hashlib.sha256(entry.read_bytes()).hexdigest() if entry.is_file() else "neither file nor link"


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataFolder]:
    folder = DataFolder(tmp_path / "data")
    yield folder
    assert folder.state() == folder.expected, "the user's files were changed"


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    return draw


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return encode_picture
