"""One pass over the images keeps what enters the output layer, and leaves the network as it was."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from finetune.features.extract import extract_features
from finetune.models.freezing import freeze_stages
from finetune.models.stages import Stage

CPU = torch.device("cpu")
Batch = tuple[torch.Tensor, torch.Tensor, list[str]]


def batches(*sizes: int, side_px: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(size, 3, side_px, side_px, generator=generator), torch.arange(size), ["x.png"] * size)
        for size in sizes
    ]


def linear_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Dropout(0.5), nn.Linear(20, 2))


def convolutional_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_input_of_the_output_layer_is_kept_in_order() -> None:
    model, given = linear_network(), batches(3, 2)
    found = extract_features(model, model[-1], given, device=CPU)
    with torch.no_grad():
        expected = model.eval()[:-1](torch.cat([images for images, _, _ in given]))
    torch.testing.assert_close(torch.from_numpy(found.features_ND), expected)
    assert (found.features_ND.shape, found.features_ND.dtype) == ((5, 20), "float32")
    assert (found.class_indices_N.tolist(), found.class_indices_N.dtype) == ([0, 1, 2, 0, 1], "int64")
    assert len(found) == 5


def test_features_and_weights_give_the_logits() -> None:
    model, given = linear_network(), batches(4)
    found = extract_features(model, model[-1], given, device=CPU)
    with torch.no_grad():
        logits_NK = model.eval()(given[0][0])
        torch.testing.assert_close(model[-1](torch.from_numpy(found.features_ND)), logits_NK)


def test_maps_before_a_convolutional_head_are_averaged() -> None:
    model, given = convolutional_network(), batches(3, side_px=6)
    found = extract_features(model, model[1], given, device=CPU)
    with torch.no_grad():
        expected = model[0](given[0][0]).mean(dim=(2, 3))
    assert found.features_ND.shape == (3, 5)
    torch.testing.assert_close(torch.from_numpy(found.features_ND), expected)


@pytest.mark.parametrize("was_training", [True, False])
def test_mode_statistics_and_hooks_are_as_before(was_training: bool) -> None:
    model = linear_network().train(was_training)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    extract_features(model, model[-1], batches(3), device=CPU)
    assert [module.training for module in model.modules()] == [was_training] * 6
    assert not model[-1]._forward_pre_hooks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_everything_is_put_back_when_a_batch_fails() -> None:
    def failing() -> Iterator[Batch]:
        yield from batches(2)
        raise OSError("the disk is gone")

    model = linear_network()
    with pytest.raises(OSError, match="the disk is gone"):
        extract_features(model, model[-1], failing(), device=CPU)
    assert model.training
    assert not model[-1]._forward_pre_hooks


def test_frozen_stages_stay_in_eval_mode() -> None:
    model = linear_network()
    stages = [
        Stage(name="body", modules=("0", "1"), tensors=(), is_body=True),
        Stage(name="head", modules=("4",), tensors=(), is_body=False),
    ]
    freeze_stages(model, stages, 1)
    extract_features(model, model[-1], batches(2), device=CPU)
    assert [module.training for module in model] == [False, False, True, True, True]


def test_no_gradient_is_kept() -> None:
    model = linear_network()
    extract_features(model, model[-1], batches(2), device=CPU)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
