"""A saved model scored on labelled images."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from finetune.data.loaders import readable, split_loaders
from finetune.data.scan import Scan
from finetune.data.split import apply_split
from finetune.data.table import ImageTable, Split
from finetune.errors import DataError, first_ten
from finetune.evaluation.infer import predict_batches
from finetune.evaluation.scores import Scores, score
from finetune.prediction.classifier import Classifier
from finetune.runs.folder import RunFolder
from finetune.runs.reporting import Reporter

SplitChoice = Literal["auto", "train", "valid", "test", "all"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a model on one split; `split` is "all" where every image was taken."""

    split: str
    scores: Scores


def choose_split(scan: Scan, run: Path, split: SplitChoice) -> tuple[str, ImageTable]:
    """Return the images to score: `split`, or with "auto" the test images, else the validation images, else all.

    Images that lie in one folder without splits are those that the run held out, if it was trained on that folder.

    Raises:
        DataError: There are no images in that split.
    """
    table = scan.table
    recorded = RunFolder(run).split
    if all(row.split is None for row in table.rows) and recorded.is_file():
        with suppress(DataError):  # other images than those of the training: all of them are new to the model
            table = apply_split(table, recorded)
    if split == "all":
        return "all", table
    wanted: tuple[Split, ...] = ("test", "valid") if split == "auto" else (split,)
    for name in wanted:
        if len(chosen := table.select(name)):
            return name, chosen
    if split != "auto":
        raise DataError(f"{table.root} has no {split} images", "choose another --split, or --split all")
    return "all", table


def evaluate_table(classifier: Classifier, table: ImageTable, *, batch_size: int, reporter: Reporter) -> Scores:
    """Score `classifier` on every image of `table`, whatever split it is in.

    Raises:
        DataError: The table has classes that the model does not know.
    """
    labels = classifier.metadata.label_map
    if unknown := sorted(set(table.class_names) - set(labels.class_names)):
        raise DataError(
            f"the model does not know the classes {first_ten(unknown)}",
            f"it knows {first_ten(labels.class_names)}",
        )
    one_split = replace(table, rows=tuple(replace(row, split="test") for row in table.rows))
    loader = split_loaders(one_split, labels, classifier.metadata.input_spec, batch_size=batch_size)["test"]
    with reporter.progress("Scoring", len(table)) as advance:
        found = predict_batches(
            classifier.model,
            readable(loader),
            device=classifier.device,
            temperature=classifier.metadata.calibration or 1.0,
            advance=advance,
        )
    return score(found.class_indices_N, found.probabilities_NK, labels.class_names)
