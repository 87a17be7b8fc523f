"""What every results file says of how it was made."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("finetune", "torch", "torchvision", "timm", "onnxruntime", "scikit-learn", "numpy", "pillow")


def circumstances(command: str) -> dict[str, Any]:
    """Return command, versions and machine."""
    return {
        "command": command,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": {
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "device": "cpu",
        },
    }


def write_results(name: str, record: Mapping[str, Any], *, title: str, text: str) -> None:
    """Write results/NAME.json and .md; `text` is what the page says below command and versions."""
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    threads = record["machine"]["threads"]
    machine = f"{record['machine']['processors']} processors, {threads} thread{'s' * (threads > 1)}, no GPU"
    heading = f"# {title}\n\n`{record['command']}`; {machine}; {versions}.\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(f"{heading}\n{text}")
