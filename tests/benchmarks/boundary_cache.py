"""Training above the freezing boundary from kept activations, against running the frozen layers in every epoch.

Run it with `python tests/benchmarks/boundary_cache.py`; it writes results/boundary_cache.{json,md}. For each network
the scenario small-different is trained on the stamps without augmentation, once from the cache and once without; both
start from the same weights. Compared are the weights after an epoch, and the ratio of the times of the second epoch
beside the one that the cost model predicted.
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
OPTIONS = {"scenario": "small-different", "augmentation": "none", "workers": 0, "batch_size": 16, "seed": 0}


def one_network(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """Train `name` both ways and compare."""
    from safetensors.torch import load_file

    import finetune

    options = {**OPTIONS, "model": name, "use_pretrained": name == "efficientnet_lite0"}
    found: dict[str, Any] = {"network": name}
    seconds = {}
    for kind in ("always", "never"):
        run = finetune.train(data, output=folder / f"{kind}-1", boundary_cache=kind, epochs=1, **options)
        found[kind] = load_file(run.folder / "model.safetensors")
        run = finetune.train(data, output=folder / f"{kind}-2", boundary_cache=kind, epochs=2, **options)
        events = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        seconds[kind] = [event["seconds"] for event in events if event["event"] == "epoch"][-1]
    cached, plain = found.pop("always"), found.pop("never")
    found["weights_differ_by"] = max(float((cached[key].float() - plain[key].float()).abs().max()) for key in plain)
    found["epoch_seconds_cached"], found["epoch_seconds_plain"] = seconds["always"], seconds["never"]
    found["ratio"] = seconds["never"] / seconds["always"]
    found["predicted_ratio"] = predicted(name, data)
    return found


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
        "| network | weights differ by at most | epoch without, s | epoch from the cache, s | ratio | predicted |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['network']} | {row['weights_differ_by']:.1e} | {row['epoch_seconds_plain']:.1f} | "
            f"{row['epoch_seconds_cached']:.1f} | {row['ratio']:.2f} | {row['predicted_ratio']:.2f} |"
            for row in rows
        ),
    ]
    text = f"""{chr(10).join(lines)}

210 photographs of 8 classes, a fifth held out; 224 px (inception 299), batches of 16. The time is that of the training
phase of the second epoch, when decoded pictures and activations are in their caches. Weights are compared after the
first.
Random weights but for efficientnet_lite0, whose are the ImageNet ones.
"""
    record = circumstances("python tests/benchmarks/boundary_cache.py") | {"networks": rows}
    write_results("boundary_cache", record, title="Training from kept activations", text=text)


if __name__ == "__main__":
    main()
