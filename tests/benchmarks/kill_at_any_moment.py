"""Kill -9 at uniformly drawn moments of a training, and go on: is anything lost, and are the final weights the same?

Run it with `python tests/benchmarks/kill_at_any_moment.py [KILLS]`; it writes results/kill_at_any_moment.{json,md}.
Every training is a process of its own, forked from one that has only imported the package, and begins with an empty
cache. It has three phases, two of which learn from what frozen layers give, so that a kill may also come while these
are computed. Every fourth one has two processes that decode. A moment at which a training had ended already is drawn
anew.
"""

import hashlib
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

from record import circumstances, write_results
from safetensors.numpy import load_file

import finetune
import finetune.api  # before the fork: importing takes longer than the training
from finetune.errors import RunError
from finetune.runs.folder import RunFolder
from finetune.runs.reporting import LoggingReporter
from finetune.training import checkpoint
from finetune.training.checkpoint import read_state

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

from tests.training.exact_resume import STEPS, write_images  # noqa: E402 (found through the line above)

MODEL, PHASES = "timm/test_resnet", "head:5,top2:8,all:12"
OPTIONS = {
    "model": MODEL,
    "use_pretrained": False,
    "phases": PHASES,
    "boundary_cache": "always",
    "views": 2,
    "image_size": 32,
    "batch_size": 8,
    "averaging": "ema",
    "augmentation": "trivial",
}


def train(data: Path, output: Path, *, workers: int, resume: bool) -> None:
    """Train, or go on; each epoch is saved, however short."""
    checkpoint.TRAINING_PER_SAVE = 0
    os.environ["FINETUNE_CACHE"] = str(cache_of(output))
    logging.getLogger("finetune").setLevel(logging.ERROR)
    if resume:
        finetune.train(output=output, workers=workers, resume=True)
    else:
        finetune.train(data, output=output, workers=workers, overwrite=output.exists(), **OPTIONS)


def cache_of(output: Path) -> Path:
    """Return where the training in `output` keeps what its frozen layers give."""
    return output.with_name(f"{output.name}-cache")


def start(data: Path, output: Path, *, workers: int, resume: bool) -> Any:
    """Fork a process that trains, and forget what an earlier training there has left, unless it goes on from it."""
    if not resume:
        for folder in (output, cache_of(output)):
            shutil.rmtree(folder, ignore_errors=True)
    options = {"workers": workers, "resume": resume}
    process = multiprocessing.get_context("fork").Process(target=train, args=(data, output), kwargs=options)
    process.start()
    return process


def digest(model: Path) -> str:
    """Return a hash of the weights."""
    sha256 = hashlib.sha256()
    for name, array in sorted(load_file(model).items()):
        sha256.update(name.encode() + array.tobytes())
    return sha256.hexdigest()


def standing(output: Path) -> tuple[int, int] | None:
    """Return the steps of the newest save that verifies and of the last epoch recorded; None before the first save."""
    run = RunFolder(output)
    try:
        saved = int(read_state(run, LoggingReporter()).values["progress"]["global_step"])
    except RunError:
        return None
    epochs = [event["epoch"] for event in run.events() if event["event"] == "epoch"]
    return saved, max(epochs, default=0) * STEPS


def one_kill(data: Path, output: Path, moment: float, workers: int) -> dict[str, Any] | None:
    """Kill a training at `moment` seconds, look at what it left, and bring it to its end; None if it had ended."""
    process = start(data, output, workers=workers, resume=False)
    time.sleep(moment)
    if not process.is_alive():
        return None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    there = standing(output)
    going_on = start(data, output, workers=workers, resume=RunFolder(output).config.exists())
    going_on.join()
    return {
        "moment": round(moment, 3),
        "workers": workers,
        "saved_step": there[0] if there else None,
        "recorded_step": there[1] if there else None,
        "resume_exit": going_on.exitcode,
        "digest": digest(RunFolder(output).model) if going_on.exitcode == 0 else None,
    }


def main() -> None:
    """Kill as often as asked and write the results."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    draw, rows = random.Random(0), []
    with tempfile.TemporaryDirectory() as scratch:
        data, output = Path(scratch) / "images", Path(scratch) / "run"
        write_images(data)
        seconds: dict[int, float] = {}
        digests = set()
        for workers in (0, 0, 2):  # the first one reads the libraries from the disk
            began = time.monotonic()
            start(data, output, workers=workers, resume=False).join()
            seconds[workers] = time.monotonic() - began
            digests.add(digest(RunFolder(output).model))
        (expected,) = digests
        while len(rows) < kills:
            workers = 0 if len(rows) % 4 else 2
            if row := one_kill(data, output, draw.uniform(0, seconds[workers]), workers):
                rows.append(row)
                print(len(rows), row, flush=True)
    lost = max(max(row["recorded_step"] - row["saved_step"], 0) for row in rows if row["saved_step"] is not None)
    wrong = [row for row in rows if row["digest"] != expected]
    anew = sum(row["saved_step"] is None for row in rows)
    story = (
        f"{kills - len(wrong)} of {kills} trainings ended with the weights of the one that was never killed. Each was "
        f"killed by SIGKILL at a moment drawn uniformly from the {seconds[0]:.1f} s that a whole one takes "
        f"({seconds[2]:.1f} s with two processes that decode): {kills - anew} then went on from their newest save, "
        f"{anew} had none yet and began anew. At most {lost} steps that had been recorded were not in the newest save "
        f"that verifies; an epoch has {STEPS}, and each is saved. The network is {MODEL} with random weights, on 31 "
        f"images of 32 px, in the phases {PHASES} with a moving average and TrivialAugment; the first two learn from "
        "what frozen layers give, computed anew in every run."
    )
    text = textwrap.fill(story, 120) + "\n"
    record = circumstances("python tests/benchmarks/kill_at_any_moment.py") | {
        "seconds_of_a_whole_run": seconds,
        "expected": expected,
        "rows": rows,
    }
    write_results("kill_at_any_moment", record, title="Kill -9 at any moment", text=text)
    sys.exit(bool(wrong) or lost > STEPS)


if __name__ == "__main__":
    main()
