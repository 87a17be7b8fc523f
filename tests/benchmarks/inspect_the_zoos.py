"""Can every network of the zoos be inspected, and does the sum of its layers agree with the network itself?

Run it with `python tests/benchmarks/inspect_the_zoos.py`; it writes results/inspect_the_zoos.{json,md}. It inspects all
of torchvision's classification networks and, from each module of timm, the one with the shortest name that takes square
images. Parameters are compared with a count over the state of the network; weights are neither needed nor loaded.
"""

import json
import os
import platform
import time
import warnings
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
from timm.models import _registry
from torchvision import models

from finetune.errors import FinetuneError
from finetune.models.anatomy import Layer, inspect_network
from finetune.models.initialize import build_as_published

HERE = Path(__file__).resolve().parent
PACKAGES = ("finetune", "torch", "torchvision", "timm")


def names() -> list[str]:
    """Return torchvision's networks, and a small one for each module of timm."""
    known = set(timm.list_models())
    families: defaultdict[str, list[str]] = defaultdict(list)
    for module, members in _registry._module_to_models.items():
        families[module] += [name for name in members if name in known]
    sizes = ("atto", "femto", "pico", "nano", "xxs", "xxt", "tiny", "_xs", "small", "_s", "b0", "18", "")
    smallest = [
        min(members, key=lambda name: (next(i for i, size in enumerate(sizes) if size in name), len(name), name))
        for members in families.values()
        if members
    ]
    return [f"torchvision/{name}" for name in models.list_models(module=models)] + [
        f"timm/{name}" for name in sorted(smallest)
    ]


def inspect_one(name: str) -> dict[str, Any]:
    """Return a row of the results."""
    try:
        module, spec = build_as_published(name)
        start = time.perf_counter()
        anatomy = inspect_network(module, (spec.channels, spec.image_size_px, spec.image_size_px))
        seconds = time.perf_counter() - start
    except FinetuneError as error:
        return {"name": name, "refused": error.message}
    except Exception as error:  # a row of its own, because the rest is worth having
        return {"name": name, "refused": f"a bug: {type(error).__name__}: {error}"}
    last = last_map(anatomy.layers)
    return {
        "name": name,
        "image_size_px": spec.image_size_px,
        "layers": len(anatomy.layers),
        "parameters": anatomy.parameters,
        "parameters_agree": anatomy.parameters
        == sum(tensor.numel() for tensor in module.parameters())
        == sum(layer.parameters for layer in anatomy.layers),
        "multiply_adds": anatomy.multiply_adds,
        "multiply_adds_agree": anatomy.multiply_adds == sum(layer.multiply_adds for layer in anatomy.layers),
        "seconds": round(seconds, 2),
        "last_map": last and last.output_shape,
        "receptive_field": last and last.receptive_field,
        "stride": last and last.stride,
        "told": sum(layer.receptive_field is not None for layer in anatomy.layers),
        "notes": anatomy.notes,
    }


def last_map(layers: tuple[Layer, ...]) -> Layer | None:
    """Return the last layer whose units still have places in the image, if there is one."""
    return next((layer for layer in reversed(layers) if layer.stride and layer.output_shape), None)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| network | px | layers | parameters | multiply-adds | s | last map | field | stride | told | notes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "refused" in row:
            lines.append(f"| {row['name']} | – | – | – | – | – | – | – | – | – | refused: {row['refused']} |")
            continue
        field = row["receptive_field"]
        lines.append(
            f"| {row['name']} | {row['image_size_px']} | {row['layers']} | {row['parameters']:,}"
            f"{'' if row['parameters_agree'] else ' DIFFERS'} | {row['multiply_adds']:,}"
            f"{'' if row['multiply_adds_agree'] else ' DIFFERS'} | {row['seconds']} | {times(row['last_map'])} | "
            f"{field if isinstance(field, str) else times(field)} | {times(row['stride'])} | "
            f"{row['told']}/{row['layers']} | {'; '.join(row['notes'])} |"
        )
    return "\n".join(lines)


def times(numbers: tuple[object, ...] | None) -> str:
    """Write 7 × 7, or a dash for nothing."""
    return " × ".join(map(str, numbers)) if numbers else "–"


def main() -> None:
    """Inspect all and write the results."""
    warnings.simplefilter("ignore")
    rows = []
    for name in names():
        rows.append(inspect_one(name))
        print(name, rows[-1].get("refused") or (rows[-1]["seconds"], rows[-1]["notes"]), flush=True)
    record = {
        "command": "python tests/benchmarks/inspect_the_zoos.py",
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": {"processors": os.cpu_count(), "platform": platform.platform()},
        "networks": rows,
    }
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    done = [row for row in rows if "refused" not in row]
    agree = sum(row["parameters_agree"] and row["multiply_adds_agree"] for row in done)
    text = f"""# Anatomy of the zoos

`{record["command"]}`: {os.cpu_count()} processors, no GPU; {versions}.

{len(done)} of {len(rows)} networks inspected, {len(rows) - len(done)} refused; in {agree} the layers add up to the
network's parameters and multiply-adds. {sum(not row["notes"] for row in done)} have a receptive field for every layer
that sees the image. "s" is the time of the inspection without the building, "told" how many layers have a receptive
field, "last map" the last layer whose units have places in the image.

{table(rows)}
"""
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "inspect_the_zoos.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "results" / "inspect_the_zoos.md").write_text(text)


if __name__ == "__main__":
    main()
