"""Write scikit-learn's 1,797 handwritten digits as an image folder: OUTPUT/<digit>/0000.png.

    python data_examples/digits.py OUTPUT

The scans are 8×8 grey pixels, just what `finetune` still accepts (it refuses sides below 8), and are enlarged to
32×32, LeNet-5's input, by repeating pixels, so that nothing is invented.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE_PX = 32
DARKEST = 16  # scikit-learn counts 0..16 ink pixels in each 4×4 block of the scan


def build_digits(output: Path) -> int:
    """Write every digit as `output/<digit>/<place in the data set>.png` and return how many there are."""
    digits = load_digits()
    for number, (scan, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        grey = (scan * 255 / DARKEST).round().astype(np.uint8)
        target = output / str(digit) / f"{number:04d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST).save(target)
    return len(digits.target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write scikit-learn's handwritten digits as an image folder.")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    print(f"{build_digits(arguments.output)} images in {arguments.output}")
