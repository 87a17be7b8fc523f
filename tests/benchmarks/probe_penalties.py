"""What the penalty of the probe should hold against a direction: one scale for all features, one for each, or scatter.

Run it with `python tests/benchmarks/probe_penalties.py`; it writes results/probe_penalties.{json,md}. It is what
SHRINKAGE was chosen by, so its images are none that any other result is reported on: stamps of the Debian package
tuxpaint-stamps-default of kinds that data_examples/stamps.py leaves out, and scikit-learn's digits.
"""

import runpy
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import circumstances, write_results
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit

from finetune.data.transforms import evaluation_transform, to_tensor
from finetune.features import probe
from finetune.features.extract import Features
from finetune.features.trunk import pooled_trunk
from finetune.models.device import resolve_device
from finetune.models.initialize import build_backbone

# Shapes: N images, D features.

Array = np.ndarray[Any, Any]

STAMPS = runpy.run_path(str(Path(__file__).resolve().parents[2] / "data_examples" / "stamps.py"))
KINDS = (
    "animals/fish",
    "clothes",
    "hobbies",
    "plants/trees",
    "seasonal/christmas",
    "seasonal/easter",
    "seasonal/halloween",
    "seasonal/hanukkah",
    "space/planets",
    "sports",
    "symbols/alphabets/asl",
    "symbols/chess",
    "symbols/money",
    "symbols/music",
    "town/roadsigns",
)
DIGITS, DIGIT_PX = 500, 64
SPLITS = 20
SHRINKAGES = (0.2, 0.5, 0.8, 0.95)


def features_of(images: list[Image.Image]) -> Array:
    """Return the pooled features (N, D) of the default backbone."""
    device = resolve_device("cpu")
    backbone = build_backbone("efficientnet_lite0", num_classes=2)
    trunk, transform = pooled_trunk(backbone).module.to(device), evaluation_transform(backbone.input_spec)
    rows = []
    with torch.inference_mode():
        for image in images:
            picture_CHW = torch.as_tensor(transform(to_tensor(np.array(image.convert("RGB")))))
            rows.append(trunk(picture_CHW[None])[0].numpy())
    return np.stack(rows)


def other_stamps() -> tuple[list[Image.Image], Array]:
    """Return stamps of the KINDS and their class indices."""
    paths = [
        (index, STAMPS["STAMPS_FOLDER"] / kind / path)
        for index, kind in enumerate(KINDS)
        for path in STAMPS["photographs"](STAMPS["STAMPS_FOLDER"] / kind)
    ]
    return [STAMPS["on_white"](path) for _, path in paths], np.array([index for index, _ in paths])


def digits() -> tuple[list[Image.Image], Array]:
    """Return digits of 8 × 8 pixels, enlarged, and their class indices."""
    found = load_digits()
    chosen = np.random.default_rng(0).permutation(len(found.target))[:DIGITS]
    pictures = [Image.fromarray((15.9 * found.images[place]).astype(np.uint8)) for place in chosen]
    enlarged = [picture.resize((DIGIT_PX, DIGIT_PX), Image.Resampling.BICUBIC) for picture in pictures]
    return enlarged, found.target[chosen].astype(np.int64)


def accuracy(train: Features, held_out: Features, *, shrinkage: float) -> float:
    """Solve the probe and return its accuracy in percent."""
    probe.SHRINKAGE = shrinkage
    solved = probe.solve_probe(train, class_count=int(train.class_indices_N.max()) + 1, seed=0)
    return 100 * float((solved.predict(held_out.features_ND) == held_out.class_indices_N).mean())


def compare(features_ND: Array, class_indices_N: Array, count: int) -> dict[str, list[float]]:
    """Return the accuracies of every penalty over the splits, of `count` training images each."""
    splitter = StratifiedShuffleSplit(SPLITS, train_size=count, random_state=0)
    found: dict[str, list[float]] = {}
    for places in splitter.split(class_indices_N, class_indices_N):
        train, held_out = (
            Features(features_ND=features_ND[place], class_indices_N=class_indices_N[place]) for place in places
        )
        size_D = train.features_ND.std(axis=0) + 1e-6
        each, each_held_out = (
            Features(features_ND=part.features_ND / size_D, class_indices_N=part.class_indices_N)
            for part in (train, held_out)
        )
        found.setdefault("a scale for each feature", []).append(accuracy(each, each_held_out, shrinkage=1.0))
        found.setdefault("one scale", []).append(accuracy(train, held_out, shrinkage=1.0))
        for shrinkage in SHRINKAGES:
            name = f"scatter within the classes, shrunk by {shrinkage}"
            found.setdefault(name, []).append(accuracy(train, held_out, shrinkage=shrinkage))
    return found


def main() -> None:
    """Compare the penalties on every set and write the results."""
    stamps, numbers = ((features_of(images), classes_N) for images, classes_N in (other_stamps(), digits()))
    found = {
        f"other stamps, {len(KINDS)} classes, 140 to train": compare(*stamps, 140),
        f"other stamps, {len(KINDS)} classes, 80 to train": compare(*stamps, 80),
        "digits, 100 to train": compare(*numbers, 100),
        "digits, 300 to train": compare(*numbers, 300),
    }
    lines = [f"| penalty | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for penalty in next(iter(found.values())):
        cells = [
            f"{statistics.mean(one[penalty]):.2f} ± {statistics.stdev(one[penalty]):.2f}" for one in found.values()
        ]
        lines.append(f"| {penalty} | {' | '.join(cells)} |")
    record = circumstances("python tests/benchmarks/probe_penalties.py") | {"accuracy": found}
    text = f"""{chr(10).join(lines)}

Accuracy on the held-out images in percent, mean and standard deviation over {SPLITS} stratified random splits, the same
for every penalty; the strength is chosen by the probe's own cross-validation each time. Features of EfficientNet-Lite0.
"""
    write_results("probe_penalties", record, title="What the probe's penalty should follow", text=text)


if __name__ == "__main__":
    main()
