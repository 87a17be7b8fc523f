"""One pass over the images before anything learns: features, the baselines every score is held against, the probe."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from finetune.data.dataset import Batch
from finetune.data.loaders import readable
from finetune.features.extract import Features, extract_features
from finetune.features.neighbours import neighbour_accuracy
from finetune.features.probe import Probe, solve_probe
from finetune.models.heads import head_module
from finetune.models.initialize import Backbone
from finetune.runs.reporting import Advance, Reporter


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Validation accuracies, in 0..1, that need no fine-tuning; None where they were not measured.

    `majority` always names the largest training class, `knn` lets the nearest training images vote, `probe` is the
    linear probe.
    """

    majority: float
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
    backbone: Backbone,
    loaders: Mapping[str, DataLoader[Any]],
    *,
    with_probe: bool = True,
    seed: int,
    device: torch.device,
    reporter: Reporter,
) -> Study:
    """Compute the features of the "train" and "valid" images, solve the probe on the first and score both."""
    output_layer = head_module(backbone.module)
    features: dict[str, Features] = {}
    for split, label in (("train", "Features of the training images"), ("valid", "Features of the validation images")):
        with reporter.progress(label, len(loaders[split].dataset)) as advance:  # type: ignore[arg-type]
            batches = _counted(loaders[split], advance)
            features[split] = extract_features(backbone.module, output_layer, batches, device=device)
    train, valid = features["train"], features["valid"]
    probe = solve_probe(train, class_count=output_layer.weight.shape[0], seed=seed) if with_probe else None
    return Study(
        train=train,
        probe=probe,
        baselines=Baselines(
            majority=majority_accuracy(train.class_indices_N, valid.class_indices_N),
            knn=neighbour_accuracy(train, valid),
            probe=float((probe.predict(valid.features_ND) == valid.class_indices_N).mean()) if probe else None,
        ),
    )


def majority_accuracy(train_N: np.ndarray[Any, Any], held_out_N: np.ndarray[Any, Any]) -> float:
    """Return the share of the held-out class indices that are the most frequent one of the training images."""
    return float((held_out_N == np.bincount(train_N).argmax()).mean())


def _counted(loader: DataLoader[Any], advance: Advance) -> Any:
    batch: Batch
    for batch in readable(loader):
        yield batch
        advance(len(batch[1]), "")
