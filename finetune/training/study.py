"""What the frozen network makes of the images before anything learns: the baselines to beat, and the probe."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from finetune.data.table import ImageTable
from finetune.features.extract import Features, TrunkPass
from finetune.features.neighbours import neighbour_accuracy
from finetune.features.probe import Probe, solve_probe
from finetune.runs.processes import ALONE, Processes
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter


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
    probe: Probe | None
    baselines: Baselines


def study_images(
    trunk_pass: TrunkPass,
    table: ImageTable,
    label_map: LabelMap,
    *,
    with_probe: bool = True,
    class_weights_K: np.ndarray[Any, Any] | None = None,
    seed: int,
    processes: Processes = ALONE,
    reporter: Reporter,
) -> Study:
    """Take the features of the "train" and "valid" images, solve the probe on the first and score both.

    Args:
        trunk_pass: Gives the pooled features.
        table: The images, split.
        label_map: Gives each label its class index.
        with_probe: Whether to solve the probe.
        class_weights_K: How much an image of each class counts in it; 1 by default.
        seed: Of the folds of its cross-validation.
        processes: Those that share the features; the main one solves.
        reporter: Shows progress where features have to be computed.
    """
    device = trunk_pass.engine.device
    train = trunk_pass.features(table.select("train"), label_map, reporter)
    held_back = table.select("valid")
    valid = trunk_pass.features(held_back, label_map, reporter) if len(held_back) else None
    probe = None
    if with_probe:
        probe = processes.from_main(
            lambda: solve_probe(
                train, class_count=len(label_map), seed=seed, class_weights_K=class_weights_K, device=device
            )
        )
    if valid is None:
        return Study(train=train, probe=probe, baselines=Baselines(majority=None))
    return Study(
        train=train,
        probe=probe,
        baselines=Baselines(
            majority=majority_accuracy(train.class_indices_N, valid.class_indices_N),
            knn=processes.from_main(lambda: neighbour_accuracy(train, valid, device=device)),
            probe=float((probe.predict(valid.features_ND) == valid.class_indices_N).mean()) if probe else None,
        ),
    )


def majority_accuracy(train_N: np.ndarray[Any, Any], held_out_N: np.ndarray[Any, Any]) -> float | None:
    """Return the share of the held-out class indices that are the most frequent one of the training images."""
    if not len(held_out_N):
        return None
    return float((held_out_N == np.bincount(train_N).argmax()).mean())
