"""Where a new training starts from: the images studied, the scenario chosen, the plan made, the head in place."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.advice.choose import choose
from finetune.advice.measure import Evidence, count_images, measure
from finetune.config.phases import parse_phases
from finetune.config.schema import TrainConfig
from finetune.data.table import ImageTable
from finetune.errors import ConfigError, ModelError
from finetune.features.extract import TrunkPass
from finetune.features.trunk import Trunk, pooled_trunk
from finetune.models.device import resolve_precision
from finetune.models.freezing import Scenario, freeze_stages, frozen_count
from finetune.models.heads import can_load_linear_head, head_module, load_linear_head
from finetune.models.initialize import Backbone
from finetune.models.neighbours import NeighbourHead, attach_neighbours, choose_neighbours
from finetune.models.stage_outputs import attach_stage_outputs, stage_ends
from finetune.runs import strict_json
from finetune.runs.folder import RunFolder, write_whole
from finetune.runs.processes import Processes
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter
from finetune.training.batch_size import fastest_batch_size
from finetune.training.boundary import weigh_boundary
from finetune.training.objectives import balanced_class_weights
from finetune.training.plan import Plan, make_plan, plan_phases
from finetune.training.study import (
    Baselines,
    Study,
    is_sampled,
    majority_accuracy,
    may_look_at_all,
    sample_to_study,
    study_images,
)

Array = np.ndarray[Any, Any]


def is_studied(config: TrainConfig, backbone: Backbone) -> bool:
    """Tell whether the network is asked what it makes of the images before it learns.

    One with random layers is not, unless they are to stay as they are.
    """
    return backbone.is_pretrained or len(backbone.stages) == 1 or _requested(config) not in ("auto", "large-different")


def is_studied_by_sample(config: TrainConfig, backbone: Backbone, *, images: int, classes: int) -> bool:
    """Tell whether a sample of so many training images is studied: not where no more than the head will learn."""
    has_body = len(backbone.stages) > 1
    return has_body and _requested(config) != "small-similar" and is_sampled(images, classes=classes)


def study_trunk(config: TrainConfig, backbone: Backbone, *, images: int) -> Trunk:
    """Return what so many images are studied by: the pooled features, and of not too many the outputs of all stages.

    These are had for nothing, and kept together whatever the head will look at.

    Raises:
        ModelError: `head_stages` is "all", and there is nothing else to look at than the features.
    """
    ends = stage_ends(backbone.module, backbone.stages, backbone.input_spec)
    if config.head_stages == "all" and not ends:
        raise ModelError(
            f"--head-stages all: {backbone.name} has no other stages that a head could look at", "leave it out"
        )
    trunk = pooled_trunk(backbone)
    if config.head_stages != "all" and not may_look_at_all(images, width=trunk.width + sum(ends.values())):
        return trunk
    return pooled_trunk(backbone, tuple(ends))


def ask_network(
    config: TrainConfig,
    backbone: Backbone,
    table: ImageTable,
    label_map: LabelMap,
    *,
    trunk_pass: TrunkPass,
    processes: Processes,
    reporter: Reporter,
) -> tuple[Study, Evidence]:
    """Ask the frozen network about the images, or a sample of very many; return what it says and what that is worth."""
    train_N = table.select("train").class_indices(label_map)
    has_body = len(backbone.stages) > 1
    is_solved = config.loss == "cross-entropy" and config.head_start == "probe"
    looks_at = config.head_stages if is_solved and _requested(config) != "large-different" else "last"
    is_probed = config.head != "knn" and (has_body or config.loss == "cross-entropy")
    is_part = is_studied_by_sample(config, backbone, images=len(train_N), classes=len(label_map))
    study = study_images(
        trunk_pass,
        sample_to_study(table, seed=config.seed) if is_part else table,
        label_map,
        looks_at=looks_at if is_probed else "none",
        augmentation="none" if is_part or config.budget else config.augmentation,
        class_weights_K=_class_weights(config, train_N, len(label_map)),
        seed=config.seed,
        reporter=reporter,
    )
    weigh = partial(
        measure,
        study.train,
        study.probe,
        class_indices_N=train_N,
        is_pretrained=backbone.is_pretrained,
        device=trunk_pass.engine.device,
    )
    return study, processes.from_main(weigh)


def start_network(
    config: TrainConfig,
    run: RunFolder,
    backbone: Backbone,
    table: ImageTable,
    label_map: LabelMap,
    *,
    trunk_pass: TrunkPass | None,
    processes: Processes,
    reporter: Reporter,
) -> tuple[Plan, ...]:
    """Study the images, choose the scenario, plan each phase and put the solved head in; write down all of it.

    Args:
        config: The options as given.
        run: Gets the advice and the baselines.
        backbone: Gets the solved head.
        table: The images, split.
        label_map: Gives each label its class index.
        trunk_pass: Gives the pooled features, if the network `is_studied`.
        processes: Those that train together; they share the study and follow what the main one measures.
        reporter: Told what there is to beat, and the scenario.
    """
    requested = _requested(config)
    has_body = len(backbone.stages) > 1
    train_N, valid_N = (table.select(split).class_indices(label_map) for split in ("train", "valid"))
    study = None
    evidence = count_images(train_N)
    baselines = Baselines(majority=majority_accuracy(train_N, valid_N))
    if trunk_pass:
        study, evidence = ask_network(
            config, backbone, table, label_map, trunk_pass=trunk_pass, processes=processes, reporter=reporter
        )
        baselines = replace(study.baselines, majority=baselines.majority)
    advice = choose(evidence, requested=None if requested == "auto" else requested, has_body=has_body)
    frozen = frozen_count(advice.scenario, backbone.module, backbone.stages, images_per_class=evidence.images_per_class)
    plan = _plan(config, backbone, advice.scenario, frozen, len(train_N), processes=processes, reporter=reporter)
    if trunk_pass:
        plan = replace(plan, kept_outputs=trunk_pass.trunk.outputs)
    if study and plan.head_start == "probe":
        plan = replace(plan, head_inputs=study.head_inputs)
        _tell_what_the_head_sees(study, reporter)
    if config.head_stages == "all" and not plan.head_inputs:
        raise ConfigError(
            f"--head-stages all needs a head that is solved, and scenario {advice.scenario} starts from a random one",
            "choose another --scenario, or leave it out",
        )
    phases = plan_phases(plan, parse_phases(config.phases), [stage.name for stage in backbone.stages])
    plans = processes.from_main(
        lambda: tuple(
            weigh_boundary(config, phase_plan, backbone, table.select("train"), reporter=reporter)
            for phase_plan in phases
        )
    )
    if study and plan.head_start != "random":
        _start_head(backbone, study, plan.head_inputs)
    if processes.is_main:
        values = {**advice.to_json(), "plans": [asdict(each) for each in plans]}
        write_whole(run.advice, strict_json.dump(values, indent=1))
        if trunk_pass:
            run.record("features", trunk_pass.summary())
        run.record("baseline", baselines.to_json())
        if study and study.head:
            sees = {"views": study.views, "head_inputs": list(plan.head_inputs), "head_start": plan.head_start}
            run.record("probe", {**study.head.summary(), **sees})
    _tell(reporter, baselines, advice.scenario, advice.reason)
    return plans


def _plan(
    config: TrainConfig,
    backbone: Backbone,
    scenario: Scenario,
    frozen: int,
    images: int,
    *,
    processes: Processes,
    reporter: Reporter,
) -> Plan:
    """Plan a training of what lies above the `frozen` stages, with a batch size that is measured where it is "auto"."""
    planned = partial(
        make_plan,
        scenario=scenario,
        frozen_stages=tuple(stage.name for stage in backbone.stages[:frozen]),
        can_solve_head=can_load_linear_head(backbone.module),
        has_batch_norm=any(isinstance(module, _BatchNorm) for module in backbone.module.modules()),
        images=images,
    )
    plan = planned(config)
    if config.batch_size != "auto" or not (plan.epochs or config.phases):
        return plan
    freeze_stages(backbone.module, backbone.stages, frozen)
    device = next(backbone.module.parameters()).device
    size = processes.from_main(
        lambda: fastest_batch_size(
            backbone,
            plan,
            images=images,
            processes=processes.count,
            device=device,
            precision=resolve_precision(config.precision, device, backbone.module),
        )
    )
    reporter.say(f"Batches of {size} images.")
    return planned(replace(config, batch_size=size))


def _requested(config: TrainConfig) -> Scenario | Literal["auto"]:
    return "small-similar" if config.feature_extract or config.head == "knn" else config.scenario


def _class_weights(config: TrainConfig, class_indices_N: Array, class_count: int) -> Array | None:
    """Return what the probe weighs an image of each class with: the same as the loss will."""
    if config.imbalance != "class-weights":
        return None
    counts_K = np.bincount(class_indices_N, minlength=class_count)
    return balanced_class_weights(torch.from_numpy(counts_K)).numpy()


def _start_head(backbone: Backbone, study: Study, head_inputs: tuple[str, ...]) -> None:
    """Put the solved probe into the output layer, or the training images in its place where no probe was asked for."""
    if study.head:
        weight_KD, bias_K = torch.from_numpy(study.head.weight_KD), torch.from_numpy(study.head.bias_K)
        if head_inputs:
            attach_stage_outputs(backbone.module, head_inputs, width=weight_KD.shape[1])
        load_linear_head(backbone.module, weight_KD, bias_K)
        return
    vectors_MD, classes_M = torch.from_numpy(study.train.features_ND), torch.from_numpy(study.train.class_indices_N)
    head = NeighbourHead(
        vectors_MD,
        classes_M,
        class_count=head_module(backbone.module).weight.shape[0],
        neighbours=choose_neighbours(vectors_MD, classes_M),
    )
    attach_neighbours(backbone.module, head)


def _tell_what_the_head_sees(study: Study, reporter: Reporter) -> None:
    if not (study.head_inputs and study.head and study.probe):
        return
    losses = [probe.loss for probe in (study.head, study.probe) if probe.loss is not None]
    measured = " instead of ".join(f"{loss:.3f}" for loss in losses)
    reporter.say(
        "The head looks at the outputs of all stages, not of the last alone"
        + (f": its loss is {measured} in a cross-validation." if measured else ".")
    )


def _tell(reporter: Reporter, baselines: Baselines, scenario: str, reason: str) -> None:
    names = {"majority": "majority", "knn": "nearest neighbours", "probe": "linear probe"}
    scores = [f"{names[name]} {score:.1%}" for name, score in baselines.to_json().items() if score is not None]
    if scores:
        reporter.say(f"Validation accuracy to beat: {', '.join(scores)}.")
    reporter.say(f"Scenario {scenario}: {reason}")
