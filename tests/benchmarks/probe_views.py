"""Whether a probe of few images gains by augmented views of each: 2 to 10 images a class, 0 to 8 views beside them.

Run it with `python tests/benchmarks/probe_views.py`; it writes results/probe_views.{json,md}. The images are those of
probe_penalties.py, which no other result is reported on. A fold of the probe's cross-validation holds out an image with
all its views.
"""

import statistics
from typing import Any

import numpy as np
import torch
from PIL import Image
from probe_penalties import digits, other_stamps
from record import circumstances, write_results

from finetune.data.transforms import evaluation_transform, to_tensor, training_transform
from finetune.features import probe
from finetune.features.extract import Features
from finetune.features.trunk import pooled_trunk
from finetune.models.initialize import build_backbone

# Shapes: N images, D features, V views, the image itself first.

Array = np.ndarray[Any, Any]

VIEWS, CHOICES = 8, {"the image alone": [0], "and 1 view": [0, 1], "and 4": [0, 1, 2, 3, 4], "and 8": list(range(9))}
PER_CLASS, DRAWS = (2, 3, 5, 10), 20
AUGMENTATION = "light"
hold_out = probe._held_out


def features_of(images: list[Image.Image]) -> Array:
    """Return the pooled features (V, N, D) of the default backbone."""
    backbone = build_backbone("efficientnet_lite0", num_classes=2)
    trunk = pooled_trunk(backbone).module
    evaluate = evaluation_transform(backbone.input_spec)
    augment = training_transform(backbone.input_spec, AUGMENTATION)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for image in images:
            picture_CHW = to_tensor(np.array(image.convert("RGB")))
            views = [evaluate(picture_CHW), *(augment(picture_CHW) for _ in range(VIEWS))]
            rows.append(trunk(torch.stack([torch.as_tensor(view) for view in views])).numpy())
    return np.stack(rows, axis=1)


def accuracy(features_VND: Array, classes_N: Array, train: Array, held_out: Array, views: list[int]) -> float:
    """Solve the probe on these views of the training images and return its accuracy on the others, in percent."""
    count = len(train)

    def whole_images(class_indices_M: Array, seed: int) -> Array:
        return np.tile(hold_out(class_indices_M[:count], seed), len(views))

    probe._held_out = whole_images
    features_MD = np.concatenate([features_VND[view, train] for view in views])
    stacked = Features(features_ND=features_MD, class_indices_N=np.tile(classes_N[train], len(views)))
    solved = probe.solve_probe(stacked, class_count=int(classes_N.max()) + 1, seed=0)
    return 100 * float((solved.predict(features_VND[0, held_out]) == classes_N[held_out]).mean())


def compare(features_VND: Array, classes_N: Array) -> dict[str, dict[str, list[float]]]:
    """Return the accuracies by images a class and views, of the same draws for every choice of views."""
    found: dict[str, dict[str, list[float]]] = {}
    for count in PER_CLASS:
        enough = np.flatnonzero(np.bincount(classes_N) >= count + 2)
        among = np.flatnonzero(np.isin(classes_N, enough))
        for draw in range(DRAWS):
            mixed = np.random.default_rng(draw).permutation(among)
            train = np.concatenate([mixed[classes_N[mixed] == each][:count] for each in enough])
            held_out = np.setdiff1d(among, train)
            for name, views in CHOICES.items():
                value = accuracy(features_VND, classes_N, train, held_out, views)
                found.setdefault(f"{count} ({len(enough)} classes)", {}).setdefault(name, []).append(value)
    return found


def cell(values: list[float], alone: list[float]) -> str:
    """Return the mean gain over the image alone with its standard error."""
    gains = [value - before for value, before in zip(values, alone, strict=True)]
    return f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.1f}"


def main() -> None:
    """Compare on both sets and write the results."""
    sets = {"other stamps": other_stamps(), "digits": digits()}
    found = {name: compare(features_of(images), classes_N) for name, (images, classes_N) in sets.items()}
    first, *others = CHOICES
    lines = [f"| set | images a class | {first} | {' | '.join(others)} |", "|---" * (len(CHOICES) + 2) + "|"]
    for name, by_count in found.items():
        for count, by_choice in by_count.items():
            gains = [cell(by_choice[other], by_choice[first]) for other in others]
            lines.append(f"| {name} | {count} | {statistics.mean(by_choice[first]):.1f} | {' | '.join(gains)} |")
    record = circumstances("python tests/benchmarks/probe_views.py") | {"accuracy": found}
    text = f"""{chr(10).join(lines)}

Accuracy on the held-out images in percent, and what views of `--augmentation {AUGMENTATION}` add to it: mean and
standard error over {DRAWS} draws of training images, the same for every choice. Features of EfficientNet-Lite0.
"""
    write_results("probe_views", record, title="Does a probe of few images want views of them?", text=text)


if __name__ == "__main__":
    main()
