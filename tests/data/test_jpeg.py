"""JPEG files by either decoder: the same pixels, the same refusals, and a clear word where there is no such decoder."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

from finetune.data.decode import decode_image
from finetune.data.jpeg import DECODER_VARIABLE, LEVELS_APART
from finetune.errors import ConfigError, ImageError, MissingExtraError


def outcome(content: bytes, short_side_px: int | None) -> np.ndarray | tuple[str, str]:
    """Return the pixels, or why there are none."""
    try:
        return decode_image(content, short_side_px=short_side_px)
    except ImageError as error:
        return error.reason, error.detail


def by_both(content: bytes, short_side_px: int | None, monkeypatch: pytest.MonkeyPatch) -> list:
    """Return the outcome by Pillow and by simplejpeg."""
    found = [outcome(content, short_side_px)]
    monkeypatch.setenv(DECODER_VARIABLE, "simplejpeg")
    found.append(outcome(content, short_side_px))
    return found


@pytest.mark.parametrize("short_side_px", [None, 200, 60, 20])
@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 40}, {"orientation": 6}, {"icc": True}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_both_decoders_give_the_same_pixels(mode, options, short_side_px, encode, picture, monkeypatch):
    options = dict(options)
    exif = Image.Exif()
    exif[0x0112] = options.pop("orientation", 1)
    if options.pop("icc", False):
        options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    content = encode(picture(5, width=643, height=401).convert(mode), "JPEG", exif=exif, **options)
    pillow_HWC, simplejpeg_HWC = by_both(content, short_side_px, monkeypatch)
    assert simplejpeg_HWC.shape == pillow_HWC.shape
    assert (simplejpeg_HWC.dtype, simplejpeg_HWC.flags["C_CONTIGUOUS"]) == (np.uint8, True)
    np.testing.assert_allclose(simplejpeg_HWC.astype(int), pillow_HWC.astype(int), atol=LEVELS_APART)


def test_simplejpeg_is_what_decodes_where_it_is_asked_for(encode, picture, monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    asked: list[tuple[int, int]] = []
    decode = simplejpeg.decode_jpeg

    def watched(data: bytes, colours: str, *, min_width: int, min_height: int) -> np.ndarray:
        asked.append((min_width, min_height))
        return decode(data, colours, min_width=min_width, min_height=min_height)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched)
    content = encode(picture(width=640, height=400), "JPEG")
    decode_image(content, short_side_px=100)
    assert asked == []
    monkeypatch.setenv(DECODER_VARIABLE, "simplejpeg")
    decode_image(content, short_side_px=100)
    assert asked == [(160, 100)]


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("short_side_px", [None, 60])
def test_truncation_is_refused_alike(kept, short_side_px, encode, picture, monkeypatch):
    content = encode(picture(5, width=320, height=240), "JPEG")
    pillow, simplejpeg = by_both(content[: int(kept * len(content))], short_side_px, monkeypatch)
    assert isinstance(pillow, tuple)
    assert simplejpeg == pillow


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_have_one_outcome(seed, encode, picture, monkeypatch):
    content = bytearray(encode(picture(5, width=320, height=240), "JPEG"))
    rng = np.random.default_rng(seed)
    for place in rng.integers(300, len(content) - 2, size=3):
        content[place] ^= int(rng.integers(1, 256))
    pillow, simplejpeg = by_both(bytes(content), 60, monkeypatch)
    assert type(pillow) is type(simplejpeg)
    if isinstance(pillow, tuple):
        assert simplejpeg == pillow
    else:
        np.testing.assert_allclose(simplejpeg.astype(int), pillow.astype(int), atol=LEVELS_APART)


def test_unknown_decoder_is_told(encode, picture, monkeypatch):
    monkeypatch.setenv(DECODER_VARIABLE, "simplejpg")
    with pytest.raises(ConfigError, match="simplejpg") as caught:
        decode_image(encode(picture(), "JPEG"))
    assert "simplejpeg" in caught.value.hint


def test_decoder_that_is_not_installed_is_told(encode, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setenv(DECODER_VARIABLE, "simplejpeg")
    with pytest.raises(MissingExtraError) as caught:
        decode_image(encode(picture(), "JPEG"))
    assert caught.value.hint == 'pip install "finetune[simplejpeg]"'
