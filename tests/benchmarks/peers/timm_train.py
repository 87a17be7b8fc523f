"""(d) timm's own train script, all layers, 8 epochs of AdamW: what it prints is read, its last epoch is scored.

The script is not in the package; `--train-script` names that of a checkout, which then runs on the timm beside it.
"""

import csv
import re
import statistics
import subprocess
import sys

from contestant import BATCH, arguments, print_result

EPOCHS = 8
# "Train: 3 [ 12/25 ( 48%)] … Time: 1.2s, 26.1/s (1.3s, 24.9/s) …": in brackets the mean of the epoch so far.
PROGRESS = re.compile(r"Train: (\d+) \[.*\(\s*[\d.]+s,\s*([\d.]+)/s\)")


def command(options) -> list[str]:
    classes = sum(folder.is_dir() for folder in (options.data / "train").iterdir())
    return [
        sys.executable, str(options.train_script), "--device", "cpu", "--data-dir", str(options.data),
        "--train-split", "train", "--val-split", "valid", "--num-classes", str(classes),
        "--model", "tf_efficientnet_lite0", "--pretrained", "--pretrained-path", str(options.weights),
        "--batch-size", str(BATCH), "--workers", str(options.workers), "--seed", str(options.seed),
        "--opt", "adamw", "--lr", "5e-4", "--smoothing", "0", "--warmup-epochs", "1",
        "--epochs", str(options.epochs or EPOCHS),
        "--output", str(options.scratch), "--experiment", "peer", "--checkpoint-hist", "1", "--log-interval", "1",
    ]  # fmt: skip


def main() -> None:
    options = arguments()
    rates: dict[str, float] = {}
    with subprocess.Popen(command(options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="")
            if found := PROGRESS.search(line):
                rates[found[1]] = float(found[2])
    if process.returncode:
        sys.exit(process.returncode)
    with (options.scratch / "peer" / "summary.csv").open(newline="") as file:
        accuracies = [float(row["eval_top1"]) / 100 for row in csv.DictReader(file)]
    print_result(
        accuracy=accuracies[-1],
        images_per_second=statistics.median(rates.values()) if rates else None,
        best_epoch=max(accuracies),
        epochs=len(accuracies),
    )


if __name__ == "__main__":
    main()
