"""The verbs: what a command does, the function of the same name does."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from finetune.advice.choose import Advice, choose
from finetune.config import TrainConfig, from_yaml, starting_point, with_options
from finetune.config.durations import parse_seconds
from finetune.data.check import Diagnosis, require_trainable
from finetune.data.listing import list_images
from finetune.data.loaders import worker_faults
from finetune.data.named import WrittenData, write_named
from finetune.data.read import read_images
from finetune.data.scan import require_few_bad
from finetune.data.split import split_table
from finetune.errors import ConfigError
from finetune.evaluation.scores import Scores
from finetune.features.extract import TrunkPass
from finetune.models import catalog
from finetune.models.anatomy import Anatomy, inspect_network
from finetune.models.device import deterministic_algorithms, resolve_device
from finetune.models.freezing import freeze_stages
from finetune.models.initialize import build_as_published, build_backbone
from finetune.models.stages import find_stages
from finetune.prediction.batch import find_inputs, predict_many
from finetune.prediction.classifier import Classifier, load_classifier
from finetune.prediction.dense import Explanation, explain_image, over_whole_pictures
from finetune.prediction.evaluate import Evaluation, SplitChoice, choose_split, evaluate_table
from finetune.report.charts import draw_rate_sweep
from finetune.report.class_map import draw_class_map, require_new_picture
from finetune.report.plots import write_plots
from finetune.runs.cache_folder import clear_cache, list_cache, prune_cache  # noqa: F401 (verbs as they are)
from finetune.runs.folder import RunFolder, next_free_folder
from finetune.runs.processes import (
    ALONE,
    Processes,
    join_processes,
    launched_count,
    peer_faults,
)
from finetune.runs.records import FailedPrediction, Prediction
from finetune.runs.reporting import LoggingReporter, Reporter, SilentReporter
from finetune.server.watch import watch_server  # noqa: F401 (a verb as it is)
from finetune.training.assemble import assemble, seed_everything
from finetune.training.budget import first_began
from finetune.training.folds import train_folds
from finetune.training.opening import list_data, opened_run, require_outside
from finetune.training.rate_finder import RateSweep, sweep_rates
from finetune.training.run import run_job
from finetune.training.start import ask_network, is_studied_by_sample, study_trunk
from finetune.training.tracking import require_tracker
from finetune.training.tune import Tuning, opened_study, search_options, searched_options

Pathlike = str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """A finished training: its folder, the scores of its held-out splits, and its classifier."""

    folder: Path
    metrics: Mapping[str, Scores]

    @cached_property
    def classifier(self) -> Classifier:
        """The model that was kept, loaded from the folder."""
        return load_classifier(self.folder)


def train(
    data: Pathlike | None = None,
    *,
    config: TrainConfig | None = None,
    reporter: Reporter | None = None,
    began: float | None = None,
    **options: object,
) -> Run:
    """Train a classifier on a folder or CSV of labelled images and leave a run folder.

    Args:
        data: What to train on; may stand in `config` instead.
        config: Where the options start from; the defaults without one, the run's own config with `resume=True`.
        reporter: Shows messages and progress; by default they go to the logger "finetune".
        began: When a `budget` began to run, by time.monotonic(); by default now.
        options: Any field of `TrainConfig`, by name.

    Raises:
        ConfigError, DataError, ModelError, RunError: Something given cannot be used; the message says what to do.
        DivergedError: The loss is no longer finite.
        MissingExtraError: The tracker is not installed.
    """
    began, asked = began or time.monotonic(), _whole_config(data, config, options)
    require_tracker(asked.tracker)
    processes = join_processes(asked.device)
    reporter = _voice(reporter, processes)
    began = first_began(began, processes)
    with (
        opened_run(asked, processes, reporter) as (whole, listing, run),
        deterministic_algorithms(is_asked=whole.deterministic),
    ):
        if whole.folds:
            metrics = train_folds(whole, run, listing, reporter, processes=processes)
        else:
            with closing(assemble(whole, run, listing, reporter, began=began, processes=processes)) as job:
                metrics = run_job(job, reporter)
        processes.from_main(lambda: write_plots(run, listing.root))
    return Run(run.path, metrics)


def find_learning_rate(
    data: Pathlike | None = None,
    *,
    config: TrainConfig | None = None,
    reporter: Reporter | None = None,
    **options: object,
) -> RateSweep:
    """Sweep the learning rate of the training that `train` would do, without doing it, and draw what was found.

    The run folder gets plots/learning_rates.png beside what `train` writes before its first step.

    Args:
        data: What to train on; may stand in `config` instead.
        config: Where the options start from; the defaults without one.
        reporter: Shows messages and progress; by default they go to the logger "finetune".
        options: Any field of `TrainConfig`, by name.

    Raises:
        ConfigError, DataError, ModelError, RunError: Something given cannot be used; the message says what to do.
    """
    reporter, asked = reporter or LoggingReporter(), _whole_config(data, config, options)
    if asked.resume:
        raise ConfigError("a training that has begun keeps its rates", "look for a rate without --resume")
    if asked.folds:
        raise ConfigError("the rates of one training are swept", "look for a rate without --folds")
    if launched_count() > 1:
        raise ConfigError("the rates are swept by one process", "look for a rate without a launcher such as torchrun")
    with (
        opened_run(asked, ALONE, reporter) as (whole, listing, run),
        deterministic_algorithms(is_asked=whole.deterministic),
    ):
        with closing(assemble(whole, run, listing, reporter, began=time.monotonic())) as job:
            sweep = sweep_rates(job.learner, job.batches.loaders, reporter=reporter)
        run.record("rate_sweep", asdict(sweep))
        draw_rate_sweep(sweep.rates, sweep.losses, run.plots / "learning_rates.png", suggestion=sweep.suggestion)
    return sweep


def tune(
    data: Pathlike | None = None,
    *,
    config: TrainConfig | None = None,
    search: Sequence[str] = (),
    trials: int = 20,
    timeout: str = "",
    reporter: Reporter | None = None,
    **options: object,
) -> Tuning:
    """Search for better options by training again and again, and leave a study with a run folder for each.

    Args:
        data: What to train on; may stand in `config` instead.
        config: What all trainings share; the defaults without one.
        search: The options to search; by default the usual ones that are not given.
        trials: How many trainings there are to be in all.
        timeout: Time after which none begins, such as "2h"; nothing sets no limit.
        reporter: Told of every training; by default the logger "finetune" is.
        options: Any field of `TrainConfig`, by name; `output` is the folder of the study, and with `resume=True` it
            goes on.

    Raises:
        ConfigError, DataError, ModelError, RunError: Something given cannot be used; the message says what to do.
        MissingExtraError: Optuna is not installed.
    """
    if launched_count() > 1:
        raise ConfigError("a search trains in one process", "tune without a launcher such as torchrun")
    deadline = time.monotonic() + parse_seconds(timeout) if timeout else math.inf
    asked = _whole_config(data, config, options)
    require_tracker(asked.tracker)
    searched = searched_options(asked, search) if search or not asked.resume else ()
    listing = list_data(asked)
    folder = asked.output or next_free_folder(asked.data, "tune")
    require_outside(folder, asked, listing)
    with (
        opened_study(replace(asked, output=folder)) as shared,
        worker_faults(),
        deterministic_algorithms(is_asked=shared.deterministic),
    ):
        return search_options(
            shared,
            folder,
            listing,
            reporter or LoggingReporter(),
            searched=searched,
            is_named=bool(search),
            trials=trials,
            deadline=deadline,
        )


def _whole_config(data: Pathlike | None, config: TrainConfig | None, options: dict[str, object]) -> TrainConfig:
    if data is not None:
        options["data"] = data
    if config is None and options.get("resume") and options.get("output"):
        saved = RunFolder(Path(str(options["output"]))).config
        config = from_yaml(saved) if saved.exists() else None
    return with_options(config or starting_point(options.get("model")), options)


def _voice(reporter: Reporter | None, processes: Processes) -> Reporter:
    return reporter or LoggingReporter() if processes.is_main else SilentReporter()


def load(path: Pathlike, *, device: str = "auto") -> Classifier:
    """Load the classifier of a run folder or a model.safetensors; no code runs and no network is used.

    Raises:
        RunError: There is no such run or file.
        ModelError: The file is damaged.
    """
    return load_classifier(path, device=device)


def predict(
    run: Pathlike,
    inputs: Sequence[str],
    *,
    top_k: int = 5,
    dense: bool = False,
    batch_size: int = 32,
    device: str = "auto",
) -> Iterator[Prediction | FailedPrediction]:
    """Predict files, folders, shards and patterns one after the other; an unreadable image yields its reason.

    With `dense` the network slides over the whole of each picture, one picture at a time, and its scores are averaged.

    Raises:
        RunError, ModelError: The model cannot be loaded, or its network cannot slide.
        DataError: The only input is a shard that cannot be read.
        PredictionInputError: An input holds no image, or a pattern matches nothing.
    """
    processes = join_processes(device)
    paths = processes.from_main(lambda: find_inputs(inputs))
    classifier = load_classifier(run, device=device)
    if dense:
        classifier, batch_size = over_whole_pictures(classifier), 1
    return predict_many(classifier, paths, batch_size=batch_size, top_k=top_k, processes=processes)


def evaluate(
    run: Pathlike,
    data: Pathlike,
    *,
    split: SplitChoice = "auto",
    batch_size: int = 32,
    device: str = "auto",
    allow_bad_images: bool = False,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Score the model of `run` on labelled images.

    Args:
        run: A run folder or a model.safetensors.
        data: A folder or CSV of labelled images.
        split: Which images; "auto" takes test, else valid, else all. In a folder without splits, those that `run`
            held out are its valid images.
        batch_size: Images computed at once.
        device: "auto", "cpu", "cuda" or "mps".
        allow_bad_images: Leave out images that cannot be read instead of refusing them.
        reporter: Shows progress.

    Raises:
        DataError: There are no such images, some cannot be read, or the model does not know their classes.
    """
    processes = join_processes(device)
    reporter = _voice(reporter, processes)
    classifier = load_classifier(run, device=device)
    with peer_faults():
        listing = processes.from_main(lambda: list_images(Path(data)))
        scan = read_images(Path(data), listing=listing, processes=processes, reporter=reporter).scan
        require_few_bad(scan, allow_bad_images=allow_bad_images)
        name, table = choose_split(scan, Path(run), split)
        scores = evaluate_table(classifier, table, batch_size=batch_size, processes=processes, reporter=reporter)
    return Evaluation(split=name, scores=scores)


def check(data: Pathlike, *, label_names: Path | None = None, reporter: Reporter | None = None) -> Diagnosis:
    """Examine a folder or CSV of labelled images as the doctor does before training; nothing is written to it.

    Raises:
        DataError: DATA is absent or in no known layout.
    """
    return read_images(Path(data), label_names=label_names, reporter=reporter or LoggingReporter()).diagnosis


def advise(
    data: Pathlike,
    *,
    model: str = "efficientnet_lite0",
    weights: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> Advice:
    """Measure which scenario the images ask for with the pretrained `model`, without training it.

    Raises:
        DataError, ModelError: The images or the model cannot be used.
    """
    reporter = reporter or LoggingReporter()
    config = TrainConfig(data=str(data), seed=seed)
    seed_everything(seed)
    place = resolve_device(device)
    listing = list_data(config)
    backbone = build_backbone(model, num_classes=len(listing.class_names), weights=weights)
    backbone.module.to(place)
    backbone.module.eval()
    with TrunkPass(
        study_trunk(config, backbone, images=len(listing.rows)),
        data_root=listing.root,
        images=len(listing.rows),
        device=place,
        reporter=reporter,
    ) as trunk_pass:
        is_part = is_studied_by_sample(config, backbone, images=len(listing.rows), classes=len(listing.class_names))
        onlooker = None if is_part else trunk_pass
        images = read_images(Path(data), listing=listing, onlooker=onlooker, reporter=reporter)
        require_trainable(images.diagnosis)
        table = split_table(images.scan.table, seed=seed)
        _, evidence = ask_network(
            config, backbone, table, images.label_map, trunk_pass=trunk_pass, processes=ALONE, reporter=reporter
        )
    return choose(evidence, has_body=len(backbone.stages) > 1)


def list_models(pattern: str = "*") -> Iterator[catalog.ModelDescription]:
    """Describe the networks whose names match `pattern`, one after the other."""
    return (catalog.describe(entry) for entry in catalog.list_models(pattern))


def write_data(
    name: str, output: Pathlike, *, source: Path | None = None, reporter: Reporter | None = None
) -> WrittenData:
    """Write a well-known data set, "mnist" or "flowers102" for two, as the image folder `output`.

    Raises:
        ConfigError: The name is unknown, or `output` holds other files.
        DataError: The set cannot be downloaded, or `source`, a local copy of mnist, is damaged.
        StorageError: The disk is full or refuses.
    """
    return write_named(name, Path(output), source=source, reporter=reporter or LoggingReporter())


def explain(
    run: Pathlike,
    image: Pathlike,
    *,
    output: Pathlike | None = None,
    class_name: str | None = None,
    dense: bool = False,
    device: str = "auto",
) -> Explanation:
    """Map where on `image` the model of `run` sees a class, and draw it as the PNG file `output` if one is named.

    Args:
        run: A run folder or a model.safetensors.
        image: An image file.
        output: The PNG file to draw into.
        class_name: Folder name or display name of the class; by default the predicted one.
        dense: Look at the whole picture instead of the crop that `predict` sees.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        RunError, ModelError: The model cannot be loaded, or its network gives no map.
        ConfigError: No class has this name, or `output` is no PNG file or the image itself.
        PredictionInputError: The image cannot be read.
        StorageError: The disk is full or refuses.
    """
    if output is not None:
        require_new_picture(Path(output), Path(image))
    found = explain_image(load_classifier(run, device=device), image, class_name=class_name, dense=dense)
    if output is None:
        return found
    draw_class_map(
        found.picture_HWC,
        found.map_HW,
        Path(output),
        stride_px=found.stride_px,
        display_name=found.display_name,
        probability=found.probability,
    )
    return replace(found, output=Path(output))


def inspect(model: Pathlike, *, image_size: int | None = None) -> Anatomy:
    """Describe every layer of a network: output shape, parameters, multiply-adds, receptive field, frozen or learning.

    Args:
        model: A name of the catalog, which gives the network with its zoo's own head; or a run folder or
            model.safetensors, if there is one of this name, which gives the trained network.
        image_size: Side of the square image in pixels, by default the network's own.

    Raises:
        RunError, ModelError: There is no such network, it is damaged, or it cannot take such images.
    """
    if os.path.exists(model):  # noqa: PTH110 (Path.exists raises for names that are too long)
        classifier = load_classifier(model, device="cpu")
        module, spec = classifier.model, classifier.metadata.input_spec
        freeze_stages(module, find_stages(module), len(classifier.metadata.frozen_stages))
        side_px = image_size or spec.image_size_px
    else:
        module, spec = build_as_published(str(model), image_size=image_size)
        side_px = spec.image_size_px
    return inspect_network(module, (spec.channels, side_px, side_px))
