"""Several phases in one run: each with its own freezing, from the best so far, resumed to the same bits."""

import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finetune
from finetune.config import from_yaml
from finetune.errors import RunError
from finetune.training import checkpoint
from finetune.training.progress import Progress
from finetune.training.stopping import Interruption

pytestmark = pytest.mark.usefixtures("fresh_cache")

PHASES = "head:2,top1:1,all:2:0.1"
STEPS = 3  # an epoch


def train(folder: Path, output: str, **options: Any) -> finetune.Run:
    settings = {
        "model": "timm/test_resnet",
        "use_pretrained": False,
        "scenario": "large-similar",
        "image_size": 32,
        "phases": PHASES,
        "batch_size": 10,
        "head_start": "random",
        "learning_rate": 0.3,
        "trunk_learning_rate": 0.3,
        "workers": 0,
    }
    return finetune.train(folder, output=folder.parent / output, **{**settings, **options})


def saves(run: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Return the weights of every save by its step."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    return {int(folder.name.removeprefix("step-")): load_file(folder / "model.safetensors") for folder in folders}


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, global_step: int, *, after: str = "step_ended") -> None:
    """Let SIGTERM come in at a step, or in the validation that follows it."""
    heed = Interruption.step_ended

    def receive(self: Interruption, progress: Progress) -> None:
        if progress.global_step == global_step:
            self.received = signal.SIGTERM
        heed(self, progress)

    monkeypatch.setattr(Interruption, after, receive)


@pytest.fixture
def _every_epoch_is_saved_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "TRAINING_PER_SAVE", 0)
    monkeypatch.setattr(checkpoint, "KEPT", 100)


@pytest.mark.usefixtures("_every_epoch_is_saved_and_kept")
def test_a_phase_moves_what_it_frees_and_nothing_else(folder: Path) -> None:
    run = train(folder, "run")
    found = saves(run.folder)
    assert list(found) == [0, 3, 6, 9, 12, 15]
    start, head, top, whole = found[0], found[3], found[9], found[15]

    def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
        return {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}

    assert moved(start, head) == {"fc"}
    assert moved(start, top) == {"fc", "layer4"}
    assert moved(start, whole) >= {"conv1", "layer1", "layer4", "fc"}
    advice = json.loads((run.folder / "advice.json").read_text())
    assert [plan["epochs"] for plan in advice["plans"]] == [2, 1, 2]
    assert [event["epoch"] for event in events(run.folder) if event["event"] == "epoch"] == [1, 2, 3, 4, 5]
    assert run.classifier.metadata.frozen_stages == ()


@pytest.mark.usefixtures("_every_epoch_is_saved_and_kept")
def test_a_phase_goes_on_from_the_best_weights_at_its_own_rates(folder: Path) -> None:
    run = train(folder, "run", phases="head:3,all:1:0.01", schedule="constant", learning_rate=0.1)
    epochs = [event for event in events(run.folder) if event["event"] == "epoch"]
    assert [event["learning_rates"] for event in epochs] == pytest.approx([0.1, 0.1, 0.1, 0.001])
    assert epochs[2]["best_epoch"] > 0
    found, best = saves(run.folder), epochs[2]["best_epoch"]
    drift = {
        step: sum(float((found[12][name] - weights[name]).float().abs().sum()) for name in ("fc.weight", "fc.bias"))
        for step, weights in found.items()
    }
    assert min((step for step in drift if step != 12), key=lambda step: drift[step]) == best * STEPS


@pytest.mark.parametrize(
    ("step", "after"),
    [
        (2, "step_ended"),
        (6, "step_ended"),
        (6, "epoch_ended"),
        (8, "step_ended"),
        (9, "epoch_ended"),
        (13, "step_ended"),
    ],
)
@pytest.mark.parametrize("averaging", ["ema", "ends"])
def test_a_run_interrupted_in_any_phase_ends_at_the_same_bits(
    folder: Path, step: int, after: str, averaging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-epoch, behind the last step of a phase and behind its last validation, in a phase of one epoch."""
    options = {"averaging": averaging, "patience": 3}
    train(folder, "whole", **options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, after=after)
        with pytest.raises(SystemExit) as stopped:
            train(folder, "parts", **options)
    assert stopped.value.code == 128 + signal.SIGTERM
    torch.manual_seed(99)
    finetune.train(output=folder.parent / "parts", resume=True)
    whole, parts = (folder.parent / name for name in ("whole", "parts"))
    expected, found = saves(whole), saves(parts)
    assert max(found) == max(expected)
    for name, tensor in expected[max(expected)].items():
        assert torch.equal(found[max(found)][name], tensor), name
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(parts / "model.safetensors")[name], tensor), name
    kept = [
        [event | {"seconds": 0} for event in events(run) if event["event"] in ("epoch", "average_of_ends")]
        for run in (whole, parts)
    ]
    assert kept[0] == kept[1]
    assert kept[0][-1].get("best_epoch", 1) > 0
    assert (averaging == "ends") == (kept[0][-1]["event"] == "average_of_ends")


def test_patience_ends_a_phase_and_the_next_one_begins(folder: Path) -> None:
    run = train(folder, "run", phases="head:9:1e-9,all:9:1e-9", patience=2, learning_rate=1e-9, averaging="none")
    epochs = [event for event in events(run.folder) if event["event"] == "epoch"]
    assert [event["best_epoch"] for event in epochs] == [0, 0, 0, 0]  # two in each phase


def test_a_longer_resume_lengthens_the_last_phase(folder: Path) -> None:
    train(folder, "run", phases="head:1,all:1")
    run = finetune.train(output=folder.parent / "run", resume=True, epochs=4)
    assert [event["epoch"] for event in events(run.folder) if event["event"] == "epoch"] == [1, 2, 3, 4]
    assert from_yaml(run.folder / "config.yaml").phases == "head:1:1,all:3:1"
    finetune.train(output=folder.parent / "run", resume=True)


def test_a_lengthened_run_can_be_gone_on_with_by_its_own_config_or_the_old_words(folder: Path) -> None:
    train(folder, "run", phases="gradual:1")
    for _ in range(2):
        finetune.train(output=folder.parent / "run", resume=True, epochs=6)
    finetune.train(output=folder.parent / "run", resume=True, phases="gradual:1", epochs=7)
    run = finetune.train(output=folder.parent / "run", resume=True, phases="head:1,top1:1,top2:1,top3:1,top4:1,all:4")
    assert [event["epoch"] for event in events(run.folder) if event["event"] == "epoch"] == list(range(1, 10))
    with pytest.raises(RunError, match=r"--phases was 'head:1:1.* and is 'head:2'"):
        finetune.train(output=folder.parent / "run", resume=True, phases="head:2")
    with pytest.raises(RunError, match="9 epochs are done, and --epochs asks for 8"):
        finetune.train(output=folder.parent / "run", resume=True, epochs=8)
    assert from_yaml(run.folder / "config.yaml").phases.endswith("all:4:1")
    train(folder, "plain", phases="", epochs=1)
    with pytest.raises(RunError, match=r"--phases was '' and is 'all:10'"):
        finetune.train(output=folder.parent / "plain", resume=True, phases="all:10", epochs="auto")


def test_a_budget_ends_a_resume_with_phases_without_entering_the_next(folder: Path) -> None:
    train(folder, "run", phases="head:1,all:1")
    finetune.train(output=folder.parent / "run", resume=True, epochs=5, budget="1h")
    begun = time.monotonic() - 27
    run = finetune.train(output=folder.parent / "run", resume=True, epochs=9, budget="30s", began=begun)
    assert 5 < len([event for event in events(run.folder) if event["event"] == "epoch"]) < 9
    assert from_yaml(run.folder / "config.yaml").budget == ""


def test_a_state_of_another_format_is_refused_and_left_alone(folder: Path) -> None:
    run = train(folder, "run", phases="head:1")
    last = max((run.folder / "checkpoints").glob("step-*"))
    values = json.loads((last / "state.json").read_text()) | {"format_number": 1}
    (last / "state.json").write_text(json.dumps(values))
    manifest = json.loads((last / "manifest.json").read_text())
    data = (last / "state.json").read_bytes()
    manifest["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (last / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=f"has format 1, where this version reads {checkpoint.FORMAT_NUMBER}"):
        finetune.train(output=run.folder, resume=True, epochs=2)
    assert last.is_dir()
