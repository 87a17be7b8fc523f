"""What the frozen network makes of the images before anything learns: the baselines to beat, and the probe."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from finetune.data.table import SPLITS, ImageTable
from finetune.data.transforms import Augmentation
from finetune.features.cache import View
from finetune.features.extract import Features, TrunkPass
from finetune.features.neighbours import neighbour_accuracy
from finetune.features.probe import Probe, are_folds_shared, solve_probe
from finetune.models.freezing import LITTLE_BELOW
from finetune.runs.processes import Processes
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter

Array = np.ndarray[Any, Any]

FEW_IMAGES, VIEWS_OF_FEW = 5, 4
"""Up to how many images a class the probe learns from how many augmented views of each too.

Chosen by tests/benchmarks/probe_views.py, as the kinds of views are.
"""
GENTLE: tuple[Augmentation, ...] = ("light", "affine")  # of the others, none gains by it
MOST_VIEWED_CLASSES = 1_000  # of more, the numbers that the probe is solved with would take gigabytes
BELOW_IMAGES, WIDEST_NUMBERS = 20_000, 2**26
"""Of fewer images, and of a quarter of a gigabyte of features at most, the probe may look at all stages.

Of more images fine-tuning makes more than that does. tests/benchmarks/probe_stages.py shows what it gains.
"""
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
    """Augmented views of every training image that the probes have learned from, beside the image itself."""
    probe: Probe | None
    """On the features that enter the output layer."""
    head: Probe | None
    """The probe to start from."""
    head_inputs: tuple[str, ...]
    """At the outputs of which modules that one looks, beside the features."""
    baselines: Baselines


def study_images(
    trunk_pass: TrunkPass,
    table: ImageTable,
    label_map: LabelMap,
    *,
    looks_at: Literal["auto", "last", "all", "none"] = "auto",
    augmentation: Augmentation = "light",
    class_weights_K: Array | None = None,
    seed: int,
    reporter: Reporter,
) -> Study:
    """Take the features of the "train" and "valid" images, solve the probe on the first and score both.

    Where the trunk gives the outputs of more stages than the last, a second probe is solved on all. It is the one to
    start from if its loss is less in the cross-validation.

    Args:
        trunk_pass: Gives the pooled features; several processes share it, and the folds of the probe where there is
            much to solve.
        table: The images, split.
        label_map: Gives each label its class index.
        looks_at: What the probe to start from looks at: the "last" stage or "all"; "auto" compares, and with "none" no
            probe is solved.
        augmentation: Changes the views that it learns from where there are few images, if it is a GENTLE one.
        class_weights_K: How much an image of each class counts in it; 1 by default.
        seed: Of the folds of its cross-validation.
        reporter: Shows progress where features have to be computed.
    """
    device, processes, width = trunk_pass.engine.device, trunk_pass.processes, trunk_pass.trunk.width
    learned_from, held_back = table.select("train"), table.select("valid")
    train = trunk_pass.features(learned_from, label_map, reporter)
    valid = trunk_pass.features(held_back, label_map, reporter) if len(held_back) else None
    probe = head = None
    views: list[Array] = []
    if looks_at != "none":
        if augmentation in GENTLE and has_few_images(train.class_indices_N):
            for number in range(VIEWS_OF_FEW):
                view = View(augmentation=augmentation, seed=seed, number=number)
                with trunk_pass.of_view(view) as view_pass:
                    views.append(view_pass.features(learned_from, label_map, reporter).features_ND)
        solve = partial(
            _solve,
            class_count=len(label_map),
            class_weights_K=class_weights_K,
            seed=seed,
            device=device,
            processes=processes,
        )
        probe = head = solve(train.first(width), [view_ND[:, :width] for view_ND in views])
        if trunk_pass.trunk.outputs and looks_at != "last":
            wide = solve(train, views)
            is_better = wide.loss is not None and probe.loss is not None and wide.loss < probe.loss
            head = wide if is_better or looks_at == "all" else probe
    baselines = Baselines(majority=None)
    if valid is not None:
        last = train.first(width), valid.first(width)
        baselines = Baselines(
            majority=majority_accuracy(train.class_indices_N, valid.class_indices_N),
            knn=processes.from_main(lambda: neighbour_accuracy(*last, device=device)),
            probe=_accuracy(head, valid) if head else None,
        )
    return Study(
        train=train.first(width),
        views=len(views),
        probe=probe,
        head=head,
        head_inputs=() if head is probe else trunk_pass.trunk.outputs,
        baselines=baselines,
    )


def _solve(train: Features, views: Sequence[Array], *, processes: Processes, **options: Any) -> Probe:
    """Solve the probe, in the main process, or with the folds shared where there is much to solve."""
    solve = partial(solve_probe, train, views=views, **options)
    if are_folds_shared(len(train) * (1 + len(views)), options["class_count"]):
        shared = solve(processes=processes)
        return processes.from_main(lambda: shared)
    return processes.from_main(solve)


def _accuracy(head: Probe, held_back: Features) -> float:
    width = head.weight_KD.shape[1]
    return float((head.predict(held_back.first(width).features_ND) == held_back.class_indices_N).mean())


def may_look_at_all(images: int, *, width: int) -> bool:
    """Tell whether so many images, with so many numbers of all stages each, get a probe on all."""
    return images < BELOW_IMAGES and images * width <= WIDEST_NUMBERS


def has_few_images(class_indices_N: Array) -> bool:
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


def majority_accuracy(train_N: Array, held_out_N: Array) -> float | None:
    """Return the share of the held-out class indices that are the most frequent one of the training images."""
    if not len(held_out_N):
        return None
    return float((held_out_N == np.bincount(train_N).argmax()).mean())
