"""A saved model scored on labelled images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.data.loaders import readable, split_loaders
from finetune.data.scan import Scan
from finetune.data.split import read_split_csv
from finetune.data.table import SPLITS, ImageTable, Split
from finetune.errors import DataError, first_ten
from finetune.evaluation.infer import predict_batches
from finetune.evaluation.scores import Scores, score
from finetune.prediction.classifier import Classifier
from finetune.runs.folder import RunFolder
from finetune.runs.processes import ALONE, Processes
from finetune.runs.reporting import Reporter

SplitChoice = Literal["auto", "train", "valid", "test", "all"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a model on one split; `split` is "all" where every image was taken."""

    split: str
    scores: Scores


def choose_split(scan: Scan, run: Path, split: SplitChoice) -> tuple[str, ImageTable]:
    """Return the images to score: `split`, or with "auto" the test images, else the validation images, else all.

    Images that the run has split, those of the same path and label, are in the split that the run put them in, so that
    what it learned from is not scored as new.

    Raises:
        DataError: There are no images in that split.
    """
    table = _with_recorded_splits(scan.table, RunFolder(run if run.is_dir() else run.parent).split)
    if split == "all":
        return "all", table
    wanted: tuple[Split, ...] = ("test", "valid") if split == "auto" else (split,)
    for name in wanted:
        if len(chosen := table.select(name)):
            return name, chosen
    if split != "auto":
        raise DataError(f"{table.root} has no {split} images", "choose another --split, or --split all")
    if (table.rows.split_codes == SPLITS.index("train")).all():
        raise DataError(
            f"{run} has learned from all of these images, so that their scores would say nothing",
            "score it on others, or pass --split all; a run of --folds has its scores in metrics.jsonl",
        )
    return "all", table


def evaluate_table(
    classifier: Classifier,
    table: ImageTable,
    *,
    batch_size: int,
    processes: Processes = ALONE,
    reporter: Reporter,
) -> Scores:
    """Score `classifier` on every image of `table`, whatever split it is in; several processes share the batches.

    Raises:
        DataError: The table has classes that the model does not know.
    """
    labels = classifier.metadata.label_map
    if unknown := sorted(set(table.class_names) - set(labels.class_names)):
        raise DataError(
            f"the model does not know the classes {first_ten(unknown)}",
            f"it knows {first_ten(labels.class_names)}",
        )
    one_split = ImageTable(table.root, table.rows.with_splits(SPLITS.index("test")))
    loader = split_loaders(
        one_split, labels, classifier.metadata.input_spec, batch_size=batch_size, processes=processes
    )["test"]
    with reporter.progress("Scoring", len(table)) as advance:
        found = predict_batches(
            classifier.model,
            readable(loader),
            device=classifier.device,
            temperature=classifier.metadata.calibration or 1.0,
            advance=advance,
            processes=processes,
        )
    assert len(found.image_paths) == len(table)
    return score(found.class_indices_N, found.probabilities_NK, labels.class_names)


def _with_recorded_splits(table: ImageTable, split_file: Path) -> ImageTable:
    if not split_file.is_file():
        return table
    recorded = {row.image_path: row for row in read_split_csv(split_file)}
    splits_M = table.rows.split_codes
    for index, row in enumerate(table.rows):
        known = recorded.get(row.image_path)
        if known and known.split and known.label == row.label:
            splits_M[index] = SPLITS.index(known.split)
    return ImageTable(table.root, table.rows.with_splits(splits_M))
