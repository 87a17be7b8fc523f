"""Training state on disk: written so that a kill at any moment leaves a state to go on from.

A save is a folder `step-000000123` of safetensors and strict JSON with a manifest of SHA-256 sums; no pickle is written
or read. It is made beside its place under a hidden name, made durable, then renamed.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from finetune.errors import RunError, StorageError, first_ten
from finetune.runs import strict_json
from finetune.runs.folder import RunFolder, sync_folder, write_whole
from finetune.runs.reporting import Reporter
from finetune.training.generators import by_rank, pack_generators, unpack_generators
from finetune.training.optimizer_state import Tensors, named_groups, pack_optimizer, pack_tensors, unpack_optimizer
from finetune.training.progress import Progress
from finetune.training.step import Learner

FORMAT_NUMBER = 6
SAVE_EVERY_SECONDS = 600.0
TRAINING_PER_SAVE = 33  # seconds that must go by after a save for each second that it took: 3 % of the time at most
KEPT = 2  # newest saves kept, beside the best
FAILURES_BORNE = 3  # saves in a row that a full disk may spoil before training stops
FREE_SPACE = "free some space, then --resume"
POINTER = "latest"
STATE_NAMES = frozenset(
    {"format_number", "progress", "schedule", "scaler", "optimizer_groups", "parts", "identity", "metrics_bytes"}
)
"""The fields of state.json."""


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What one save holds, read and verified."""

    folder: Path
    model: Tensors
    best: Tensors
    """The best weights so far."""
    optimizer: Tensors
    rng: Tensors
    ema: Tensors
    """The moving average of the weights, where there is one."""
    start: Tensors
    """The weights that training began with, where they are needed in the end."""
    values: dict[str, Any]

    @property
    def scored(self) -> Tensors:
        """The weights that validation has seen."""
        return self.ema or self.model


class Checkpointer:
    """A watcher that saves after every epoch and every ten minutes, so that saving takes 3 % of the time at most.

    Of short epochs only some are saved then, the last always. `identity` is what a resume must find unchanged: options
    and data. A save that the disk refuses leaves the older ones in place and is told; the third in a row ends the
    training.
    """

    def __init__(self, run: RunFolder, learner: Learner, *, identity: Mapping[str, Any], reporter: Reporter) -> None:
        self.run = run
        self.learner = learner
        self.identity = identity
        self.reporter = reporter
        self.failures = 0
        self.refusal = ""  # of the last save
        self.saved_at = time.monotonic()
        self.save_seconds = 0.0

    def epoch_started(self, progress: Progress) -> None:
        """Save the start, which may turn out to be the best."""
        if progress.is_new:
            self.save(progress)

    def step_ended(self, progress: Progress) -> None:
        """Save when ten minutes have gone by, or when training is about to stop."""
        is_due = progress.is_interrupted or time.monotonic() - self.saved_at > SAVE_EVERY_SECONDS
        if self.learner.processes.any(is_due):
            self.save(progress)

    def epoch_ended(self, progress: Progress) -> None:
        """Save, unless the last save is too recent for what it cost; the last epoch always."""
        is_last = progress.epoch == progress.epochs or bool(progress.stop_reason)
        is_due = is_last or time.monotonic() - self.saved_at >= TRAINING_PER_SAVE * self.save_seconds
        if self.learner.processes.any(is_due):
            self.save(progress)

    def save(self, progress: Progress) -> None:
        """Write one save, then let go of those no longer needed.

        Raises:
            StorageError: The disk has refused for the third time in a row.
        """
        started = time.monotonic()
        self.learner.collect()
        generators, optimizer = self.learner.processes.gather(pack_generators()), pack_optimizer(self.learner)
        self.refusal = self.learner.processes.from_main(lambda: self._refusal(progress, generators, optimizer))
        if self.refusal:
            self.failures += 1
            if self.failures >= FAILURES_BORNE:
                raise StorageError(
                    f"{self.run.checkpoints} refused {self.failures} saves in a row: {self.refusal}", FREE_SPACE
                )
            self.reporter.warn(f"the training state could not be saved ({self.refusal}); the one before is kept.")
        else:
            self.failures = 0
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - started

    def _refusal(self, progress: Progress, generators: Sequence[Tensors], optimizer: Tensors) -> str:
        """Write one save and return why the disk refused it, nothing if it did not."""
        try:
            write_state(
                self.run,
                self.learner,
                progress,
                identity=self.identity,
                generators=generators,
                optimizer_tensors=optimizer,
            )
        except OSError as error:
            return str(error)
        return ""


def write_state(
    run: RunFolder,
    learner: Learner,
    progress: Progress,
    *,
    identity: Mapping[str, Any],
    generators: Sequence[Tensors] = (),
    optimizer_tensors: Tensors | None = None,
) -> None:
    """Write the whole training state as one save, and prune older ones only once it is in place.

    `generators` are the states of the random generators of every process, by default those of this one alone, and
    `optimizer_tensors` what all of them have of the optimiser's.

    Raises:
        OSError: The disk is full or refuses; nothing that was there before is touched.
    """
    model = learner.network
    files = {
        "model.safetensors": save(pack_tensors(model.state_dict())),
        "optimizer.safetensors": save(pack_optimizer(learner) if optimizer_tensors is None else optimizer_tensors),
        "rng.safetensors": save(by_rank(generators or [pack_generators()])),
        "state.json": strict_json.dump(
            {
                "format_number": FORMAT_NUMBER,
                "progress": progress.to_json(),
                "schedule": learner.schedule.state(),
                "scaler": learner.accelerator.scaler.state_dict() if learner.accelerator.scaler else None,
                "optimizer_groups": named_groups(learner),
                "parts": learner.parts,
                "identity": dict(identity),
                "metrics_bytes": run.metrics.stat().st_size if run.metrics.exists() else 0,
            }
        ).encode(),
    }
    if learner.average:
        files["ema.safetensors"] = save(pack_tensors(learner.average.module.state_dict()))
    if learner.keeps_start:
        files["start.safetensors"] = save(pack_tensors(progress.start_weights))
    if progress.best_step != progress.global_step and not _step_folder(run, progress.best_step).exists():
        files["best.safetensors"] = save(pack_tensors(progress.best_weights))  # its own save was refused or left out
    files["manifest.json"] = strict_json.dump(
        {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    ).encode()
    run.checkpoints.mkdir(exist_ok=True)
    needed = sum(map(len, files.values()))
    if shutil.disk_usage(run.checkpoints).free < needed:
        raise OSError(f"{needed:,} bytes are needed and fewer are free")
    folder = _step_folder(run, progress.global_step)
    _place(folder, files)
    write_whole(run.checkpoints / POINTER, f"{folder.name}\n")
    _prune(run.checkpoints)


def read_state(run: RunFolder, reporter: Reporter) -> SavedState:
    """Return the newest save whose manifest verifies; damaged ones are told, with the reason, and put out of the way.

    The best weights so far may lie in an earlier save. Where that is damaged, its own are the best there are.

    Raises:
        RunError: No save verifies.
        StorageError: The disk cannot be read, which says nothing of what is on it.
    """
    _put_back(run.checkpoints)
    for folder in sorted(run.checkpoints.glob("step-*"), reverse=True):
        try:
            state = _verified(folder)
        except _Damage as damage:
            reporter.warn(f"passed over the damaged training state {folder.name}: {damage}")
            with suppress(OSError):  # out of the way of the save that will have its name
                folder.rename(folder.with_name(f".{folder.name}.damaged.part"))
            continue
        try:
            return replace(state, best=_read_best(state))
        except _Damage as damage:
            reporter.warn(f"the best weights so far are lost ({damage}); those of {folder.name} take their place.")
            return _best_of_itself(state)
    raise RunError(f"{run.path} holds no training state to resume from", "train anew with --overwrite")


def holds_saves(folder: Path) -> bool:
    """Tell whether a save in `folder` was ever whole, also one that is being replaced or was found damaged since."""
    names = ("step-*", ".step-*.old.part", ".step-*.damaged.part")
    return any(any(folder.glob(name)) for name in names)


def _put_back(folder: Path) -> None:
    """Give a save its name again that was to be replaced when the process was killed."""
    for old in folder.glob(".step-*.old.part"):
        saved = folder / old.name.split(".")[1]
        if not saved.exists():
            old.rename(saved)


def restore_state(state: SavedState, learner: Learner, *, is_longer: bool) -> Progress:
    """Put model, optimiser, schedule and random generators back to where `state` was saved; return its progress.

    If the training `is_longer` than the one saved, a schedule that spans the whole training goes on from where the
    longer one is at that step.

    Raises:
        RunError: The optimiser moves other parameters.
    """
    progress = Progress.from_json(state.values["progress"], state.best, state.start)
    first_rates = [float(group["lr"]) for group in learner.optimizer.param_groups]
    learner.network.load_state_dict(state.model)
    learner.parts = state.values["parts"]
    if learner.average:
        learner.average.module.load_state_dict(state.ema)
    learner.spread()
    unpack_optimizer(learner, state.optimizer, state.values["optimizer_groups"])
    if is_longer and learner.schedule.every == "step":
        learner.schedule.catch_up(progress.global_step - progress.phase_step, first_rates)
    else:
        learner.schedule.restore(state.values["schedule"])
    if learner.accelerator.scaler is not None and state.values["scaler"]:
        learner.accelerator.scaler.load_state_dict(state.values["scaler"])
    unpack_generators(state.rng, rank=learner.processes.rank)
    return progress


def _read_best(state: SavedState) -> Tensors:
    """Return the best weights known when `state` was saved, which may lie in an earlier save.

    Raises:
        _Damage: That one does not verify.
    """
    if state.best:
        return state.best
    best = state.folder.with_name(f"step-{state.values['progress']['best_step']:09d}")
    return state.scored if best == state.folder else _verified(best).scored


def _best_of_itself(state: SavedState) -> SavedState:
    """Return `state` as if its own weights were the best so far, with the last score there is."""
    progress = state.values["progress"]
    history = progress["history"]
    accuracy = [history["start_accuracy"], *history["valid_accuracy"]][-1]
    history |= {"best_accuracy": accuracy, "best_epoch": progress["epoch"]}
    progress["best_step"] = progress["global_step"]
    return replace(state, best=state.scored)


def _step_folder(run: RunFolder, step: int) -> Path:
    return run.checkpoints / f"step-{step:09d}"


def _place(target: Path, files: Mapping[str, bytes]) -> None:
    part, old = (target.with_name(f".{target.name}.{os.getpid()}{kind}.part") for kind in ("", ".old"))
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        for name, data in files.items():
            with (part / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(part)
        if target.exists():  # the same step saved again, as after an interrupt at an epoch's end
            target.rename(old)
        part.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        sync_folder(target.parent)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        _put_back(target.parent)
        raise


def _prune(folder: Path) -> None:
    """Delete all saves but the newest, and those that hold the best weights of one of these."""
    for part in folder.glob(".*.part"):  # of a process that was killed; the run folder's lock is ours
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
    saves = sorted(folder.glob("step-*"))
    kept = set()
    for newest in saves[-KEPT:]:
        kept.add(newest.name)
        with suppress(OSError, ValueError, KeyError):  # an older one that was damaged since leads nowhere
            state = strict_json.parse((newest / "state.json").read_bytes())
            kept.add(f"step-{state['progress']['best_step']:09d}")
    for old in saves:
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)


class _Damage(Exception):  # noqa: N818 (it is no error of a caller's)
    """What is wrong with a save."""


def _verified(folder: Path) -> SavedState:
    """Return what a save holds.

    Raises:
        _Damage: It is not whole.
        RunError: It is of another version.
        StorageError: The disk cannot be read.
    """
    try:
        return _checked(folder)
    except RunError:
        raise
    except FileNotFoundError as error:
        raise _Damage(f"{folder.name}/{Path(str(error.filename)).name} is missing") from error
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be read: {error}",
            "try again when the disk can be read; without this folder --resume takes the save before it",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damage(f"{folder.name}: {error}") from error


def _checked(folder: Path) -> SavedState:
    manifest = strict_json.parse((folder / "manifest.json").read_bytes())
    files: dict[str, bytes] = {}
    for name, entry in manifest.items():
        files[name] = (folder / Path(name).name).read_bytes()
        if len(files[name]) != entry["bytes"] or hashlib.sha256(files[name]).hexdigest() != entry["sha256"]:
            raise ValueError(f"{name} does not match its checksum")
    values = strict_json.parse(files["state.json"])
    if values["format_number"] != FORMAT_NUMBER:
        raise RunError(
            f"{folder} has format {values['format_number']}, where this version reads {FORMAT_NUMBER}",
            "go on with the version of finetune that wrote it, or train anew with another --output",
        )
    for found, expected in ((values, STATE_NAMES), (values["progress"], Progress().to_json().keys())):
        if set(found) != set(expected):
            raise ValueError(f"state.json has other fields: {first_ten(sorted(set(found) ^ set(expected)))}")
    return SavedState(
        folder=folder,
        model=load(files["model.safetensors"]),
        best=load(files["best.safetensors"]) if "best.safetensors" in files else {},
        optimizer=load(files["optimizer.safetensors"]),
        rng=load(files["rng.safetensors"]),
        ema=load(files["ema.safetensors"]) if "ema.safetensors" in files else {},
        start=load(files["start.safetensors"]) if "start.safetensors" in files else {},
        values=values,
    )
