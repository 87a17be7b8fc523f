"""Fine-tuning from the solved head (LP-FT) against fine-tuning from a random one, on real photographs.

Run it with `python tests/benchmarks/solved_head_start.py`; it writes results/solved_head_start.{json,md}. All layers
are trained on the photographs of the Debian package tuxpaint-stamps-default, seeds 0 to 4, each with its own split.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import circumstances, write_results

PROJECT = Path(__file__).resolve().parents[2]
SEEDS = range(5)
EPOCHS = 10


def accuracies(data: Path, output: Path, start: str, seed: int) -> list[float]:
    """Train once and return the validation accuracy of the start and of every epoch."""
    options = ["--scenario", "large-similar", "--head-start", start, "--epochs", str(EPOCHS), "--seed", str(seed)]
    command = [sys.executable, "-m", "finetune", "train", str(data), *options, "--output", str(output), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [event["valid_accuracy"] for event in events if event["event"] in ("start", "epoch")]


def compare(solved: list[float], random: list[float]) -> dict[str, Any]:
    """Say when either gets to the best of the random start, and where both end."""
    best = max(random)
    return {
        "best_of_random_start": best,
        "epochs_random": random.index(best),
        "epochs_solved": next((epoch for epoch, accuracy in enumerate(solved) if accuracy >= best), None),
        "kept_solved": max(solved),
        "kept_random": best,
        "last_solved": solved[-1],
        "last_random": random[-1],
        "probe": solved[0],
        "probe_is_kept": max(solved) == solved[0],
    }


def line(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    kept, last = (f"{row[f'{what}_solved']:.3f} / {row[f'{what}_random']:.3f}" for what in ("kept", "last"))
    reached = f"{row['best_of_random_start']:.3f}, {row['epochs_random']} | {row['epochs_solved']}"
    return f"| {row['seed']} | {reached} | {kept} | {last} | {'yes' if row['probe_is_kept'] else 'no'} |"


def of_the_means(rows: list[dict[str, Any]]) -> str:
    """Say the same of the two curves averaged over the seeds, which hold five times as many images."""
    solved, random = (
        [statistics.mean(epoch) for epoch in zip(*(row["curves"][start] for row in rows), strict=True)]
        for start in ("probe", "random")
    )
    found = compare(solved, random)
    return (
        f"Averaged over the seeds the random start is best after {found['epochs_random']} epochs, with "
        f"{found['best_of_random_start']:.3f}; the\nsolved start is there after {found['epochs_solved']} and ends at "
        f"{found['last_solved']:.3f}, the random one at {found['last_random']:.3f}."
    )


def main() -> None:
    """Run both starts for every seed and write the results."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "stamps"
        subprocess.run([sys.executable, PROJECT / "data_examples" / "stamps.py", data], check=True)
        for seed in SEEDS:
            curves = {
                start: accuracies(data, Path(scratch) / f"{start}-{seed}", start, seed) for start in ("probe", "random")
            }
            rows.append({"seed": seed, "curves": curves, **compare(curves["probe"], curves["random"])})
    lines = [
        "| seed | best of the random start, after epochs | the solved start is there after | kept: solved / random | "
        "last epoch: solved / random | the probe is kept |",
        "|---|---|---|---|---|---|",
        *map(line, rows),
    ]
    means = {
        name: statistics.mean(row[name] for row in rows)
        for name in ("kept_solved", "kept_random", "last_solved", "last_random", "probe")
    }
    text = f"""{chr(10).join(lines)}

Means: {", ".join(f"{name} {value:.3f}" for name, value in means.items())}.
{of_the_means(rows)}

All layers learn for {EPOCHS} epochs at the default rates; about 43 images are held out, one is 2.3 points. "Kept" is
the best epoch on those images, the start among them, and so optimistic for both; the last epoch is free of that choice.
"""
    record = circumstances("python tests/benchmarks/solved_head_start.py") | {"runs": rows, "means": means}
    write_results("solved_head_start", record, title="Fine-tuning from the solved head", text=text)


if __name__ == "__main__":
    main()
