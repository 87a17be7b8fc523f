"""Training all layers on a CPU: the steps of this package's loop against a plain loop over the same network.

Run it with `python tests/benchmarks/full_fine_tuning.py`; it writes results/full_fine_tuning.{json,md}. The images are
random and already in memory, so that only computing is timed. Every measurement is a process of its own, the loops in
turn, because how memory is kept is a matter of the whole process.
"""

import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from record import circumstances, write_results

NETWORKS = ("resnet18", "resnet50", "efficientnet_lite0")
BATCH_SIZE, WARM_UP, STEPS, ROUNDS = 32, 1, 3, 3


def plain_loop(name: str) -> float:
    """Return images a second of the loop that every tutorial has."""
    from torch import nn

    from finetune.models.initialize import build_backbone

    torch.manual_seed(0)
    model = build_backbone(name, num_classes=10, use_pretrained=False).module.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    images, class_indices = torch.randn(BATCH_SIZE, 3, 224, 224), torch.arange(BATCH_SIZE) % 10

    def step() -> None:
        optimizer.zero_grad()
        loss = criterion(model(images), class_indices)
        loss.backward()
        optimizer.step()
        loss.item()

    return _rate(step)


def our_loop(name: str, precision: str) -> float:
    """Return images a second of `train_step`, the network set up as a fine-tuning on little data does."""
    from torch import nn

    from finetune.models.device import resolve_device, resolve_precision
    from finetune.models.freezing import hold_batch_norm
    from finetune.models.initialize import build_backbone
    from finetune.training.schedules import Schedule
    from finetune.training.step import Learner, build_accelerator, train_step

    torch.manual_seed(0)
    device = resolve_device("cpu")
    model = build_backbone(name, num_classes=10, use_pretrained=False).module
    model.to(device, memory_format=torch.channels_last).train()
    hold_batch_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    learner = Learner(
        model=model,
        criterion=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        schedule=Schedule.of(None, optimizer),
        accelerator=build_accelerator(device, resolve_precision(precision, device, model)),
    )
    batch = torch.randn(BATCH_SIZE, 3, 224, 224), torch.arange(BATCH_SIZE) % 10, ["x"] * BATCH_SIZE
    return _rate(lambda: train_step(learner, batch))


LOOPS = {
    "plain": plain_loop,
    "finetune, fp32": partial(our_loop, precision="fp32"),
    "finetune": partial(our_loop, precision="auto"),
}


def spread(values: list[float], form: str) -> str:
    """Return the median with the range."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}–{max(values):{form}}]"


def main() -> None:
    """Measure both loops for every network and write the results."""
    if len(sys.argv) == 3:
        print(json.dumps(LOOPS[sys.argv[1]](sys.argv[2])))
        return
    rates: dict[str, dict[str, list[float]]] = {name: {loop: [] for loop in LOOPS} for name in NETWORKS}
    for _ in range(ROUNDS):
        for name in NETWORKS:
            for loop in LOOPS:
                command = [sys.executable, str(Path(__file__).resolve()), loop, name]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rates[name][loop].append(float(output))
    lines = [
        "| network | plain loop, images/s | this loop in fp32 | this loop | ratio of each round in fp32 | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, measured in rates.items():
        cells = [spread(measured[loop], ".1f") for loop in LOOPS]
        for loop in ("finetune, fp32", "finetune"):
            ratios = [ours / plain for ours, plain in zip(measured[loop], measured["plain"], strict=True)]
            cells.append(spread(ratios, ".2f"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    has_bf16 = "as this one does" if torch.cpu._is_avx512_bf16_supported() else "which this one lacks"
    record = circumstances("python tests/benchmarks/full_fine_tuning.py") | {"images_per_second": rates}
    text = f"""{chr(10).join(lines)}

Forward, backward and SGD step on resident batches of {BATCH_SIZE}, {STEPS} steps after {WARM_UP}, {ROUNDS} rounds, each
a process. This package's loop lays images and weights channels last, keeps the memory of freed activations, and holds
BatchNorm in eval mode, as in every fine-tuning of fewer than 20,000 images. Where the processor has instructions for
it, {has_bf16}, a large network without depthwise convolutions computes in bfloat16. The plain loop does none of that.
"""
    write_results("full_fine_tuning", record, title="Training all layers on a CPU", text=text)


def _rate(step: object) -> float:
    for _ in range(WARM_UP):
        step()  # type: ignore[operator]
    started = time.perf_counter()
    for _ in range(STEPS):
        step()  # type: ignore[operator]
    return STEPS * BATCH_SIZE / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
