"""Whether a head does better on the pooled outputs of all stages than on those of the last, solved and fine-tuned.

Run it with `python tests/benchmarks/probe_stages.py [probe|training]`; it writes results/probe_stages.{json,md}, each
half of which can be measured on its own. The images are those of probe_penalties.py, which no other result is reported
on.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from probe_penalties import digits, other_stamps
from record import RESULTS, circumstances, write_results

from finetune.data.transforms import evaluation_transform, to_tensor
from finetune.features.extract import Features
from finetune.features.probe import solve_probe
from finetune.features.trunk import pooled_trunk
from finetune.models.initialize import build_backbone
from finetune.models.stage_outputs import stage_ends

# Shapes: N images, D features of the last stage, E of all, K classes.

Array = np.ndarray[Any, Any]

PER_CLASS, DRAWS = (2, 5, 10, 20, 50), 20
CHOICES = ("last", "all", "auto")
FINE_TUNED = {
    "other stamps, all layers": ("other stamps", 8, "large-similar"),
    "digits, the upper layers": ("digits", 10, "small-different"),
}
"""Which images, how many of a class to learn from, and in which scenario."""
SEEDS, EPOCHS = range(3), 8


def features_of(images: list[Image.Image]) -> tuple[Array, int]:
    """Return the features (N, E) of the default backbone, and D, how many of them, the first, are the last stage's."""
    backbone = build_backbone("efficientnet_lite0", num_classes=2)
    ends = stage_ends(backbone.module, backbone.stages, backbone.input_spec)
    trunk, transform = pooled_trunk(backbone, tuple(ends)), evaluation_transform(backbone.input_spec)
    rows = []
    with torch.inference_mode():
        for image in images:
            picture_CHW = torch.as_tensor(transform(to_tensor(np.array(image.convert("RGB")))))
            rows.append(trunk.module(picture_CHW[None])[0].numpy())
    return np.stack(rows), trunk.width


def drawn(classes_N: Array, count: int, seed: int) -> tuple[Array, Array]:
    """Return which images to learn from, `count` of every class that has two more, and the others of these classes."""
    enough = np.flatnonzero(np.bincount(classes_N) >= count + 2)
    among = np.flatnonzero(np.isin(classes_N, enough))
    mixed = np.random.default_rng(seed).permutation(among)
    train = np.concatenate([mixed[classes_N[mixed] == each][:count] for each in enough])
    return train, np.setdiff1d(among, train)


def probed(features_NE: Array, width: int, classes_N: Array) -> dict[str, dict[str, list[float]]]:
    """Return the accuracies in percent by images a class and by choice, of the same draws for each."""
    found: dict[str, dict[str, list[float]]] = {}
    for count in PER_CLASS:
        kinds = int((np.bincount(classes_N) >= count + 2).sum())
        for draw in range(DRAWS if kinds > 2 else 0):
            train, held_out = drawn(classes_N, count, draw)
            accuracy, loss = {}, {}
            for choice, chosen_NE in (("last", features_NE[:, :width]), ("all", features_NE)):
                learned_from = Features(features_ND=chosen_NE[train], class_indices_N=classes_N[train])
                probe = solve_probe(learned_from, class_count=int(classes_N.max()) + 1, seed=0)
                right = probe.predict(chosen_NE[held_out]) == classes_N[held_out]
                accuracy[choice], loss[choice] = 100 * float(right.mean()), probe.loss
            accuracy["auto"] = accuracy[min(loss, key=lambda choice: loss[choice])]
            for choice in CHOICES:
                found.setdefault(f"{count} ({kinds} classes)", {}).setdefault(choice, []).append(accuracy[choice])
    return found


def fine_tuned(images: list[Image.Image], classes_N: Array, count: int, scenario: str, seed: int) -> dict[str, Any]:
    """Train once from either head; return the validation accuracies of the start and of every epoch, in percent."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for split, chosen in zip(("train", "valid"), drawn(classes_N, count, seed), strict=True):
            for index in chosen if split == "train" else chosen[:200]:
                path = Path(scratch) / "data" / split / f"{classes_N[index]:02d}" / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                images[index].convert("RGB").save(path)
        for choice in ("last", "all"):
            run = Path(scratch) / choice
            words = ["--output", str(run), "--head-stages", choice, "--scenario", scenario, "--epochs", str(EPOCHS)]
            command = [sys.executable, "-m", "finetune", "train", f"{scratch}/data", *words, "--seed", str(seed)]
            subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
            events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            found[choice] = [100 * each["valid_accuracy"] for each in events if each["event"] in ("start", "epoch")]
    return found


def gain(values: list[float], before: list[float]) -> str:
    """Return the mean difference with its standard error."""
    gains = [value - other for value, other in zip(values, before, strict=True)]
    return f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.1f}"


def text_of(record: dict[str, Any]) -> str:
    """Return the tables."""
    lines = ["| set | images a class | the last stage | all stages | what the loss chooses |", "|---|---|---|---|---|"]
    for name, by_count in record.get("probe", {}).items():
        for count, found in by_count.items():
            gains = [gain(found[choice], found["last"]) for choice in ("all", "auto")]
            lines.append(f"| {name} | {count} | {statistics.mean(found['last']):.1f} | {' | '.join(gains)} |")
    tuned = [
        "| images, what learns | head on the last stage: start, last epoch, best | on all: start | last epoch | best |"
    ]
    tuned.append("|---" * 5 + "|")
    for name, rows in record.get("training", {}).items():
        ends = [
            {choice: pick(row[choice]) for choice in ("last", "all")}
            for pick in (lambda curve: curve[0], lambda curve: curve[-1], max)
            for row in rows
        ]
        thirds = [ends[start : start + len(rows)] for start in range(0, len(ends), len(rows))]
        means = ", ".join(f"{statistics.mean(row['last'] for row in third):.1f}" for third in thirds)
        gains = [gain([row["all"] for row in third], [row["last"] for row in third]) for third in thirds]
        tuned.append(f"| {name} | {means} | {' | '.join(gains)} |")
    return f"""{chr(10).join(lines)}

Accuracy of the solved head on the held-out images in percent, and what the outputs of more stages add to it: mean and
standard error over {DRAWS} draws of training images, the same for every choice. The last column is what the loss in a
cross-validation of the training images chooses. Features of EfficientNet-Lite0.

{chr(10).join(tuned)}

The same after {EPOCHS} epochs of fine-tuning from either head, {len(SEEDS)} seeds, on at most 200 held-out images;
"best" is the best epoch on these, the start among them.
"""


def main() -> None:
    """Run the halves that were asked for and write the results of both."""
    halves = sys.argv[1:] or ["probe", "training"]
    path = RESULTS / "probe_stages.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= circumstances("python tests/benchmarks/probe_stages.py")
    sets = {"other stamps": other_stamps(), "digits": digits()}
    if "probe" in halves:
        record["probe"] = {name: probed(*features_of(images), classes_N) for name, (images, classes_N) in sets.items()}
    if "training" in halves:
        record["training"] = {
            name: [fine_tuned(*sets[chosen], count, scenario, seed) for seed in SEEDS]
            for name, (chosen, count, scenario) in FINE_TUNED.items()
        }
    write_results("probe_stages", record, title="Does a head want the outputs of all stages?", text=text_of(record))


if __name__ == "__main__":
    main()
