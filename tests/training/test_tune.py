"""A search for options: what is tried, kept and ended early, and how it goes on after an interrupt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

import finetune
from finetune.config import from_yaml
from finetune.errors import ConfigError, DivergedError, RunError
from finetune.training import tune
from finetune.training.progress import Progress
from tests.training.exact_resume import write_images

OPTIONS: dict[str, Any] = {
    "model": "timm/test_resnet",
    "use_pretrained": False,
    "scenario": "large-similar",
    "head_start": "random",
    "image_size": 32,
    "epochs": 2,
    "batch_size": 8,
    "workers": 0,
}
SEARCHED_BY_DEFAULT = {"scenario", "trunk_learning_rate", "depth_ratio", "weight_decay", "augmentation"}
SEARCHED = ("trunk_learning_rate", "weight_decay")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_images(tmp_path / "data")
    return tmp_path / "data"


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=tune.NAME, storage=f"sqlite:///{folder / tune.STUDY_FILE}")


def test_the_best_run_is_kept_and_its_options_are_those_it_was_trained_with(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    found = finetune.tune(data, output=folder, trials=3, search=SEARCHED, **OPTIONS)
    assert (found.trials, set(found.options)) == (3, set(SEARCHED))
    values = [trial.value for trial in study_of(folder).trials]
    assert found.accuracy == max(values)
    assert found.best == folder / f"trial-{values.index(max(values)):04d}"
    config = from_yaml(found.best / "config.yaml")
    assert {name: getattr(config, name) for name in SEARCHED} == pytest.approx(found.options)
    assert [path.parent.name for path in folder.rglob("model.safetensors")] == [found.best.name]
    assert finetune.load(found.best).predict(str(next(data.rglob("*.png")))).class_name in ("blue", "green", "red")
    assert not list(folder.rglob("step-*"))
    again = finetune.tune(output=folder, resume=True, trials=4, search=SEARCHED)
    assert again.trials == 4
    assert again.accuracy >= found.accuracy
    with pytest.raises(RunError, match="--search was trunk_learning_rate weight_decay"):
        finetune.tune(output=folder, resume=True, trials=5, search=["mixup"])
    with pytest.raises(RunError, match="--epochs was 2 and is 3"):
        finetune.tune(output=folder, resume=True, trials=5, epochs=3)
    with pytest.raises(RunError, match="is not empty"):
        finetune.tune(data, output=folder, trials=5, **OPTIONS)


def test_an_interrupted_training_is_the_first_to_be_tried_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job: Callable[..., Any] = tune.run_job
    begun: list[Any] = []

    def interrupted(job: Any, *values: Any, **options: Any) -> Any:
        begun.append(job.config.trunk_learning_rate)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return run_job(job, *values, **options)

    monkeypatch.setattr(tune, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.tune(data, output=tmp_path / "study", trials=3, search=SEARCHED, **OPTIONS)
    found = finetune.tune(output=tmp_path / "study", resume=True, trials=3, search=SEARCHED)
    assert begun[2] == pytest.approx(begun[1])
    assert len(set(begun)) == 3
    assert found.trials == 3
    assert [trial.state.name for trial in study_of(tmp_path / "study").trials].count("FAIL") == 1


def test_a_training_of_a_killed_process_is_tried_again(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    finetune.tune(data, output=folder, trials=1, search=SEARCHED, **OPTIONS)
    killed = study_of(folder).ask()
    rate = killed.suggest_float("trunk_learning_rate", 1e-4, 3e-2, log=True)
    found = finetune.tune(output=folder, resume=True, trials=2)
    assert found.trials == 2
    assert set(found.options) == set(SEARCHED), "those that the study began with"
    assert study_of(folder).trials[-1].params["trunk_learning_rate"] == pytest.approx(rate)


@pytest.mark.parametrize("reason", ["worse than the others", "diverged"])
def test_a_training_that_does_badly_is_ended_early(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(tune, "UNPRUNED_TRIALS", 1)
    monkeypatch.setattr(tune, "UNPRUNED_EPOCHS", 0)
    trials = []

    def epoch_ended(self: Any, progress: Progress) -> None:
        if self.trial.number not in trials:
            trials.append(self.trial.number)
        if len(trials) == 2 and reason == "diverged":
            raise DivergedError("the loss became nan", "")
        self.trial.report(1.0 / len(trials), progress.epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned

    monkeypatch.setattr(tune._Pruning, "epoch_ended", epoch_ended)
    found = finetune.tune(data, output=tmp_path / "study", trials=2, search=SEARCHED, **OPTIONS)
    assert (found.trials, found.pruned, found.best.name) == (2, 1, "trial-0000")


def test_real_scores_are_reported_after_every_epoch(data: Path, tmp_path: Path) -> None:
    finetune.tune(data, output=tmp_path / "study", trials=1, search=SEARCHED, **OPTIONS)
    (trial,) = study_of(tmp_path / "study").trials
    assert sorted(trial.intermediate_values) == [1, 2]
    assert max(trial.intermediate_values.values()) == trial.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": ("trunk-learning-rat",)}, "cannot be searched"),
        ({"folds": 5}, "neither --folds nor --overwrite"),
        ({"overwrite": True}, "neither --folds nor --overwrite"),
        (
            {
                "scenario": "large-similar",
                "trunk_learning_rate": 0.1,
                "depth_ratio": 0.5,
                "weight_decay": 0.1,
                "augmentation": "none",
            },
            "nothing to search",
        ),
        ({"head": "knn"}, "nothing to search"),
        ({"feature_extract": True}, "nothing to search"),
        (
            {"head": "log_softmax", "search": ("label-smoothing",)},
            "label_smoothing cannot be searched here: --label-smoo",
        ),
    ],
)
def test_a_search_for_nothing_is_refused(data: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune.tune(data, output=tmp_path / "study", **options)
    assert not (tmp_path / "study").exists(), "so that what is put right can begin"


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, SEARCHED_BY_DEFAULT),
        ({"phases": "head:1,all:1"}, SEARCHED_BY_DEFAULT - {"scenario"}),
        ({"phases": "head:1"}, {"weight_decay", "augmentation"}),
        ({"feature_extract": True, "epochs": 5}, {"weight_decay", "augmentation"}),
        ({"model": "linear", "loss": "hinge"}, {"weight_decay", "augmentation"}),
    ],
    ids=["all layers", "phases", "head in phases", "head only", "classic"],
)
def test_only_what_has_an_effect_is_searched_unasked(options: dict[str, Any], left: set[str]) -> None:
    assert set(tune.searched_options(finetune.TrainConfig(data="x", **options), [])) == left


def test_a_search_without_an_end_of_a_training_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*values: Any, **options: Any) -> None:
        raise DivergedError("the loss became nan", "")

    monkeypatch.setattr(tune, "run_job", diverged)
    with pytest.raises(RunError, match="no training"):
        finetune.tune(data, output=tmp_path / "study", trials=2, search=SEARCHED, **OPTIONS)
    with pytest.raises(RunError, match="there is no study"):
        finetune.tune(data, output=tmp_path / "nowhere", resume=True, **OPTIONS)
