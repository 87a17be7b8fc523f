"""How fast photographs are decoded for a network, and what decoding JPEGs at a fraction of their size changes.

Run it with `python tests/benchmarks/decoding.py`; it writes results/decoding.{json,md}. Speed: JPEGs of 500 × 667 and
4000 × 3000 made of noise with the spectrum of photographs, brought to a short side of 256 by several ways, in 1 and 2
threads. Change: the photographs of the Debian package tuxpaint-stamps-default, seen by the bundled efficientnet_lite0.
simplejpeg, which finetune does not use, is measured if it can be imported.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torchvision.transforms import InterpolationMode, v2

from finetune.data.decode import decode_image, image_size
from finetune.data.jpeg import SHRINK_TOLERANCE
from finetune.data.transforms import evaluation_transform, to_tensor, unnormalize
from finetune.models.initialize import build_backbone
from finetune.runs.records import InputSpec

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Shapes: N images, B batch, C channels, H height, W width, D features.

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
PACKAGES = ("finetune", "torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg")
SHORT_SIDE_PX = 256
SIZES = {(500, 667): (8, 4), (4000, 3000): (2, 1)}  # width and height: different files, times each is decoded
ROUNDS = 5
QUALITY = 90

resize = v2.Resize(SHORT_SIDE_PX, InterpolationMode.BICUBIC, antialias=True)


def exact(data: bytes) -> torch.Tensor:
    """Decode all pixels and resize with torchvision."""
    return resize(to_tensor(decode_image(data)))


def draft(data: bytes) -> torch.Tensor:
    """Decode as training and prediction do."""
    return resize(to_tensor(decode_image(data, short_side_px=SHORT_SIDE_PX)))


def pil_bicubic(data: bytes) -> torch.Tensor:
    """Decode and resize with Pillow, timm's usual path."""
    image = Image.open(BytesIO(data)).convert("RGB")
    scale = SHORT_SIDE_PX / min(image.size)
    size = (int(image.width * scale), int(image.height * scale))
    return to_tensor(np.array(image.resize(size, Image.Resampling.BICUBIC)))


def simplejpeg_exact(data: bytes) -> torch.Tensor:
    """Decode all pixels with simplejpeg."""
    return resize(to_tensor(simplejpeg.decode_jpeg(data, strict=True)))


def simplejpeg_scaled(data: bytes) -> torch.Tensor:
    """Decode with simplejpeg at the fraction that `draft` takes."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    factor = next(n for n in (8, 4, 2, 1) if min(width, height) // n >= SHRINK_TOLERANCE * SHORT_SIDE_PX)
    pixels = simplejpeg.decode_jpeg(data, min_height=height // factor, min_width=width // factor, strict=True)
    return resize(to_tensor(pixels))


def photograph(width: int, height: int, seed: int) -> bytes:
    """Return a JPEG of noise whose amplitude falls with frequency as in photographs, every octave as strong."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    cells = 4
    while cells < min(width, height):
        octave = random.normal(0, 14, (cells, cells * width // height, 3)).clip(-127, 127) + 128
        coarse = Image.fromarray(octave.astype(np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) - 128.0
        cells *= 2
    return encoded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def encoded(image: Image.Image) -> bytes:
    """Return the bytes of a JPEG."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def measure_speed() -> list[dict[str, Any]]:
    """Return images a second and processor time of every way, the ways taking turns in every round."""
    ways: list[Callable[[bytes], torch.Tensor]] = [exact, draft, pil_bicubic]
    if simplejpeg is not None:
        ways += [simplejpeg_exact, simplejpeg_scaled]
    torch.set_num_threads(1)
    rows = []
    for (width, height), (files, repeats) in SIZES.items():
        photographs = [photograph(width, height, seed) for seed in range(files)]
        for threads in (1, 2):
            rates: dict[str, list[float]] = {way.__name__: [] for way in ways}
            milliseconds: dict[str, list[float]] = {way.__name__: [] for way in ways}
            with ThreadPoolExecutor(threads) as pool:
                for _ in range(ROUNDS):
                    for way in ways:
                        start = time.perf_counter()
                        seconds = list(pool.map(partial(processor_seconds, way), photographs * repeats))
                        rates[way.__name__].append(files * repeats / (time.perf_counter() - start))
                        milliseconds[way.__name__].append(1_000 * statistics.mean(seconds))
            size = {"width": width, "height": height, "kilobytes": round(len(photographs[0]) / 1000)}
            rows += [
                {
                    **size,
                    "threads": threads,
                    "way": way,
                    "images_a_second": rates[way],
                    "processor_ms": milliseconds[way],
                }
                for way in rates
            ]
    return rows


def processor_seconds(way: Callable[[bytes], torch.Tensor], data: bytes) -> float:
    """Return the processor time of one picture, which other work on the machine hardly changes."""
    start = time.thread_time()
    way(data)
    return time.thread_time() - start


@torch.inference_mode()
def features_of(network: nn.Module, image_CHW: torch.Tensor) -> torch.Tensor:
    """Return the pooled features (D,) of one preprocessed image."""
    features_D: torch.Tensor = network.forward_head(network.forward_features(image_CHW[None]), pre_logits=True)[0]
    return features_D


def measure_change(photographs: list[tuple[str, bytes, InputSpec]], network: nn.Module) -> dict[str, Any]:
    """Compare what the network is given, and makes of it, from all pixels and from a reduced JPEG.

    The nearest class is that of the nearest other photograph, seen from all of its pixels, by cosine. For scale, the
    features of the exact picture moved by one pixel are compared too.
    """
    differences, largest, fractions, features = [], [], set(), {"exact": [], "draft": [], "moved": []}
    for _, data, spec in photographs:
        transform = evaluation_transform(spec)
        whole_HWC, reduced_HWC = decode_image(data), decode_image(data, short_side_px=spec.resize_px)
        fractions.add(round(min(whole_HWC.shape[:2]) / min(reduced_HWC.shape[:2])))
        seen = [transform(to_tensor(image_HWC)) for image_HWC in (whole_HWC, reduced_HWC)]
        pixels = [unnormalize(image_CHW[None], spec).astype(int) for image_CHW in seen]
        difference = np.abs(pixels[0] - pixels[1])
        differences.append(float(difference.mean()))
        largest.append(int(difference.max()))
        seen.append(seen[0].roll(1, dims=2))
        for name, image_CHW in zip(features, seen, strict=True):
            features[name].append(functional.normalize(features_of(network, image_CHW), dim=0))
    exact_ND, draft_ND, moved_ND = (torch.stack(rows) for rows in features.values())
    labels = np.array([label for label, _, _ in photographs])
    nearest = {}
    for name, query_ND in (("exact", exact_ND), ("draft", draft_ND), ("moved", moved_ND)):
        nearest[name] = labels[(query_ND @ exact_ND.T).fill_diagonal_(-1).argmax(1).numpy()]
    cosines_N, moved_N = ((exact_ND * other_ND).sum(1) for other_ND in (draft_ND, moved_ND))
    return {
        "photographs": len(photographs),
        "decoded_at_one_over": sorted(fractions),
        "pixel_difference_mean": statistics.mean(differences),
        "pixel_difference_max": max(largest),
        "cosine_mean": float(cosines_N.mean()),
        "cosine_min": float(cosines_N.min()),
        "moved_cosine_mean": float(moved_N.mean()),
        "moved_cosine_min": float(moved_N.min()),
        "same_nearest_class": float((nearest["exact"] == nearest["draft"]).mean()),
        "moved_same_nearest_class": float((nearest["exact"] == nearest["moved"]).mean()),
        "nearest_class_right_exact": float((nearest["exact"] == labels).mean()),
        "nearest_class_right_draft": float((nearest["draft"] == labels).mean()),
    }


def enlarged(folder: Path, short_side_px: int, spec: InputSpec) -> Iterator[tuple[str, bytes, InputSpec]]:
    """Yield the photographs as JPEGs with a short side of `short_side_px`."""
    for path in sorted(folder.rglob("*.*")):
        image = Image.fromarray(decode_image(path))
        scale = short_side_px / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        yield path.parent.name, encoded(image.resize(size, Image.Resampling.BICUBIC)), spec


def at_own_size(folder: Path, spec: InputSpec) -> Iterator[tuple[str, bytes, InputSpec]]:
    """Yield the larger photographs as they are, for a network that wants 256/500 of their short side."""
    for path in sorted(folder.rglob("*.*")):
        data = encoded(Image.fromarray(decode_image(path)))
        if (short_px := min(image_size(data))) >= 150:
            yield path.parent.name, data, spec.at_size(spec.image_size_px * (short_px // 2) // 250)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Return the speeds as a Markdown table of medians and ranges."""
    lines = [
        "| JPEG | threads | way | images/s, median [min–max] | processor ms an image, median [min–max] |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        rates, spent = row["images_a_second"], row["processor_ms"]
        lines.append(
            f"| {row['width']} × {row['height']}, {row['kilobytes']} kB | {row['threads']} | {row['way']} | "
            f"{statistics.median(rates):.1f} [{min(rates):.1f}–{max(rates):.1f}] | "
            f"{statistics.median(spent):.2f} [{min(spent):.2f}–{max(spent):.2f}] |"
        )
    return "\n".join(lines)


def change_table(changes: dict[str, dict[str, Any]]) -> str:
    """Return the changes as a Markdown table."""
    lines = [
        "| photographs | decoded at | pixel difference, mean / max of 255 | cosine, mean / min (moved by a pixel) | "
        "same nearest class (moved) | nearest class right, exact / draft |",
        "|---|---|---|---|---|---|",
    ]
    for what, change in changes.items():
        fractions = ", ".join(f"1/{number}" for number in change["decoded_at_one_over"])
        lines.append(
            f"| {change['photographs']} {what} | {fractions} | "
            f"{change['pixel_difference_mean']:.2f} / {change['pixel_difference_max']} | "
            f"{change['cosine_mean']:.4f} / {change['cosine_min']:.4f} "
            f"({change['moved_cosine_mean']:.4f} / {change['moved_cosine_min']:.4f}) | "
            f"{change['same_nearest_class']:.3f} ({change['moved_same_nearest_class']:.3f}) | "
            f"{change['nearest_class_right_exact']:.3f} / {change['nearest_class_right_draft']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write the results."""
    speed = measure_speed()
    backbone = build_backbone("efficientnet_lite0", num_classes=2)
    network, spec = backbone.module.eval(), backbone.input_spec
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "stamps"
        subprocess.run([sys.executable, PROJECT / "data_examples" / "stamps.py", folder], check=True)
        changes = {
            f"enlarged to {short_side_px} px": measure_change([*enlarged(folder, short_side_px, spec)], network)
            for short_side_px in (500, 512, 1024)
        }
        changes["at their own size"] = measure_change([*at_own_size(folder, spec)], network)
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    record = {
        "command": "python tests/benchmarks/decoding.py",
        "versions": versions,
        "machine": {"processors": os.cpu_count(), "platform": platform.platform(), "load_average": os.getloadavg()},
        "shrink_tolerance": SHRINK_TOLERANCE,
        "speed": speed,
        "change": changes,
    }
    text = f"""# Decoding photographs

`{record["command"]}`: {os.cpu_count()} processors, shared with other work (load average {os.getloadavg()[1]:.1f}), no
GPU; {", ".join(f"{name} {number}" for name, number in versions.items())}.

## Speed

From the bytes of a JPEG (quality {QUALITY}) to a picture with a short side of {SHORT_SIDE_PX} px, bicubic;
{ROUNDS} rounds in which the ways take turns. `draft` is what training and prediction use, `exact` the same without
reducing the JPEG; `pil_bicubic` is Pillow alone. On a shared machine the processor time tells more.

{speed_table(speed)}

## What reducing changes

`draft` against `exact` after the evaluation transform of the bundled efficientnet_lite0 ({spec.resize_px} px,
bicubic), and its pooled features. A reduced JPEG may be {SHRINK_TOLERANCE} of the size asked for: of 500 px, half is
250, which is enlarged to 256; of 512 and 1024 px, a half and a quarter are just 256. A reduced picture may come out a
pixel longer, which moves the central crop by one: hence the comparison with the exact picture moved by a pixel.
Enlarged photographs are soft and flatter the method; those at their own size (short side of at least 150 px) are not,
and the network is run at 224/500 of it.

{change_table(changes)}
"""
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "decoding.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "results" / "decoding.md").write_text(text)


if __name__ == "__main__":
    main()
