"""The only place where a config becomes objects: images, network, advice, plan, and all that the loop works on."""

import os
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.config.durations import parse_seconds
from finetune.config.phases import parse_phases
from finetune.config.schema import TrainConfig, flag_of
from finetune.config.yaml_io import to_yaml
from finetune.data.check import require_trainable
from finetune.data.listing import Listing
from finetune.data.read import read_images
from finetune.data.scan import Onlooker, write_bad_files
from finetune.data.split import apply_split, split_table, write_split_csv
from finetune.data.table import ImageTable
from finetune.errors import ConfigError, ModelError, RunError
from finetune.features.extract import TrunkPass
from finetune.models.device import resolve_device, resolve_precision
from finetune.models.initialize import Backbone, build_backbone
from finetune.models.neighbours import require_vectors
from finetune.models.stage_outputs import attach_saved_stage_outputs
from finetune.runs import strict_json
from finetune.runs.environment import describe_environment
from finetune.runs.folder import RunFolder, write_whole
from finetune.runs.processes import ALONE, Processes
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter
from finetune.training.budget import Budget, decoding_pace
from finetune.training.checkpoint import SavedState, read_state, restore_state
from finetune.training.job import Job, fixed_options
from finetune.training.plan import Plan, phases_text, plan_phases
from finetune.training.progress import Progress
from finetune.training.start import is_studied, is_studied_by_sample, start_network, study_trunk

ANEW = "train anew with another --output"


def assemble(
    config: TrainConfig,
    run: RunFolder,
    listing: Listing,
    reporter: Reporter,
    *,
    began: float = 0.0,
    processes: Processes = ALONE,
    is_fold: bool = False,
) -> Job:
    """Turn `config` into a job on the images of `listing`: a new one, or the one that `resume` goes on with.

    `began` is when its budget, if it has one, began to run, by time.monotonic(), and `processes` those that share it.
    What a job that `is_fold` of a cross-validation holds back chooses nothing.

    Raises:
        ConfigError, DataError, ModelError: The options, the images or the network cannot be used.
        RunError: A resume finds other options or images than were saved, or no state to go on from.
    """
    device = resolve_device(config.device)
    seed_everything(config.seed)
    budget = (
        Budget(parse_seconds(config.budget), began=began, processes=processes.in_epoch()) if config.budget else None
    )
    if config.resume:
        job, saved = _saved_job(config, run, listing, device, reporter, processes=processes)
        job.budget, job.is_fold = budget, is_fold
        job.enter_phase()
        job.fit_budget()
        torch.manual_seed(config.seed + processes.rank)  # for one more process than there were
        saved_plan = saved.values["identity"]["plans"][job.progress.phase]
        is_longer = job.plan.epochs > saved_plan["epochs"]
        job.progress = restore_state(saved, job.learner, is_longer=is_longer)
        if is_longer:
            job.progress.longer_from = job.progress.epoch
        if processes.is_main:
            _forget_later_events(run, saved)
    else:
        job = _new_job(config, run, listing, device, reporter, budget=budget, processes=processes)
        processes.same(job.backbone.module.state_dict().values())
        job.is_fold = is_fold
        job.enter_phase()
        job.fit_budget()
        if processes.rank:
            torch.manual_seed(config.seed + processes.rank)  # so that each drops out what it pleases
    job.config = _resolved(config, job)
    if processes.is_main:
        _write_down(job, is_new=not config.resume)
    return job


def _write_down(job: Job, *, is_new: bool) -> None:
    """Write how the training is set up, and, when it is new, where."""
    if is_new:
        environment = describe_environment(
            device=str(job.device),
            processes=job.processes.count,
            threads=torch.get_num_threads(),
            precision=resolve_precision(job.config.precision, job.device, job.batches.model),
            seed=job.config.seed,
        )
        write_whole(job.run.environment, strict_json.dump(environment, indent=1))
    write_whole(job.run.config, to_yaml(job.config))


def _new_job(
    config: TrainConfig,
    run: RunFolder,
    listing: Listing,
    device: torch.device,
    reporter: Reporter,
    *,
    budget: Budget | None,
    processes: Processes,
) -> Job:
    backbone = _network(config, listing, device)
    if budget:
        config, backbone = _in_time(config, listing, backbone, budget, device, processes=processes, reporter=reporter)
    with ExitStack() as stack:
        trunk_pass = None
        if is_studied(config, backbone):
            precision = resolve_precision(config.precision, device, backbone.module)
            trunk_pass = stack.enter_context(
                TrunkPass(
                    study_trunk(config, backbone, images=len(listing.rows)),
                    data_root=listing.root,
                    images=len(listing.rows),
                    device=device,
                    reporter=reporter,
                    precision=precision,
                    processes=processes,
                )
            )
        is_part = is_studied_by_sample(config, backbone, images=len(listing.rows), classes=len(listing.class_names))
        onlooker = None if is_part else trunk_pass
        table, label_map = _images(config, run, listing, onlooker=onlooker, processes=processes, reporter=reporter)
        plans = start_network(
            config,
            run,
            backbone,
            table,
            label_map,
            trunk_pass=trunk_pass,
            processes=processes,
            reporter=reporter,
        )
    if plans[0].start == "fresh" and backbone.is_pretrained:
        backbone = _network(config, listing, device, is_filled_later=True)
    return Job(
        config=config,
        run=run,
        table=table,
        label_map=label_map,
        backbone=backbone,
        plans=plans,
        device=device,
        reporter=reporter,
        processes=processes,
        budget=budget,
    )


def _in_time(
    config: TrainConfig,
    listing: Listing,
    backbone: Backbone,
    budget: Budget,
    device: torch.device,
    *,
    processes: Processes,
    reporter: Reporter,
) -> tuple[TrainConfig, Backbone]:
    """Return the config and the network for images as large as there is time for, or as they are asked for."""
    spec = backbone.input_spec

    def size() -> int:
        try:
            return budget.image_size(
                backbone.module,
                spec,
                images=len(processes.share(listing.rows)),
                decode_seconds=decoding_pace(ImageTable(listing.root, listing.rows), spec),
                device=device,
                is_studied=is_studied(config, backbone),
            )
        except ConfigError as error:
            if config.image_size == "auto":
                raise
            reporter.warn(f"{error.message}; {error.hint}.")
            return spec.image_size_px

    size_px = processes.from_main(size)
    if size_px == spec.image_size_px or config.image_size != "auto":
        return config, backbone
    sized = replace(config, image_size=size_px)
    try:
        return sized, _network(sized, listing, device)
    except ModelError:
        return config, backbone  # it takes images of one size only


def _saved_job(
    config: TrainConfig,
    run: RunFolder,
    listing: Listing,
    device: torch.device,
    reporter: Reporter,
    *,
    processes: Processes,
) -> tuple[Job, SavedState]:
    """Return the job that `run` holds, with the weights of its last save but nothing else restored yet."""
    saved = processes.from_main(lambda: read_state(run, reporter))
    identity = saved.values["identity"]
    refuse_changes(config, identity["options"], run)
    backbone = _network(config, listing, device, is_filled_later=True)
    names = [stage.name for stage in backbone.stages]
    config = replace(config, phases=config.phases or identity["phases"])
    _refuse_fewer_epochs(config, saved, run)
    plans = _saved_plans(config, identity["plans"], names)
    _refuse_other_phases(config, plans, names, run, had_phases=bool(identity["phases"]))
    table, label_map = _images(config, run, listing, onlooker=None, processes=processes, reporter=reporter)
    if identity["data_fingerprint"] != table.fingerprint():
        raise RunError(f"{run.path} cannot be resumed: its split.csv was edited since training began", ANEW)
    if plans[0].head_inputs:
        attach_saved_stage_outputs(
            backbone.module,
            plans[0].head_inputs,
            saved.model,
            input_spec=backbone.input_spec,
            source=str(saved.folder),
        )
    backbone.module.load_state_dict(saved.model)  # what frozen layers give is computed before all is restored
    job = Job(
        config=config,
        run=run,
        table=table,
        label_map=label_map,
        backbone=replace(backbone, weights=identity["pretrained_weights"]),
        plans=plans,
        device=device,
        reporter=reporter,
        processes=processes,
        progress=Progress(phase=saved.values["progress"]["phase"]),
    )
    return job, saved


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; loaders and splits have their own."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _images(
    config: TrainConfig,
    run: RunFolder,
    listing: Listing,
    *,
    onlooker: Onlooker | None,
    processes: Processes,
    reporter: Reporter,
) -> tuple[ImageTable, LabelMap]:
    images = read_images(
        Path(config.data),
        listing=listing,
        label_names=config.label_names,
        allow_bad_images=config.allow_bad_images,
        onlooker=onlooker,
        processes=processes,
        reporter=reporter,
    )
    if processes.is_main:
        write_bad_files(images.scan.bad_files, run.bad_files)
    for finding in images.diagnosis.findings:
        if finding.severity == "warning":
            reporter.warn(finding.message)
    require_trainable(images.diagnosis)
    if config.resume or processes.from_main(run.split.exists):  # a fold of a cross-validation has got one
        return processes.from_main(lambda: apply_split(images.scan.table, run.split)), images.label_map
    table = split_table(images.scan.table, seed=config.seed, valid_fraction=config.valid_fraction)
    if processes.is_main:
        write_split_csv(table, run.split)
    return table, images.label_map


def _network(config: TrainConfig, listing: Listing, device: torch.device, *, is_filled_later: bool = False) -> Backbone:
    """Build the network, with random weights where those it will have come from elsewhere."""
    backbone = build_backbone(
        config.model,
        num_classes=len(listing.class_names),
        use_pretrained=config.use_pretrained and not is_filled_later,
        weights=None if is_filled_later else config.weights,
        head=config.head,
        image_size=None if config.image_size == "auto" else config.image_size,
        channels=None if config.channels == "auto" else config.channels,
    )
    if config.head == "knn":
        require_vectors(backbone.module)
    if config.shuffle_pixels:
        spec = replace(backbone.input_spec, pixel_permutation_seed=config.seed)
        backbone = replace(backbone, input_spec=spec)
    backbone.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return backbone


def _saved_plans(config: TrainConfig, saved: list[dict[str, Any]], names: Sequence[str]) -> tuple[Plan, ...]:
    """Return the plans that were followed, the last of them with as many epochs as make up those now asked for."""
    texts = ("frozen_stages", "head_inputs", "kept_outputs")  # JSON has no tuples
    *plans, last = (Plan(**values | {name: tuple(values[name]) for name in texts}) for values in saved)
    if config.epochs != "auto":
        fewest = 1 if config.phases else 0
        last = replace(last, epochs=max(config.epochs - sum(plan.epochs for plan in plans), fewest))
    elif config.phases:
        asked = plan_phases(last, parse_phases(config.phases), names)
        last = replace(last, epochs=max(last.epochs, asked[-1].epochs))
    return (*plans, last)


def _resolved(config: TrainConfig, job: Job) -> TrainConfig:
    plan, spec = job.plans[0], job.backbone.input_spec
    values: dict[str, Any] = {}
    if config.phases:
        names = [stage.name for stage in job.backbone.stages]
        values = {"phases": phases_text(job.plans, names), "epochs": "auto", "budget": ""}
    else:
        values = {
            "epochs": plan.epochs,
            "views": plan.views,
            "boundary_cache": "always" if plan.boundary_cache else "never",
        }
    return replace(
        config,
        data=str(Path(config.data).resolve()),
        output=None,
        weights=None if plan.start == "fresh" else _absolute(config.weights),
        label_names=_absolute(config.label_names),
        scenario=plan.scenario,
        head_start="random" if plan.head_start == "random" else "probe",
        head_stages="all" if plan.head_inputs else "last",
        image_size=spec.image_size_px,
        channels=spec.channels,
        batch_size=plan.batch_size,
        optimizer=plan.optimizer,
        learning_rate=plan.learning_rate,
        trunk_learning_rate=plan.trunk_learning_rate,
        depth_ratio=plan.depth_ratio,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        workers=job.batches.workers if len(job.plans) == 1 else config.workers,  # a later phase may need others
        resume=False,
        overwrite=False,
        **values,
    )


def _absolute(path: Path | None) -> Path | None:
    return path and path.resolve()


def refuse_changes(config: TrainConfig, options: dict[str, Any], run: RunFolder) -> None:
    """Compare the options as they were given with those the run was saved with; an "auto" agrees with any.

    Raises:
        RunError: Some differ; all are listed.
    """
    changes = [
        f"{flag_of(name)} was {options[name]!r} and is {value!r}"
        for name, value in fixed_options(config).items()
        if value not in ("auto", options[name])
    ]
    if changes:
        raise RunError(f"{run.path} cannot be resumed: {'; '.join(changes)}", ANEW)


def _refuse_fewer_epochs(config: TrainConfig, saved: SavedState, run: RunFolder) -> None:
    done = saved.values["progress"]["epoch"]
    if config.epochs != "auto" and config.epochs < done:
        raise RunError(
            f"{run.path} cannot be resumed: {done} epochs are done, and --epochs asks for {config.epochs}",
            "ask for more, or leave --epochs out to go on as it was planned",
        )


def _refuse_other_phases(
    config: TrainConfig, plans: tuple[Plan, ...], names: Sequence[str], run: RunFolder, *, had_phases: bool
) -> None:
    """Compare the phases as they were given with the saved ones; only the length of the last may differ."""

    def lasting(phases: tuple[Plan, ...]) -> str:
        return phases_text((*phases[:-1], replace(phases[-1], epochs=0)), names)

    asked = plan_phases(plans[0], parse_phases(config.phases), names)
    if bool(config.phases) != had_phases or lasting(asked) != lasting(plans):
        before = phases_text(plans, names) if had_phases else ""
        raise RunError(f"{run.path} cannot be resumed: --phases was {before!r} and is {config.phases!r}", ANEW)


def _forget_later_events(run: RunFolder, saved: SavedState) -> None:
    """Cut metrics.jsonl back to where the saved state left it: what came after will happen again."""
    if run.metrics.exists():
        kept = run.metrics.read_bytes()[: saved.values["metrics_bytes"]]
        os.truncate(run.metrics, kept.rfind(b"\n") + 1)  # a power cut may have taken the end of a line
