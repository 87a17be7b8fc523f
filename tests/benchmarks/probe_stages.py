"""Whether a probe sees more in the pooled outputs of all stages than in those of the last: 2 to 100 images a class.

Run it with `python tests/benchmarks/probe_stages.py`; it writes results/probe_stages.{json,md}. Evci 2022 (Head2Toe,
arXiv 2201.03529) finds that a head on the outputs of all layers does better on data unlike those of the pretraining.
The images are those of probe_penalties.py, which no other result is reported on.
"""

import statistics
from typing import Any

import numpy as np
import torch
from PIL import Image
from probe_penalties import digits, other_stamps
from record import circumstances, write_results
from torch import nn

from finetune.data.transforms import evaluation_transform, to_tensor
from finetune.features.extract import Features
from finetune.features.probe import Probe, solve_probe
from finetune.models.initialize import build_backbone

# Shapes: N images, D features, C channels, H height, W width, K classes.

Array = np.ndarray[Any, Any]

PER_CLASS, DRAWS = (2, 5, 10, 20, 50, 100), 10
LAST, ALL, LATER = "the last", "all", "the later half"


def stage_features(images: list[Image.Image]) -> list[Array]:
    """Return the pooled outputs (N, D) of every stage of the default backbone below the head, each of one mean size."""
    backbone = build_backbone("efficientnet_lite0", num_classes=2)
    body = [stage for stage in backbone.stages if stage.is_body]
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            seen[name] = output.mean(dim=(2, 3)) if output.ndim == 4 else output

        return hook

    for stage in body:
        backbone.module.get_submodule(stage.modules[-1]).register_forward_hook(keep(stage.name))
    backbone.module.eval()
    transform = evaluation_transform(backbone.input_spec)
    rows: dict[str, list[Array]] = {stage.name: [] for stage in body}
    with torch.inference_mode():
        for image in images:
            picture_CHW = torch.as_tensor(transform(to_tensor(np.array(image.convert("RGB")))))
            backbone.module(picture_CHW[None])
            for name, features_1C in seen.items():
                rows[name].append(features_1C[0].numpy())
    stages = [np.stack(vectors) for vectors in rows.values()]
    return [each / np.sqrt(np.square(each - each.mean(axis=0)).mean()) for each in stages]


def solved(features_ND: Array, classes_N: Array, train: Array) -> Probe:
    """Solve the probe on the training images."""
    learned_from = Features(features_ND=features_ND[train], class_indices_N=classes_N[train])
    return solve_probe(learned_from, class_count=int(classes_N.max()) + 1, seed=0)


def compare(stages: list[Array], classes_N: Array) -> dict[str, dict[str, list[float]]]:
    """Return the accuracies in percent by images a class and by what is probed, of the same draws for all."""
    choices = {LAST: stages[-1:], LATER: stages[len(stages) // 2 :], ALL: stages}
    found: dict[str, dict[str, list[float]]] = {}
    for count in PER_CLASS:
        enough = np.flatnonzero(np.bincount(classes_N) >= count + 2)
        if len(enough) < 2:
            continue
        among = np.flatnonzero(np.isin(classes_N, enough))
        for draw in range(DRAWS):
            mixed = np.random.default_rng(draw).permutation(among)
            train = np.concatenate([mixed[classes_N[mixed] == each][:count] for each in enough])
            held_out = np.setdiff1d(among, train)
            for name, chosen in choices.items():
                features_ND = np.concatenate(chosen, axis=1)
                probe = solved(features_ND, classes_N, train)
                right = probe.predict(features_ND[held_out]) == classes_N[held_out]
                of_count = found.setdefault(f"{count} ({len(enough)} classes)", {})
                of_count.setdefault(name, []).append(100 * float(right.mean()))
    return found


def cell(values: list[float], alone: list[float]) -> str:
    """Return the mean gain over the last stage with its standard error."""
    gains = [value - before for value, before in zip(values, alone, strict=True)]
    return f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.1f}"


def main() -> None:
    """Compare on both sets and write the results."""
    found = {}
    for name, (images, classes_N) in {"other stamps": other_stamps(), "digits": digits()}.items():
        found[name] = compare(stage_features(images), classes_N)
    lines = ["| set | images a class | the last stage | the later half | all stages |", "|---|---|---|---|---|"]
    for name, by_count in found.items():
        for count, by_choice in by_count.items():
            gains = [cell(by_choice[choice], by_choice[LAST]) for choice in (LATER, ALL)]
            lines.append(f"| {name} | {count} | {statistics.mean(by_choice[LAST]):.1f} | {' | '.join(gains)} |")
    record = circumstances("python tests/benchmarks/probe_stages.py") | {"accuracy": found}
    text = f"""{chr(10).join(lines)}

Accuracy on the held-out images in percent, and what the pooled outputs of more stages add to it: mean and standard
error over {DRAWS} draws of training images, the same for every choice. Features of EfficientNet-Lite0.
"""
    write_results("probe_stages", record, title="Does a probe want the outputs of all stages?", text=text)


if __name__ == "__main__":
    main()
