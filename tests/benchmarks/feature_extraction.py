"""Feature extraction beside its peers: accuracy, time, memory, and how near the floor of the machine it comes.

    python tests/benchmarks/feature_extraction.py [--peers-python PYTHON] [--timm-train TRAIN.PY] [--work FOLDER]

It writes results/feature_extraction.{json,md}. Every tool runs on the same files, backbone and weights: photographs of
the Debian package tuxpaint-stamps-default, split anew for each seed, and 2,000 JPEGs that it makes. The peers are
peers/*.py; --peers-python names the interpreter that has their packages (peers/requirements.txt). Any part can be
measured again (--only, --tools, --seeds): its rows take the place of the old ones and the table is made of all;
`--tools` without a name makes the table alone. --quick proves on few images and epochs that everything runs, and
writes to the work folder.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peers.measure import measure
from peers.scoreboard import scoreboard

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
SETS = ("stamps", "jpegs")
SEEDS = range(5)
SCRIPTS = {
    "a": ("tutorial_loop.py", "torchvision, timm"),
    "b": ("sklearn_on_embeddings.py", "torchvision, timm, sklearn.linear_model"),
    "c": ("fastai_fine_tune.py", "fastai.vision.all"),
    "d": ("timm_train.py", "torchvision, timm"),
    "e": ("vyntri_fit.py", "vyntri, timm"),
}
"""The script of each peer, and the modules it cannot do without."""

TOOLS = ("floor", "ours", "epochs", *SCRIPTS)
TRAINS_LONG = ("a", "c", "d")  # most of an hour each on the JPEGs: one seed is enough unless seeds are asked for
PHOTOGRAPHS, QUICK_PHOTOGRAPHS = 2_000, 510
QUICK_EPOCHS = {"a": 2, "c": 1, "d": 1}
PACKAGES = ("finetune", "torch", "torchvision", "timm", "scikit-learn", "numpy", "pillow", "onnxruntime", "openvino")
PEER_PACKAGES = ("torch", "torchvision", "timm", "scikit-learn", "numpy", "pillow", "fastai", "vyntri")
TELL_VERSIONS = """
import json, sys
from importlib.metadata import distributions
found = {each.name: each.version for each in distributions()}
print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))
"""


class Benchmark:
    """One call of the command: where its files lie, what runs what, and all rows measured so far."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.photographs = QUICK_PHOTOGRAPHS if options.quick else PHOTOGRAPHS
        self.target = work / "quick.json" if options.quick else HERE / "results" / "feature_extraction.json"
        self.record: dict[str, Any] = {"runs": {}, "not_run": {}, "rows": []}
        if self.target.exists():
            self.record |= json.loads(self.target.read_text())
        self.record["command"] = "python tests/benchmarks/feature_extraction.py" + " --quick" * options.quick
        self.record["quick"] = options.quick
        self.run = datetime.now().isoformat(timespec="seconds")

    def measure_all(self) -> None:
        """Measure what was asked for; every row is on disk as soon as it is there."""
        seeds = self.options.seeds or list(SEEDS)
        words = ["--photographs", str(self.photographs), "--seeds", *map(str, seeds)]
        subprocess.run([sys.executable, PEERS / "prepare.py", self.work, *words], check=True)
        (self.work / "logs").mkdir(exist_ok=True)
        tools = [tool for tool in self.options.tools if self.can_run(tool)]
        self.record["runs"][self.run] = self.circumstances()
        for name in self.options.only or SETS:
            for seed in seeds:
                is_long = name == "jpegs" and not self.options.seeds and seed != seeds[0]
                turn = seed % max(1, len(tools))
                for tool in [*tools[turn:], *tools[:turn]]:  # in turns, so that the machine's moods fall on all alike
                    if (tool == "epochs" and name == "stamps") or (tool in TRAINS_LONG and is_long):
                        continue
                    self.measure_tool(tool, name, seed)

    def can_run(self, tool: str) -> bool:
        """Import once what a peer needs, which also brings it off the disk; where it cannot run, keep the reason."""
        self.record["not_run"].pop(tool, None)
        if tool not in SCRIPTS:
            return True
        if tool == "d" and self.options.timm_train is None:
            self.record["not_run"][tool] = "not run: needs a checkout of timm (--timm-train)"
            return False
        command = [self.options.peers_python, "-c", f"import {SCRIPTS[tool][1]}"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            self.record["not_run"][tool] = f"not installed ({last_line(found.stderr)})"
        return found.returncode == 0

    def circumstances(self) -> dict[str, Any]:
        """Return on what, and with which arguments, this run was made."""
        versions = {
            whose: json.loads(subprocess.check_output([python, "-c", TELL_VERSIONS, *names], text=True))
            for whose, python, names in (
                ("ours", sys.executable, PACKAGES),
                ("peers", self.options.peers_python, PEER_PACKAGES),
            )
        }
        files = list((self.work / f"jpegs-{self.photographs}").rglob("*.jpg"))
        return {
            "arguments": [Path(word).name if os.sep in word else word for word in sys.argv[1:]],
            "versions": versions,
            "python": platform.python_version(),
            "machine": {"processors": os.cpu_count(), "processor": processor(), "platform": platform.platform()},
            "photographs": {
                "count": len(files),
                "held_out": sum(path.parts[-3] == "valid" for path in files),
                "mean_kb": round(sum(path.stat().st_size for path in files) / len(files) / 1_000),
            },
        }

    def measure_tool(self, tool: str, name: str, seed: int) -> None:
        """Measure one tool on one image set with one seed, in a scratch folder that is gone afterwards."""
        data = self.work / (f"stamps-{seed}" if name == "stamps" else f"jpegs-{self.photographs}")
        with TemporaryDirectory(dir=self.work) as scratch:
            for label, command, cache in self.commands(tool, data, seed, Path(scratch)):
                log = self.work / "logs" / f"{name}-{label.replace(' ', '-')}-{seed}.log"
                row = {"run": self.run, "set": name, "tool": label, "seed": seed}
                row |= measure(command, log=log, FINETUNE_CACHE=str(Path(scratch) / cache))
                lines = log.read_text(errors="replace")
                if code := row.pop("exit_code"):
                    row["error"] = f"exit code {code}, {last_line(lines)}"
                elif tool in ("ours", "epochs"):
                    row |= read_run(Path(scratch) / label)
                else:
                    row |= json.loads(last_line(lines))
                print(json.dumps(row), flush=True)
                self.keep(row)

    def commands(self, tool: str, data: Path, seed: int, scratch: Path) -> list[tuple[str, list[str | Path], str]]:
        """Return the processes of a tool: the name of its row, its command, and the folder of its cache."""
        weights = self.work / "lite0.pth"
        if tool == "floor":
            seconds = "0.5" if self.options.quick else "2"
            return [(tool, [sys.executable, PEERS / "floor.py", data, "--weights", weights, "--seconds", seconds], "")]
        train: list[str | Path] = [sys.executable, "-m", "finetune", "train", data, "--feature-extract"]
        train += ["--seed", str(seed), "--quiet", "--output"]
        if tool == "ours":
            return [(label, [*train, scratch / label], "cache") for label in ("ours", "ours again")]
        if tool == "epochs":
            start = ["--head-start", "random", "--epochs"]
            counts = {"25 epochs": 2 if self.options.quick else 25, "1 epoch": 1}
            labels = sorted(counts, reverse=bool(seed % 2))
            return [
                (label, [*train, scratch / label, *start, str(counts[label])], f"cache {label}") for label in labels
            ]
        script, _ = SCRIPTS[tool]
        command: list[str | Path] = [self.options.peers_python, PEERS / script, data, "--weights", weights]
        command += ["--scratch", scratch, "--seed", str(seed)]
        if tool != "a" and data.name.startswith("jpegs"):  # starting them costs more than they save on a few images
            command += ["--workers", str(os.cpu_count())]
        if self.options.quick and tool in QUICK_EPOCHS:
            command += ["--epochs", str(QUICK_EPOCHS[tool])]
        if tool == "d":
            command += ["--train-script", self.options.timm_train]
        return [(tool, command, "")]

    def keep(self, row: dict[str, Any]) -> None:
        """Put `row` in the place of the one it repeats, and write all."""
        key = ("set", "tool", "seed")
        rows = [old for old in self.record["rows"] if any(old[name] != row[name] for name in key)]
        self.record["rows"] = sorted([*rows, row], key=lambda each: [each[name] for name in key])
        self.write()

    def write(self) -> None:
        """Write the rows, and the table made of them."""
        self.target.parent.mkdir(exist_ok=True)
        used = {row["run"] for row in self.record["rows"]} | {self.run}
        self.record["runs"] = {run: about for run, about in self.record["runs"].items() if run in used}
        self.target.write_text(json.dumps(self.record, indent=1) + "\n")
        self.target.with_suffix(".md").write_text(scoreboard(self.record))


def read_run(folder: Path) -> dict[str, Any]:
    """Return accuracy and rate of one of our runs; the rate counts only what was computed, not read from the cache."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    passes = [event for event in events if event["event"] == "features" and event["computed"] > 0]
    seconds = sum(event["seconds"] for event in passes)
    scores = {event["split"]: event["accuracy"] for event in events if event["event"] == "evaluation"}
    epochs = [event["valid_accuracy"] for event in events if event["event"] == "epoch"]
    return {
        "accuracy": scores["valid"],
        "last_epoch": epochs[-1] if epochs else None,
        "images_per_second": sum(event["computed"] for event in passes) / seconds if seconds else None,
        "engines": sorted({event["engine"] for event in passes}),
    }


def last_line(text: str) -> str:
    """Return the last line of `text` that is not empty."""
    return ([line for line in text.splitlines() if line.strip()] or ["it said nothing"])[-1]


def processor() -> str:
    """Return what the kernel calls the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure feature extraction beside its peers.")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers' packages")
    parser.add_argument(
        "--timm-train", type=os.path.abspath, help="train.py of a checkout of timm; its package has none"
    )
    parser.add_argument("--work", type=Path, help="folder for images and logs, kept; by default one that is removed")
    parser.add_argument("--only", choices=SETS, nargs="+", help="image sets; by default both")
    parser.add_argument("--tools", choices=TOOLS, nargs="*", default=TOOLS, help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0 to 4, (a), (c) and (d) on JPEGs 0 alone")
    parser.add_argument("--quick", action="store_true", help="few images and epochs, results into the work folder")
    options = parser.parse_args()
    # Not resolved: the interpreter of a virtual environment is a link, and knows by its own path where it is.
    options.peers_python = Path(shutil.which(options.peers_python) or options.peers_python).absolute()
    return options


def main() -> None:
    """Measure what the command line asks for, and make the table."""
    options = arguments()
    with TemporaryDirectory() as removed:
        work = options.work or Path(removed)
        work.mkdir(parents=True, exist_ok=True)
        benchmark = Benchmark(options, work.resolve())
        if options.tools:
            benchmark.measure_all()
        benchmark.write()
        print(benchmark.target.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
