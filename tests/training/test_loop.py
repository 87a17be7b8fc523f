"""The loop: what it learns, what it keeps, what it refuses."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from finetune.errors import ConfigError, DivergedError
from finetune.models.initialize import initialize_model
from finetune.training.loop import run_epochs, train_model
from finetune.training.progress import Progress
from finetune.training.schedules import Schedule
from finetune.training.step import Learner, build_accelerator, train_step
from finetune.training.stopping import EarlyStopping


def test_a_notebook_trains_with_five_arguments(loaders: dict[str, Any], make_learner: Callable[..., Learner]) -> None:
    model = make_learner().model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    history = train_model(model, loaders, nn.CrossEntropyLoss(), optimizer, 9, scheduler=scheduler)
    assert {name: len(values) for name, values in history.series().items()} == dict.fromkeys(
        ["train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "learning_rates", "seconds"], 9
    )
    assert history.learning_rates == pytest.approx([0.05] * 7 + [0.005] * 2)
    assert history.best_accuracy == max([history.start_accuracy, *history.valid_accuracy])
    assert history.best_accuracy > 0.9
    assert history.train_loss[-1] < history.train_loss[0]


def test_the_best_validation_weights_are_restored(
    loaders: dict[str, Any], make_learner: Callable[..., Learner]
) -> None:
    learner = make_learner(rate=0.5)
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Keeper:
        def epoch_started(self, progress: Progress) -> None: ...
        def step_ended(self, progress: Progress) -> None: ...
        def epoch_ended(self, progress: Progress) -> None:
            seen[progress.epoch] = copy.deepcopy(learner.accelerator.unwrap_model(learner.model).state_dict())

    seen[0] = copy.deepcopy(learner.model.state_dict())
    progress = Progress()
    run_epochs(learner, loaders, 4, progress=progress, watchers=[Keeper()])
    best = seen[progress.history.best_epoch]
    assert all(torch.equal(tensor, best[name]) for name, tensor in learner.model.state_dict().items())
    assert not learner.model.training


def test_ties_keep_the_earlier_and_nan_is_never_best() -> None:
    progress = Progress()
    model = nn.Linear(1, 1)
    progress.keep_best(model, 0.5)
    assert not progress.is_best(0.5)
    assert not progress.is_best(math.nan)
    assert progress.is_best(0.6)


def test_a_last_batch_of_one_image_does_no_harm(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    learner.model.train()
    statistics = learner.model.body[1].running_mean.clone()
    found = train_step(learner, [torch.randn(1, 3, 1, 1), torch.tensor([0])])
    assert found.images == 1
    assert math.isfinite(found.loss)
    assert torch.equal(learner.model.body[1].running_mean, statistics)
    assert learner.model.body[1].training


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_updates_nothing_and_names_the_images(
    make_learner: Callable[..., Learner], poison: float
) -> None:
    learner = make_learner(rate=0.25)
    before = copy.deepcopy(learner.model.state_dict())
    images = torch.full((2, 3, 8, 8), poison)
    learner.model.train()  # so that the poison reaches BatchNorm's statistics in the forward pass
    with pytest.raises(DivergedError, match=r"loss of step 1 became nan at learning rate 0\.0025 on a\.jpg, b\.jpg"):
        train_step(learner, [images, torch.tensor([0, 1]), ["a.jpg", "b.jpg"]])
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items())


@pytest.mark.parametrize("clipped_at", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_updates_nothing_though_the_loss_is(
    make_learner: Callable[..., Learner], clipped_at: float
) -> None:
    learner = make_learner()
    learner.max_grad_norm = clipped_at
    before = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
    learner.model.fc.weight.register_hook(lambda gradient: gradient * math.inf)
    batch = [torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), ["a.jpg", "b.jpg"]]
    with pytest.raises(DivergedError, match=r"gradient norm of step 7 became (nan|inf) .* on a\.jpg, b\.jpg"):
        train_step(learner, batch, step=7)
    assert all(torch.equal(parameter, before[name]) for name, parameter in learner.model.named_parameters())


@pytest.mark.parametrize(
    ("head", "criterion", "fault"),
    [("log_softmax", nn.CrossEntropyLoss(), "applies a softmax"), ("logits", nn.NLLLoss(), "needs log-probabilities")],
)
def test_the_two_wrong_pairings_are_refused(
    loaders: dict[str, Any], head: Any, criterion: nn.Module, fault: str
) -> None:
    model, _ = initialize_model("squeezenet", 3, True, False, head=head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=fault):
        train_model(model, loaders, criterion, optimizer, 1)


def test_a_log_softmax_head_trains_with_nll(make_learner: Callable[..., Learner]) -> None:
    model, size = initialize_model("alexnet", 3, True, False, head="log_softmax")
    images = DataLoader(TensorDataset(torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 0])), batch_size=2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = train_model(model, {"train": images, "valid": images}, nn.NLLLoss(), optimizer, 1)
    assert len(history) == 1
    assert math.isfinite(history.train_loss[0])


def test_a_missing_loader_is_named(make_learner: Callable[..., Learner], loaders: dict[str, Any]) -> None:
    model = make_learner().model
    with pytest.raises(ConfigError, match="valid"):
        train_model(model, {"train": loaders["train"]}, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters()))


def test_early_stopping_ends_the_training(loaders: dict[str, Any], make_learner: Callable[..., Learner]) -> None:
    learner = make_learner(rate=1e-9, schedule="constant")
    progress = Progress()
    run_epochs(learner, loaders, 20, progress=progress, watchers=[EarlyStopping(3)])
    assert progress.epoch == progress.history.best_epoch + 3
    assert "3 epochs" in progress.stop_reason


def test_gradients_are_clipped(loaders: dict[str, Any], make_learner: Callable[..., Learner]) -> None:
    learner = make_learner(optimizer="sgd", rate=1.0, schedule="constant")
    learner.max_grad_norm = 1e-3
    before = torch.cat([p.detach().flatten().clone() for p in learner.model.parameters()])
    train_step(learner, next(iter(loaders["train"])))
    after = torch.cat([p.detach().flatten() for p in learner.model.parameters()])
    assert (after - before).norm() == pytest.approx(1e-3, rel=1e-3)


def test_flat_inputs_are_trained_too() -> None:
    model = nn.Linear(4, 2)
    batches = DataLoader(TensorDataset(torch.eye(4), torch.tensor([0, 1, 0, 1])), batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    learner = Learner(
        model=model,
        criterion=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        schedule=Schedule.of(None, optimizer),
        accelerator=Accelerator(cpu=True),
    )
    losses = [train_step(learner, batch).loss for _ in range(5) for batch in batches]
    assert losses[-1] < losses[0]


def test_steps_are_taken_in_bfloat16_and_scored_in_float32(
    loaders: dict[str, Any], make_learner: Callable[..., Learner]
) -> None:
    learner = make_learner()
    learner.accelerator = build_accelerator(torch.device("cpu"), "bf16")
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    learner.model.fc.register_forward_hook(lambda head, _, output: seen[head.training].add(output.dtype))
    progress = Progress()
    run_epochs(learner, loaders, 2, progress=progress)
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert progress.history.train_loss[-1] < progress.history.train_loss[0]


def test_a_training_that_is_stopped_in_mid_epoch_scores_what_it_has_learned(
    make_learner: Callable[..., Learner], loaders: dict[str, DataLoader[Any]]
) -> None:
    class StopAtTwo:
        def epoch_started(self, progress: Progress) -> None: ...
        def epoch_ended(self, progress: Progress) -> None: ...
        def step_ended(self, progress: Progress) -> None:
            if progress.global_step == 2:
                progress.stop_reason = "enough"

    progress = Progress()
    run_epochs(make_learner(), loaders, 3, progress=progress, watchers=[StopAtTwo()])
    assert (progress.epoch, progress.global_step, len(progress.history)) == (1, 2, 1)
    assert progress.history.valid_accuracy[0] > 0
