"""BatchNorm of several processes against torch's of one."""

import torch
from timm.layers import BatchNormAct2d
from torch import nn

from finetune.runs.processes import ALONE
from finetune.training.sync_norm import SharedStatistics


def pass_through(norm: nn.Module, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
    """Return the output, every gradient and every statistic."""
    images_BCHW = images_BCHW.clone().requires_grad_()
    outputs = norm(images_BCHW)
    (outputs * torch.linspace(-1, 2, outputs.numel()).view_as(outputs)).sum().backward()
    assert images_BCHW.grad is not None
    gradients = [parameter.grad for parameter in norm.parameters() if parameter.grad is not None]
    return [outputs.detach(), images_BCHW.grad, *gradients, *norm.buffers()]


def test_of_one_process_is_what_torch_computes() -> None:
    torch.manual_seed(0)
    images_BCHW = torch.randn(5, 4, 3, 3) * 3 + 100  # far from zero, where squares would swallow the variance
    for build in (nn.BatchNorm2d, lambda size: nn.BatchNorm2d(size, affine=False), BatchNormAct2d):
        expected, own = build(4), build(4)
        with SharedStatistics(ALONE):
            found = pass_through(own, images_BCHW)
        for one, other in zip(pass_through(expected, images_BCHW), found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_an_image_that_does_not_count_is_normalised_by_the_others() -> None:
    norm, shared = nn.BatchNorm2d(4), SharedStatistics(ALONE)
    nn.init.constant_(norm.running_mean, 3.0)
    image_1CHW = torch.randn(1, 4, 3, 3)
    with shared.over(weight=0):
        torch.testing.assert_close(norm(image_1CHW), (image_1CHW - 3) / (1 + norm.eps) ** 0.5)
    assert torch.equal(norm.running_mean, torch.full((4,), 3.0))
    with shared.over(weight=1):
        norm(torch.cat([image_1CHW] * 2))
    assert not torch.equal(norm.running_mean, torch.full((4,), 3.0))


def test_images_beside_their_copies_count_once() -> None:
    """Statistics are those of the images; with no loss on the copies, gradients are too, once summed over both."""
    torch.manual_seed(0)
    images_BCHW, expected, own = torch.randn(5, 4, 3, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    outputs, gradient_BCHW, *others = pass_through(expected, images_BCHW)
    twice = torch.cat([images_BCHW] * 2).requires_grad_()
    with SharedStatistics(ALONE).over(weight=0.5):
        found = own(twice)[:5]
    (found * torch.linspace(-1, 2, found.numel()).view_as(found)).sum().backward()
    torch.testing.assert_close(found, outputs)
    assert twice.grad is not None
    torch.testing.assert_close(twice.grad[:5] + twice.grad[5:], gradient_BCHW)
    assert own.weight.grad is not None
    assert own.bias.grad is not None
    for one, other in zip(others, [own.weight.grad, own.bias.grad, *own.buffers()], strict=True):
        torch.testing.assert_close(other, one)


def test_vectors_and_bfloat16_keep_their_format() -> None:
    norm = nn.BatchNorm1d(4)
    with SharedStatistics(ALONE):
        assert norm(torch.randn(6, 4)).shape == (6, 4)
        assert norm(torch.randn(6, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_eval_mode_and_a_single_image_take_the_statistics_there_are() -> None:
    norm = nn.BatchNorm2d(4)
    nn.init.constant_(norm.running_mean, 3.0)
    image_1CHW = torch.randn(1, 4, 3, 3)
    expected = (image_1CHW - 3) / (1 + norm.eps) ** 0.5
    with SharedStatistics(ALONE):
        torch.testing.assert_close(norm(image_1CHW), expected)
        assert torch.equal(norm.running_mean, torch.full((4,), 3.0))
        torch.testing.assert_close(norm.eval()(torch.cat([image_1CHW] * 2))[1:], expected)
