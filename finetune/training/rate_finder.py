"""A sweep of the learning rate over many sizes in one go, to see which one a training bears (Smith 2017)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from finetune.data.loaders import EpochSampler
from finetune.errors import ConfigError, DivergedError
from finetune.runs.reporting import Reporter
from finetune.training.step import Learner, train_step, undone

STEPS = 100
LOWEST_SHARE, HIGHEST_SHARE = 1e-4, 1e3
"""The first and the last rate of the sweep, as a share of the planned one."""
SMOOTHING = 0.9  # of the loss, which jumps from batch to batch
DIVERGED = 4.0  # times the least loss so far: the sweep ends
EDGE = 0.1  # of the sweep at either end tells nothing: nothing moves yet, or all is lost


@dataclass(frozen=True, kw_only=True)
class RateSweep:
    """What a sweep has found.

    `rates` are the rates of the head, as of `--learning-rate`, `losses` the smoothed mean losses (nats) after a step
    at each, and `suggestion` the rate at which the loss falls fastest; None where it falls nowhere.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float | None


def sweep_rates(learner: Learner, loaders: dict[str, DataLoader[Any]], *, reporter: Reporter) -> RateSweep:
    """Take up to `STEPS` steps at rates that rise from very low to very high, and undo them.

    All rates keep their proportions to each other. Small sets are gone through as often as it takes. The learner's
    optimiser and schedule are used up by it; its network and the random generators are as before.

    Raises:
        ConfigError: Nothing learns by gradient.

    Source: Smith 2017, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 3.3.
    """
    if not any(group["params"] for group in learner.optimizer.param_groups):
        raise ConfigError(
            "nothing learns by gradient here, so that there is no rate to find", "train without --head knn"
        )
    planned = [float(group.get("initial_lr", group["lr"])) for group in learner.optimizer.param_groups]
    batches = _endless(learner, loaders["train"])
    rates: list[float] = []
    losses: list[float] = []
    with undone(learner) as trying, reporter.progress("Rates", STEPS) as advance:
        groups = trying.optimizer.param_groups
        for number, share in enumerate(np.geomspace(LOWEST_SHARE, HIGHEST_SHARE, STEPS)):
            for group, rate in zip(groups, planned, strict=True):
                group["lr"] = rate * float(share)
            try:
                loss = train_step(trying, next(batches), step=number + 1).loss
            except DivergedError:
                break
            smooth = loss if not losses else SMOOTHING * losses[-1] + (1 - SMOOTHING) * loss
            rates.append(groups[0]["lr"])
            losses.append(smooth)
            advance(1, f"rate {rates[-1]:.1e}  loss {smooth:.3f}")
            if smooth > DIVERGED * min(losses):
                break
    return RateSweep(rates=tuple(rates), losses=tuple(losses), suggestion=steepest(rates, losses))


def steepest(rates: list[float], losses: list[float]) -> float | None:
    """Return the rate at which the loss falls fastest as the rates rise, before its least; None if it never falls."""
    edge = round(EDGE * len(losses))
    end = int(np.argmin(losses)) + 1 if losses else 0
    if end - edge < 2:
        return None
    slopes = np.gradient(np.asarray(losses[edge:end]), np.log(rates[edge:end]))
    fastest = int(slopes.argmin())
    return float(f"{rates[edge + fastest]:.2g}") if slopes[fastest] < 0 else None


def _endless(learner: Learner, loader: DataLoader[Any]) -> Iterator[Any]:
    epoch = 0
    while True:
        if isinstance(loader.batch_sampler, EpochSampler):
            loader.batch_sampler.start(epoch)
        yield from learner.placed(loader)
        epoch += 1
