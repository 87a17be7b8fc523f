"""Cross-validation: every image is held back once, and in the end a model learns from all of them."""

import math
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy.stats import t
from sklearn.model_selection import StratifiedGroupKFold

from finetune.config.schema import TrainConfig
from finetune.config.yaml_io import from_yaml, to_yaml
from finetune.data.check import require_trainable
from finetune.data.listing import Listing
from finetune.data.read import read_images
from finetune.data.split import TRAIN, VALID, apply_split, components, write_split_csv
from finetune.data.table import SPLITS, Array, ImageTable
from finetune.errors import DataError, RunError, first_ten
from finetune.evaluation.infer import Predictions
from finetune.evaluation.scores import Scores
from finetune.runs.folder import RunFolder, open_run, write_whole
from finetune.runs.processes import Processes
from finetune.runs.reporting import Reporter
from finetune.training.assemble import ANEW, assemble, refuse_changes
from finetune.training.job import Job, fixed_options
from finetune.training.run import predict_start, run_job

CONFIDENCE = 0.95
WORTH_WHILE, FEW_IMAGES = 0.01, 10
"""Accuracy that fine-tuning must gain over the solved head where there are so few images a class; else any."""


@dataclass(frozen=True, kw_only=True)
class _Fold:
    """What came of training with one part of the images held back."""

    held_out: Predictions
    solved_head: Predictions | None
    """What the head predicted of the same images before fine-tuning, if it was solved and anything followed."""
    epochs: int
    scenario: str

    @property
    def accuracy(self) -> float:
        """Share of right predictions of what was held back."""
        return float(_right(self.held_out).mean())


def train_folds(
    config: TrainConfig, run: RunFolder, listing: Listing, reporter: Reporter, *, processes: Processes
) -> dict[str, Scores]:
    """Train `config.folds` times, each time with another part of the images held back, and then on all of them.

    Each of these is a run in a folder of its own below folds/. What it holds back chooses nothing in it, so that its
    score is that of images not seen: the last epoch is kept. The one choice that all of them together make is whether
    fine-tuning `is_worth_while`, or solved heads stay as they are. The last run, in `run`, takes their most frequent
    scenario and the median of their epochs. Its scores of "valid" are those of the out-of-fold predictions. On a
    resume, finished ones stay as they are.

    Returns:
        The scores of "valid" and, where there is one, "test".

    Raises:
        DataError: Some class has too few images to be learned while one is held back.
        RunError: A resume asks for another number of folds.
    """
    if config.resume:
        processes.from_main(lambda: _refuse_changes(config, run))
    images = read_images(
        Path(config.data),
        listing=listing,
        label_names=config.label_names,
        allow_bad_images=config.allow_bad_images,
        processes=processes,
        reporter=reporter,
    )
    require_trainable(images.diagnosis)
    table, fold_of = images.scan.table, fold_numbers(images.scan.table, folds=config.folds, seed=config.seed)
    processes.from_main(lambda: _write_plan(config, run, table))
    folds = []
    for number in range(config.folds):
        reporter.say(f"Fold {number + 1} of {config.folds}.")
        part = _held_back(table, fold_of, number)
        folds.append(_train_fold(config, run.fold(number), part, listing, reporter, processes=processes))
    if heads := solved_heads(folds):
        is_tuned = is_worth_while(folds, heads)
        _tell_the_choice(folds, heads, is_tuned=is_tuned, reporter=reporter)
        if not is_tuned:
            folds = [replace(fold, held_out=head, epochs=0) for fold, head in zip(folds, heads, strict=True)]
    held_out = _joined([fold.held_out for fold in folds])
    accuracies = [fold.accuracy for fold in folds]
    low, high = accuracy_interval(accuracies)
    reporter.say(
        f"Accuracy on what was held back, mean of {config.folds} folds: {np.mean(accuracies):.1%} ({low:.1%} to "
        f"{high:.1%}). Now one model learns from all images."
    )
    everything = _held_back(table, fold_of, None)
    with closing(_last_job(config, run, everything, listing, reporter, folds=folds, processes=processes)) as job:
        job.held_out = held_out
        if processes.is_main and job.progress.is_new:
            values = {"folds": config.folds, "accuracies": accuracies, "mean": float(np.mean(accuracies))}
            run.record("cross_validation", {**values, "interval": [low, high], "is_fine_tuned": job.plan.epochs > 0})
        return run_job(job, reporter)


def solved_heads(folds: Sequence[_Fold]) -> list[Predictions]:
    """Return what the solved heads of all folds predicted; nothing if none was fine-tuned, or some began at random."""
    heads = [fold.solved_head if fold.epochs else fold.held_out for fold in folds]
    known = [head for head in heads if head]
    return known if len(known) == len(heads) and any(fold.epochs for fold in folds) else []


def is_worth_while(folds: Sequence[_Fold], heads: Sequence[Predictions]) -> bool:
    """Tell whether fine-tuning does better, over all folds, than the solved `heads` that it began from.

    Of few images it must gain more than a point (Kim 2022, arXiv 2205.07874: there the solved head usually wins).
    """
    before, after = _joined(heads), _joined([fold.held_out for fold in folds])
    images, classes = after.probabilities_NK.shape
    gained = _right(after).sum() - _right(before).sum()
    return bool(gained > (WORTH_WHILE * images if images <= FEW_IMAGES * classes else 0))


def _tell_the_choice(
    folds: Sequence[_Fold], heads: Sequence[Predictions], *, is_tuned: bool, reporter: Reporter
) -> None:
    before, after = (_right(_joined(parts)).mean() for parts in (heads, [fold.held_out for fold in folds]))
    verdict = "so that more than the head learns" if is_tuned else "not enough: the head stays as it is solved"
    reporter.say(f"On what was held back the solved head reaches {before:.1%} and fine-tuning {after:.1%}, {verdict}.")


def _right(found: Predictions) -> Array:
    right_N: Array = found.probabilities_NK.argmax(axis=1) == found.class_indices_N
    return right_N


def _refuse_changes(config: TrainConfig, run: RunFolder) -> None:
    """Refuse a resume with other options than the folds before it had."""
    before = from_yaml(run.config)
    if (before.folds, before.epochs, before.phases) != (config.folds, config.epochs, config.phases):
        raise RunError(
            f"{run.path} cannot be resumed: --folds, --epochs and --phases were {before.folds}, {before.epochs!r} and "
            f"{before.phases!r} and are {config.folds}, {config.epochs!r} and {config.phases!r}",
            ANEW,
        )
    refuse_changes(config, fixed_options(before), run)


def _write_plan(config: TrainConfig, run: RunFolder, table: ImageTable) -> None:
    """Write down what is divided into folds, and how all are to be trained; a resume must find the same images."""
    plan = run.folds / "images.csv"
    if config.resume and plan.exists():
        apply_split(table, plan)
        return
    run.folds.mkdir(exist_ok=True)
    write_whole(run.config, to_yaml(_lasting(config)))
    write_split_csv(table, plan)


def _lasting(config: TrainConfig) -> TrainConfig:
    """Return the options as they were given, to be used from anywhere."""
    return replace(
        config,
        data=str(Path(config.data).resolve()),
        weights=config.weights and config.weights.resolve(),
        label_names=config.label_names and config.label_names.resolve(),
        output=None,
        resume=False,
        overwrite=False,
    )


def fold_numbers(table: ImageTable, *, folds: int, seed: int) -> Array:
    """Return for each image the fold in which it is held back, (M,) from 0; -1 for test images, which never are.

    The folds are stratified, and images of one group, of identical bytes or of one picture are in the same.

    Raises:
        DataError: Some class would have nothing left to learn from.
    """
    rows = table.rows
    learned = np.flatnonzero(rows.split_codes != SPLITS.index("test"))
    pool = rows.take(learned)
    component_of = components(pool)
    parts = Counter(label for _, label in set(zip(component_of.tolist(), pool.label_codes.tolist(), strict=True)))
    if alone := sorted(rows.label_column.names[label] for label, count in parts.items() if count < 2):
        raise DataError(
            f"{len(alone)} classes have one image, or images that are copies of one another or of one group, so that "
            f"nothing is left to learn from where it is held back: {first_ten(map(repr, alone))}",
            "add images to these classes, or train without --folds",
        )
    if np.bincount(pool.label_codes).max() < folds:
        raise DataError(f"no class has {folds} images, one for each fold", "take fewer --folds")
    if (groups := len(set(component_of.tolist()))) < folds:
        raise DataError(
            f"there are {groups} groups of images that must stay together, which is less than one for each of "
            f"{folds} folds",
            "take fewer --folds",
        )
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    fold_of = np.full(len(rows), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer images than folds: some have none of them
        for number, (_, held_back) in enumerate(splitter.split(learned, pool.label_codes, component_of)):
            fold_of[learned[held_back]] = number
    whole = set(pool.label_codes.tolist())
    for number in range(folds):
        rest = set(rows.label_codes[(fold_of >= 0) & (fold_of != number)].tolist())
        if lost := sorted(rows.label_column.names[label] for label in whole - rest):
            raise DataError(
                f"where a part of the images is held back, nothing is left of these classes: {first_ten(lost)}",
                "take other --folds or another --seed, or loosen the groups",
            )
    return fold_of


def accuracy_interval(accuracies: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean accuracy of the folds, within 0..1.

    The folds learn from nearly the same images, for which the variance of the mean is corrected (Nadeau & Bengio 2003,
    Inference for the generalization error, Machine Learning 52).
    """
    folds, mean = len(accuracies), float(np.mean(accuracies))
    variance = float(np.var(accuracies, ddof=1)) * (1 / folds + 1 / (folds - 1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, folds - 1)) * math.sqrt(variance)
    return max(0.0, mean - half), min(1.0, mean + half)


def _held_back(table: ImageTable, fold_of: Array, number: int | None) -> ImageTable:
    """Return the images with those of one fold for validation, or with none."""
    is_test = table.rows.split_codes == SPLITS.index("test")
    codes = np.where(is_test, SPLITS.index("test"), np.where(fold_of == number, VALID, TRAIN))
    return ImageTable(table.root, table.rows.with_splits(codes))


def _train_fold(
    config: TrainConfig,
    run: RunFolder,
    table: ImageTable,
    listing: Listing,
    reporter: Reporter,
    *,
    processes: Processes,
) -> _Fold:
    """Train with the split of `table`, unless that has been done, and return what came of it."""
    fold = processes.from_main(lambda: _read_fold(run, reporter))
    if fold is None:
        config = replace(config, folds=0, tracker="none", output=run.path)
        with ExitStack() as stack:
            config = processes.from_main(lambda: _open(config, run, table, stack))
            job = stack.enter_context(
                closing(assemble(config, run, listing, reporter, processes=processes, is_fold=True))
            )
            job.folder = run.path.parent.parent
            if job.progress.is_new and job.plan.head_start == "probe" and any(plan.epochs for plan in job.plans):
                start = predict_start(job, reporter)
                if processes.is_main:
                    write_whole(run.held_out_start, _packed(start))
            run_job(job, reporter)
            if processes.is_main:
                made = {"epochs": str(job.progress.epoch), "scenario": job.plan.scenario}
                write_whole(run.held_out, _packed(job.predictions["valid"], **made))
                shutil.rmtree(run.checkpoints, ignore_errors=True)
        fold = processes.from_main(lambda: _read_fold(run, reporter))
    assert fold is not None
    return fold


def _open(config: TrainConfig, run: RunFolder, table: ImageTable, stack: ExitStack) -> TrainConfig:
    """Open the folder of a fold, or of what is left of it; return the config to begin or to go on with."""
    has_save = any(run.checkpoints.glob("step-*"))
    stack.enter_context(open_run(run.path, resume=has_save, overwrite=not has_save))
    if has_save:
        return _going_on(config, run, run.config)
    write_split_csv(table, run.split)
    return replace(config, resume=False, overwrite=True)


def _last_job(
    config: TrainConfig,
    run: RunFolder,
    table: ImageTable,
    listing: Listing,
    reporter: Reporter,
    *,
    folds: list[_Fold],
    processes: Processes,
) -> Job:
    """Return the job that learns from all images in the way that the folds have found best."""
    resolved = run.folds / "last.yaml"
    if processes.from_main(lambda: any(run.checkpoints.glob("step-*"))):
        going_on = processes.from_main(lambda: _going_on(config, run, resolved))
        job = assemble(going_on, run, listing, reporter, processes=processes)
    else:
        if processes.is_main:
            run.metrics.unlink(missing_ok=True)  # of a start that came to no save
            write_split_csv(table, run.split)
        processes.wait()
        scenario = Counter(fold.scenario for fold in folds).most_common(1)[0][0]
        changes: dict[str, Any] = {"resume": False, "scenario": scenario}
        if scenario == "large-different":
            changes["weights"] = None
        epochs = median_low(fold.epochs for fold in folds if fold.scenario == scenario)
        if not config.phases or not epochs:
            changes |= {"phases": "", "epochs": epochs}
        job = assemble(replace(config, **changes), run, listing, reporter, processes=processes)
    if processes.is_main:  # training with the config of the run repeats all of it
        write_whole(resolved, to_yaml(job.config))
        write_whole(run.config, to_yaml(_lasting(config)))
    return job


def _going_on(config: TrainConfig, run: RunFolder, resolved: Path) -> TrainConfig:
    """Return the options of a training that was interrupted, with those that may change as they are now."""
    return replace(
        from_yaml(resolved),
        data=config.data,
        device=config.device,
        workers=config.workers,
        output=run.path,
        resume=True,
    )


def _packed(found: Predictions, **texts: str) -> bytes:
    arrays = {"probabilities_NK": found.probabilities_NK, "class_indices_N": found.class_indices_N}
    texts["image_paths"] = "\0".join(found.image_paths)
    encoded = {name: np.frombuffer(text.encode(errors="surrogateescape"), np.uint8) for name, text in texts.items()}
    return bytes(save({**arrays, **encoded}))


def _unpacked(packed: Mapping[str, Array]) -> Predictions:
    return Predictions(
        probabilities_NK=packed["probabilities_NK"],
        class_indices_N=packed["class_indices_N"],
        image_paths=tuple(_text(packed["image_paths"]).split("\0")),
    )


def _text(characters: Array) -> str:
    return characters.tobytes().decode(errors="surrogateescape")


def _read_fold(run: RunFolder, reporter: Reporter) -> _Fold | None:
    """Return what came of a fold, None where it has not ended or that has been damaged."""
    if not run.held_out.exists():
        return None
    try:
        packed = load(run.held_out.read_bytes())
        return _Fold(
            held_out=_unpacked(packed),
            solved_head=_unpacked(load(run.held_out_start.read_bytes())) if run.held_out_start.exists() else None,
            epochs=int(_text(packed["epochs"])),
            scenario=_text(packed["scenario"]),
        )
    except (SafetensorError, KeyError, ValueError) as error:
        reporter.warn(f"what {run.path} held back is damaged ({error}); this fold is trained again.")
        return None


def _joined(parts: Sequence[Predictions]) -> Predictions:
    """Return the predictions of all parts, in the order of the image paths."""
    paths = [path for part in parts for path in part.image_paths]
    order = np.array(sorted(range(len(paths)), key=paths.__getitem__))
    return Predictions(
        probabilities_NK=np.concatenate([part.probabilities_NK for part in parts])[order],
        class_indices_N=np.concatenate([part.class_indices_N for part in parts])[order],
        image_paths=tuple(paths[place] for place in order),
    )
