"""Two phases and fine-tuning from the solved head against plain fine-tuning, and whether a budget is kept.

Run it with `python tests/benchmarks/phases_and_budget.py [plans|budget]`; it writes
results/phases_and_budget.{json,md}, each half of which can be measured on its own. The photographs are those of the
Debian package tuxpaint-stamps-default, seeds 0 to 4, each with its own split.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import RESULTS, circumstances, write_results

PROJECT = Path(__file__).resolve().parents[2]
SEEDS = range(5)
PLANS = {
    "plain: a random head, all layers, 10 epochs": ["--head-start", "random", "--epochs", "10"],
    "the solved head, all layers, 10 epochs": ["--epochs", "10"],
    "the solved head, last stage for 5, all for 5 at a tenth": ["--phases", "top1:5,all:5:0.1"],
}
BUDGET_SECONDS, TIMES = 60, 5


def command(data: Path, output: Path, *words: str) -> list[str]:
    """Return the command line of one training of all layers."""
    train = [sys.executable, "-m", "finetune", "train", str(data), "--output", str(output), "--quiet"]
    return [*train, "--scenario", "large-similar", *words]


def one_plan(data: Path, output: Path, seed: int, words: list[str]) -> dict[str, Any]:
    """Train once; return the validation accuracies of the start and of every epoch, and what was kept."""
    subprocess.run(command(data, output, "--seed", str(seed), *words), check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    accuracies = [event["valid_accuracy"] for event in events if event["event"] in ("start", "epoch")]
    return {"accuracies": accuracies, "kept": max(accuracies), "last": accuracies[-1]}


def one_budget(data: Path, output: Path, seed: int) -> dict[str, Any]:
    """Train in a budget with an empty cache; return the seconds of the whole process."""
    environment = os.environ | {"FINETUNE_CACHE": str(output.parent / f"cache-{seed}")}
    words = command(data, output, "--seed", str(seed), "--budget", f"{BUDGET_SECONDS}s", "--epochs", "50")
    began = time.monotonic()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds = time.monotonic() - began
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    epochs = sum(event["event"] == "epoch" for event in events)
    return {"seconds": round(seconds, 2), "epochs": epochs}


def text_of(record: dict[str, Any]) -> str:
    """Return the tables."""
    lines = ["| plan | kept, mean | last epoch, mean | kept, by seed |", "|---|---|---|---|"]
    for name, rows in record.get("plans", {}).items():
        kept, last = (statistics.mean(row[what] for row in rows) for what in ("kept", "last"))
        by_seed = ", ".join(f"{row['kept']:.3f}" for row in rows)
        lines.append(f"| {name} | {kept:.3f} | {last:.3f} | {by_seed} |")
    budget = ", ".join(f"{row['seconds']:.1f} s ({row['epochs']} epochs)" for row in record.get("budget", []))
    return f"""{chr(10).join(lines)}

Accuracy on about 43 held-out images, one of which is 2.3 points; "kept" is the best epoch on those images, the start
among them, and so optimistic for all; the last epoch is free of that choice.

With `--budget {BUDGET_SECONDS}s --epochs 50` and nothing cached, whole processes: {budget}.
"""


def main() -> None:
    """Run the halves that were asked for and write the results of both."""
    halves = sys.argv[1:] or ["plans", "budget"]
    path = RESULTS / "phases_and_budget.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= circumstances("python tests/benchmarks/phases_and_budget.py")
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "stamps"
        subprocess.run([sys.executable, PROJECT / "data_examples" / "stamps.py", data], check=True)
        if "plans" in halves:
            os.environ["FINETUNE_CACHE"] = str(Path(scratch) / "cache")
            record["plans"] = {
                name: [one_plan(data, Path(scratch) / f"plan-{number}-{seed}", seed, words) for seed in SEEDS]
                for number, (name, words) in enumerate(PLANS.items())
            }
        if "budget" in halves:
            record["budget"] = [one_budget(data, Path(scratch) / f"budget-{n}", n) for n in range(TIMES)]
    write_results("phases_and_budget", record, title="Phases, and training in time", text=text_of(record))


if __name__ == "__main__":
    main()
