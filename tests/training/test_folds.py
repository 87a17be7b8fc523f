"""Cross-validation: who is held back when, what is said of it, and a resume in the middle of it."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

import finetune
from finetune.config import from_yaml
from finetune.data.table import ImageRow, ImageTable
from finetune.errors import ConfigError, DataError, RunError
from finetune.evaluation.infer import Predictions
from finetune.runs.folder import RunFolder
from finetune.runs.model_file import read_metadata
from finetune.training import folds
from finetune.training.folds import accuracy_interval, fold_numbers, is_worth_while, solved_heads
from finetune.training.progress import Progress
from finetune.training.watchers import ProgressBar
from tests.training.exact_resume import write_images

OPTIONS: dict[str, Any] = {
    "model": "timm/test_resnet",
    "use_pretrained": False,
    "scenario": "large-similar",
    "image_size": 32,
    "epochs": 2,
    "batch_size": 8,
    "workers": 0,
    "head_start": "random",
    "folds": 3,
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_images(tmp_path / "data")
    return tmp_path / "data"


def table_of(rows: list[ImageRow]) -> ImageTable:
    return ImageTable(Path("/data"), rows)


def singles(label: str, count: int) -> list[ImageRow]:
    return [ImageRow(image_path=f"{label}/{number}", label=label) for number in range(count)]


def test_every_image_is_held_back_once_and_every_class_in_every_fold() -> None:
    table = table_of([*singles("a", 20), *singles("b", 10), ImageRow(image_path="t", label="a", split="test")])
    found = fold_numbers(table, folds=5, seed=3)
    assert found[-1] == -1
    assert Counter(zip(table.labels, found.tolist(), strict=True)) == {
        **{("a", number): 4 for number in range(5)},
        **{("b", number): 2 for number in range(5)},
        ("a", -1): 1,
    }
    assert (fold_numbers(table, folds=5, seed=3) == found).all()
    assert (fold_numbers(table, folds=5, seed=4) != found).any()


def test_images_of_a_group_and_copies_are_in_one_fold() -> None:
    rows = [replace(row, group=f"film {number // 3}") for number, row in enumerate(singles("a", 12))]
    rows += [replace(row, sha256=f"{number // 2 + 1:064x}") for number, row in enumerate(singles("b", 12))]
    found = fold_numbers(table_of(rows), folds=3, seed=0)
    assert all(len(set(found[first : first + 3])) == 1 for first in range(0, 12, 3))
    assert all(len(set(found[first : first + 2])) == 1 for first in range(12, 24, 2))
    assert set(found) == {0, 1, 2}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*singles("a", 9), *singles("b", 1)], "1 classes have one image.*'b'"),
        ([*singles("a", 2), *singles("b", 2)], "no class has 5 images"),
        ([*singles("a", 4), *singles("b", 4), *singles("c", 4)], "no class has 5 images"),
        (
            [
                replace(row, group=row.image_path[-1:])
                for row in [*singles("a", 40), *singles("b", 40)]
                if row.image_path[-1] < "4"
            ],
            "there are 4 groups of images that must stay together, which is less than one for each of 5 folds",
        ),
    ],
)
def test_too_few_images_are_refused(rows: list[ImageRow], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fold_numbers(table_of(rows), folds=5, seed=0)


def test_interval_is_that_of_the_corrected_t_test() -> None:
    """Five folds: a variance of 0.001, times 1/5 + 1/4, and 2.776 standard errors to either side."""
    accuracies = [0.8, 0.84, 0.86, 0.82, 0.88]
    low, high = accuracy_interval(accuracies)
    half = 2.776445 * (np.var(accuracies, ddof=1) * 0.45) ** 0.5
    assert (low, high) == pytest.approx((0.84 - half, 0.84 + half))
    assert t.ppf(0.975, 4) == pytest.approx(2.776445)
    assert accuracy_interval([1.0, 0.9])[1] == 1.0


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_out_of_fold_predictions_are_scored_and_a_model_learns_from_all(data: Path, tmp_path: Path) -> None:
    run = finetune.train(data, output=tmp_path / "run", **OPTIONS)
    folder = RunFolder(run.folder)
    predicted = rows_of(folder.predictions)
    assert sorted(row["image_path"] for row in predicted) == [row["image_path"] for row in rows_of(folder.split)]
    assert len(predicted) == run.metrics["valid"].images == 43
    assert {row["split"] for row in rows_of(folder.split)} == {"train"}

    held_back, right = [], 0
    for number in range(3):
        fold = folder.fold(number)
        own = {row["image_path"]: row["predicted"] for row in rows_of(fold.predictions)}
        assert set(own) == {row["image_path"] for row in rows_of(fold.split) if row["split"] == "valid"}
        assert own == {row["image_path"]: row["predicted"] for row in predicted if row["image_path"] in own}
        held_back += list(own)
    assert len(held_back) == len(set(held_back)) == 43
    right = sum(row["label"] == row["predicted"] for row in predicted)
    assert run.metrics["valid"].accuracy == pytest.approx(right / 43)

    events = {event["event"]: event for event in folder.events()}
    assert events["cross_validation"]["folds"] == 3
    assert events["cross_validation"]["mean"] == pytest.approx(np.mean(events["cross_validation"]["accuracies"]))
    assert not {"valid_loss", "valid_accuracy"} & set(events["epoch"])
    assert read_metadata(folder.model).metrics["accuracy"] == pytest.approx(right / 43)
    assert run.classifier.predict(str(next((data / "train").rglob("*.png")))).class_name in ("blue", "green", "red")
    assert {path.name for path in folder.plots.iterdir()} == {"curves.png", "confusion.png", "samples.png"}
    for changes, message in (({"seed": 1}, "--seed was 0 and is 1"), ({"epochs": 3}, "--epochs")):
        with pytest.raises(RunError, match=message):
            finetune.train(output=run.folder, resume=True, **changes)
    with pytest.raises(DataError, match="has learned from all"):
        finetune.evaluate(run.folder, data)
    assert finetune.evaluate(run.folder, data, split="all").scores.images == 43
    assert from_yaml(folder.config).folds == 3
    assert from_yaml(folder.config).scenario == "large-similar"
    next((data / "train").rglob("*.png")).unlink()
    with pytest.raises(DataError, match=r"are not those of .*images\.csv; 1 gone: 'train/"):
        finetune.train(output=run.folder, resume=True)
    with pytest.raises(RunError, match="--folds, --epochs and --phases were 3"):
        finetune.train(output=run.folder, resume=True, folds=2)


def test_images_for_tests_are_never_learned_from_nor_held_back(data: Path, tmp_path: Path) -> None:
    (data / "valid").rename(data / "test")
    run = finetune.train(data, output=tmp_path / "run", **OPTIONS)
    assert (run.metrics["valid"].images, run.metrics["test"].images) == (31, 12)
    for number in range(3):
        counts = Counter(row["split"] for row in rows_of(RunFolder(run.folder).fold(number).split))
        assert counts["test"] == 12


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resume_goes_on_in_the_fold_that_was_interrupted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = finetune.train(data, output=tmp_path / "whole", **OPTIONS)
    begun, step_ended = [], ProgressBar.step_ended

    def interrupted(self: ProgressBar, progress: Progress) -> None:
        step_ended(self, progress)
        if len(begun) == stop + 1 and progress.global_step == 2:
            progress.stop_reason, progress.is_interrupted = "enough", True

    def counted(*values: Any, **options: Any) -> Any:
        begun.append(values)
        return assemble(*values, **options)

    class StoppedError(Exception):
        pass

    def run_job(job: Any, reporter: Any) -> Any:
        scores = finished(job, reporter)
        if job.progress.is_interrupted:
            raise StoppedError
        return scores

    assemble, finished = folds.assemble, folds.run_job
    with monkeypatch.context() as patch:
        patch.setattr(folds, "assemble", counted)
        patch.setattr(folds, "run_job", run_job)
        patch.setattr(ProgressBar, "step_ended", interrupted)
        with pytest.raises(StoppedError):
            finetune.train(data, output=tmp_path / "run", **OPTIONS)
        begun.clear()
        patch.setattr(ProgressBar, "step_ended", step_ended)
        finetune.train(output=tmp_path / "run", resume=True)
    assert len(begun) == 4 - stop
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole.folder.joinpath(
        "model.safetensors"
    ).read_bytes()


def test_a_fold_whose_outcome_is_damaged_is_trained_again(data: Path, tmp_path: Path) -> None:
    run = RunFolder(finetune.train(data, output=tmp_path / "run", **OPTIONS).folder)
    before = run.predictions.read_bytes()
    run.fold(1).held_out.write_bytes(run.fold(1).held_out.read_bytes()[:20])
    finetune.train(output=run.path, resume=True)
    assert run.predictions.read_bytes() == before


def test_what_a_fold_holds_back_chooses_no_epoch(data: Path, tmp_path: Path) -> None:
    changes = {"epochs": 6, "learning_rate": 0.3, "schedule": "constant"}
    run = RunFolder(finetune.train(data, output=tmp_path / "run", **OPTIONS | changes).folder)
    is_other = []
    for fold in (run.fold(number) for number in range(3)):
        accuracies = [event["valid_accuracy"] for event in fold.events() if event["event"] == "epoch"]
        rows = rows_of(fold.predictions)
        assert np.mean([row["label"] == row["predicted"] for row in rows]) == pytest.approx(accuracies[-1])
        is_other.append(max(accuracies) > accuracies[-1])
    assert any(is_other), "the best epoch is the last in all folds, so that this test shows nothing"


SOLVED = OPTIONS | {"scenario": "small-different", "head_start": "probe", "max_grad_norm": 0.0}


@pytest.mark.parametrize("phases", ["", "head:1,all:1"])
def test_a_solved_head_stays_where_fine_tuning_gains_nothing(data: Path, tmp_path: Path, phases: str) -> None:
    length = {"phases": phases, "epochs": "auto" if phases else 2}
    run = RunFolder(finetune.train(data, output=tmp_path / "run", **SOLVED | length).folder)
    events = {event["event"]: event for event in run.events()}
    assert not events["cross_validation"]["is_fine_tuned"]
    assert "epoch" not in events
    starts = [
        next(event["valid_accuracy"] for event in run.fold(number).events() if event["event"] == "start")
        for number in range(3)
    ]
    assert events["cross_validation"]["accuracies"] == pytest.approx(starts)
    probability = {row["image_path"]: row["probability"] for row in rows_of(run.predictions)}
    tuned = [row for number in range(3) for row in rows_of(run.fold(number).predictions)]
    assert any(row["probability"] != probability[row["image_path"]] for row in tuned), "these are of fine-tuned heads"
    assert read_metadata(run.model).scenario == "small-different"
    assert from_yaml(run.config).epochs == length["epochs"]


def test_fine_tuning_follows_where_the_folds_are_better_for_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folds, "is_worth_while", lambda found, heads: len(heads) == len(found))
    run = RunFolder(finetune.train(data, output=tmp_path / "run", **SOLVED).folder)
    events = run.events()
    assert [event["event"] for event in events].count("epoch") == 2
    assert all(event["is_fine_tuned"] for event in events if event["event"] == "cross_validation")


@pytest.mark.parametrize(
    ("images", "right_before", "right_after", "is_better"),
    [
        (20, 10, 11, True),  # ten images a class, 5 points
        (20, 10, 10, False),
        (200, 150, 151, True),  # half a point is enough of many
        (200, 150, 150, False),
        (2000, 1500, 1501, True),
    ],
)
def test_fine_tuning_is_worth_while_if_it_gains(
    images: int, right_before: int, right_after: int, is_better: bool
) -> None:
    first, second = (images // 2, right_before // 2), (images - images // 2, right_before - right_before // 2)
    made = [fold_of(*first, first[1] + right_after - right_before), fold_of(*second, second[1])]
    assert is_worth_while(made, solved_heads(made)) == is_better


def test_of_few_images_it_must_gain_more_than_a_point() -> None:
    for gained, is_better in ((10, False), (11, True)):
        made = [fold_of(1000, 500, 500 + gained, classes=100)]
        assert is_worth_while(made, solved_heads(made)) == is_better


def test_there_is_a_choice_only_where_all_folds_have_a_solved_head_and_some_went_on_from_it() -> None:
    tuned = fold_of(100, 50, 40)
    left = replace(tuned, epochs=0, solved_head=None)
    assert solved_heads([tuned, left]) == [tuned.solved_head, left.held_out]
    assert solved_heads([left, left]) == []
    assert solved_heads([tuned, replace(tuned, solved_head=None)]) == []


def fold_of(images: int, right_before: int, right_after: int, classes: int = 2) -> Any:
    """A fold of which so many are right before and after fine-tuning; all are of class 0."""

    def predictions(right: int) -> Predictions:
        chosen_N = np.where(np.arange(images) < right, 0, 1)
        return Predictions(
            probabilities_NK=np.eye(classes, dtype=np.float32)[chosen_N],
            class_indices_N=np.zeros(images, dtype=np.int64),
            image_paths=tuple(f"{number:05d}" for number in range(images)),
        )

    return folds._Fold(
        held_out=predictions(right_after), solved_head=predictions(right_before), epochs=3, scenario="large-similar"
    )


@pytest.mark.parametrize(
    "changes", [{"folds": 1}, {"folds": 21}, {"budget": "5m"}, {"patience": 3}, {"averaging": "ends"}]
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--folds"):
        finetune.TrainConfig(data="x", **{"folds": 5, **changes})
