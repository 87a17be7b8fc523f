"""The linear classifier on pixels."""

from collections.abc import Callable

import torch

from finetune.models.classic.pixels import pixels


def test_layers_are_those_of_the_table(layer_table: Callable[..., dict]) -> None:
    table = layer_table(pixels, (3, 32, 32), num_classes=10, channels=3)
    assert table == {"flatten": ((3072,), 0), "classifier": ((10,), 30_730), "": ((10,), 30_730)}


def test_it_starts_at_zero_and_learns_from_there() -> None:
    network = pixels(4, channels=1)
    images_BCHW = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    logits_NK = network(images_BCHW)
    assert not logits_NK.any()
    torch.nn.functional.cross_entropy(logits_NK, torch.tensor([0, 1, 2])).backward()
    gradient = network.get_parameter("classifier.weight").grad
    # At zero the probabilities are 1/4, so the gradient of a class is the mean of (1/4 - is it the class) · pixels.
    expected_D = ((0.25 - torch.tensor([1.0, 0.0, 0.0]))[:, None] * images_BCHW.flatten(1)).mean(dim=0)
    torch.testing.assert_close(gradient[0], expected_D)
