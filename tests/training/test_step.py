"""One step: in parts as in one go, with less memory, with mixed images, with averaged weights."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from finetune.errors import DivergedError
from finetune.training.mixing import Mix
from finetune.training.step import Learner, train_step

IMAGES = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(11) % 3


def still(learner: Learner) -> Learner:
    """Leave nothing in the network that depends on which images are together, or on chance."""
    learner.model.body[1].eval().train = lambda mode=True: learner.model.body[1]
    learner.model.body[3] = nn.Identity()
    learner.model.train()
    return learner


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in learner.model.named_parameters()}


@pytest.mark.parametrize("parts", [2, 3, 11, 40])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 3.0])], ids=["alike", "class weights"])
def test_a_batch_in_parts_takes_the_step_of_the_whole(
    make_learner: Callable[..., Learner], parts: int, weights: torch.Tensor | None
) -> None:
    whole, split = still(make_learner(optimizer="sgd")), still(make_learner(optimizer="sgd"))
    split.parts = parts
    for learner in (whole, split):
        learner.criterion = nn.CrossEntropyLoss(weight=weights, label_smoothing=0.1)
    found, expected = (train_step(learner, [IMAGES, CLASSES]) for learner in (split, whole))
    assert found == replace(expected, loss=found.loss, weight=found.weight)
    assert (found.loss, found.weight) == pytest.approx((expected.loss, expected.weight), rel=1e-5)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(split)[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("images", "parts"), [(1, 1), (11, 1), (7, 4), (5, 5)])
def test_no_image_is_computed_alone(make_learner: Callable[..., Learner], images: int, parts: int) -> None:
    """Of one by itself several threads can make other bits each time; with a copy the step is the same."""
    learner, expected = still(make_learner(optimizer="sgd")), still(make_learner(optimizer="sgd"))
    sizes: list[int] = []
    learner.model.register_forward_pre_hook(lambda _model, inputs: sizes.append(len(inputs[0])))
    learner.parts = parts
    outcome = train_step(learner, [IMAGES[:images], CLASSES[:images]])
    assert min(sizes) > 1
    assert outcome.images == images
    loss = expected.criterion(expected.model(IMAGES[:images]), CLASSES[:images])
    loss.backward()
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(learner)[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("images", "parts", "sizes"), [(9, 8, [2] * 5), (11, 3, [4, 4, 3]), (7, 4, [2] * 4)])
def test_parts_are_as_few_as_are_no_larger(
    make_learner: Callable[..., Learner], images: int, parts: int, sizes: list[int]
) -> None:
    """A batch that its parts do not divide leaves one image at most alone, of which BatchNorm learns nothing."""
    learner, found = make_learner(), []
    learner.model.train()
    learner.parts = parts
    learner.model.register_forward_pre_hook(lambda _model, inputs: found.append(len(inputs[0])))
    outcome = train_step(learner, [IMAGES[:images], CLASSES[:images]])
    assert (outcome.images, found) == (images, sizes)


class Forgetful(nn.Module):
    """A network that runs out of memory on more than so many images."""

    def __init__(self, inner: nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most = inner, most

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if len(images_BCHW) > self.most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory")
        return self.inner(images_BCHW)


class Heard:
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def test_out_of_memory_takes_the_same_step_in_more_parts(make_learner: Callable[..., Learner]) -> None:
    whole, short = still(make_learner(optimizer="sgd")), still(make_learner(optimizer="sgd"))
    short.model, short.reporter = Forgetful(short.model, 3), Heard()  # type: ignore[assignment]
    expected, found = (train_step(learner, [IMAGES, CLASSES]) for learner in (whole, short))
    assert short.parts == 4
    assert found == replace(expected, loss=found.loss, weight=found.weight)
    assert (found.loss, found.weight) == pytest.approx((expected.loss, expected.weight), rel=1e-5)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(short.model.inner.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert [text for text in short.reporter.said if "4 parts" in text]


def test_dropout_draws_the_same_after_an_attempt_that_failed(make_learner: Callable[..., Learner]) -> None:
    split, short = make_learner(optimizer="sgd"), make_learner(optimizer="sgd")
    split.parts = 4
    short.model, short.reporter = Forgetful(short.model, 3), Heard()  # type: ignore[assignment]
    losses = []
    for learner in (split, short):
        learner.model.train()
        torch.manual_seed(5)
        losses.append(train_step(learner, [IMAGES, CLASSES]).loss)
    assert losses[0] == losses[1]


def test_memory_that_does_not_do_for_one_image_is_an_error(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    learner.model, learner.reporter = Forgetful(learner.model, 1), Heard()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train_step(learner, [IMAGES, CLASSES])


def test_another_error_is_not_taken_for_a_lack_of_memory(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    with pytest.raises(RuntimeError, match="size"):
        train_step(learner, [IMAGES[:, :2], CLASSES])
    assert learner.parts == 1


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixing_is_a_function_of_seed_and_step(mixup: float, cutmix: float) -> None:
    mix = Mix(mixup=mixup, cutmix=cutmix, class_count=3, seed=7)
    before = torch.get_rng_state()
    (first,), targets_BK = mix((IMAGES,), CLASSES, step=3)
    torch.manual_seed(99)
    (again,), _ = mix((IMAGES,), CLASSES, step=3)
    assert torch.equal(first, again)
    assert not torch.equal(first, IMAGES)
    assert not torch.equal(first, mix((IMAGES,), CLASSES, step=4)[0][0])
    assert not torch.equal(
        first, Mix(mixup=mixup, cutmix=cutmix, class_count=3, seed=8)((IMAGES,), CLASSES, step=3)[0][0]
    )
    torch.testing.assert_close(targets_BK.sum(dim=1), torch.ones(11))
    torch.set_rng_state(before)


def test_mixup_blends_what_crosses_a_cut_by_one_share() -> None:
    """Vectors and maps of the same images, and their targets, are all blended by the same number."""
    ones_BK = nn.functional.one_hot(CLASSES, 3).float()
    maps = ones_BK[:, :, None, None].expand(-1, -1, 4, 4).clone()
    mix = Mix(mixup=0.4, cutmix=0.0, class_count=3, seed=0)
    (vectors_BK, maps_BKHW), targets_BK = mix((ones_BK, maps), CLASSES, step=1)
    torch.testing.assert_close(vectors_BK, targets_BK)
    torch.testing.assert_close(maps_BKHW[:, :, 1, 2], targets_BK)
    assert ((targets_BK > 0).sum(dim=1) == 2).any()


def test_a_mixed_batch_is_learned_from(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    learner.mix = Mix(mixup=0.2, cutmix=1.0, class_count=3, seed=0)
    start = copy.deepcopy(learner.model.state_dict())
    found = train_step(learner, [IMAGES, CLASSES, ["x"] * 11], step=1)
    assert found.loss > 0
    assert (found.right <= found.images, found.images) == (True, 11)
    assert not torch.equal(start["fc.weight"], learner.model.state_dict()["fc.weight"])


def test_a_mixed_batch_that_diverges_names_its_images(make_learner: Callable[..., Learner]) -> None:
    learner = make_learner()
    learner.mix = Mix(mixup=0.2, cutmix=0.0, class_count=3, seed=0)
    with pytest.raises(DivergedError, match=r"7\.png"):
        train_step(learner, [IMAGES * float("nan"), CLASSES, [f"{number}.png" for number in range(11)]])
