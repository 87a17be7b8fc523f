"""Kill -9 at uniformly drawn moments of a training, and go on: is anything lost, and are the final weights the same?

Run it with `python tests/benchmarks/kill_at_any_moment.py [KILLS]`; it writes results/kill_at_any_moment.{json,md}.
Every training is a process of its own, forked from one that has only imported the package.
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
from collections import Counter
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

MODEL, EPOCHS = "timm/test_resnet", 40
OPTIONS = {
    "model": MODEL,
    "use_pretrained": False,
    "scenario": "large-similar",
    "image_size": 32,
    "batch_size": 8,
    "averaging": "ema",
    "augmentation": "trivial",
    "workers": 0,
}


def train(data: Path, output: Path, *, resume: bool) -> None:
    """Train, or go on; each epoch is saved, however short."""
    checkpoint.TRAINING_PER_SAVE = 0
    logging.getLogger("finetune").setLevel(logging.ERROR)
    if resume:
        finetune.train(output=output, resume=True)
    else:
        finetune.train(data, output=output, epochs=EPOCHS, overwrite=output.exists(), **OPTIONS)


def start(data: Path, output: Path, *, resume: bool) -> Any:
    """Fork a process that trains."""
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(data, output), kwargs={"resume": resume}, daemon=True
    )
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


def one_kill(data: Path, output: Path, moment: float) -> dict[str, Any]:
    """Kill a training at `moment` seconds, look at what it left, and bring it to its end."""
    process = start(data, output, resume=False)
    time.sleep(moment)
    was_running = process.is_alive()
    os.kill(process.pid, signal.SIGKILL) if was_running else None
    process.join()
    is_whole = RunFolder(output).model.exists() and RunFolder(output).predictions.exists()
    there = standing(output)
    going_on = start(data, output, resume=there is not None)
    going_on.join()
    return {
        "moment": round(moment, 3),
        "was_running": was_running,
        "had_written_results": is_whole,
        "saved_step": there[0] if there else None,
        "recorded_step": there[1] if there else None,
        "resume_exit": going_on.exitcode,
        "digest": digest(RunFolder(output).model) if going_on.exitcode == 0 else None,
    }


def main() -> None:
    """Kill as often as asked and write the results."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FINETUNE_CACHE"] = str(Path(scratch) / "cache")
        data, output = Path(scratch) / "images", Path(scratch) / "run"
        write_images(data)
        seconds = []
        for _ in range(2):
            began = time.monotonic()
            start(data, output, resume=False).join()
            seconds.append(time.monotonic() - began)
        expected = digest(RunFolder(output).model)
        rows = []
        for number in range(kills):
            shutil.rmtree(output)
            rows.append(one_kill(data, output, draw.uniform(0, seconds[-1])))
            print(number, rows[-1], flush=True)
    lost = [max(row["recorded_step"] - row["saved_step"], 0) for row in rows if row["saved_step"] is not None]
    wrong = [row for row in rows if row["digest"] != expected]
    kinds = Counter(
        "had ended" if not row["was_running"] else "before the first save" if row["saved_step"] is None else "later"
        for row in rows
    )
    story = (
        f"{kills - len(wrong)} of {kills} trainings ended with the weights of the one that was never killed. Each was "
        f"killed by SIGKILL at a moment drawn uniformly from the {seconds[-1]:.1f} s that a whole one takes: "
        f"{kinds['later']} then went on from their newest save, {kinds['before the first save']} had none yet and "
        f"began anew, {kinds['had ended']} had ended. At most {max(lost, default=0)} steps that had been recorded were "
        f"not in the newest save that verifies; an epoch has {STEPS}, and each is saved. The network is {MODEL} with "
        f"random weights, on 31 images of 32 px for {EPOCHS} epochs, with a moving average and TrivialAugment."
    )
    text = textwrap.fill(story, 120) + "\n"
    record = circumstances("python tests/benchmarks/kill_at_any_moment.py") | {
        "seconds_of_a_whole_run": seconds,
        "expected": expected,
        "rows": rows,
    }
    write_results("kill_at_any_moment", record, title="Kill -9 at any moment", text=text)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
