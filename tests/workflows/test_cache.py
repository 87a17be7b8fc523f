"""Frozen layers run once: in a run, in the next one, and after a run that was killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune.data.csv_files import read_csv
from finetune.runs.cache_folder import list_cache
from finetune.runs.model_file import read_metadata

pytestmark = pytest.mark.usefixtures("fresh_cache")

Command = Callable[..., Any]


def train(finetune: Command, data: Path, output: Path, *options: str) -> dict[str, Any]:
    """Train and return the last event of each kind."""
    outcome = finetune("train", data, "--output", output, "--quiet", *options)
    assert outcome.code == 0, outcome.err
    return {event["event"]: event for event in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())}


def kept_rows() -> int:
    return sum(entry.rows for entry in list_cache() if entry.kind == "activations")


def test_the_next_run_computes_nothing_and_ends_at_the_same_head(
    finetune: Command, flowers: Path, tmp_path: Path
) -> None:
    first = train(finetune, flowers, tmp_path / "first", "--feature-extract")
    again = train(finetune, flowers, tmp_path / "again", "--feature-extract")
    assert first["features"]["computed"] == kept_rows() > 0
    assert again["features"]["computed"] == 0
    heads = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "again")]
    assert all(heads[0][name].equal(tensor) for name, tensor in heads[1].items())
    advised = finetune("advise", flowers, "--format", "json")
    assert advised.code == 0
    assert kept_rows() == first["features"]["computed"], "the advice reads what the training computed"


@pytest.mark.parametrize("first", ["all", "last"])
def test_either_head_learns_from_what_was_kept_for_the_other(
    finetune: Command, flowers: Path, tmp_path: Path, first: str
) -> None:
    options = ("--feature-extract", "--epochs", "1", "--head-stages")
    found = train(finetune, flowers, tmp_path / "first", *options, first)
    assert found["features"]["computed"] == kept_rows()
    again = train(finetune, flowers, tmp_path / "again", *options, "last" if first == "all" else "all")
    assert again["features"]["computed"] == 0
    assert kept_rows() == found["features"]["computed"]
    heads = [read_metadata(tmp_path / name / "model.safetensors").head_inputs for name in ("first", "again")]
    assert sorted(map(len, heads)) == [0, 6]


def test_a_trained_head_learns_from_the_features_of_the_study(finetune: Command, flowers: Path, tmp_path: Path) -> None:
    found = train(finetune, flowers, tmp_path / "run", "--feature-extract", "--head-start", "random", "--epochs", "3")
    assert found["epoch"]["epoch"] == 3
    assert found["features"]["computed"] == kept_rows()
    assert found["evaluation"]["accuracy"] > 0.9


def test_views_are_computed_for_training_images_only(finetune: Command, flowers: Path, tmp_path: Path) -> None:
    options = ("--feature-extract", "--head-start", "random", "--epochs", "2", "--views", "1")
    found = train(finetune, flowers, tmp_path / "run", *options)
    entries = {entry.what: entry.rows for entry in list_cache() if entry.kind == "activations"}
    whole = found["features"]["computed"]
    assert sorted(entries.values()) == [whole - found["evaluation"]["images"], whole]


@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_computed(finetune: Command, flowers: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    words = ["train", str(flowers), "--feature-extract", "--output", str(output), "--quiet"]
    process = subprocess.Popen([sys.executable, "-m", "finetune", *words], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not kept_rows() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = kept_rows()
    found = train(finetune, flowers, tmp_path / "next", "--feature-extract")
    assert 0 < before < kept_rows()
    assert found["features"]["computed"] == kept_rows() - before


@pytest.mark.slow
def test_two_runs_at_once_fill_the_cache_without_a_wrong_value(
    finetune: Command, flowers: Path, tmp_path: Path
) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "finetune",
                "train",
                str(flowers),
                "--feature-extract",
                "--output",
                str(run),
                "--quiet",
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        for run in runs
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    third = train(finetune, flowers, tmp_path / "three", "--feature-extract")
    assert third["features"]["computed"] == 0
    probabilities = [
        [float(row["probability"]) for _, row in read_csv(run / "predictions.csv", required=("probability",))]
        for run in (*runs, tmp_path / "three")
    ]
    for found in probabilities[1:]:
        assert found == pytest.approx(probabilities[0], abs=1e-3)
