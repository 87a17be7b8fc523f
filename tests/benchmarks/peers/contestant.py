"""What the peers share: their command line, the one backbone with its preprocessing, and the line each prints."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 32


def arguments() -> argparse.Namespace:
    """Read what the benchmark gives every peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, help="a folder with train/CLASS and valid/CLASS")
    parser.add_argument("--weights", type=Path, required=True, help="the backbone's state dict under timm's names")
    parser.add_argument("--scratch", type=Path, required=True, help="an empty folder to write into")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own number")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--train-script", type=Path, help="timm's train.py")
    return parser.parse_args()


def backbone(weights: Path, *, classes: int = 0) -> Any:
    """Return the default backbone of finetune as timm builds it; without classes it puts out its features."""
    import timm

    overlay = {"file": str(weights)}
    return timm.create_model(
        "tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes
    )


def preprocessing(model: Any) -> Callable[[Any], Any]:
    """Return timm's transform of evaluation for `model`: bicubic to 256, centre 224, mean and deviation 0.5."""
    import timm

    transform: Callable[[Any], Any] = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return transform


def print_result(
    *, accuracy: float, images_per_second: float | None, last_epoch: float | None = None, **details: Any
) -> None:
    """Print the one line that the benchmark reads.

    Args:
        accuracy: On the held-out images, of the model that the tool leaves.
        images_per_second: Of its feature pass, or of its training epochs (median).
        last_epoch: Accuracy after the last epoch, where that is not the model left.
        **details: What else is worth keeping.
    """
    values = {"accuracy": accuracy, "images_per_second": images_per_second, "last_epoch": last_epoch, **details}
    print(json.dumps(values), flush=True)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 3)
