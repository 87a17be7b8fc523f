"""Build an image folder of about 210 real photographs from the Debian package tuxpaint-stamps-default.

    python data_examples/stamps.py OUTPUT

The stamps are cut-out photographs with a transparent background, which becomes white. Drawn stamps are left out.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

STAMPS_FOLDER = Path("/usr/share/tuxpaint/stamps")
SOURCES = {
    "birds": "animals/birds",
    "flowers": "plants/flowers",
    "fruit": "food/fruit",
    "insects": "animals/insects",
    "mammals": "animals/mammals",
    "tools": "household/tools",
    "vegetables": "food/vegetables",
    "vehicles": "vehicles",
}
PNG_EVERY = 4  # so that the folder holds two formats, as people's own folders do


def photographs(folder: Path) -> list[Path]:
    """Return the photographs under `folder`, relative to it and in a fixed order, without the drawn stamps."""
    stamps = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    return [path for path in stamps if "cartoon" not in str(path)]


def on_white(path: Path) -> Image.Image:
    """Return the stamp at `path` as an RGB image on a white background."""
    with Image.open(path) as image:
        stamp = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", stamp.size, "white"), stamp).convert("RGB")


def build_stamps(output: Path, stamps_folder: Path = STAMPS_FOLDER) -> int:
    """Write the photographs as `output/CLASS/NAME.jpg`, every fourth as PNG, and return how many there are.

    Raises:
        FileNotFoundError: `stamps_folder` is absent, so the package is not installed.
        FileExistsError: `output` holds something already.
    """
    if not stamps_folder.is_dir():
        raise FileNotFoundError(f"{stamps_folder} is missing; install it with: apt install tuxpaint-stamps-default")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; name a new folder")
    count = 0
    for class_name, source in SOURCES.items():
        (output / class_name).mkdir(parents=True, exist_ok=True)
        for path in photographs(stamps_folder / source):
            ending = ".png" if count % PNG_EVERY == PNG_EVERY - 1 else ".jpg"
            # The sub-folder stays in the name: two of them may hold a stamp of the same name.
            name = "-".join(path.with_suffix("").parts) + ending
            on_white(stamps_folder / source / path).save(output / class_name / name, quality=95)
            count += 1
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build an image folder from the stamps of Tux Paint.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--stamps-folder", type=Path, default=STAMPS_FOLDER)
    arguments = parser.parse_args()
    try:
        print(f"{build_stamps(arguments.output, arguments.stamps_folder)} images in {arguments.output}")
    except OSError as error:
        sys.exit(f"stamps.py: {error}")
