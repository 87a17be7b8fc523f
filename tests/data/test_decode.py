import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from finetune.data.decode import (
    DEFAULT_LIMITS,
    Limits,
    decode_image,
    image_size,
    perceptual_hash,
)
from finetune.data.formats import looks_like_image
from finetune.errors import ImageError

TURNS = Image.Transpose
STORED = {  # how a camera held in each orientation stores an upright picture
    1: None,
    2: TURNS.FLIP_LEFT_RIGHT,
    3: TURNS.ROTATE_180,
    4: TURNS.FLIP_TOP_BOTTOM,
    5: TURNS.TRANSPOSE,
    6: TURNS.ROTATE_90,
    7: TURNS.TRANSVERSE,
    8: TURNS.ROTATE_270,
}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, raw: bytes = b"", extra: bytes = b"") -> bytes:
    """Return a PNG written by hand; without `raw` it is a header with a promise of pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )


def grey(width: int = 16, height: int = 16, value: int = 100) -> Image.Image:
    return Image.new("L", (width, height), value)


def reason_of(source: object, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(source, **options)
    return caught.value.reason


@cache
def samples() -> dict[str, bytes]:
    """One small file of each format."""
    ramp = np.add.outer(np.arange(24), np.arange(32)).astype(np.uint8) * 4
    image = Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1))
    files = {}
    for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        buffer = BytesIO()
        image.save(buffer, name)
        files[name] = buffer.getvalue()
    buffer = BytesIO()
    image.save(buffer, "JPEG", progressive=True)
    files["progressive"] = buffer.getvalue()
    return files


REFUSED = {
    "0 bytes": (lambda encode, picture: b"", "empty"),
    "JPEG cut in half": (lambda encode, picture: halved(encode(picture(), "JPEG")), "truncated"),
    "progressive JPEG cut in half": (
        lambda encode, picture: halved(encode(picture(), "JPEG", progressive=True)),
        "truncated",
    ),
    "PNG cut in half": (lambda encode, picture: halved(encode(picture())), "truncated"),
    "WebP cut in half": (lambda encode, picture: halved(encode(picture(), "WEBP")), "truncated"),
    "TIFF cut in half": (
        lambda encode, picture: halved(encode(picture(), "TIFF", compression="tiff_lzw")),
        "truncated",
    ),
    "wrong PNG checksum": (lambda encode, picture: with_wrong_checksum(encode(picture())), "corrupt"),
    "JPEG without a picture": (lambda encode, picture: b"\xff\xd8\xff\xd9", "corrupt"),
    "50,000 × 50,000 bomb": (lambda encode, picture: png(50_000, 50_000), "too_many_pixels"),
    "bomb of which Pillow only warns": (lambda encode, picture: png(12_000, 12_000), "too_many_pixels"),
    "1 × 1": (lambda encode, picture: encode(grey(1, 1)), "too_small"),
    "7 × 7": (lambda encode, picture: encode(grey(7, 7)), "too_small"),
    "strip of 1 × 16,000": (lambda encode, picture: encode(grey(1, 16_000)), "aspect"),
    "21 : 1": (lambda encode, picture: encode(grey(210, 10)), "aspect"),
    "side of 33,000": (lambda encode, picture: png(33_000, 2_000), "too_large"),
    "text": (lambda encode, picture: b"this is no picture\n", "not_an_image"),
    "text that starts like a PPM": (lambda encode, picture: b"Python is a language\n", "not_an_image"),
    "text that starts like a BMP": (lambda encode, picture: b"BMW is a maker of cars, among others\n", "not_an_image"),
    "web page": (lambda encode, picture: b"<!DOCTYPE html><html>404</html>", "not_an_image"),
    "PDF": (lambda encode, picture: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "format_not_allowed"),
    "SVG": (lambda encode, picture: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "format_not_allowed"),
    "SVG with XML header": (lambda encode, picture: b'<?xml version="1.0"?>\n<svg/>', "format_not_allowed"),
    "HEIC": (lambda encode, picture: b"\0\0\0\x18ftypheic" + b"\0" * 50, "format_not_allowed"),
    "JPEG 2000": (lambda encode, picture: encode(picture(), "JPEG2000"), "format_not_allowed"),
    "ICO": (lambda encode, picture: encode(picture(), "ICO"), "format_not_allowed"),
    "EPS": (lambda encode, picture: encode(picture(), "EPS"), "format_not_allowed"),
    "Photoshop": (lambda encode, picture: b"8BPS\0\1" + b"\0" * 50, "format_not_allowed"),
    "32-bit float TIFF": (
        lambda encode, picture: encode(Image.fromarray(np.ones((16, 16), np.float32)), "TIFF"),
        "unsupported_depth",
    ),
    "32-bit integer TIFF": (
        lambda encode, picture: encode(Image.fromarray(np.ones((16, 16), np.int32)), "TIFF"),
        "unsupported_depth",
    ),
    "float PFM": (lambda encode, picture: b"Pf 16 16 -1.0\n" + b"\0" * 1024, "unsupported_depth"),
}


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def with_wrong_checksum(data: bytes) -> bytes:
    at = data.index(b"IDAT") + 4 + struct.unpack(">I", data[data.index(b"IDAT") - 4 : data.index(b"IDAT")])[0]
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_reason_whatever_its_name(case, extension, data, encode, picture):
    make, reason = REFUSED[case]
    content = make(encode, picture)
    file = data.add(f"x{extension}", content)
    assert reason_of(content) == reason_of(content, short_side_px=8) == reason
    with pytest.raises(ImageError) as caught:
        decode_image(file)
    assert caught.value.reason == reason
    assert str(file) in caught.value.message
    assert "0x" not in caught.value.message, "no address of an object in a message"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda data: data.path / "absent.jpg", "missing"),
        (lambda data: data.link("dangling.jpg", data.path / "absent"), "missing"),
        (lambda data: data.link("loop.jpg", data.path / "loop.jpg"), "missing"),
        (lambda data: "null\0.jpg", "missing"),
        (lambda data: data.path / ("x" * 300), "missing"),
        (lambda data: data.folder("folder.jpg"), "not_a_file"),
        (lambda data: data.pipe("pipe.jpg"), "not_a_file"),
        (lambda data: "/dev/zero", "not_a_file"),
    ],
)
def test_paths_that_lead_to_no_file(make, reason, data):
    assert reason_of(make(data)) == reason


def test_unreadable_file(data, monkeypatch):
    file = data.image("a.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert reason_of(file) == "permission"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_read_permission(data):
    file = data.image("a.png")
    file.chmod(0)
    reason = reason_of(file)
    file.chmod(0o600)
    assert reason == "permission"


def test_file_size_limit_holds_for_paths_and_bytes(data):
    file = data.image("a.png")
    small = Limits(max_file_bytes=100)
    assert reason_of(file, limits=small) == reason_of(file.read_bytes(), limits=small) == "too_large"


def test_limits_are_those_of_the_promise():
    assert DEFAULT_LIMITS.max_file_bytes == 64 * 1024 * 1024
    assert 89_000_000 <= DEFAULT_LIMITS.max_pixels < 90_000_000
    assert (DEFAULT_LIMITS.min_side_px, DEFAULT_LIMITS.max_side_px, DEFAULT_LIMITS.max_aspect_ratio) == (8, 32_768, 20)
    assert decode_image(grey(8, 160)).shape == (160, 8, 3)


@pytest.mark.parametrize("size", [50_000, 12_000])
def test_bomb_takes_no_memory(size, tmp_path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(size, size))
    script = (
        "import sys\n"
        "from finetune.data.decode import decode_image\n"
        "from finetune.errors import ImageError\n"
        "try:\n    decode_image(sys.argv[1])\n"
        "except ImageError as error:\n    print(error.reason)\n"
        # ru_maxrss would start from the peak of the process that forked this one; VmHWM is its own.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, bomb], capture_output=True, text=True, check=True, timeout=60)
    reason, peak_kib = done.stdout.split()
    assert reason == "too_many_pixels"
    assert int(peak_kib) < 300 * 1024
    assert done.stderr == ""


def test_lossless_formats_give_the_pixels_back(encode, picture):
    expected = np.asarray(picture())
    for format_name, options in (
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ):
        image_HWC = decode_image(encode(picture(), format_name, **options))
        np.testing.assert_array_equal(image_HWC, expected, err_msg=format_name)
        assert image_HWC.flags.c_contiguous
        assert image_HWC.flags.writeable
        assert image_HWC.dtype == np.uint8


def test_content_decides_not_the_name(data, encode, picture):
    file = data.add("really_a_png.jpg", encode(picture()))
    np.testing.assert_array_equal(decode_image(file), np.asarray(picture()))
    np.testing.assert_array_equal(decode_image(str(file)), np.asarray(picture()))


def test_camera_jpeg_with_several_pictures(encode, picture):
    content = encode(picture(), "MPO", save_all=True, append_images=[picture(1)], quality=100, subsampling=0)
    assert Image.open(BytesIO(content)).format == "MPO"
    np.testing.assert_allclose(decode_image(content).astype(int), np.asarray(picture()).astype(int), atol=8)


def test_cmyk_with_and_without_adobe_marker(encode):
    content = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
    marker = content.index(b"\xff\xee")
    assert content[marker + 4 : marker + 9] == b"Adobe"
    without = content[:marker] + content[marker + 2 + struct.unpack(">H", content[marker + 2 : marker + 4])[0] :]
    assert b"Adobe" not in without
    for file in (content, without):
        np.testing.assert_allclose(decode_image(file)[8, 8], (0, 255, 255), atol=3)


def test_transparency_is_laid_on_white(encode):
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    assert decode_image(encode(half))[0, 0].tolist() == [127, 127, 127]
    assert decode_image(encode(half, "WEBP", lossless=True))[0, 0].tolist() == [127, 127, 127]
    assert decode_image(encode(Image.new("LA", (16, 16), (0, 64))))[0, 0].tolist() == [191, 191, 191]
    hidden_red = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert decode_image(encode(hidden_red))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_palette_with_transparency(encode, transparency):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (8, 0, 16, 16))
    pixels = decode_image(encode(image, transparency=transparency))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 15].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("mode", "colour", "transparency", "expected"),
    [
        ("RGB", (1, 2, 3), (1, 2, 3), [255, 255, 255]),
        ("RGB", (1, 2, 3), (3, 2, 1), [1, 2, 3]),
        ("L", 7, 7, [255, 255, 255]),
        ("L", 7, 8, [7, 7, 7]),
        ("1", 0, 0, [255, 255, 255]),
    ],
)
def test_one_transparent_colour(mode, colour, transparency, expected, encode):
    pixels = decode_image(encode(Image.new(mode, (16, 16), colour), transparency=transparency))
    assert pixels[3, 3].tolist() == expected


def test_one_bit(encode):
    image = Image.new("1", (16, 16), 0)
    image.paste(1, (8, 0, 16, 16))
    for format_name in ("PNG", "TIFF", "PPM", "BMP"):
        pixels = decode_image(encode(image, format_name))
        assert (pixels[0, 0].tolist(), pixels[0, 15].tolist()) == ([0, 0, 0], [255, 255, 255]), format_name


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_ramp_keeps_256_levels(format_name, encode):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    content = encode(Image.fromarray(ramp), format_name)
    assert Image.open(BytesIO(content)).mode in ("I;16", "I")
    np.testing.assert_array_equal(decode_image(content)[:, :, 0].ravel(), np.arange(256))


def test_sixteen_bit_grey_with_a_transparent_level():
    rows = b"".join(b"\0" + np.full(16, level, ">u2").tobytes() for level in (*[1000] * 8, *[65535 // 5] * 8))
    pixels = decode_image(png(16, 16, depth=16, colour=0, raw=rows, extra=chunk(b"tRNS", struct.pack(">H", 1000))))
    assert (pixels[0, 0].tolist(), pixels[15, 0].tolist()) == ([255] * 3, [51] * 3)


def test_sixteen_bit_colour():
    rows = b"".join(b"\0" + np.array([[0xFFFF, 0x8080, 0x0101]] * 16, ">u2").tobytes() for _ in range(16))
    assert decode_image(png(16, 16, depth=16, raw=rows))[0, 0].tolist() == [255, 128, 1]


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_gives_the_same_upright_pixels(orientation, format_name, encode, picture):
    upright = picture(3)
    turn = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format_name, {})
    content = encode(upright if turn is None else upright.transpose(turn), format_name, exif=exif, **options)
    tolerance = 8 if format_name == "JPEG" else 0
    np.testing.assert_allclose(decode_image(content).astype(int), np.asarray(upright).astype(int), atol=tolerance)


def test_exif_orientation_of_sixteen_bit_grey(encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = Image.fromarray((np.arange(20 * 30, dtype=np.uint16) * 100).reshape(20, 30))
    assert decode_image(encode(ramp, "PNG", exif=exif)).shape == (30, 20, 3)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\x01\0\0\0\x09\0\0\0" * 3,
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0",
    ],
)
def test_broken_exif_is_ignored(exif, encode, picture):
    plain = encode(picture(), "JPEG")
    broken = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    np.testing.assert_array_equal(decode_image(broken), decode_image(plain))


def test_first_frame_and_first_page(encode):
    first, second = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    for format_name in ("GIF", "TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if format_name == "WEBP" else {}
        content = encode(first, format_name, save_all=True, append_images=[second], **options)
        assert Image.open(BytesIO(content)).n_frames == 2
        assert decode_image(content)[0, 0].tolist() == [255, 0, 0], format_name


def srgb_profile(*, red_and_green_swapped: bool = False) -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if red_and_green_swapped:
        profile = profile.replace(b"rXYZ", b"?XYZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"?XYZ", b"gXYZ", 1)
    return profile


def test_colour_profile_is_applied(encode, picture):
    swapped = srgb_profile(red_and_green_swapped=True)
    pixels = decode_image(encode(picture(), icc_profile=swapped))
    np.testing.assert_allclose(pixels.astype(int), np.asarray(picture())[:, :, [1, 0, 2]].astype(int), atol=3)


def test_colour_profile_is_applied_beside_transparency(encode):
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (8, 0, 16, 16))
    pixels = decode_image(encode(image, icc_profile=srgb_profile(red_and_green_swapped=True)))
    np.testing.assert_allclose(pixels[0, [0, 15]].astype(int), [[0, 255, 0], [255, 255, 255]], atol=3)


@pytest.mark.parametrize("profile", [b"garbage", srgb_profile(), srgb_profile()[:200]])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA"])
def test_profile_that_is_broken_or_srgb_changes_nothing(mode, profile, encode, picture):
    image = picture().convert(mode)
    np.testing.assert_array_equal(decode_image(encode(image, icc_profile=profile)), decode_image(encode(image)))


def test_profile_of_another_colour_model_is_ignored(encode):
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    with_profile = encode(image, "JPEG", icc_profile=srgb_profile(red_and_green_swapped=True))
    np.testing.assert_array_equal(decode_image(with_profile), decode_image(encode(image, "JPEG")))


def test_pil_images_and_arrays(picture):
    expected = np.asarray(picture())
    np.testing.assert_array_equal(decode_image(picture()), expected)
    np.testing.assert_array_equal(decode_image(expected), expected)
    np.testing.assert_array_equal(decode_image(expected[:, ::-1]), expected[:, ::-1])
    one = expected[:, :, 0]
    for array in (one, one[:, :, None]):
        np.testing.assert_array_equal(decode_image(array), np.stack([one] * 3, axis=-1))
    clear = np.dstack([expected, np.zeros(one.shape, np.uint8)])
    assert (decode_image(clear) == 255).all()


def test_result_never_shares_memory_with_the_source():
    array = np.zeros((16, 16, 3), np.uint8)
    decode_image(array)[:] = 9
    assert not array.any()
    image = grey()
    decode_image(image)[:] = 9
    assert image.getpixel((0, 0)) == 100


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((16, 16, 3), np.float32), "unsupported_depth"),
        (np.zeros((16, 16), np.uint16), "unsupported_depth"),
        (np.zeros((16, 16, 2), np.uint8), "not_an_image"),
        (np.zeros((2, 16, 16, 3), np.uint8), "not_an_image"),
        (np.zeros((0, 16, 3), np.uint8), "empty"),
        (np.zeros((4, 4, 3), np.uint8), "too_small"),
        (Image.new("F", (16, 16)), "unsupported_depth"),
        (Image.new("L", (16, 400)), "aspect"),
        (None, "not_an_image"),
        (3, "not_an_image"),
    ],
)
def test_sources_in_memory_that_are_refused(source, reason):
    assert reason_of(source) == reason


def test_lazy_pil_image_that_turns_out_truncated(encode, picture):
    lazy = Image.open(BytesIO(halved(encode(picture(), "BMP"))))
    assert reason_of(lazy) == "corrupt"


def test_errors_carry_the_name_given():
    with pytest.raises(ImageError, match=r"^upload 3: empty"):
        decode_image(b"", name="upload 3")


def test_truncation_tolerance_is_off():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "progressive"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), max_size=4),
)
def test_damaged_files_raise_nothing_but_image_errors(name, cut, flips):
    content = bytearray(samples()[name])
    for at, mask in flips:
        content[at % len(content)] ^= mask
    try:
        pixels = decode_image(bytes(content[: round(cut * len(content))]))
    except ImageError as error:
        assert error.reason  # noqa: PT017 - an undamaged file raises nothing
    else:
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3


@pytest.mark.parametrize(
    ("short_side_px", "shape"),
    [
        (None, (400, 600)),
        (400, (400, 600)),
        (207, (400, 600)),
        (206, (200, 300)),  # 200 is 0.97 of it
        (200, (200, 300)),
        (101, (100, 150)),
        (50, (50, 75)),
        (1, (50, 75)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_large_jpeg_is_reduced_as_far_as_it_may(options, short_side_px, shape, encode, picture):
    content = encode(picture(width=600, height=400), "JPEG", quality=95, **options)
    image_HWC = decode_image(content, short_side_px=short_side_px)
    assert image_HWC.shape == (*shape, 3)
    averaged = np.asarray(picture(width=600, height=400).resize(shape[::-1], Image.Resampling.BOX))
    np.testing.assert_allclose(image_HWC.astype(int), averaged.astype(int), atol=8)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_reduced_jpeg_of_every_colour_model(mode, encode, picture):
    content = encode(picture(width=320, height=240).convert(mode), "JPEG", quality=95)
    whole = Image.fromarray(decode_image(content)).resize((80, 60), Image.Resampling.BOX)
    reduced_HWC = decode_image(content, short_side_px=60)
    np.testing.assert_allclose(reduced_HWC.astype(int), np.asarray(whole).astype(int), atol=4)


def test_reduced_jpeg_keeps_its_colour_profile(encode, picture):
    upright = picture(width=320, height=240)
    options = {"quality": 95, "icc_profile": srgb_profile(red_and_green_swapped=True)}
    reduced_HWC = decode_image(encode(upright, "JPEG", **options), short_side_px=60)
    expected = np.asarray(upright.resize((80, 60), Image.Resampling.BOX))[:, :, [1, 0, 2]]
    np.testing.assert_allclose(reduced_HWC.astype(int), expected.astype(int), atol=8)


@pytest.mark.parametrize("format_name", ["JPEG", "MPO"])
@pytest.mark.parametrize("orientation", STORED)
def test_reduced_jpeg_is_turned_upright(orientation, format_name, encode, picture):
    upright = picture(3, width=320, height=240)
    turn = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"save_all": True, "append_images": [picture(1)]} if format_name == "MPO" else {}
    stored = upright if turn is None else upright.transpose(turn)
    content = encode(stored, format_name, exif=exif, quality=95, **options)
    expected = np.asarray(upright.resize((80, 60), Image.Resampling.BOX))
    np.testing.assert_allclose(decode_image(content, short_side_px=60).astype(int), expected.astype(int), atol=8)
    assert image_size(content) == (320, 240)


def test_limits_are_judged_on_the_full_size_of_a_reduced_jpeg(encode, picture):
    content = encode(picture(width=320, height=240), "JPEG")
    assert reason_of(content, short_side_px=30, limits=Limits(max_pixels=320 * 240 - 1)) == "too_many_pixels"
    assert reason_of(content, short_side_px=30, limits=Limits(max_side_px=319)) == "too_large"
    assert decode_image(content, short_side_px=30, limits=Limits(min_side_px=240)).shape == (30, 40, 3)


def test_only_files_of_jpeg_are_reduced(encode, picture):
    upright = picture(width=320, height=240)
    sources = [encode(upright, name) for name in ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]
    lazy = Image.open(BytesIO(encode(upright, "JPEG")))
    for source in (*sources, upright, np.asarray(upright), lazy):
        assert decode_image(source, short_side_px=30).shape == (240, 320, 3)
    assert lazy.size == (320, 240)


@cache
def large_jpegs():
    """Return JPEGs of every kind that differs in how a decoder meets damage."""
    colours = np.random.default_rng(5).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    files = {}
    for mode, options in (
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"restart_marker_blocks": 3}),
        ("RGB", {"subsampling": 0}),
        ("L", {}),
        ("L", {"progressive": True}),
        ("CMYK", {}),
    ):
        buffer = BytesIO()
        bands = [Image.fromarray(colours[:, :, n]) for n in range(len(Image.new(mode, (1, 1)).getbands()))]
        Image.merge(mode, bands).resize((160, 120), Image.Resampling.BICUBIC).save(buffer, "JPEG", **options)
        files[mode, *options] = buffer.getvalue()
    return files


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(large_jpegs())),
    cut=st.one_of(st.just(1.0), st.floats(0, 1)),
    flips=st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 255)), max_size=4),
    short_side_px=st.sampled_from([15, 30, 60]),
)
def test_damage_is_found_in_a_reduced_jpeg_exactly_as_in_the_whole(name, cut, flips, short_side_px):
    content = bytearray(large_jpegs()[name])
    for at, mask in flips:
        content[at % len(content)] ^= mask
    outcomes = []
    for option in (None, short_side_px):
        try:
            decode_image(bytes(content[: round(cut * len(content))]), short_side_px=option)
            outcomes.append("read")
        except ImageError as error:
            outcomes.append((error.reason, error.detail))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", STORED)
def test_size_in_the_header_is_that_of_the_upright_picture(orientation, format_name, encode, picture):
    turn = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture() if turn is None else picture().transpose(turn)
    content = encode(stored, format_name, exif=exif)
    height, width, _ = decode_image(content).shape
    assert image_size(content) == (width, height) == (64, 48)
    assert image_size(encode(picture(), format_name)) == (64, 48)


def test_orientation_behind_the_pixels_of_a_png_counts_for_its_size(encode, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(picture())
    end = content.index(b"IEND") - 4
    turned = content[:end] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + content[end:]
    assert decode_image(turned).shape == (64, 48, 3)
    assert image_size(turned) == (48, 64)


@pytest.mark.parametrize("case", ["0 bytes", "50,000 × 50,000 bomb", "7 × 7", "text", "PDF", "32-bit float TIFF"])
def test_size_of_what_the_header_rules_out_is_refused(case, encode, picture):
    make, reason = REFUSED[case]
    with pytest.raises(ImageError, match=r"^upload: ") as caught:
        image_size(make(encode, picture), name="upload")
    assert caught.value.reason == reason


def test_pillow_warnings_are_silent_in_every_thread_and_filters_are_restored(encode, picture):
    plain = encode(picture(), "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + b"\x12\x01\x03\0\xff\0\0\0\xff\xff\0\0" + b"\0\0"
    noisy = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Image.open(BytesIO(noisy)).getexif().get(0x0112)
    assert told, "Pillow must warn about this file, or nothing is tested"
    before = list(warnings.filters)
    barrier = threading.Barrier(4)

    def work(_):
        barrier.wait()
        for _ in range(10):
            decode_image(noisy)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert list(warnings.filters) == before


def test_looks_like_image(data, encode, picture):
    assert looks_like_image(data.path / "ABSENT.JPG")
    assert looks_like_image(data.add("text.Png", "no picture"))
    assert looks_like_image(data.add("no_extension", encode(picture())))
    assert looks_like_image(data.add("photo.jpg.download", encode(picture(), "JPEG")))
    assert not looks_like_image(data.add("notes.txt", "P1 is the first of the parts"))
    assert not looks_like_image(data.add("scan.pdf", b"%PDF-1.7"))
    assert not looks_like_image(data.pipe("pipe"))
    assert not looks_like_image(data.folder("folder"))
    assert not looks_like_image(data.path / "absent")


def test_perceptual_hash(encode, picture):
    pixels = decode_image(picture(1))
    value = perceptual_hash(pixels)
    assert value is not None
    assert 0 < value < 2**256
    assert perceptual_hash(decode_image(encode(picture(1), "BMP"))) == value
    assert perceptual_hash(decode_image(picture(2))) != value
    assert perceptual_hash(pixels[:, ::-1]) != value
    assert perceptual_hash(np.full((20, 30, 3), 77, np.uint8)) is None
