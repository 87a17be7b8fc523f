"""A job carried through: train, score the best weights, and leave the run folder whole."""

import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing

from finetune.config.schema import TrainConfig, flag_of
from finetune.data.csv_files import write_csv
from finetune.data.loaders import readable
from finetune.errors import StorageError
from finetune.evaluation.infer import Predictions, predict_batches
from finetune.evaluation.scores import Scores, score
from finetune.models.freezing import stage_summary
from finetune.runs.model_file import ModelMetadata, save_model_file
from finetune.runs.reporting import Reporter
from finetune.training.checkpoint import FREE_SPACE, Checkpointer
from finetune.training.job import Job
from finetune.training.loop import run_epochs
from finetune.training.progress import Watcher
from finetune.training.stopping import EarlyStopping, Interruption
from finetune.training.tracking import Tracking
from finetune.training.watchers import EpochRecorder, ProgressBar

OF_EPOCHS = ("mixup", "cutmix", "random_erasing", "label_smoothing", "averaging", "patience")
"""Options that say how epochs are trained, and nothing else; no preset has any."""
PREDICTION_COLUMNS = ("image_path", "split", "label", "predicted", "probability")


def run_job(job: Job, reporter: Reporter, *, watchers: Sequence[Watcher] = ()) -> dict[str, Scores]:
    """Train as `job` plans, then write the model, the predictions and the scores of every held-out split.

    `watchers` look on beside its own.

    Returns:
        The scores of "valid" and, where there is one, "test".

    Raises:
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; the state is saved and `--resume` goes on from it.
        DataError: An image can no longer be read, or a process that decodes died or hangs.
        DivergedError: The loss is no longer finite.
        StorageError: The disk has refused several saves, or that of an interrupt.
    """
    started = time.monotonic()
    with Interruption(job.processes.in_epoch()) as interruption, ExitStack() as stack:
        recorder = EpochRecorder(job.run, reporter) if job.processes.is_main else None
        others = [recorder, *watchers] if recorder else list(watchers)
        if job.config.tracker != "none" and job.processes.is_main:
            others.append(stack.enter_context(closing(Tracking(job.config.tracker, job.run, job.config, reporter))))
        while True:
            refusal = _run_phase(job, interruption, others, reporter)
            is_out_of_time = job.budget is not None and job.budget.is_used_up
            if job.is_last_phase or job.progress.is_interrupted or is_out_of_time:
                break
            job.progress.next_phase()
            job.enter_phase()
    if interruption.received is not None and job.progress.is_interrupted:
        folder = job.folder or job.run.path
        if refusal:
            raise StorageError(
                f"interrupted, and the training state could not be saved ({refusal}); the one before is kept",
                FREE_SPACE,
            )
        reporter.say(f"Interrupted; the state is saved. Go on with: finetune train --output {folder} --resume")
        if interruption.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + interruption.received)
    if recorder and recorder.epochs < job.progress.epoch:
        recorder.record(job.progress)
    _tell_the_end(job, reporter, seconds=time.monotonic() - started)
    return _write_results(job, reporter)


def _run_phase(job: Job, interruption: Interruption, others: Sequence[Watcher], reporter: Reporter) -> str:
    """Train the phase that `job` is in and return why the last save was refused, nothing if it was not."""
    _tell_what_learns(job, reporter)
    checkpointer = Checkpointer(job.run, job.learner, identity=job.identity(), reporter=reporter)
    watchers: list[Watcher] = [interruption, ProgressBar(reporter)]
    if job.config.patience:
        stopping = EarlyStopping(job.config.patience)
        watchers.append(stopping)
        if job.progress.epoch:
            stopping.epoch_ended(job.progress)  # a resume of a training that had stopped early
    watchers += others
    if job.budget:
        watchers.append(job.budget)
    # The checkpointer comes last: what it saves includes what the others have done.
    run_epochs(
        job.learner,
        job.batches.loaders,
        job.progress.phase_epoch + job.plan.epochs,
        progress=job.progress,
        watchers=[*watchers, checkpointer],
    )
    if not job.plan.epochs and job.progress.is_new and job.plan.head_start != "neighbours" and not job.is_fold:
        checkpointer.save(job.progress)  # for a resume with epochs
    return checkpointer.refusal


def _tell_what_learns(job: Job, reporter: Reporter) -> None:
    rows = [
        (row.stage, f"{row.parameters:,}", f"{row.learning:,}" if row.learning else "frozen")
        for row in stage_summary(job.backbone.module, job.backbone.stages)
    ]
    phase = f", phase {job.progress.phase + 1} of {len(job.plans)}" if len(job.plans) > 1 else ""
    reporter.table(f"What learns in {job.backbone.name}{phase}", ["stage", "parameters", "learning"], rows)


def _tell_the_end(job: Job, reporter: Reporter, *, seconds: float) -> None:
    history = job.progress.history
    if not len(history):
        why = "there was no time for an epoch" if job.had_no_time else "no epochs were asked for"
        what = {
            "probe": f"The head was solved on the frozen features; {why}.",
            "neighbours": "The training images are kept as neighbours; nothing is trained.",
            "random": f"The head is random; {why}.",
        }[job.plan.head_start]
        reporter.say(what)
        idle = [name for name in OF_EPOCHS if getattr(job.config, name) != getattr(TrainConfig, name)]
        if idle and not job.held_out:  # the folds of a cross-validation may have had epochs
            reporter.warn(f"without an epoch {', '.join(map(flag_of, idle))} had no effect.")
        return
    if job.progress.stop_reason:
        reporter.say(f"Stopped early: {job.progress.stop_reason}.")
    if math.isnan(history.best_accuracy):
        reporter.say(f"Trained for {seconds:.0f} s on all images; kept the last epoch, {history.best_epoch}.")
        return
    start = "the solved head, the linear probe" if job.plan.head_start == "probe" else "the start"
    kept = f"epoch {history.best_epoch}" if history.best_epoch else f"{start}: no epoch of fine-tuning improved on it"
    reporter.say(f"Trained for {seconds:.0f} s; kept {kept} (validation accuracy {history.best_accuracy:.1%}).")
    if not math.isnan(history.ends_accuracy):
        verdict = "kept in its place" if history.ends_accuracy >= history.best_accuracy else "not kept"
        reporter.say(f"The mean of it and the start reaches {history.ends_accuracy:.1%} and is {verdict}.")
        if job.processes.is_main:
            job.run.record("average_of_ends", {"valid_accuracy": history.ends_accuracy})


def _write_results(job: Job, reporter: Reporter) -> dict[str, Scores]:
    if job.held_out:
        job.predictions["valid"] = job.held_out
    for split in ("valid", "test"):
        if split in job.batches.loaders:
            job.predictions[split] = _predicted(job, split, reporter)
    names = job.label_map.class_names
    scores = {
        split: score(found.class_indices_N, found.probabilities_NK, names) for split, found in job.predictions.items()
    }
    if job.processes.is_main:
        _write_model(job, scores)
        write_csv(job.run.predictions, columns=PREDICTION_COLUMNS, rows=_rows(job.predictions, names))
    return scores


def predict_start(job: Job, reporter: Reporter) -> Predictions:
    """Return what the network of a job that has not begun says of the validation images."""
    job.learner.model.to(job.device)
    found = _predicted(job, "valid", reporter)
    if job.learner.sharded:  # a copy of it will learn, and it waits for the end
        job.learner.model.cpu()
    return found


def _predicted(job: Job, split: str, reporter: Reporter) -> Predictions:
    loader = job.batches.loaders[split]
    images = len(loader.dataset)  # type: ignore[arg-type]
    with reporter.progress(f"Scoring {split}", images) as advance:
        found = predict_batches(
            job.learner.model,
            readable(loader),
            device=job.learner.accelerator.device,
            advance=advance,
            processes=job.processes,
        )
    assert len(found.image_paths) == images, split
    return found


def _write_model(job: Job, scores: Mapping[str, Scores]) -> None:
    for split, found in scores.items():
        job.run.record("evaluation", {"split": split, **found.to_json()})
    metadata = ModelMetadata(
        architecture=job.backbone.name,
        head=job.backbone.head,
        head_inputs=job.plan.head_inputs,
        label_map=job.label_map,
        input_spec=job.backbone.input_spec,
        frozen_stages=min((plan.frozen_stages for plan in job.plans), key=len),
        scenario=job.plan.scenario,
        pretrained_weights=job.backbone.weights,
        metrics=scores["valid"].headline(),
        data_fingerprint=job.table.fingerprint(),
    )
    save_model_file(job.run.model, job.backbone.module.state_dict(), metadata)


def _rows(predictions: dict[str, Predictions], class_names: Sequence[str]) -> Iterator[Sequence[str]]:
    for split, found in predictions.items():
        predicted_N = found.probabilities_NK.argmax(axis=1)
        for path, true, guess, row_K in zip(
            found.image_paths, found.class_indices_N, predicted_N, found.probabilities_NK, strict=True
        ):
            yield path, split, class_names[true], class_names[guess], f"{row_K[guess]:.6f}"
