"""The plots of a run, drawn from its folder."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.data.csv_files import read_csv
from finetune.data.decode import decode_image
from finetune.data.transforms import evaluation_transform, to_tensor, unnormalize
from finetune.report.charts import draw_confusion_matrix, draw_curves, draw_samples
from finetune.runs.folder import RunFolder
from finetune.runs.model_file import read_metadata
from finetune.runs.records import InputSpec

SAMPLES = 12


def write_plots(run: RunFolder, image_root: Path) -> None:
    """Draw curves, the confusion matrix and a grid of samples into the plots of `run`.

    Args:
        run: A finished run.
        image_root: The folder that the image paths of the run are relative to.

    Raises:
        StorageError: The disk is full or refuses.
    """
    metadata = read_metadata(run.model)
    events = run.events()
    epochs = [event for event in events if event["event"] == "epoch"]
    draw_curves(_history(epochs), run.plots / "curves.png", best_epoch=epochs[-1]["best_epoch"] if epochs else None)
    confusion = next(event["confusion"] for event in reversed(events) if event.get("split") == "valid")
    draw_confusion_matrix(np.array(confusion), metadata.label_map.display_names, run.plots / "confusion.png")
    rows = _samples(run)
    names = metadata.label_map.display_names
    shown = {  # classes that are shown by one name are still two classes
        class_name: name if names.count(name) == 1 else f"{name} ({class_name})"
        for class_name, name in zip(metadata.label_map.class_names, names, strict=True)
    }
    draw_samples(
        _pictures([image_root / row["image_path"] for row in rows], metadata.input_spec),
        [shown[row["label"]] for row in rows],
        [shown[row["predicted"]] for row in rows],
        [float(row["probability"]) for row in rows],
        run.plots / "samples.png",
    )


def _history(epochs: list[dict[str, Any]]) -> dict[str, list[float]]:
    names = ("train_loss", "valid_loss", "train_accuracy", "valid_accuracy", "learning_rates")
    return {name: [float(epoch.get(name, math.nan)) for epoch in epochs] for name in names}


def _samples(run: RunFolder) -> list[dict[str, str]]:
    """Choose validation images at even distances, the wrong predictions making up to half of them."""
    rows = [row for _, row in read_csv(run.predictions, required=("image_path",)) if row["split"] == "valid"]
    wrong = _spread([row for row in rows if row["label"] != row["predicted"]], SAMPLES // 2)
    right = _spread([row for row in rows if row["label"] == row["predicted"]], SAMPLES - len(wrong))
    return sorted(right + wrong, key=lambda row: row["image_path"])


def _spread(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    return [rows[int(index)] for index in np.linspace(0, len(rows) - 1, min(count, len(rows)))]


def _pictures(paths: list[Path], spec: InputSpec) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the images as the network sees them, (N, H, W, 3) uint8."""
    transform = evaluation_transform(spec)
    decoded = (decode_image(path, short_side_px=spec.resize_px) for path in paths)
    return unnormalize(torch.stack([transform(to_tensor(image_HWC)) for image_HWC in decoded]), spec)
