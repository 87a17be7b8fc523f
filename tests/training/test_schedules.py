"""Learning rates along each schedule."""

import math

import pytest
import torch

from finetune.training.schedules import Schedule, build_schedule


def rates(
    name: str, *, epochs: int = 4, steps: int = 5, warmup: float = 1.0, losses: list[float] | None = None
) -> list[float]:
    """Return the rate at every step of a training."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(
        optimizer, name, epochs=epochs, steps_per_epoch=steps, warmup_epochs=warmup, step_epochs=2, step_factor=0.1
    )
    seen = []
    for epoch in range(epochs):
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step_ended()
        schedule.epoch_ended((losses or [1.0] * epochs)[epoch])
    return seen


def test_cosine_rises_for_an_epoch_and_falls_to_nothing() -> None:
    seen = rates("cosine")
    assert seen[0] == pytest.approx(0.01)
    assert seen[5] == pytest.approx(1.0)
    assert seen[:6] == sorted(seen[:6])
    assert seen[5:] == sorted(seen[5:], reverse=True)
    assert seen[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 14 / 15)))


def test_cosine_without_a_warm_up_begins_at_the_top() -> None:
    assert rates("cosine", warmup=0)[0] == 1.0


def test_a_warm_up_longer_than_the_training_leaves_a_step_to_fall() -> None:
    assert len(rates("cosine", epochs=1, steps=3, warmup=5)) == 3


def test_step_falls_every_two_epochs() -> None:
    assert rates("step", steps=1) == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_plateau_falls_when_the_validation_loss_stays() -> None:
    assert rates("plateau", epochs=6, steps=1, losses=[1, 0.9, 0.9, 0.9, 0.9, 0.9])[-1] == pytest.approx(0.1)
    assert rates("plateau", epochs=6, steps=1, losses=[6, 5, 4, 3, 2, 1])[-1] == 1.0


def test_one_cycle_goes_up_and_down_once() -> None:
    seen = rates("one-cycle")
    top = seen.index(max(seen))
    assert 0 < top < len(seen) - 1
    assert seen[:top] == sorted(seen[:top])
    assert seen[top:] == sorted(seen[top:], reverse=True)


@pytest.mark.parametrize("name", ["cosine", "step", "plateau", "one-cycle", "constant"])
def test_no_epochs_and_one_step_are_allowed(name: str) -> None:
    assert rates(name, epochs=0) == []
    assert len(rates(name, epochs=1, steps=1)) == 1


def test_a_plain_torch_scheduler_moves_every_epoch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Schedule.of(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), optimizer)
    optimizer.step()
    schedule.step_ended()
    assert optimizer.param_groups[0]["lr"] == 1.0
    schedule.epoch_ended(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.5
