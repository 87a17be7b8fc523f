"""Whether fine-tuning does better with what is often recommended than with the defaults, one change at a time.

Run it with `python tests/benchmarks/recipe_defaults.py [near|far]`; it writes results/recipe_defaults.{json,md}, each
half of which can be measured on its own. The images are those of probe_penalties.py, which no other result is reported
on, and small, so that an epoch takes seconds.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from probe_penalties import digits, other_stamps
from probe_stages import Array, drawn, gain
from record import RESULTS, circumstances, write_results

import finetune
from finetune.runs.folder import RunFolder
from finetune.training import plan

SETS: dict[str, dict[str, Any]] = {
    "near": {
        "title": "Near: 8 stamps of each of 12 classes or so, all layers",
        "images": other_stamps,
        "per_class": 8,
        "options": {"scenario": "large-similar", "image_size": 128},
    },
    "far": {
        "title": "Far: 20 digits of each class, the upper layers",
        "images": digits,
        "per_class": 20,
        "options": {"scenario": "small-different", "image_size": 96, "boundary_cache": "never"},
    },
}
DEFAULT = "as by default: 10 epochs, batch 32, light changes, BatchNorm fixed, no average"
CHANGES: dict[str, dict[str, Any]] = {
    "30 epochs": {"epochs": 30},
    "batch 64": {"batch_size": 64},
    "BatchNorm learns its statistics": {"own_statistics": 0},
    "moving average": {"averaging": "ema"},
    "average of the ends": {"averaging": "ends"},
    "trivial": {"augmentation": "trivial"},
    "mixup 0.1": {"mixup": 0.1},
    "head at ten times the rate": {"head_rate": 10},
    "last stage first, then all at a tenth": {"phases": "top1:5,all:5:0.1", "epochs": "auto"},
    "all layers": {"scenario": "large-similar", "far_rates": True},
}
ONLY = {"near": set(CHANGES) - {"all layers"}, "far": set(CHANGES) - {"last stage first, then all at a tenth"}}
SEEDS, EPOCHS, HELD_OUT = range(3), 10, 150


def write_images(folder: Path, images: list[Any], classes_N: Array, splits: dict[str, Array]) -> None:
    """Write the images of each split into a folder for each class."""
    for split, chosen in splits.items():
        for index in chosen:
            path = folder / split / f"{classes_N[index]:02d}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images[index].convert("RGB").save(path)


@contextmanager
def options_of(base: dict[str, Any], change: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the options of a training with one `change`; what is no option is patched meanwhile."""
    options = {"epochs": EPOCHS, **base, **change}
    rate = 1e-2 if base["scenario"] == "small-different" else 1e-3
    if factor := options.pop("head_rate", None):
        options["learning_rate"] = factor * rate
    if options.pop("far_rates", False):
        options |= {"learning_rate": rate, "trunk_learning_rate": rate, "depth_ratio": 0.1}
    statistics_from = options.pop("own_statistics", plan.OWN_STATISTICS)
    with mock.patch.object(plan, "OWN_STATISTICS", statistics_from):
        yield options


def curve(data: Path, run: Path, seed: int, base: dict[str, Any], change: dict[str, Any]) -> dict[str, float]:
    """Train once; return the validation accuracies in percent of the start, the last epoch, and what is kept."""
    with options_of(base, change) as options:
        trained = finetune.train(data, output=run, seed=seed, **options)
    events = [each for each in RunFolder(run).events() if each["event"] in ("start", "epoch")]
    accuracies = [100 * each["valid_accuracy"] for each in events]
    return {"start": accuracies[0], "last": accuracies[-1], "kept": 100 * trained.metrics["valid"].accuracy}


def compare(name: str) -> dict[str, list[dict[str, float]]]:
    """Return what every change leads to on one set, by seed; each seed draws its own training images."""
    images, classes_N = SETS[name]["images"]()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        train, held_out = drawn(classes_N, SETS[name]["per_class"], seed)
        mixed = np.random.default_rng(seed).permutation(held_out)[:HELD_OUT]
        with tempfile.TemporaryDirectory() as scratch:
            write_images(Path(scratch) / "data", images, classes_N, {"train": train, "valid": mixed})
            changes = {DEFAULT: {}} | {each: CHANGES[each] for each in CHANGES if each in ONLY[name]}
            for number, (title, change) in enumerate(changes.items()):
                run = Path(scratch) / f"run-{number}"
                row = curve(Path(scratch) / "data", run, seed, SETS[name]["options"], change)
                found.setdefault(title, []).append(row | {"train": len(train), "valid": len(mixed)})
                print(name, seed, title, row, flush=True)
    return found


def text_of(record: dict[str, Any]) -> str:
    """Return a table for each set."""
    parts = []
    for name, found in record["sets"].items():
        before = found[DEFAULT]
        start, last, kept = (np.mean([row[what] for row in before]) for what in ("start", "last", "kept"))
        lines = [f"{SETS[name]['title']}; {before[0]['train']} to learn from, {before[0]['valid']} held out.", ""]
        lines += ["| change | last epoch | kept |", "|---|---|---|", f"| {DEFAULT} | {last:.1f} | {kept:.1f} |"]
        for title, rows in found.items():
            if title != DEFAULT:
                gains = [gain(*([row[what] for row in each] for each in (rows, before))) for what in ("last", "kept")]
                lines.append(f"| {title} | {' | '.join(gains)} |")
        parts.append("\n".join([*lines, "", f"The start, the solved head, is at {start:.1f}."]))
    return (
        "\n\n".join(parts)
        + f"""

Accuracy on the held-out images in percent, and what each change adds to it: mean and standard error over {len(SEEDS)}
draws of training images, the same for every change. "Kept" is chosen on these images, the start among them, and so
optimistic for all; the last epoch is free of that choice. EfficientNet-Lite0.
"""
    )


def main() -> None:
    """Compare on the sets that were asked for and write the results of both."""
    path = RESULTS / "recipe_defaults.json"
    record = json.loads(path.read_text()) if path.exists() else {"sets": {}}
    record |= circumstances("python tests/benchmarks/recipe_defaults.py")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FINETUNE_CACHE"] = cache
        for name in sys.argv[1:] or SETS:
            record["sets"][name] = compare(name)
            title = "Recommended recipes against the defaults"
            write_results("recipe_defaults", record, title=title, text=text_of(record))


if __name__ == "__main__":
    main()
