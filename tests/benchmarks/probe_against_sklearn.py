"""The probe and the neighbours against scikit-learn's: is it the same optimum, are they the same neighbours, how fast?

Run it with `python tests/benchmarks/probe_against_sklearn.py [DEVICE]`, which needs the Debian package
tuxpaint-stamps-default; it writes results/probe_against_sklearn.{json,md}. Three sets: features of the photographs from
the default backbone, the digits of scikit-learn as raw pixels, and a random problem of 20,000 × 512 features and 50
classes. Both sides start from the raw float32 features in one process, and take turns.
"""

import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp, softmax
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import NearestNeighbors

from finetune.data.loaders import evaluation_loader, labelled_dataset
from finetune.data.read import read_images
from finetune.features.extract import Features
from finetune.features.neighbours import NEIGHBOURS, leave_one_out_accuracy, nearest_vectors
from finetune.features.probe import FOLDS, STRENGTHS, find_axes, solve_probe
from finetune.features.solver import Problems, solve
from finetune.models.heads import head_module
from finetune.models.initialize import build_backbone
from finetune.runs.reporting import LoggingReporter

# Shapes: N images, D features, K classes.

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
REPEATS = 3
FIXED = (1e-2, 1.0)  # strengths solved without cross-validation
EQUAL = 1e-4  # greatest difference in probability at which scikit-learn's solution counts as the same optimum
MANY = (200_000, 512)  # vectors whose neighbours are searched to measure the memory
PACKAGES = ("finetune", "torch", "scikit-learn", "scipy", "numpy")

Array = np.ndarray[Any, Any]


def stamps() -> Features:
    """Return what enters the output layer of the default backbone for each photograph."""
    backbone = build_backbone("efficientnet_lite0", num_classes=8)
    kept: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    head_module(backbone.module).register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        data = Path(scratch) / "stamps"
        subprocess.run([sys.executable, PROJECT / "data_examples" / "stamps.py", data], check=True)
        images = read_images(data, reporter=LoggingReporter())
        dataset = labelled_dataset(images.scan.table, images.label_map, backbone.input_spec)
        backbone.module.eval()
        for images_BCHW, class_indices_B, _ in evaluation_loader(dataset, batch_size=32):
            backbone.module(images_BCHW)
            labels.append(class_indices_B)
    return Features(features_ND=torch.cat(kept).numpy(), class_indices_N=torch.cat(labels).numpy())


def digits() -> Features:
    """Return raw pixels, 8 × 8."""
    found = load_digits()
    return Features(features_ND=found.data.astype(np.float32), class_indices_N=found.target.astype(np.int64))


def random_problem() -> Features:
    """Return overlapping classes around random centres."""
    rng = np.random.default_rng(0)
    centres_KD = 0.15 * rng.normal(size=(50, 512))
    class_indices_N = rng.integers(0, 50, 20_000)
    features_ND = centres_KD[class_indices_N] + rng.normal(size=(20_000, 512))
    return Features(features_ND=features_ND.astype(np.float32), class_indices_N=class_indices_N)


def solve_fixed(train: Features, strength: float, device: torch.device) -> Array:
    """Solve the head at one strength, from raw features, and return the probabilities (N, K)."""
    axes = find_axes(train.features_ND, device)
    problem = Problems(
        features_BNR=axes.features_NR[None],
        class_indices_N=torch.tensor(train.class_indices_N, device=device),
        image_weights_BN=torch.ones(1, len(train), device=device),
        class_count=int(train.class_indices_N.max()) + 1,
    )
    weight_KD, bias_K = axes.raw_head(solve(problem, strength=strength, start_BKR=problem.start())[0])
    probabilities_NK: Array = softmax(train.features_ND @ weight_KD.T + bias_K, axis=1)
    return probabilities_NK


def scaled(features_ND: Array) -> Array:
    """Centre the features and divide all by their root mean square, as the probe does."""
    centred_ND: Array = features_ND - features_ND.mean(axis=0)
    return centred_ND / np.sqrt(np.square(centred_ND).mean())


def fit_fixed(train: Features, strength: float, tolerance: float, dtype: type) -> Array:
    """Solve the same with scikit-learn."""
    scaled_ND = scaled(train.features_ND.astype(dtype))
    judge = LogisticRegression(C=strength, tol=tolerance, max_iter=10_000).fit(scaled_ND, train.class_indices_N)
    probabilities_NK: Array = judge.predict_proba(scaled_ND)
    return probabilities_NK


def fit_path(train: Features) -> dict[str, float]:
    """Choose the strength with scikit-learn as the probe does, and as well as it allows.

    Float32, default tolerance, each fold in its own basis and warm-started from the strength before, no further once
    the log loss rises; few images are turned to the directions that they span.
    """
    labels_N = train.class_indices_N
    axes, classes_N = find_axes(train.features_ND, torch.device("cpu")), torch.from_numpy(labels_N)
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(labels_N, labels_N))
    masks = [torch.isin(torch.arange(len(labels_N)), torch.from_numpy(fitted)) for fitted, _ in folds]
    features_FNR = [(axes.features_NR @ axes.within(classes_N, mask))[:, :-1].numpy() for mask in masks]
    judges = [LogisticRegression(max_iter=1_000, warm_start=True) for _ in folds]
    best = {"log_loss": np.inf}
    for strength in STRENGTHS:
        losses, accuracies = [], []
        for judge, features_NR, (fitted, held_out) in zip(judges, features_FNR, folds, strict=True):
            judge.set_params(C=strength).fit(features_NR[fitted], labels_N[fitted])
            logits_NK = judge.decision_function(features_NR[held_out])
            own_N = logits_NK[np.arange(len(held_out)), labels_N[held_out]]
            losses.append((logsumexp(logits_NK, axis=1) - own_N).mean())
            accuracies.append((logits_NK.argmax(axis=1) == labels_N[held_out]).mean())
        if np.mean(losses) > best["log_loss"]:
            break
        best = {"strength": strength, "accuracy": float(np.mean(accuracies)), "log_loss": float(np.mean(losses))}
    whole_NR = (axes.features_NR @ axes.within(classes_N))[:, :-1].numpy()
    LogisticRegression(C=best["strength"], max_iter=1_000).fit(whole_NR, labels_N)
    return best


def in_turn(*works: Callable[[], Any]) -> tuple[dict[str, list[float]], list[Any]]:
    """Return the seconds of both sides over the repeats, in turns after each has run once, and what each found."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(REPEATS + 1):
        found = []
        for work, kept in zip(works, seconds.values(), strict=True):
            start = time.perf_counter()
            found.append(work())
            if repeat:
                kept.append(time.perf_counter() - start)
    return seconds, found


def compare_fixed(train: Features, strength: float, device: torch.device) -> dict[str, Any]:
    """Compare one solution; scikit-learn has the quickest of its settings that reaches the optimum."""
    reference_NK = fit_fixed(train, strength, 1e-8, np.float64)
    reaching: dict[float, tuple[float, type]] = {}
    for settings in itertools.product((1e-4, 1e-5, 1e-6, 1e-7), (np.float32, np.float64)):
        start = time.perf_counter()
        found_NK = fit_fixed(train, strength, *settings)
        if np.abs(found_NK - reference_NK).max() <= EQUAL:
            reaching[time.perf_counter() - start] = settings
    tolerance, dtype = reaching[min(reaching)]
    seconds, (ours_NK, theirs_NK) = in_turn(
        lambda: solve_fixed(train, strength, device), lambda: fit_fixed(train, strength, tolerance, dtype)
    )
    return seconds | {
        "difference": float(np.abs(ours_NK - reference_NK).max()),
        "their_difference": float(np.abs(theirs_NK - reference_NK).max()),
        "their_settings": f"{dtype.__name__}, tol {tolerance:g}",
    }


def compare_path(train: Features, device: torch.device) -> dict[str, Any]:
    """Compare the whole: cross-validation along the strengths and the solution on all images."""
    class_count = int(train.class_indices_N.max()) + 1
    seconds, (probe, theirs) = in_turn(
        lambda: solve_probe(train, class_count=class_count, seed=0, device=device), lambda: fit_path(train)
    )
    return seconds | {"probe": probe.summary(), "scikit_learn": theirs}


def compare_neighbours(train: Features, device: torch.device) -> dict[str, Any]:
    """Compare the neighbours of every image, itself left out."""
    vectors_ND = train.features_ND

    def search() -> Array:
        rows_N = np.arange(len(train))
        return nearest_vectors(
            vectors_ND, vectors_ND, asked_Q=rows_N, count=NEIGHBOURS, leave_self_out=True, device=device
        )  # fmt: skip

    def search_theirs() -> Array:
        judge = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(vectors_ND)
        neighbours_NJ: Array = judge.kneighbors(return_distance=False)
        return neighbours_NJ

    seconds, (found_NJ, expected_NJ) = in_turn(search, search_theirs)
    unit_ND = vectors_ND / np.linalg.norm(vectors_ND.astype(np.float64), axis=1, keepdims=True)
    differing = np.flatnonzero((found_NJ != expected_NJ).any(axis=1))
    nearness = [
        np.einsum("nd,njd->nj", unit_ND[differing], unit_ND[rows[differing]]) for rows in (found_NJ, expected_NJ)
    ]
    return seconds | {
        "images_that_differ": len(differing),
        "greatest_difference_in_similarity": float(np.abs(nearness[0] - nearness[1]).max(initial=0.0)),
    }


def search_many(device: torch.device) -> dict[str, float]:
    """Return seconds and additional peak memory (MB) of the leave-one-out score of many vectors, in a new process."""
    rng = np.random.default_rng(0)
    small = Features(features_ND=rng.normal(size=(2_000, 64)).astype(np.float32), class_indices_N=np.zeros(2_000, int))
    leave_one_out_accuracy(small, device=device)  # libraries and threads are there before the memory is measured
    features_ND = rng.standard_normal(MANY, dtype=np.float32)
    train = Features(features_ND=features_ND, class_indices_N=rng.integers(0, 10, MANY[0]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    leave_one_out_accuracy(train, device=device)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "megabytes": (peak - before) / 1024, "vectors_megabytes": features_ND.nbytes / 2**20}


def shown(seconds: list[float]) -> str:
    """Return median and range."""
    return f"{statistics.median(seconds):.3g} [{min(seconds):.3g}–{max(seconds):.3g}]"


def row(label: str, found: dict[str, Any], *more: str) -> str:
    """Return a line of a table: both times, how many times as fast, and what else there is to say."""
    ratio = statistics.median(found["theirs"]) / statistics.median(found["ours"])
    return f"| {' | '.join([label, shown(found['ours']), shown(found['theirs']), f'{ratio:.1f}', *more])} |"


def report(record: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    machine = record["machine"]
    fixed = [
        row(f"{name}, C = {strength}", found, f"{found['difference']:.1e}", f"{found['their_difference']:.1e}",
            found["their_settings"])
        for name, by_strength in record["fixed"].items()
        for strength, found in by_strength.items()
    ]  # fmt: skip
    paths = [
        row(name, found, *(f"{one['strength']:.3g}: {one['accuracy']:.4f}" for one in (found["probe"],
            found["scikit_learn"])))
        for name, found in record["paths"].items()
    ]  # fmt: skip
    neighbours = [
        row(name, found, str(found["images_that_differ"]), f"{found['greatest_difference_in_similarity']:.1e}")
        for name, found in record["neighbours"].items()
    ]
    lines = "\n".join
    shared = (
        "The machine was shared with other work, from which short parallel work suffers most, on both sides"
        if machine["load_before"] > 0.5
        else "The machine was quiet"
    )
    return f"""# The probe and the neighbours against scikit-learn

`{record["command"]}`: {machine["processors"]} processors, {machine["threads"]} threads, device {machine["device"]};
{versions}.

Seconds are medians [range] of {REPEATS} runs after one to warm up, both sides taking turns in one process. {shared}
(load average {machine["load_before"]:.1f} before and {machine["load_after"]:.1f} after).

## One strength, from raw features to the solved head

The optimum is scikit-learn's in float64 with tol 1e-8. Its time is that of the quickest of float32 and float64 with tol
1e-4 to 1e-7 which comes within {EQUAL:g} of the optimum in every probability.

| set | ours, s | scikit-learn, s | times as fast | ours off by | scikit-learn off by | its settings |
|---|---|---|---|---|---|---|
{lines(fixed)}

## The whole probe: {FOLDS} folds, up to {len(STRENGTHS)} strengths, the solution on all images

scikit-learn: float32, default tolerance, warm-started along the same strengths until the log loss rises, its own
folds; the features of few images turned to the directions that they span.

| set | ours, s | scikit-learn, s | times as fast | ours: strength and accuracy | scikit-learn's |
|---|---|---|---|---|---|
{lines(paths)}

## The {NEIGHBOURS} nearest neighbours of every image by cosine, itself left out

| set | ours, s | scikit-learn, s | times as fast | images with other neighbours | greatest difference in similarity |
|---|---|---|---|---|---|
{lines(neighbours)}

The leave-one-out score of {MANY[0]:,} × {MANY[1]} vectors ({record["many"]["vectors_megabytes"]:.0f} MB), 20,000
of them asked, took {record["many"]["seconds"]:.0f} s and at most {record["many"]["megabytes"]:.0f} MB beside them.
"""


def main() -> None:
    """Compare everything and write the results."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    if "--many" in sys.argv:
        print(json.dumps(search_many(device)))
        return
    warnings.simplefilter("ignore", ConvergenceWarning)
    load_before = os.getloadavg()[0]
    many = subprocess.run([sys.executable, __file__, str(device), "--many"], check=True, capture_output=True, text=True)
    sets = {
        "stamps": stamps(),
        "digits": digits(),
        "random 20,000 × 512 × 50": random_problem(),
    }
    record: dict[str, Any] = {
        "command": " ".join(["python tests/benchmarks/probe_against_sklearn.py", *sys.argv[1:]]),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "fixed": {
            name: {str(strength): compare_fixed(train, strength, device) for strength in FIXED}
            for name, train in sets.items()
        },
        "paths": {name: compare_path(train, device) for name, train in sets.items()},
        "neighbours": {name: compare_neighbours(train, device) for name, train in sets.items()},
        "many": json.loads(many.stdout),
        "machine": {
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
        },
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "probe_against_sklearn.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "results" / "probe_against_sklearn.md").write_text(report(record))


if __name__ == "__main__":
    main()
