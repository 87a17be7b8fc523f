"""On what a run was made: versions, machine, device, threads."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "finetune",
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "onnxruntime",
    "scikit-learn",
    "numpy",
    "pillow",
    "safetensors",
)


def describe_environment(*, device: str, processes: int, threads: int, precision: str, seed: int) -> dict[str, Any]:
    """Return what environment.json holds; `threads` are those torch computes with, `precision` what it trains in."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "processes": processes,
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device,
        "threads": threads,
        "precision": precision,
        "seed": seed,
        "command": sys.argv,
    }


def available_cores() -> int:
    """Return how many processors there are for this process, where a launcher has started others beside it, too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
