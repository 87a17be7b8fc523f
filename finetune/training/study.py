"""What the frozen network makes of the images before anything learns: the baselines to beat, and the probe."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from finetune.data.table import SPLITS, ImageTable
from finetune.data.transforms import Augmentation
from finetune.features.cache import View
from finetune.features.extract import Features, TrunkPass
from finetune.features.neighbours import neighbour_accuracy
from finetune.features.probe import Probe, are_folds_shared, solve_probe
from finetune.models.freezing import LITTLE_BELOW
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter

FEW_IMAGES, VIEWS_OF_FEW = 5, 4
"""Up to how many images a class the probe learns from how many augmented views of each too.

Chosen by tests/benchmarks/probe_views.py, as the kinds of views are.
"""
GENTLE: tuple[Augmentation, ...] = ("light", "affine")  # of the others, none gains by it
MOST_VIEWED_CLASSES = 1_000  # of more, the numbers that the probe is solved with would take gigabytes
MANY_IMAGES, STUDIED_IMAGES = 500_000, 50_000
"""Above how many training images a sample is studied, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Validation accuracies, in 0..1, that need no fine-tuning; None where they were not measured.

    `majority` always names the largest training class, `knn` lets the nearest training images vote, `probe` is the
    linear probe.
    """

    majority: float | None
    knn: float | None = None
    probe: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for metrics.jsonl."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the frozen network makes of the images."""

    train: Features
    views: int
    """Augmented views of every training image that the probe has learned from, beside the image itself."""
    probe: Probe | None
    baselines: Baselines


def study_images(
    trunk_pass: TrunkPass,
    table: ImageTable,
    label_map: LabelMap,
    *,
    with_probe: bool = True,
    augmentation: Augmentation = "light",
    class_weights_K: np.ndarray[Any, Any] | None = None,
    seed: int,
    reporter: Reporter,
) -> Study:
    """Take the features of the "train" and "valid" images, solve the probe on the first and score both.

    Args:
        trunk_pass: Gives the pooled features; several processes share it, and those of one machine also the folds of
            the probe where there is much to solve.
        table: The images, split.
        label_map: Gives each label its class index.
        with_probe: Whether to solve the probe.
        augmentation: Changes the views that it learns from where there are few images, if it is a GENTLE one.
        class_weights_K: How much an image of each class counts in it; 1 by default.
        seed: Of the folds of its cross-validation.
        reporter: Shows progress where features have to be computed.
    """
    device, processes = trunk_pass.engine.device, trunk_pass.processes
    learned_from, held_back = table.select("train"), table.select("valid")
    train = trunk_pass.features(learned_from, label_map, reporter)
    valid = trunk_pass.features(held_back, label_map, reporter) if len(held_back) else None
    probe, views = None, []
    if with_probe:
        if augmentation in GENTLE and has_few_images(train.class_indices_N):
            for number in range(VIEWS_OF_FEW):
                view = View(augmentation=augmentation, seed=seed, number=number)
                with trunk_pass.of_view(view, images=len(train)) as view_pass:
                    views.append(view_pass.features(learned_from, label_map, reporter).features_ND)
        solve = partial(
            solve_probe,
            train,
            views=views,
            class_count=len(label_map),
            class_weights_K=class_weights_K,
            seed=seed,
            device=device,
        )
        if processes.local_count == processes.count and are_folds_shared(len(train) * (1 + len(views)), len(label_map)):
            shared = solve(processes=processes)
            probe = processes.from_main(lambda: shared)
        else:
            probe = processes.from_main(solve)
    if valid is None:
        return Study(train=train, views=len(views), probe=probe, baselines=Baselines(majority=None))
    return Study(
        train=train,
        views=len(views),
        probe=probe,
        baselines=Baselines(
            majority=majority_accuracy(train.class_indices_N, valid.class_indices_N),
            knn=processes.from_main(lambda: neighbour_accuracy(train, valid, device=device)),
            probe=float((probe.predict(valid.features_ND) == valid.class_indices_N).mean()) if probe else None,
        ),
    )


def has_few_images(class_indices_N: np.ndarray[Any, Any]) -> bool:
    """Tell whether the probe learns from views of images of these classes too."""
    classes = len(np.unique(class_indices_N))
    return classes <= MOST_VIEWED_CLASSES and len(class_indices_N) <= FEW_IMAGES * classes


def is_sampled(images: int, *, classes: int) -> bool:
    """Tell whether a sample of so many training images is enough to study.

    So it is where that is only what fine-tuning starts from, as with much data of every class.
    """
    return images > MANY_IMAGES and images >= LITTLE_BELOW * classes


def sample_to_study(table: ImageTable, *, seed: int) -> ImageTable:
    """Return STUDIED_IMAGES of "train" and of "valid", from every class in proportion, and at least one."""
    generator = np.random.default_rng(seed)
    kept = []
    for split in ("train", "valid"):
        own = generator.permutation(np.flatnonzero(table.rows.split_codes == SPLITS.index(split)))
        by_class = own[np.argsort(table.rows.label_codes[own], kind="stable")]
        spread = np.linspace(0, len(own) - 1, min(STUDIED_IMAGES, len(own))).round().astype(np.int64)
        codes = table.rows.label_codes[by_class]
        classes, first = np.unique(codes, return_index=True)
        missing = first[~np.isin(classes, codes[spread])]
        kept.append(by_class[np.union1d(spread, missing)])
    return ImageTable(table.root, table.rows.take(np.sort(np.concatenate(kept))))


def majority_accuracy(train_N: np.ndarray[Any, Any], held_out_N: np.ndarray[Any, Any]) -> float | None:
    """Return the share of the held-out class indices that are the most frequent one of the training images."""
    if not len(held_out_N):
        return None
    return float((held_out_N == np.bincount(train_N).argmax()).mean())
