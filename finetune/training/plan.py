"""The plan of a training: every "auto" resolved, every number that the loop will use."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finetune.config.phases import Phase
from finetune.config.schema import TrainConfig
from finetune.models.freezing import Scenario

STEPS_WORTH = 500  # optimiser steps after which fine-tuning from a solved head has mostly settled
FEWEST_EPOCHS, MOST_EPOCHS, MOST_EPOCHS_FAR = 3, 10, 30  # that make up those steps
"""Data that the features say less of gains by the longer training (tests/benchmarks/recipe_defaults.py)."""
EPOCHS_FRESH = 30
OWN_STATISTICS = 20_000
"""Training images from which BatchNorm does better with the data's own statistics; of few, be they far, it does worse
with them (tests/benchmarks/recipe_defaults.py)."""
EPOCHS_HEAD = 20
USUAL_BATCH = 32
DEPTH_RATIO_CNN: dict[Scenario, float] = {
    "small-similar": 1.0,
    "large-similar": 0.01,
    "small-different": 0.1,
    "large-different": 1.0,
}
"""Rate of the lowest stage that learns against that of the highest, in CNNs with BatchNorm."""
DEPTH_RATIO: dict[Scenario, float] = {**DEPTH_RATIO_CNN, "large-similar": 0.03, "small-different": 0.3}
"""The same in transformers and ConvNeXts: 0.75 and 0.9 a layer, over twelve."""
CLIPPED_AT = 1.0
"""Norm of the gradient, from a solved head. On images unlike those of the pretraining its weights are large, and the
first steps would undo both head and network (the training half of tests/benchmarks/probe_stages.py)."""
WEIGHT_DECAY = {"adamw": 0.01, "adam": 0.0, "sgd": 5e-4}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be trained in a phase, from where, how long and how fast."""

    scenario: Scenario
    frozen_stages: tuple[str, ...]
    start: Literal["pretrained", "fresh"]
    head_start: Literal["probe", "neighbours", "random"]
    epochs: int
    batch_size: int
    optimizer: Literal["adamw", "adam", "sgd"]
    learning_rate: float
    trunk_learning_rate: float
    depth_ratio: float
    weight_decay: float
    batch_norm: Literal["eval", "train"]
    """Mode of the BatchNorm layers that learn; "eval" keeps the statistics of the pretrained network."""
    max_grad_norm: float
    """At which the norm of the gradient is clipped; 0 does not."""
    boundary_cache: bool = False
    """Whether the frozen stages run once and the others learn from what they gave."""
    views: int = 0
    """Augmented views of every training image that the frozen stages are run on; 0 is the image itself."""
    rate_share: float = 1.0
    """What the rates are multiplied by in this phase."""
    head_inputs: tuple[str, ...] = ()
    """Modules at whose outputs the head looks, beside the features of the last stage."""
    kept_outputs: tuple[str, ...] = ()
    """Modules whose outputs were kept with the features when the network was studied."""


def make_plan(
    config: TrainConfig,
    *,
    scenario: Scenario,
    frozen_stages: tuple[str, ...],
    can_solve_head: bool,
    has_batch_norm: bool,
    images: int,
) -> Plan:
    """Resolve the options of `config` that are "auto", the batch size to USUAL_BATCH.

    Args:
        config: The options as given.
        scenario: The scenario chosen.
        frozen_stages: Names of the stages that stay as they are.
        can_solve_head: Whether the output layer is linear, so that the solved probe can be put into it.
        has_batch_norm: Whether the network has BatchNorm layers, as CNNs of the old school do.
        images: Training images.
    """
    is_fresh = scenario == "large-different"
    head_start: Literal["probe", "neighbours", "random"] = "random"
    if config.head == "knn":
        head_start = "neighbours"
    elif config.head_start == "probe" and config.loss == "cross-entropy" and can_solve_head and not is_fresh:
        head_start = "probe"
    optimizer = config.optimizer
    if optimizer == "auto":
        optimizer = "sgd" if has_batch_norm and not is_fresh else "adamw"
    is_sgd = optimizer == "sgd"
    trunk = config.trunk_learning_rate
    if trunk == "auto":
        trunk = _trunk_rate(scenario, is_sgd=is_sgd)
    auto_head = trunk if head_start == "probe" else max(trunk, 1e-2 if is_sgd else 1e-3)
    max_grad_norm = config.max_grad_norm
    if max_grad_norm == "auto":
        max_grad_norm = CLIPPED_AT if head_start == "probe" else 0.0
    depth_ratio = config.depth_ratio
    if depth_ratio == "auto":
        depth_ratio = DEPTH_RATIO_CNN[scenario] if has_batch_norm else DEPTH_RATIO[scenario]
    epochs, batch_size = config.epochs, USUAL_BATCH if config.batch_size == "auto" else config.batch_size
    if head_start == "neighbours":
        epochs = 0
    elif epochs == "auto":
        epochs = _epochs(scenario, head_start, math.ceil(images / batch_size))
    return Plan(
        scenario=scenario,
        frozen_stages=frozen_stages,
        start="fresh" if is_fresh else "pretrained",
        head_start=head_start,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=auto_head if config.learning_rate == "auto" else config.learning_rate,
        trunk_learning_rate=trunk,
        depth_ratio=depth_ratio,
        weight_decay=WEIGHT_DECAY[optimizer] if config.weight_decay == "auto" else config.weight_decay,
        max_grad_norm=max_grad_norm,
        batch_norm="train" if is_fresh or images >= OWN_STATISTICS else "eval",
    )


def plan_phases(plan: Plan, phases: Sequence[Phase], stages: Sequence[str]) -> tuple[Plan, ...]:
    """Return a plan for each of `phases`, or `plan` itself where there are none.

    Args:
        plan: What all phases have in common.
        phases: What is frozen in each, its length and rates.
        stages: The names of all stages, from the stem to the head.
    """
    trunk = len(stages) - 1
    plans = []
    for phase in phases:
        counts = range(trunk, -1, -1) if phase.learning == "gradual" else [_frozen(phase.learning, trunk)]
        plans += [
            replace(plan, frozen_stages=tuple(stages[:count]), epochs=phase.epochs, rate_share=phase.rate_share)
            for count in counts
        ]
    return tuple(plans) or (plan,)


def phases_text(plans: Sequence[Plan], stages: Sequence[str]) -> str:
    """Return what `plan_phases` makes `plans` of, for a network with these stages."""
    trunk = len(stages) - 1
    names = {trunk: "head", 0: "all"}
    parts = [
        (names.get(frozen := len(plan.frozen_stages), f"top{trunk - frozen}"), plan.epochs, plan.rate_share)
        for plan in plans
    ]
    return ",".join(f"{learning}:{epochs}:{str(share).removesuffix('.0')}" for learning, epochs, share in parts)


def _frozen(learning: str | int, trunk: int) -> int:
    match learning:
        case "head":
            return trunk
        case "all":
            return 0
        case _:
            return max(trunk - int(learning), 0)


def _trunk_rate(scenario: Scenario, *, is_sgd: bool) -> float:
    """Return the rate of the top stage: near data wants less change of the network than far data."""
    match scenario:
        case "large-different":
            return 1e-2 if is_sgd else 1e-3
        case "small-different":
            return 1e-2 if is_sgd else 3e-4
        case _:
            return 1e-3 if is_sgd else 1e-4


def _epochs(scenario: Scenario, head_start: str, steps_per_epoch: int) -> int:
    if scenario == "large-different":
        return EPOCHS_FRESH
    if scenario == "small-similar":
        return EPOCHS_HEAD if head_start == "random" else 0
    most = MOST_EPOCHS_FAR if scenario == "small-different" else MOST_EPOCHS
    return min(most, max(FEWEST_EPOCHS, round(STEPS_WORTH / steps_per_epoch)))
