"""Whether fine-tuning on far data does better with what is often recommended than with the defaults, one at a time.

Run it with `python tests/benchmarks/recipe_defaults.py`; it writes results/recipe_defaults.{json,md}. The images are
the digits of probe_penalties.py, which no other result is reported on, and small, so that an epoch takes seconds.
"""

import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from probe_penalties import digits
from probe_stages import Array, drawn, gain
from record import circumstances, write_results

import finetune
from finetune.runs.folder import RunFolder
from finetune.training import plan

PER_CLASS, HELD_OUT, SEEDS, RATE = 20, 150, range(3), 1e-2
BASE = {"scenario": "small-different", "image_size": 64, "boundary_cache": "never", "epochs": 10}
DEFAULT = "the upper layers, 10 epochs, batch 32, light changes, BatchNorm fixed, no average"
CHANGES: dict[str, dict[str, Any]] = {
    "30 epochs": {"epochs": 30},
    "batch 64": {"batch_size": 64},
    "BatchNorm learns its statistics": {"own_statistics": 0},
    "moving average": {"averaging": "ema"},
    "TrivialAugment": {"augmentation": "trivial"},
    "all layers": {
        "scenario": "large-similar",
        "learning_rate": RATE,
        "trunk_learning_rate": RATE,
        "depth_ratio": 0.1,
    },
}


def write_images(folder: Path, images: list[Any], classes_N: Array, splits: dict[str, Array]) -> None:
    """Write the images of each split into a folder for each class."""
    for split, chosen in splits.items():
        for index in chosen:
            path = folder / split / f"{classes_N[index]:02d}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images[index].convert("RGB").save(path)


@contextmanager
def options_of(change: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the options of a training with one `change`; what is no option is patched meanwhile."""
    options = BASE | change
    statistics_from = options.pop("own_statistics", plan.OWN_STATISTICS)
    with mock.patch.object(plan, "OWN_STATISTICS", statistics_from):
        yield options


def curve(data: Path, run: Path, seed: int, change: dict[str, Any]) -> dict[str, float]:
    """Train once; return the validation accuracies in percent of the start, the last epoch, and what is kept."""
    with options_of(change) as options:
        trained = finetune.train(data, output=run, seed=seed, **options)
    events = [each for each in RunFolder(run).events() if each["event"] in ("start", "epoch")]
    accuracies = [100 * each["valid_accuracy"] for each in events]
    return {"start": accuracies[0], "last": accuracies[-1], "kept": 100 * trained.metrics["valid"].accuracy}


def compare() -> dict[str, list[dict[str, float]]]:
    """Return what every change leads to, by seed; each seed draws its own training images."""
    images, classes_N = digits()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        train, held_out = drawn(classes_N, PER_CLASS, seed)
        mixed = np.random.default_rng(seed).permutation(held_out)[:HELD_OUT]
        with tempfile.TemporaryDirectory() as scratch:
            write_images(Path(scratch) / "data", images, classes_N, {"train": train, "valid": mixed})
            for number, (title, change) in enumerate(({DEFAULT: {}} | CHANGES).items()):
                row = curve(Path(scratch) / "data", Path(scratch) / f"run-{number}", seed, change)
                found.setdefault(title, []).append(row)
                print(seed, title, row, flush=True)
    return found


def text_of(found: dict[str, list[dict[str, float]]]) -> str:
    """Return the table."""
    before = found[DEFAULT]
    start, last, kept = (statistics.mean(row[what] for row in before) for what in ("start", "last", "kept"))
    lines = ["| change | last epoch | kept |", "|---|---|---|", f"| {DEFAULT} | {last:.1f} | {kept:.1f} |"]
    for title, rows in found.items():
        if title != DEFAULT:
            gains = [gain(*([row[what] for row in each] for each in (rows, before))) for what in ("last", "kept")]
            lines.append(f"| {title} | {' | '.join(gains)} |")
    return f"""{chr(10).join(lines)}

Accuracy on {HELD_OUT} held-out digits in percent, {PER_CLASS} of each class to learn from, and what each change adds to
it: mean and standard error over {len(SEEDS)} draws of training images, the same for every change. "Kept" is chosen on
these images, the start among them, and so optimistic for all; the last epoch is free of that choice. The start, the
solved head, is at {start:.1f}. EfficientNet-Lite0 at {BASE["image_size"]} px.
"""


def main() -> None:
    """Compare and write the results."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FINETUNE_CACHE"] = cache
        found = compare()
    record = circumstances("python tests/benchmarks/recipe_defaults.py") | {"accuracy": found}
    write_results("recipe_defaults", record, title="Recommended recipes for far data", text=text_of(found))


if __name__ == "__main__":
    main()
