"""A search for better options: trainings one after the other, each with what the earlier ones have taught."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.config.phases import parse_phases
from finetune.config.schema import OPTION_NAMES, TrainConfig, flag_of, with_options
from finetune.config.yaml_io import from_yaml, to_yaml
from finetune.data.listing import Listing
from finetune.errors import ConfigError, DivergedError, MissingExtraError, RunError, first_ten, nearest
from finetune.runs.folder import RunFolder, hold_folder, open_run, write_whole
from finetune.runs.reporting import Reporter, SilentReporter
from finetune.training.assemble import assemble
from finetune.training.job import Job
from finetune.training.progress import Progress
from finetune.training.run import run_job

if TYPE_CHECKING:
    from optuna import Study, Trial

Choice = tuple[Literal["one of", "between", "by size"], tuple[Any, ...]]
"""What an option may be: one of several values, or a number between two, evenly or by its order of magnitude."""

SPACE: dict[str, Choice] = {
    "scenario": ("one of", ("small-similar", "small-different", "large-similar")),
    "trunk_learning_rate": ("by size", (1e-4, 3e-2)),
    "depth_ratio": ("by size", (3e-3, 1.0)),
    "weight_decay": ("by size", (1e-5, 1e-1)),
    "augmentation": ("one of", ("none", "light", "trivial")),
    "learning_rate": ("by size", (1e-4, 1e-1)),
    "optimizer": ("one of", ("adamw", "sgd")),
    "batch_size": ("one of", (16, 32, 64)),
    "label_smoothing": ("between", (0.0, 0.2)),
    "mixup": ("between", (0.0, 0.4)),
    "averaging": ("one of", ("none", "ema", "ends")),
}
"""The options that can be searched; the first five are by default, unless they were given."""

SEARCHED = tuple(SPACE)[:5]
FREE = ("data", "output", "workers", "device")  # may differ where a search goes on
STUDY_FILE = "study.db"
SEARCHED_HERE = "searched"
NAME = "finetune"
UNPRUNED_TRIALS, UNPRUNED_EPOCHS = 5, 1


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a search has found: the best run, its validation accuracy (0..1), and the options that made it.

    `trials` counts the trainings of the study, `pruned` those of them that were ended early.
    """

    best: Path
    accuracy: float
    options: dict[str, Any]
    trials: int
    pruned: int


def search_options(
    config: TrainConfig,
    folder: Path,
    listing: Listing,
    reporter: Reporter,
    *,
    searched: tuple[str, ...],
    is_named: bool,
    trials: int,
    deadline: float,
) -> Tuning:
    """Train until the study in `folder` has `trials` trainings, and return the best.

    Every training is a run folder below `folder`, of which the best keeps its model; the study itself is an Optuna one
    in SQLite, so that a search that was interrupted goes on, and one that has ended can be made longer. A training that
    is worse than half of the earlier ones after as many epochs is ended.

    Args:
        config: The options that all trainings share.
        folder: Where the study is or will be.
        listing: The images of DATA.
        reporter: Told of every training.
        searched: The options to search, as `searched_options` gives them; a study that goes on has its own.
        is_named: Whether they were named, and so have to be those of the study.
        trials: How many trainings there are to be in all.
        deadline: By time.monotonic(), after which none begins.

    Raises:
        RunError: Nothing was trained, or the study searches other options.

    Source: Akiba 2019, Optuna, arXiv 1907.10902; the tree-structured Parzen estimator of Bergstra 2011.
    """
    study = _open_study(folder, seed=config.seed)
    kept = tuple(study.user_attrs.get(SEARCHED_HERE) or searched or searched_options(config, ()))
    if is_named and set(kept) != set(searched):
        raise RunError(f"{folder} cannot be gone on with: --search was {' '.join(kept)}", "begin with another --output")
    study.set_user_attr(SEARCHED_HERE, kept)
    while (number := _finished(study)) < trials and (time.monotonic() < deadline or not number):
        trial = study.ask()
        values = {name: _suggest(trial, name) for name in kept}
        told = ", ".join(f"{name} {_shown(value)}" for name, value in values.items())
        try:
            outcome = _try(config, folder, listing, study=study, trial=trial, values=values)
        except (KeyboardInterrupt, SystemExit):
            reporter.say(f"Interrupted. Go on with: finetune tune --output {folder} --resume --trials {trials}")
            raise
        reporter.say(f"Trial {number + 1} of {trials}: {told}: {outcome}.")
        _keep_the_best(study, folder)
    if not any(trial.value is not None for trial in study.trials):
        raise RunError(f"no training in {folder} has come to its end", "give it more --trials or a longer --timeout")
    best = study.best_trial
    return Tuning(
        best=trial_folder(folder, best.number).path,
        accuracy=float(best.value or 0.0),
        options=dict(best.params),
        trials=_finished(study),
        pruned=sum(trial.state.name == "PRUNED" for trial in study.trials),
    )


@contextmanager
def opened_study(config: TrainConfig) -> Iterator[TrainConfig]:
    """Make or open the folder of a study, `config.output`, and hold it; give the options that its trainings share.

    Raises:
        ConfigError: An option makes no sense for a study.
        MissingExtraError: Optuna is not installed.
        RunError: It holds something and `resume` is not asked for, it holds no study, or one of other options.
    """
    assert config.output is not None
    _import_optuna()
    if config.folds or config.overwrite:
        raise ConfigError("tune takes neither --folds nor --overwrite", "name another --output, or --resume")
    study = RunFolder(config.output)
    is_there = (study.path / STUDY_FILE).exists()
    if config.resume and not is_there:
        raise RunError(f"there is no study to go on with in {study.path}", "check --output, or leave --resume out")
    if not config.resume and study.path.is_dir() and any(study.path.iterdir()):
        raise RunError(f"{study.path} is not empty", "pass --resume to go on with its study, or another --output")
    config = replace(config, data=str(Path(config.data).resolve()), resume=False, overwrite=False)
    with hold_folder(study.path):
        if not is_there:
            write_whole(study.config, to_yaml(config))
        else:
            _refuse_changes(config, from_yaml(study.config), study.path)
        yield config


def _refuse_changes(config: TrainConfig, before: TrainConfig, folder: Path) -> None:
    """Refuse to compare trainings whose common options differ."""
    pairs = {name: (getattr(before, name), getattr(config, name)) for name in OPTION_NAMES if name not in FREE}
    changes = [f"{flag_of(name)} was {old!r} and is {new!r}" for name, (old, new) in pairs.items() if old != new]
    if changes:
        raise RunError(f"{folder} cannot be gone on with: {'; '.join(changes)}", "begin with another --output")


def trial_folder(folder: Path, number: int) -> RunFolder:
    """Return the run of the trial of this number."""
    return RunFolder(folder / f"trial-{number:04d}")


class _Pruning:
    """A watcher that ends a training which does worse than half of the earlier ones did after as many epochs."""

    def __init__(self, trial: "Trial") -> None:
        self.trial = trial

    def epoch_started(self, progress: Progress) -> None:
        """Nothing to do."""

    def step_ended(self, progress: Progress) -> None:
        """Nothing to do."""

    def epoch_ended(self, progress: Progress) -> None:
        """Report the best so far and see whether it is good enough to go on."""
        from optuna import TrialPruned

        self.trial.report(progress.history.best_accuracy, progress.epoch)
        if self.trial.should_prune():
            raise TrialPruned


def _try(
    config: TrainConfig,
    folder: Path,
    listing: Listing,
    *,
    study: "Study",
    trial: "Trial",
    values: dict[str, Any],
) -> str:
    """Train with `values`, tell the study what came of it, and return it in words."""
    from optuna import TrialPruned
    from optuna.trial import TrialState

    run = trial_folder(folder, trial.number)
    try:
        whole = replace(with_options(config, values), output=run.path, overwrite=False)
        with open_run(run.path), closing(_assembled(whole, run, listing)) as job:
            run_job(job, SilentReporter(), watchers=[_Pruning(trial)])
    except TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        return "ended early, for half of those before it did better after as many epochs"
    except DivergedError as error:
        study.tell(trial, state=TrialState.PRUNED)
        return f"ended early: {error.message}"
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)  # the first to be tried when the search goes on
        raise
    accuracy = job.progress.history.best_accuracy
    study.tell(trial, accuracy)
    return f"validation accuracy {accuracy:.1%}"


def _assembled(config: TrainConfig, run: RunFolder, listing: Listing) -> Job:
    return assemble(config, run, listing, SilentReporter(), began=time.monotonic())


def searched_options(config: TrainConfig, names: Sequence[str]) -> tuple[str, ...]:
    """Return the options of SPACE to search: those named, or the usual ones that `config` leaves open.

    Raises:
        ConfigError: An option cannot be searched, or there is nothing to search.
    """
    names = tuple(name.replace("-", "_") for name in names)
    if unknown := [name for name in names if name not in SPACE]:
        raise ConfigError(f"these options cannot be searched: {first_ten(unknown)}", nearest(unknown[0], list(SPACE)))
    for name in names:
        _require_compatible(config, name)
    defaults = TrainConfig()
    without_effect = _without_effect(config)
    free = tuple(
        name for name in SEARCHED if getattr(config, name) == getattr(defaults, name) and name not in without_effect
    )
    if not (names or free):
        raise ConfigError(
            "there is nothing to search: every option was given or has no effect", f"name some: {', '.join(SPACE)}"
        )
    return names or free


def _require_compatible(config: TrainConfig, name: str) -> None:
    """Refuse an option that cannot take its values beside those of `config`."""
    for value in SPACE[name][1]:
        try:
            with_options(config, {name: value})
        except ConfigError as error:
            raise ConfigError(f"{name} cannot be searched here: {error.message}", error.hint) from error


def _without_effect(config: TrainConfig) -> set[str]:
    """Return which of the SEARCHED options change nothing where it is given what learns."""
    if "knn" in (config.head, config.model):
        return set(SEARCHED)
    phases = parse_phases(config.phases)
    is_head_only = config.feature_extract or config.model == "linear" or config.scenario == "small-similar"
    is_solved = config.head_start == "probe" and config.loss == "cross-entropy" and config.epochs in ("auto", 0)
    if is_head_only and is_solved and not phases:
        return set(SEARCHED)
    if is_head_only or (phases and all(phase.learning == "head" for phase in phases)):
        return {"scenario", "trunk_learning_rate", "depth_ratio"}
    return {"scenario"} if phases else set()


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("finetune tune needs the package optuna", 'pip install "finetune[tune]"') from error
    return optuna


def _open_study(folder: Path, *, seed: int) -> "Study":
    optuna = _import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=NAME,
        storage=f"sqlite:///{folder.absolute() / STUDY_FILE}",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED_TRIALS, n_warmup_steps=UNPRUNED_EPOCHS),
    )
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), multivariate=False)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a process that was killed
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return study


def _finished(study: "Study") -> int:
    return sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)


def _suggest(trial: "Trial", name: str) -> Any:
    match SPACE[name]:
        case ("one of", values):
            return trial.suggest_categorical(name, values)
        case (how, (low, high)):
            return trial.suggest_float(name, low, high, log=how == "by size")


def _shown(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _keep_the_best(study: "Study", folder: Path) -> None:
    """Delete what takes much of the disk in every run but the best."""
    done = [trial for trial in study.trials if trial.value is not None]
    best = study.best_trial.number if done else None
    for trial in study.trials:
        run = trial_folder(folder, trial.number)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        if trial.number != best:
            run.model.unlink(missing_ok=True)
