"""The one way from bytes to pixels, for training, evaluation, prediction and serving alike.

Every refusal is an `ImageError` with a reason from its closed list. No other error of Pillow's and none of its warnings
leave this file, and no pixel is decoded before the size in the header has been accepted.
"""

import hashlib
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from finetune.data.formats import ALLOWED, FOREIGN, HAS_END, SNIFFED_BYTES, format_of
from finetune.data.jpeg import decode_jpeg, reduce_jpeg
from finetune.data.shards import packed_state, read_packed
from finetune.errors import DataError, FinetuneError, ImageError, ImageFault

Pixels: TypeAlias = npt.NDArray[np.uint8]
ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused before a pixel is decoded.

    The aspect ratio counts because resizing the short side multiplies the long one: a 1 × 16,000 strip brought to a
    short side of 256 px is a gigapixel. `max_pixels` is the size from which Pillow suspects a decompression bomb.
    """

    max_file_bytes: int = 64 * 2**20
    max_pixels: int = 89_478_485
    min_side_px: int = 8
    max_side_px: int = 32_768
    max_aspect_ratio: float = 20.0


DEFAULT_LIMITS = Limits()


def decode_image(
    source: ImageSource, *, limits: Limits = DEFAULT_LIMITS, name: str = "", short_side_px: int | None = None
) -> Pixels:
    """Decode one image into upright sRGB pixels.

    EXIF orientation and ICC profile are applied (and ignored where broken), 16-bit grey is scaled to 8 bits,
    transparency is laid on white, every colour model becomes RGB, and of many frames or pages the first is taken.

    Args:
        source: a path (text is always a path), the bytes of a file, a PIL image, or an array of uint8 in the shape HW,
            HW1 (grey), HW3 (RGB) or HW4 (RGBA). It is never changed.
        limits: what to refuse, judged on the file and the full size of the picture.
        name: what errors call the image; its path where left out.
        short_side_px: how long the short side must be at least, within SHRINK_TOLERANCE, in pixels. The file of a
            larger JPEG is then decoded at 1/2, 1/4 or 1/8 of its size, which averages the pixels and saves most of the
            time; what is wrong with it is found all the same. Every other source keeps its size.

    Returns:
        A contiguous array HWC of uint8 with three channels.

    Raises:
        ImageError: if the image is refused, with the reason.
        ConfigError, MissingExtraError: if the environment asks for a JPEG decoder that there is not.
    """
    name = name or _name_of(source)
    if isinstance(source, str | os.PathLike):
        source = read_image_file(source, limits=limits)
    data = source if isinstance(source, bytes) else None
    if isinstance(source, np.ndarray):
        source = _picture_of_array(source, name)
    with _translated(name, data):
        if isinstance(source, bytes):
            image = _opened(source, limits, name)
            if isinstance(image, JpegImageFile):
                if short_side_px is not None:
                    reduce_jpeg(image, short_side_px)
                image = decode_jpeg(image, source)
            return _upright_pixels(image)
        if isinstance(source, Image.Image):
            _check_header(source, limits, name)
            return _upright_pixels(source)
    raise ImageError("not_an_image", f"{type(source).__name__} is no path, bytes, PIL image or array", name)


def image_size(data: bytes, *, limits: Limits = DEFAULT_LIMITS, name: str = "image") -> tuple[int, int]:
    """Return the full width and height in pixels of the upright picture in the bytes of a file.

    Only the header is looked at, so that damage further on is not found; `decode_image` finds it.

    Raises:
        ImageError: if the header alone is reason to refuse the image.
    """
    with _translated(name, data):
        image = _opened(data, limits, name)
        width, height = image.size
        # Pillow tells the upright size of a TIFF, and decodes a PNG to look for metadata behind its pixels.
        is_upright = image.format == "TIFF" or (
            image.format == "PNG" and not any(word in data for word in (b"eXIf", b"exif", b"com.adobe.xmp"))
        )
        is_turned = not is_upright and _orientation(image) >= 5
    return (height, width) if is_turned else (width, height)


def read_image_file(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Read a file, or a picture in a shard, whole.

    What is no regular file is never opened, since opening a named pipe would wait forever.

    Raises:
        ImageError: with the reason `missing`, `permission`, `not_a_file`, `empty` or `too_large`.
    """
    name = os.fspath(path)
    try:
        try:
            status = Path(path).stat()
        except NotADirectoryError:  # a file has the place of a folder: a shard
            _check_file_size(packed_state(name)[0], limits, name)
            return read_packed(name)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not_a_file", "a folder, pipe or device, not a regular file", name)
        _check_file_size(status.st_size, limits, name)
        return Path(path).read_bytes()
    except ImageError:  # a ValueError too
        raise
    except PermissionError as error:
        raise ImageError("permission", "the file may not be read by this user", name) from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        detail = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ImageError("missing", detail, name) from error


def read_scanned_file(path: Path, sha256: str) -> bytes:
    """Read a file that a scan has looked at, when its bytes had this SHA-256; without one nothing is compared.

    Raises:
        ImageError: As `read_image_file`.
        DataError: The file has changed since: what is on it now may be something else.
    """
    data = read_image_file(path)
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{path} has changed since it was looked at", "start again")
    return data


def file_state(path: str) -> tuple[int, int]:
    """Return the size in bytes of a file, or of a picture in a shard, and when it was last changed, in nanoseconds.

    Raises:
        OSError, ValueError: There is no such file.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (there may be a million)
    except NotADirectoryError:
        return packed_state(path)
    return status.st_size, status.st_mtime_ns


def perceptual_hash(image_HWC: Pixels) -> int | None:
    """Return a 256-bit difference hash, which copies of one picture share across lossless formats and metadata.

    Of copies at JPEG quality 95 about a third share it, after a resize few: other hashes do not mean other pictures.

    Each bit says whether the brightness rises from one cell to the next on a grid of 16 rows and 17 columns. A picture
    in which it never rises, such as a flat one, has too little detail to be told from others and gets None.
    """
    grid = Image.fromarray(image_HWC).convert("L").resize((17, 16), Image.Resampling.BOX)
    cells = np.asarray(grid)
    rises = cells[:, 1:] > cells[:, :-1]
    return int.from_bytes(np.packbits(rises).tobytes(), "big") if rises.any() else None


@contextmanager
def _translated(name: str, data: bytes | None) -> Iterator[None]:
    """Keep Pillow quiet and turn whatever it raises into an `ImageError`; `data` are the bytes it works on."""
    try:
        with _quiet_pillow:
            yield
    except (FinetuneError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error), name) from error
    except Exception as error:  # hostile bytes make the decoders raise whatever they please
        raise ImageError(*_fault(error, data), name) from error


def _name_of(source: ImageSource) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "image"


def _opened(data: bytes, limits: Limits, name: str) -> Image.Image:
    """Open the bytes of a file without decoding pixels, refusing what the header already rules out."""
    _check_file_size(len(data), limits, name)
    image = Image.open(BytesIO(data), formats=tuple(ALLOWED))
    _check_header(image, limits, name)
    if image.format == "PNG":
        # Pillow skips the checksums of pixel chunks when it loads; `verify` checks them, and uses the image up.
        image.verify()
        image = Image.open(BytesIO(data), formats=("PNG",))
    return image


def _picture_of_array(array: npt.NDArray[Any], name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError("unsupported_depth", f"an array must hold uint8, not {array.dtype}", name)
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise ImageError("not_an_image", f"an array must have the shape HW, HW1, HW3 or HW4, not {array.shape}", name)
    if array.size == 0:
        raise ImageError("empty", f"an array of shape {array.shape} has no pixels", name)
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _check_file_size(size_bytes: int, limits: Limits, name: str) -> None:
    if size_bytes == 0:
        raise ImageError("empty", "the file has 0 bytes", name)
    if size_bytes > limits.max_file_bytes:
        raise ImageError("too_large", f"{size_bytes:,} bytes, at most {limits.max_file_bytes:,} are read", name)


def _check_header(image: Image.Image, limits: Limits, name: str) -> None:
    width, height = image.size
    short, long = sorted(image.size)
    size = f"{width:,} × {height:,} px"
    if width * height > limits.max_pixels:
        raise ImageError("too_many_pixels", f"{size}, at most {limits.max_pixels:,} pixels are decoded", name)
    if long > limits.max_side_px:
        raise ImageError("too_large", f"{size}, a side may have at most {limits.max_side_px:,} px", name)
    if long > limits.max_aspect_ratio * short:
        raise ImageError("aspect", f"{size}, at most {limits.max_aspect_ratio:g} : 1 is accepted", name)
    if short < limits.min_side_px:
        raise ImageError("too_small", f"{size}, a side must have at least {limits.min_side_px} px", name)
    if image.mode in ("I", "F") and not _has_sixteen_bits(image):
        raise ImageError("unsupported_depth", "32 bits a pixel; save it with 8 or 16 bits", name)


def _has_sixteen_bits(image: Image.Image) -> bool:
    # Pillow opens a 16-bit PGM in its 32-bit mode "I", the values already brought to 0..65535.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _upright_pixels(image: Image.Image) -> Pixels:
    """Bring an opened picture to upright sRGB, laid on white."""
    image.load()
    orientation = _orientation(image)  # after loading, because Pillow turns a TIFF by itself and then drops the tag
    profile = image.info.get("icc_profile")
    colour, alpha = _colour_and_alpha(_eight_bit_grey(image) if _has_sixteen_bits(image) else image)
    rgb = _to_srgb(colour, profile)
    if alpha is not None:
        white = Image.new("RGB", rgb.size, "white")
        white.paste(rgb, mask=alpha)
        rgb = white
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    return np.array(rgb, dtype=np.uint8, order="C")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF raises whatever its bytes lead to, and costs no more than the orientation
        return 1
    return value if isinstance(value, int) else 1


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, where Pillow's own conversion would clip it."""
    levels = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((levels * 255 + 32_767) // 65_535).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _colour_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split off the transparency; the colour comes in one of the modes L, RGB and CMYK."""
    is_grey = image.mode in ("1", "L", "LA", "La")
    if not image.has_transparency_data:
        return (image if image.mode in ("L", "RGB", "CMYK") else image.convert("L" if is_grey else "RGB")), None
    image = image.convert("LA" if is_grey else "RGBA")
    return image.convert("L" if is_grey else "RGB"), image.getchannel("A")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    found = _transform_to_srgb(profile) if profile else None
    if found is not None:
        transform, mode = found
        if image.mode == mode or (image.mode, mode) == ("L", "RGB"):
            return transform.apply(image.convert(mode))
    return image if image.mode == "RGB" else image.convert("RGB")  # converting to the same mode would copy


@lru_cache(maxsize=16)  # a transform takes milliseconds to build, and the images of one camera share their profile
def _transform_to_srgb(profile: bytes) -> tuple[ImageCms.ImageCmsTransform, str] | None:
    """Build the transform from `profile` to sRGB and name its input mode; None if it is broken or changes nothing."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space]
        transform = ImageCms.ImageCmsTransform(
            source, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")), mode, "RGB"
        )
        bands = len(mode)
        grid = np.indices((6,) * bands).reshape(bands, -1).T * 51  # every mixture of six levels a band
        colours = Image.frombytes(mode, (len(grid), 1), grid.astype(np.uint8).tobytes())
        changes = np.asarray(transform.apply(colours)).astype(int) - np.asarray(colours.convert("RGB"))
    except (ImageCms.PyCMSError, OSError, KeyError, TypeError, ValueError):
        return None
    return (transform, mode) if np.abs(changes).max() > 1 else None


def _fault(error: Exception, data: bytes | None) -> tuple[ImageFault, str]:
    """Say which reason a failure of Pillow's amounts to, given the bytes it failed on."""
    detail = "its header makes no sense" if isinstance(error, UnidentifiedImageError) else repr(error)
    if data is None:
        return "corrupt", detail
    start = data[:SNIFFED_BYTES]
    if (known := format_of(start, ALLOWED)) is not None:
        has_end = HAS_END.get(known)
        if "truncated" in detail.lower() or isinstance(error, EOFError) or (has_end and not has_end(data)):
            return "truncated", f"the {known} file ends too early"
        return "corrupt", f"the {known} file cannot be decoded: {detail}"
    if (foreign := format_of(start, FOREIGN)) is not None:
        return "format_not_allowed", f"{foreign} is not read; convert it to one of {', '.join(ALLOWED)}"
    return "not_an_image", "its first bytes are those of no known image format"


class _QuietPillow:
    """Silences Pillow's warnings while any thread is inside.

    Warning filters belong to the whole process, so overlapping uses of `warnings.catch_warnings` in several threads
    would restore each other's. Here the first thread in installs one filter and the last one out removes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()
