"""Whether a probe of few images gains by augmented views of each: 1 to 10 images a class, 0 to 8 views beside them.

Run it with `python tests/benchmarks/probe_views.py`; it writes results/probe_views.{json,md}. It is what FEW_IMAGES and
VIEWS_OF_FEW of finetune/training/study.py were chosen by, so its images are those of probe_penalties.py, which no other
result is reported on.
"""

import statistics
from typing import Any

import numpy as np
import torch
from PIL import Image
from probe_penalties import digits, other_stamps
from record import circumstances, write_results

from finetune.data.transforms import Augmentation, evaluation_transform, to_tensor, training_transform
from finetune.features.extract import Features
from finetune.features.probe import solve_probe
from finetune.features.trunk import pooled_trunk
from finetune.models.initialize import build_backbone

# Shapes: N images, D features, V views, the image itself first.

Array = np.ndarray[Any, Any]

CHOICES = (0, 1, 4, 8)
PER_CLASS, DRAWS = (1, 2, 3, 5, 10), 20
AUGMENTATIONS: dict[str, tuple[Augmentation, ...]] = {
    "other stamps": ("light", "trivial", "flowers"),
    "digits": ("light", "affine"),
}


def features_of(images: list[Image.Image], augmentation: Augmentation) -> Array:
    """Return the pooled features (V, N, D) of the default backbone."""
    backbone = build_backbone("efficientnet_lite0", num_classes=2)
    trunk = pooled_trunk(backbone).module
    evaluate = evaluation_transform(backbone.input_spec)
    augment = training_transform(backbone.input_spec, augmentation)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for image in images:
            picture_CHW = to_tensor(np.array(image.convert("RGB")))
            views = [evaluate(picture_CHW), *(augment(picture_CHW) for _ in range(max(CHOICES)))]
            rows.append(trunk(torch.stack([torch.as_tensor(view) for view in views])).numpy())
    return np.stack(rows, axis=1)


def accuracy(features_VND: Array, classes_N: Array, train: Array, held_out: Array, views: int) -> float:
    """Solve the probe on the training images and `views` of each; return its accuracy on the others, in percent."""
    image_ND, *view_VND = features_VND[: 1 + views, train]
    learned_from = Features(features_ND=image_ND, class_indices_N=classes_N[train])
    solved = solve_probe(learned_from, views=view_VND, class_count=int(classes_N.max()) + 1, seed=0)
    return 100 * float((solved.predict(features_VND[0, held_out]) == classes_N[held_out]).mean())


def compare(features_VND: Array, classes_N: Array) -> dict[str, dict[int, list[float]]]:
    """Return the accuracies by images a class and views, of the same draws for every choice of views."""
    found: dict[str, dict[int, list[float]]] = {}
    for count in PER_CLASS:
        enough = np.flatnonzero(np.bincount(classes_N) >= count + 2)
        among = np.flatnonzero(np.isin(classes_N, enough))
        for draw in range(DRAWS):
            mixed = np.random.default_rng(draw).permutation(among)
            train = np.concatenate([mixed[classes_N[mixed] == each][:count] for each in enough])
            held_out = np.setdiff1d(among, train)
            for views in CHOICES:
                value = accuracy(features_VND, classes_N, train, held_out, views)
                found.setdefault(f"{count} ({len(enough)} classes)", {}).setdefault(views, []).append(value)
    return found


def cell(values: list[float], alone: list[float]) -> str:
    """Return the mean gain over the image alone with its standard error."""
    gains = [value - before for value, before in zip(values, alone, strict=True)]
    return f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.1f}"


def main() -> None:
    """Compare on both sets and write the results."""
    sets = {"other stamps": other_stamps(), "digits": digits()}
    found = {
        f"{name}, {augmentation}": compare(features_of(images, augmentation), classes_N)
        for name, (images, classes_N) in sets.items()
        for augmentation in AUGMENTATIONS[name]
    }
    alone, *others = CHOICES
    titles = ["set, augmentation", "images a class", "the image alone", *(f"and {views}" for views in others)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, by_count in found.items():
        for count, by_choice in by_count.items():
            gains = [cell(by_choice[views], by_choice[alone]) for views in others]
            lines.append(f"| {name} | {count} | {statistics.mean(by_choice[alone]):.1f} | {' | '.join(gains)} |")
    record = circumstances("python tests/benchmarks/probe_views.py") | {"accuracy": found}
    text = f"""{chr(10).join(lines)}

Accuracy on the held-out images in percent, and what views by that `--augmentation` add to it: mean and standard error
over {DRAWS} draws of training images, the same for every choice. Features of EfficientNet-Lite0.
"""
    write_results("probe_views", record, title="Does a probe of few images want views of them?", text=text)


if __name__ == "__main__":
    main()
