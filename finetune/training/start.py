"""Where a new training starts from: the images studied, the scenario chosen, the plan made, the head in place."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from finetune.advice.choose import choose
from finetune.advice.measure import count_images, measure
from finetune.config.schema import TrainConfig
from finetune.models.freezing import frozen_count
from finetune.models.heads import can_load_linear_head, head_module, load_linear_head
from finetune.models.initialize import Backbone
from finetune.models.neighbours import NeighbourHead, attach_neighbours, choose_neighbours
from finetune.runs import strict_json
from finetune.runs.folder import RunFolder, write_whole
from finetune.runs.reporting import Reporter
from finetune.training.plan import Plan, make_plan
from finetune.training.study import Baselines, Study, majority_accuracy, study_images


def start_network(
    config: TrainConfig,
    run: RunFolder,
    backbone: Backbone,
    loaders: dict[str, DataLoader[Any]],
    *,
    device: torch.device,
    reporter: Reporter,
) -> Plan:
    """Study the images, choose the scenario, make the plan and put the solved head in; write down all of it.

    A network with random layers is not asked what it makes of the images, unless they are to stay as they are.
    """
    requested = "small-similar" if config.feature_extract or config.head == "knn" else config.scenario
    labels_of = {split: np.array(loader.dataset.class_indices) for split, loader in loaders.items()}  # type: ignore[attr-defined]
    study = None
    has_body = len(backbone.stages) > 1
    if backbone.is_pretrained or not has_body or requested not in ("auto", "large-different"):
        with_probe = config.head != "knn" and (has_body or config.loss == "cross-entropy")
        study = study_images(
            backbone, loaders, with_probe=with_probe, seed=config.seed, device=device, reporter=reporter
        )
        evidence = measure(study.train, study.probe, is_pretrained=backbone.is_pretrained)
        baselines = study.baselines
    else:
        evidence = count_images(labels_of["train"])
        baselines = Baselines(majority=majority_accuracy(labels_of["train"], labels_of["valid"]))
    advice = choose(evidence, requested=None if requested == "auto" else requested, has_body=has_body)
    frozen = frozen_count(advice.scenario, backbone.module, backbone.stages, images_per_class=evidence.images_per_class)
    plan = make_plan(
        config,
        scenario=advice.scenario,
        frozen_stages=tuple(stage.name for stage in backbone.stages[:frozen]),
        can_solve_head=can_load_linear_head(backbone.module),
        has_batch_norm=any(isinstance(module, _BatchNorm) for module in backbone.module.modules()),
        images=len(labels_of["train"]),
    )
    if study and plan.head_start != "random":
        _start_head(backbone, study)
    write_whole(run.advice, strict_json.dump({**advice.to_json(), "plan": asdict(plan)}, indent=1))
    run.record("baseline", baselines.to_json())
    if study and study.probe:
        run.record("probe", {**study.probe.summary(), "head_start": plan.head_start})
    _tell(reporter, baselines, advice.scenario, advice.reason)
    return plan


def _start_head(backbone: Backbone, study: Study) -> None:
    """Put the solved probe into the output layer, or the training images in its place where no probe was asked for."""
    if study.probe:
        load_linear_head(backbone.module, torch.from_numpy(study.probe.weight_KD), torch.from_numpy(study.probe.bias_K))
        return
    vectors_MD, classes_M = torch.from_numpy(study.train.features_ND), torch.from_numpy(study.train.class_indices_N)
    head = NeighbourHead(
        vectors_MD,
        classes_M,
        class_count=head_module(backbone.module).weight.shape[0],
        neighbours=choose_neighbours(vectors_MD, classes_M),
    )
    attach_neighbours(backbone.module, head)


def _tell(reporter: Reporter, baselines: Baselines, scenario: str, reason: str) -> None:
    names = {"majority": "majority", "knn": "nearest neighbours", "probe": "linear probe"}
    scores = [f"{names[name]} {score:.1%}" for name, score in baselines.to_json().items() if score is not None]
    reporter.say(f"Validation accuracy to beat: {', '.join(scores)}.")
    reporter.say(f"Scenario {scenario}: {reason}")
