"""Which files are images: by their extension, or by the first bytes, which decide."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

# fmt: off
IMAGE_EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm",
})
# fmt: on
"""Extensions, in lower case, of the formats that are read."""

ALLOWED = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "PPM": rb"P[1-6]\s(?:\s|#[^\n]*\n)*\d",
}
FOREIGN = {
    "PDF": rb"%PDF-",
    "SVG or XML": rb"(?:\xef\xbb\xbf)?\s*<(?:\?xml|svg|!DOCTYPE svg)",
    "HEIC or AVIF": rb"....ftyp(?:hei|hev|mif|msf|avi)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "Photoshop": rb"8BPS",
    "EPS or PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "ICO": rb"\0\0[\1\2]\0",
    "DDS": rb"DDS ",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Radiance HDR": rb"#\?RADIANCE",
    "QOI": rb"qoif",
    "DICOM": rb".{128}DICM",
    "FITS": rb"SIMPLE  =",
    "MP4 or QuickTime": rb"....ftyp",
}
SNIFFED_BYTES = 256
HAS_END: dict[str, Callable[[bytes], bool]] = {
    "JPEG": lambda data: b"\xff\xd9" in data[-1024:],
    "PNG": lambda data: b"IEND" in data[-1024:],
    "WEBP": lambda data: len(data) >= 8 + int.from_bytes(data[4:8], "little"),
    "BMP": lambda data: len(data) >= int.from_bytes(data[2:6], "little"),
    "GIF": lambda data: data.rstrip(b"\0").endswith(b";"),
    "TIFF": lambda data: len(data) > int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big"),
}


def looks_like_image(path: Path | str) -> bool:
    """Tell whether a file may be an image of an allowed format: by its extension, or else by its first bytes."""
    if os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS:  # noqa: PTH122 (there may be a million)
        return True
    path = Path(path)
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return format_of(file.read(SNIFFED_BYTES), ALLOWED) is not None
    except OSError:
        return False


def format_of(start: bytes, magic: Mapping[str, bytes]) -> str | None:
    """Return which format of `magic`, ALLOWED or FOREIGN, a file has that begins with `start`, None if none."""
    return next((name for name, pattern in magic.items() if re.match(pattern, start, re.DOTALL)), None)
