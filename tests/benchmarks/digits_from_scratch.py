"""Classic networks from scratch on 10,000 real digits: how far each comes, how long it takes, what binds an epoch.

Run it with `python tests/benchmarks/digits_from_scratch.py MNIST10K`, the folder that data_examples/mnist10k.py writes
(8,000 training images, 2,000 held out, stratified with seed 0); it writes results/digits_from_scratch.{json,md}. Every
network is trained through the command line, one whole process a run. The recipe of `lenet5` was chosen on a part of the
8,000 alone.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from finetune.data.loaders import labelled_dataset, training_loader
from finetune.data.pixels import hold_pixels
from finetune.data.read import read_images
from finetune.models.initialize import build_backbone
from finetune.runs.reporting import LoggingReporter

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
ARMS: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "lenet5": (["--model", "lenet5"], SEEDS),
    "lenet5_relu (the plain form)": (["--model", "lenet5_relu"], SEEDS),
    "small_cnn": (["--model", "small_cnn"], SEEDS),
    "small_cnn, shuffled pixels": (["--model", "small_cnn", "--shuffle-pixels"], SEEDS),
    "mlp": (["--model", "mlp"], SEEDS),
    "mlp, shuffled pixels": (["--model", "mlp", "--shuffle-pixels"], SEEDS),
    "linear, softmax": (["--model", "linear", "--channels", "1"], (0,)),
    "linear, hinge": (["--model", "linear", "--channels", "1", "--loss", "hinge"], (0,)),
    "knn on pixels": (["--model", "knn", "--channels", "1"], (0,)),
}
PACKAGES = ("finetune", "torch", "torchvision", "scikit-learn", "numpy", "pillow")
BATCH = 64


def one_run(data: Path, output: Path, options: list[str], seed: int) -> dict[str, Any]:
    """Train once and return what the run folder says; the last epoch is not chosen on the images it is scored on."""
    command = [sys.executable, "-m", "finetune", "train", str(data), *options, "--seed", str(seed)]
    start = time.perf_counter()
    subprocess.run([*command, "--output", str(output), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = next(event["accuracy"] for event in events if event["event"] == "evaluation")
    epochs = [event["valid_accuracy"] for event in events if event["event"] == "epoch"]
    return {
        "seed": seed,
        "last_epoch": epochs[-1] if epochs else kept,
        "kept": kept,
        "epochs": len(epochs),
        "seconds": round(seconds, 1),
    }


def judges(data: Path) -> dict[str, dict[str, float]]:
    """Return scikit-learn's nearest neighbours and support vector machine on the same images, 28 × 28 grey pixels."""
    images = read_images(data, reporter=LoggingReporter())
    pixels = hold_pixels(images.scan.table, build_backbone("mlp", num_classes=10).input_spec)
    arrays = {}
    for split in ("train", "valid"):
        rows = images.scan.table.select(split).rows  # type: ignore[arg-type]
        places = [pixels.place_of[row.image_path] for row in rows]
        vectors_ND = pixels.images_NCHW[places].flatten(1).numpy().astype(np.float32) / 255
        arrays[split] = vectors_ND, np.array([row.label for row in rows])
    found = {}
    for name, judge in {
        "scikit-learn kNN (k = 3, Euclidean)": KNeighborsClassifier(3),
        "scikit-learn SVM (RBF, C = 10, gamma scale)": SVC(C=10),
    }.items():
        start = time.perf_counter()
        accuracy = float(judge.fit(*arrays["train"]).score(*arrays["valid"]))
        found[name] = {"accuracy": accuracy, "seconds": round(time.perf_counter() - start, 1)}
    return found


def rates(data: Path) -> dict[str, float]:
    """Return images a second of loading alone, computing alone, and an epoch of both, for lenet5 in batches of 64."""
    images = read_images(data, reporter=LoggingReporter())
    train = images.scan.table.select("train")
    backbone = build_backbone("lenet5", num_classes=10)
    model, spec = backbone.module, backbone.input_spec
    start = time.perf_counter()
    pixels = hold_pixels(train, spec)
    decoding = time.perf_counter() - start
    dataset = labelled_dataset(train, images.label_map, spec, augmentation="affine", pixels=pixels)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    def epoch(work: bool, load: bool) -> float:
        loader = training_loader(dataset, batch_size=BATCH, seed=0)
        fixed = next(iter(loader))
        start = time.perf_counter()
        for batch in loader if load else [fixed] * len(loader):
            if work:
                step(batch)
        return len(dataset) / (time.perf_counter() - start)

    epoch(work=True, load=True)  # warm up
    repeats = {name: [epoch(**kind) for _ in range(5)] for name, kind in {
        "loading alone": {"work": False, "load": True},
        "computing alone": {"work": True, "load": False},
        "both": {"work": True, "load": True},
    }.items()}  # fmt: skip
    return {name: round(statistics.median(values)) for name, values in repeats.items()} | {
        "decoding once, s": round(decoding, 1)
    }


def table(results: dict[str, list[dict[str, Any]]], others: dict[str, dict[str, float]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| network | last epoch, mean [min–max] | kept epoch, mean | epochs | whole process s, median [min–max] |",
        "|---|---|---|---|---|",
    ]
    for arm, runs in results.items():
        last, kept, seconds = ([run[name] for run in runs] for name in ("last_epoch", "kept", "seconds"))
        lines.append(
            f"| {arm} | {statistics.mean(last):.4f} [{min(last):.4f}–{max(last):.4f}] | {statistics.mean(kept):.4f} | "
            f"{runs[0]['epochs']} | {statistics.median(seconds):.1f} [{min(seconds):.1f}–{max(seconds):.1f}] |"
        )
    lines += [
        f"| {name} | {found['accuracy']:.4f} | – | – | {found['seconds']} (fit and score) |"
        for name, found in others.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Run all arms and write the results."""
    data = Path(sys.argv[1])
    speed = rates(data)
    others = judges(data)
    with tempfile.TemporaryDirectory() as scratch:
        results = {
            arm: [one_run(data, Path(scratch) / f"{place}-{seed}", options, seed) for seed in seeds]
            for place, (arm, (options, seeds)) in enumerate(ARMS.items())
        }
    record: dict[str, Any] = {
        "command": "python tests/benchmarks/digits_from_scratch.py MNIST10K",
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": {"processors": os.cpu_count(), "platform": platform.platform(), "device": "cpu"},
        "runs": results,
        "others": others,
        "images_per_second": speed,
    }
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    text = f"""# Digits from scratch

`{record["command"]}`: 8,000 training digits and 2,000 held out, seeds {", ".join(map(str, SEEDS))}, {os.cpu_count()}
processors, no GPU; {versions}.

{table(results, others)}

The binomial standard error of 98.7 % on 2,000 images is 0.25 points. The epoch kept is chosen on the images it is
scored on, so that column is optimistic; the last epoch is not chosen. Linear and knn have no epochs but the hinge's,
and use the pixels of 32 × 32 images.

An epoch of `lenet5` over the 8,000 (batches of {BATCH}, augmentation affine, medians of five epochs): loading alone
{speed["loading alone"]:,.0f} images/s, computing alone {speed["computing alone"]:,.0f}, both together
{speed["both"]:,.0f}. All images are decoded once, in {speed["decoding once, s"]} s.
"""
    (HERE / "results" / "digits_from_scratch.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "results" / "digits_from_scratch.md").write_text(text)


if __name__ == "__main__":
    main()
