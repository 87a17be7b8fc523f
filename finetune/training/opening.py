"""How a training begins: its images listed and its run folder opened, by one process for all, also after a restart."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from finetune.config import TrainConfig, from_yaml
from finetune.data.check import require_classes
from finetune.data.listing import Listing, list_images
from finetune.data.loaders import worker_faults
from finetune.errors import ConfigError, RunError
from finetune.runs.folder import RunFolder, next_free_folder, open_run
from finetune.runs.processes import Processes, peer_faults
from finetune.runs.reporting import Reporter
from finetune.training.assemble import refuse_changes
from finetune.training.checkpoint import holds_saves
from finetune.training.job import fixed_options

FOLDER = "run folder"  # of this job, which is to be found again after a restart
RESTART_SECONDS = 30.0  # for which processes of a job that was killed may still hold it


@contextmanager
def opened_run(
    config: TrainConfig, processes: Processes, reporter: Reporter
) -> Iterator[tuple[TrainConfig, Listing, RunFolder]]:
    """List the images and open the run folder, named in the config then, while the main process writes to it."""
    with ExitStack() as stack, worker_faults(), peer_faults():
        yield processes.from_main(lambda: _open(config, stack, processes, reporter))


def list_data(config: TrainConfig) -> Listing:
    """List the images to learn from: the first to be done, before anything is made or emptied for them.

    Raises:
        ConfigError, DataError: There is no DATA, or too few classes in it.
        RunError: There is no run whose DATA could be taken.
    """
    if not config.data and config.resume:
        raise RunError(f"there is no run to resume in {config.output}", "check --output, or leave --resume out")
    if not config.data:
        raise ConfigError("no DATA to train on", "name a folder or CSV of labelled images")
    listing = list_images(Path(config.data))
    require_classes(listing)
    return listing


def require_outside(output: Path, config: TrainConfig, listing: Listing) -> None:
    """Refuse to write among the images.

    Raises:
        ConfigError: `output` lies in the folder of the images.
    """
    if Path(config.data).is_dir() and output.resolve().is_relative_to(listing.root.resolve()):
        raise ConfigError(f"the run folder {output} lies inside DATA", "name an --output outside of it")


def _open(
    config: TrainConfig, stack: ExitStack, processes: Processes, reporter: Reporter
) -> tuple[TrainConfig, Listing, RunFolder]:
    listing = list_data(config)
    if folder := processes.recall(FOLDER):
        config = _going_on(config, Path(folder))
    output = config.output or next_free_folder(config.data, config.model)
    config = replace(config, output=output)
    require_outside(output, config, listing)
    patience = RESTART_SECONDS if folder else 0.0
    run = stack.enter_context(
        open_run(output, resume=config.resume, overwrite=config.overwrite, patience_seconds=patience)
    )
    processes.remember(FOLDER, str(output))
    if config.resume and not (_has_saves(run) or run.model.exists() or run.plots.exists()):
        refuse_changes(config, fixed_options(from_yaml(run.config)), run)
        reporter.say(f"{output} was stopped before its first save: it begins again.")
        run.metrics.unlink(missing_ok=True)
        config = replace(config, resume=False)
    return config, listing, run


def _going_on(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return the config with which a job goes on that had `folder` before its launcher restarted it."""
    if config.resume:
        return config
    run = RunFolder(folder)
    if _has_saves(run):
        return replace(from_yaml(run.config), output=folder, resume=True)
    return replace(config, output=folder, overwrite=True)


def _has_saves(run: RunFolder) -> bool:
    """Tell whether a training has saved anything in its run folder, be it damaged."""
    return holds_saves(run.checkpoints) or (run.folds.is_dir() and run.config.exists())
