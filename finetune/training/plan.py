"""The plan of a training: every "auto" resolved, every number that the loop will use."""

import math
from dataclasses import dataclass
from typing import Literal

from finetune.config.schema import TrainConfig
from finetune.models.freezing import Scenario

STEPS_WORTH = 500  # optimiser steps after which fine-tuning from a solved head has mostly settled
EPOCHS_FINE_TUNING = (3, 10)  # fewest and most passes that make up those steps
EPOCHS_FRESH = 30
OWN_STATISTICS = 20_000  # training images from which BatchNorm does better with the data's own statistics
EPOCHS_HEAD = 20
WEIGHT_DECAY = {"adamw": 0.01, "adam": 0.0, "sgd": 5e-4}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be trained, from where, how long and how fast."""

    scenario: Scenario
    frozen_stages: tuple[str, ...]
    start: Literal["pretrained", "fresh"]
    head_start: Literal["probe", "neighbours", "random"]
    epochs: int
    optimizer: Literal["adamw", "adam", "sgd"]
    learning_rate: float
    trunk_learning_rate: float
    weight_decay: float
    batch_norm: Literal["eval", "train"]
    """Mode of the BatchNorm layers that learn; "eval" keeps the statistics of the pretrained network."""


def make_plan(
    config: TrainConfig,
    *,
    scenario: Scenario,
    frozen_stages: tuple[str, ...],
    can_solve_head: bool,
    has_batch_norm: bool,
    images: int,
) -> Plan:
    """Resolve the options of `config` that are "auto".

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
    pace = 10.0 if optimizer == "sgd" else 1.0
    trunk = (1e-3 if is_fresh else 1e-4) * pace if config.trunk_learning_rate == "auto" else config.trunk_learning_rate
    head = (trunk if head_start == "probe" else 1e-3 * pace) if config.learning_rate == "auto" else config.learning_rate
    epochs = config.epochs
    if head_start == "neighbours":
        epochs = 0
    elif epochs == "auto":
        epochs = _epochs(scenario, head_start, math.ceil(images / config.batch_size))
    return Plan(
        scenario=scenario,
        frozen_stages=frozen_stages,
        start="fresh" if is_fresh else "pretrained",
        head_start=head_start,
        epochs=epochs,
        optimizer=optimizer,
        learning_rate=head,
        trunk_learning_rate=trunk,
        weight_decay=WEIGHT_DECAY[optimizer] if config.weight_decay == "auto" else config.weight_decay,
        batch_norm="train" if is_fresh or images >= OWN_STATISTICS else "eval",
    )


def _epochs(scenario: Scenario, head_start: str, steps_per_epoch: int) -> int:
    if scenario == "large-different":
        return EPOCHS_FRESH
    if scenario == "small-similar":
        return EPOCHS_HEAD if head_start == "random" else 0
    fewest, most = EPOCHS_FINE_TUNING
    return min(most, max(fewest, round(STEPS_WORTH / steps_per_epoch)))
