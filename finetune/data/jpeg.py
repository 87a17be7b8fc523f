"""JPEG files, decoded no larger than they are needed: by Pillow, or by simplejpeg where one asks for it."""

import os
from importlib import import_module
from importlib.metadata import version

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from finetune.errors import ConfigError, MissingExtraError, nearest

SHRINK_TOLERANCE = 0.97
"""The share of the short side asked for that a reduced JPEG must still have: half of 500 px serves 256."""

DECODER_VARIABLE = "FINETUNE_JPEG_DECODER"
DECODERS = ("pillow", "simplejpeg")
"""Both call libjpeg-turbo and give the same pixels, within LEVELS_APART."""

LEVELS_APART = 2
"""By which a value in 0..255 may differ between builds of libjpeg-turbo; of one release they are equal."""


def reduce_jpeg(image: JpegImageFile, short_side_px: int) -> None:
    """Have an opened JPEG decoded as small as its inverse cosine transform can make it and `short_side_px` allows."""
    width, height = image.size
    for factor in (8, 4, 2):
        if min(width, height) // factor >= SHRINK_TOLERANCE * short_side_px:
            image.draft(None, (width // factor, height // factor))
            return


def decode_jpeg(image: JpegImageFile, data: bytes) -> Image.Image:
    """Return an opened JPEG, whose bytes are `data`, decoded by simplejpeg if the environment names it.

    Else it comes back as it is, for Pillow to decode; so does what simplejpeg refuses, and any but grey and RGB.

    Raises:
        ConfigError: The environment names an unknown decoder.
        MissingExtraError: It names one that is not installed.
    """
    if _decoder() == "pillow" or image.mode not in ("L", "RGB"):
        return image
    width, height = image.size
    colours = "GRAY" if image.mode == "L" else "RGB"
    try:
        pixels_HWC = import_module("simplejpeg").decode_jpeg(data, colours, min_width=width, min_height=height)
    except ValueError:  # damage, for which Pillow has the better words
        return image
    decoded = Image.fromarray(pixels_HWC[:, :, 0] if image.mode == "L" else pixels_HWC)
    decoded.info = image.info  # profile and orientation
    return decoded


def decoder_key() -> str:
    """Return what tells kept pixels of one decoder from those of another: its name and, but for Pillow, its version."""
    name = _decoder()
    return name if name == "pillow" else f"{name} {version(name)}"


def _decoder() -> str:
    name = os.environ.get(DECODER_VARIABLE) or "pillow"
    if name not in DECODERS:
        raise ConfigError(f"{DECODER_VARIABLE} names no decoder: {name!r}", nearest(name, list(DECODERS)))
    if name == "simplejpeg":
        try:
            import_module("simplejpeg")
        except ImportError as error:
            raise MissingExtraError(
                f"{DECODER_VARIABLE} asks for simplejpeg, which is not installed",
                'pip install "finetune[simplejpeg]"',
            ) from error
    return name
