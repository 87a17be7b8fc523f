"""What every tool is given: five splits of the stamps, a set of JPEGs, and the backbone's weights under timm's names.

    python prepare.py WORK [--photographs 2000] [--seeds 0 1 2 3 4]

Whatever is in WORK already is left alone, so that all runs with one WORK see the same files.
"""

import argparse
import os
import runpy
import shutil
from collections.abc import Iterable
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

# Shapes: C channels, H height, W width.

STAMPS = runpy.run_path(str(Path(__file__).resolve().parents[3] / "data_examples" / "stamps.py"))
TRAIN_SHARE = 0.6
CLASSES = 102
SIDES = (500, 667)
QUALITY = 90
HELD_OUT_EVERY = 5


def write_weights(path: Path) -> None:
    """Save the bundled weights as timm names them."""
    import timm
    import torch

    from finetune.models.weights import bundled_state

    torch.save(bundled_state(timm.create_model("tf_efficientnet_lite0")), path)


def split_stamps(stamps: Path, folder: Path, *, seed: int) -> None:
    """Link 60 % of each class into `folder`/train and the rest into `folder`/valid, drawn with `seed`."""
    generator = np.random.default_rng(seed)
    for source in sorted(stamps.iterdir()):
        files = sorted(source.iterdir())
        order = generator.permutation(len(files))
        count = round(TRAIN_SHARE * len(files))
        for split, places in (("train", order[:count]), ("valid", order[count:])):
            (folder / split / source.name).mkdir(parents=True)
            for place in places:
                os.link(files[place], folder / split / source.name / files[place].name)


def write_photographs(folder: Path, *, count: int) -> None:
    """Write `count` photo-like JPEGs of 102 classes, about a fifth of each class held out.

    A class is a stamp, pasted large near the middle of a picture; smaller ones that are no class lie behind it.
    """
    root: Path = STAMPS["STAMPS_FOLDER"]
    paths = [root / part / path for part in STAMPS["SOURCES"].values() for path in STAMPS["photographs"](root / part)]
    paths.sort(key=lambda path: -pixel_count(path))
    mains, others = paths[:CLASSES], paths[CLASSES:]
    with Pool() as pool:
        pool.map(partial(write_photograph, folder=folder, mains=mains, others=others), range(count), chunksize=16)


def pixel_count(path: Path) -> int:
    with Image.open(path) as image:
        return image.width * image.height


def write_photograph(number: int, *, folder: Path, mains: list[Path], others: list[Path]) -> None:
    """Compose and save picture `number`; all that is random about it comes from its number."""
    generator = np.random.default_rng(number)
    index = number % CLASSES
    width, height = generator.permutation(SIDES)
    picture = background(generator, height=int(height), width=int(width))
    for place in generator.integers(len(others), size=2):
        paste(picture, others[place], generator, sizes=(0.15, 0.3), spread=0.45)
    paste(picture, mains[index], generator, sizes=(0.6, 0.9), spread=0.1)
    is_held_out = (number // CLASSES + index) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    target = folder / ("valid" if is_held_out else "train") / f"{index + 1}"
    target.mkdir(parents=True, exist_ok=True)
    picture.save(target / f"image_{number:05d}.jpg", quality=QUALITY)


def background(generator: np.random.Generator, *, height: int, width: int) -> Image.Image:
    """Draw what a defocused background looks like: noise whose amplitude falls with frequency, and a little grain."""
    frequency_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency_HW[0, 0] = np.inf  # no mean
    phases_CHW = generator.normal(size=(4, *frequency_HW.shape, 2)) @ np.array([1, 1j])
    noise_CHW = np.fft.irfft2(phases_CHW / frequency_HW**1.5, s=(height, width))
    noise_CHW /= noise_CHW.std(axis=(1, 2), keepdims=True)
    light_HW, colours_CHW = noise_CHW[0], noise_CHW[1:]
    mean_C11 = generator.uniform(60, 190, size=(3, 1, 1))
    grain_HW = generator.normal(0, 1.5, size=(height, width))
    pixels_CHW = mean_C11 + 35 * light_HW + 15 * colours_CHW + grain_HW
    return Image.fromarray(pixels_CHW.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def paste(
    picture: Image.Image,
    path: Path,
    generator: np.random.Generator,
    *,
    sizes: tuple[float, float],
    spread: float,
) -> None:
    """Paste the stamp at `path`, turned a little, off the middle by up to `spread` of each side.

    `sizes` is the range of its longer side, as a share of the picture's shorter one.
    """
    with Image.open(path) as image:
        stamp = image.convert("RGBA")
    scale = generator.uniform(*sizes) * min(picture.size) / max(stamp.size)
    stamp = stamp.resize([max(8, round(side * scale)) for side in stamp.size], Image.Resampling.BICUBIC)
    stamp = stamp.rotate(generator.uniform(-20, 20), expand=True, resample=Image.Resampling.BICUBIC)
    corner = [
        round(side * (0.5 + generator.uniform(-spread, spread)) - own / 2)
        for side, own in zip(picture.size, stamp.size, strict=True)
    ]
    picture.paste(stamp, (corner[0], corner[1]), stamp)


def prepare(work: Path, *, photographs: int, seeds: Iterable[int]) -> None:
    """Fill `work` with what is missing there; what is there is whole, for it came by renaming."""
    steps = {
        work / "stamps": STAMPS["build_stamps"],
        **{
            work / f"stamps-{seed}": partial(split_stamps, work / "stamps", seed=seed) for seed in seeds
        },
        work / f"jpegs-{photographs}": partial(write_photographs, count=photographs),
        work / "lite0.pth": write_weights,
    }  # fmt: skip
    for path, write in steps.items():
        unfinished = path.with_name(f"{path.name}.unfinished")
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        if not path.exists():
            write(unfinished)
            unfinished.rename(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prepare what the tools of feature_extraction.py are given.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--photographs", type=int, default=2_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    prepare(arguments.work, photographs=arguments.photographs, seeds=arguments.seeds)
