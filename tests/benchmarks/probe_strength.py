"""What it costs to choose the strength of the probe on 20,000 images instead of all, and what it saves.

Run it with `python tests/benchmarks/probe_strength.py`; it writes results/probe_strength.{json,md}. The features are
drawn from normal distributions around the classes, wide enough apart for some errors: only so are there enough of them.
"""

import statistics
import time
from typing import Any

import numpy as np
from record import circumstances, write_results

from finetune.features import probe
from finetune.features.extract import Features

SEEDS = range(3)
IMAGES, HELD_OUT, CLASSES, DIMENSIONS = 60_000, 10_000, 50, 128
DISTANCE = 0.3  # of the centres, in standard deviations of an image, along each of the dimensions


def one(seed: int, chosen_on: int) -> dict[str, Any]:
    """Solve the probe; return the strength chosen, the seconds, and accuracy and log loss on new images."""
    generator = np.random.default_rng(seed)
    centres_KD = DISTANCE * generator.normal(size=(CLASSES, DIMENSIONS))
    classes_N = generator.integers(0, CLASSES, IMAGES + HELD_OUT)
    features_ND = (centres_KD[classes_N] + generator.normal(size=(len(classes_N), DIMENSIONS))).astype(np.float32)
    train = Features(features_ND=features_ND[:IMAGES], class_indices_N=classes_N[:IMAGES])
    probe.CHOSEN_ON = chosen_on
    started = time.perf_counter()
    solved = probe.solve_probe(train, class_count=CLASSES, seed=0)
    seconds = time.perf_counter() - started
    logits_NK = solved.logits(features_ND[IMAGES:]).astype(np.float64)
    right_N = logits_NK.argmax(axis=1) == classes_N[IMAGES:]
    top_N = logits_NK.max(axis=1)
    loss_N = top_N + np.log(np.exp(logits_NK - top_N[:, None]).sum(axis=1))
    loss_N -= logits_NK[np.arange(HELD_OUT), classes_N[IMAGES:]]
    return {
        "strength": solved.strength,
        "seconds": seconds,
        "accuracy": float(right_N.mean()),
        "loss": float(loss_N.mean()),
        "cross_validated": solved.accuracy,
    }


def main() -> None:
    """Compare and write the results."""
    chosen = probe.CHOSEN_ON
    found = {str(count): [one(seed, count) for seed in SEEDS] for count in (chosen, IMAGES)}
    lines = ["| chosen on | strength | seconds | accuracy | log loss | accuracy as cross-validated |", "|---" * 6 + "|"]
    for count, rows in found.items():
        mean = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
        seconds = [row["seconds"] for row in rows]
        spread = f"{mean['seconds']:.0f} [{min(seconds):.0f}–{max(seconds):.0f}]"
        strengths = ", ".join(f"{row['strength']:.3g}" for row in rows)
        scores = f"{mean['accuracy']:.4f} | {mean['loss']:.4f} | {mean['cross_validated']:.4f}"
        lines.append(f"| {int(count):,} | {strengths} | {spread} | {scores} |")
    record = circumstances("python tests/benchmarks/probe_strength.py") | {"found": found}
    text = f"""{chr(10).join(lines)}

{IMAGES:,} training images of {CLASSES} classes with {DIMENSIONS} features, {HELD_OUT:,} new ones to score; means over
{len(SEEDS)} draws, in brackets the least and the most.
"""
    write_results("probe_strength", record, title="How many images choose the strength of the probe", text=text)


if __name__ == "__main__":
    main()
