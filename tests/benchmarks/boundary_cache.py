"""Training above the freezing boundary from kept activations, against running the frozen layers in every epoch.

Run it with `python tests/benchmarks/boundary_cache.py`; it writes results/boundary_cache.{json,md}. For each network
the scenario small-different is trained on the stamps without augmentation, once from the cache and once without; both
start from the same weights. Compared are the weights after two epochs, and the ratio of the times of the second one
beside that which the cost model predicted.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import circumstances, write_results

PROJECT = Path(__file__).resolve().parents[2]
NETWORKS = (
    "resnet18",
    "resnet50",
    "vgg16",
    "densenet121",
    "squeezenet",
    "inception",
    "efficientnet_lite0",
    "timm/convnext_tiny.fb_in22k",
)
BATCH_SIZE, EPOCHS = 16, 2
OPTIONS = {
    "scenario": "small-different",
    "augmentation": "none",
    "precision": "fp32",
    "workers": 0,
    "batch_size": BATCH_SIZE,
    "seed": 0,
}
PRETRAINED = "efficientnet_lite0"
RANDOM_RATES = {"learning_rate": 1e-3, "trunk_learning_rate": 1e-5}
"""For random weights: at the usual 1e-2 they blow up, and rounding alone then parts two trainings."""


def one_network(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """Train `name` both ways and compare."""
    from safetensors.torch import load_file

    import finetune

    options = {**OPTIONS, "model": name}
    if name != PRETRAINED:
        weights = save_settled_weights(name, data, folder / "settled.safetensors")
        options |= {"weights": weights, **RANDOM_RATES}
    found: dict[str, Any] = {"network": name}
    seconds = {}
    for kind in ("always", "never"):
        run = finetune.train(data, output=folder / kind, boundary_cache=kind, epochs=EPOCHS, **options)
        events = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        seconds[kind] = [event["seconds"] for event in events if event["event"] == "epoch"][-1]
        # model.safetensors may be the start, where that was best
        start, last = (choose(run.folder.glob("checkpoints/step-*")) / "model.safetensors" for choose in (min, max))
        found[kind] = load_file(last)
    cached, plain = found.pop("always"), found.pop("never")
    found["weights_differ_by"] = furthest(cached, plain)
    found["weights_moved_by"] = furthest(load_file(start), plain)
    found["epoch_seconds_cached"], found["epoch_seconds_plain"] = seconds["always"], seconds["never"]
    found["ratio"] = seconds["never"] / seconds["always"]
    found["predicted_ratio"] = predicted(name, data)
    return found


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the greatest difference of two networks' weights."""
    return max(float((one[key].float() - other[key].float()).abs().max()) for key in other)


def save_settled_weights(name: str, data: Path, path: Path) -> Path:
    """Write random weights whose BatchNorm knows the images: held in eval mode without, deep networks blow up."""
    import torch
    from safetensors.torch import save_file
    from torch.nn.modules.batchnorm import _BatchNorm

    from finetune.data.dataset import ImageDataset
    from finetune.data.listing import list_images
    from finetune.data.scan import scan_images
    from finetune.models.initialize import build_backbone
    from finetune.runs.records import LabelMap

    table = scan_images(list_images(data)).table
    torch.manual_seed(0)
    backbone = build_backbone(name, num_classes=len(table.class_names), use_pretrained=False)
    images = ImageDataset(table, LabelMap.from_names(table.class_names, {}), spec=backbone.input_spec)
    for module in backbone.module.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for first in range(0, 4 * BATCH_SIZE, BATCH_SIZE):
            backbone.module.train()(torch.stack([images[index][0] for index in range(first, first + BATCH_SIZE)]))
    save_file(backbone.module.state_dict(), path)
    return path


def predicted(name: str, data: Path) -> float:
    """Return what the cost model expects of the ratio."""
    import torch

    from finetune.data.listing import list_images
    from finetune.data.scan import scan_images
    from finetune.features.cut import cut_model
    from finetune.models.device import resolve_device
    from finetune.models.freezing import freeze_stages, frozen_count
    from finetune.models.initialize import build_backbone
    from finetune.training.boundary import measure_costs

    table = scan_images(list_images(data)).table
    backbone = build_backbone(name, num_classes=len(table.class_names), use_pretrained=name == "efficientnet_lite0")
    backbone.module.to(resolve_device("cpu"), memory_format=torch.channels_last)
    frozen = frozen_count(
        "small-different", backbone.module, backbone.stages, images_per_class=len(table) / len(table.class_names)
    )
    freeze_stages(backbone.module, backbone.stages, frozen)
    return measure_costs(cut_model(backbone.module, backbone.stages, frozen), backbone, table).epoch_ratio


def line(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    moved, differ = (f"{row[f'weights_{what}_by']:.1e}" for what in ("moved", "differ"))
    plain, cached = (f"{row[f'epoch_seconds_{kind}']:.1f}" for kind in ("plain", "cached"))
    return (
        f"| {row['network']} | {moved} | {differ} | {plain} | {cached} | {row['ratio']:.2f} | "
        f"{row['predicted_ratio']:.2f} |"
    )


def main() -> None:
    """Run every network in a process of its own and write the results."""
    if len(sys.argv) == 4:
        print(json.dumps(one_network(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "stamps"
        subprocess.run([sys.executable, PROJECT / "data_examples" / "stamps.py", data], check=True)
        for number, name in enumerate(NETWORKS):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            command = [sys.executable, str(Path(__file__).resolve()), name, str(data), str(folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(output.splitlines()[-1]))
    lines = [
        "| network | weights moved by up to | and differ by up to | epoch without, s | from the cache, s | ratio | "
        "predicted |",
        "|---|---|---|---|---|---|---|",
        *map(line, rows),
    ]
    text = f"""{chr(10).join(lines)}

210 photographs of 8 classes, a fifth held out; 224 px (inception 299), batches of 16. The time is that of the training
phase of the second epoch, when decoded pictures and activations are in their caches. Weights are compared after
both, in float32 throughout.
Random weights, their BatchNorm acquainted with the images, but for efficientnet_lite0, whose are the ImageNet ones.
Maps are kept in float16, and in float32 for the networks without normalisation, vgg16 and squeezenet: in float16 their
weights would differ by 7e-4.
"""
    record = circumstances("python tests/benchmarks/boundary_cache.py") | {"networks": rows}
    write_results("boundary_cache", record, title="Training from kept activations", text=text)


if __name__ == "__main__":
    main()
