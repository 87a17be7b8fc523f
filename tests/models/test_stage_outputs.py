"""A head that looks at the pooled outputs of all stages."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from finetune.errors import ModelError
from finetune.features.cut import cut_model, possible_cuts
from finetune.features.trunk import boundary_trunk, pooled_trunk
from finetune.models.heads import head_module, load_linear_head
from finetune.models.initialize import Backbone, build_backbone
from finetune.models.stage_outputs import (
    attach_saved_stage_outputs,
    attach_stage_outputs,
    find_stage_outputs,
    head_inputs,
    pool,
    stage_ends,
)
from finetune.training import step
from finetune.training.schedules import Schedule
from finetune.training.step import Learner, train_step

NETWORKS = ("efficientnet_lite0", "timm/test_resnet", "timm/test_vit", "timm/test_convnext", "swin_t", "lenet5")


def build(name: str) -> tuple[Backbone, Tensor]:
    """Return the network in eval mode and a batch of images for it."""
    torch.manual_seed(0)
    backbone = build_backbone(name, num_classes=3, use_pretrained=False)
    backbone.module.eval()
    spec = backbone.input_spec
    return backbone, torch.randn(2, spec.channels, spec.image_size_px, spec.image_size_px)


def widen(backbone: Backbone, images_BCHW: Tensor) -> Tensor:
    """Let the head look at all stages, with weights of its own; return what it looks at, (B, E)."""
    ends = stage_ends(backbone.module, backbone.stages, backbone.input_spec)
    features_BE: Tensor = pooled_trunk(backbone, tuple(ends)).module(images_BCHW)
    attach_stage_outputs(backbone.module, tuple(ends), width=features_BE.shape[1])
    weight_KE, bias_K = torch.randn(3, features_BE.shape[1]), torch.randn(3)
    load_linear_head(backbone.module, weight_KE, bias_K)
    return features_BE


@pytest.fixture(params=NETWORKS)
def wide(request: pytest.FixtureRequest) -> tuple[Backbone, Tensor, Tensor]:
    """Give a network whose head looks at all stages, images, and what the head looks at."""
    backbone, images_BCHW = build(request.param)
    return backbone, images_BCHW, widen(backbone, images_BCHW)


def test_it_is_a_linear_layer_on_the_features_and_what_each_stage_gives(wide: tuple[Backbone, Tensor, Tensor]) -> None:
    backbone, images_BCHW, features_BE = wide
    ends = head_inputs(backbone.module)
    assert len(ends) >= 2
    layer = head_module(backbone.module)
    given: dict[str, Tensor] = {}
    for path in ends:
        backbone.module.get_submodule(path).register_forward_hook(
            lambda _, __, output, path=path: given.update({path: output})
        )
    with torch.no_grad():
        logits_BK = backbone.module(images_BCHW)
        assert torch.equal(logits_BK, layer(features_BE))
    sides_BC = [pool(given[path]) for path in ends]
    assert torch.equal(features_BE[:, -sum(side.shape[1] for side in sides_BC) :], torch.cat(sides_BC, dim=1))
    for side_BC in sides_BC:
        assert side_BC.mean(dim=1) == pytest.approx(torch.zeros(2), abs=1e-5)
        assert side_BC.std(dim=1, correction=0) == pytest.approx(torch.ones(2), abs=0.1)
    assert torch.equal(pooled_trunk(backbone).module(images_BCHW), features_BE), (
        "by default it gives what the head sees"
    )


def test_it_can_be_cut_at_every_boundary_and_only_vectors_cross_beside_the_map(
    wide: tuple[Backbone, Tensor, Tensor],
) -> None:
    backbone, images_BCHW, _ = wide
    with torch.no_grad():
        expected_BK = backbone.module(images_BCHW)
        for count in possible_cuts(backbone.module, backbone.stages):
            cut = cut_model(backbone.module, backbone.stages, count)
            crossing = cut.trunk(images_BCHW)
            assert torch.equal(cut.rest(*crossing), expected_BK), cut.boundary
            assert sum(tensor.ndim > 2 for tensor in crossing) <= 1
    assert possible_cuts(backbone.module, backbone.stages)
    last = len(backbone.stages) - 1
    assert boundary_trunk(backbone, cut_model(backbone.module, backbone.stages, last), last).is_pooled


def test_what_is_kept_at_a_boundary_is_kept_apart_from_that_of_a_head_on_the_last_stage() -> None:
    backbone, images_BCHW = build("timm/test_resnet")
    keys = [boundary_trunk(backbone, cut_model(backbone.module, backbone.stages, 3), 3).key()]
    keys.append(pooled_trunk(backbone).key())
    widen(backbone, images_BCHW)
    keys.append(boundary_trunk(backbone, cut_model(backbone.module, backbone.stages, 3), 3).key())
    keys.append(pooled_trunk(backbone).key())
    assert all(keys.count(key) == 1 for key in keys)


def test_a_copy_looks_at_its_own_stages(wide: tuple[Backbone, Tensor, Tensor]) -> None:
    backbone, images_BCHW, _ = wide
    twin = copy.deepcopy(backbone.module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
        changed_BK = twin(images_BCHW)
        expected_BK = backbone.module(images_BCHW)
        assert not torch.allclose(changed_BK, expected_BK)
        twin.load_state_dict(backbone.module.state_dict())
        assert torch.equal(twin(images_BCHW), expected_BK)


def test_threads_do_not_mix_their_images() -> None:
    """The first is held up in its last stage until the second has passed the others."""
    backbone, images_BCHW = build("timm/test_resnet")
    widen(backbone, images_BCHW)
    with torch.no_grad():
        expected = [backbone.module(image_CHW[None]) for image_CHW in images_BCHW]
    is_waiting, may_go_on = threading.Event(), threading.Event()
    found: dict[int, Tensor] = {}

    def hold_up(*_: object) -> None:
        if threading.current_thread().name == "first":
            is_waiting.set()
            assert may_go_on.wait(60)

    def run(place: int) -> None:
        with torch.no_grad():
            found[place] = backbone.module(images_BCHW[place][None])

    backbone.module.get_submodule("layer4").register_forward_hook(hold_up)
    first = threading.Thread(target=run, args=(0,), name="first")
    first.start()
    assert is_waiting.wait(60)
    run(1)
    may_go_on.set()
    first.join()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", ["squeezenet1_0", "knn"])
def test_a_head_that_cannot_be_solved_or_that_is_all_there_is_has_no_other_stages(name: str) -> None:
    backbone, _ = build(name)
    assert stage_ends(backbone.module, backbone.stages, backbone.input_spec) == {}


def test_what_gives_the_features_alone_is_not_looked_at_twice() -> None:
    backbone, _ = build("timm/test_resnet")
    ends = stage_ends(backbone.module, backbone.stages, backbone.input_spec)
    assert list(ends) == ["layer1", "layer2", "layer3"], "neither the stem nor layer4"
    assert find_stage_outputs(backbone.module) is None


@pytest.mark.parametrize("name", ["lenet5", "alexnet"])
def test_maps_are_looked_at_and_no_vectors_and_nothing_behind_a_dropout(name: str) -> None:
    backbone, _ = build(name)
    ends = stage_ends(backbone.module, backbone.stages, backbone.input_spec)
    assert len(ends) >= 2
    for path in ends:
        assert not isinstance(backbone.module.get_submodule(path), nn.Dropout | nn.Flatten)


def test_a_map_whose_channels_cannot_be_told_is_left_out() -> None:
    """Of 384 px this transformer makes 96 × 96 positions of 96 channels, the channels last."""
    backbone = build_backbone("swin_t", num_classes=3, use_pretrained=False, image_size=384)
    ends = stage_ends(backbone.module, backbone.stages, backbone.input_spec)
    assert "features.1" not in ends
    assert "features.2" in ends


def test_a_pass_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that runs out of memory, and is taken again in smaller parts."""
    backbone, images_BCHW = build("timm/test_resnet")
    widen(backbone, images_BCHW)
    attempts: list[int] = []

    def fail(*_: object) -> None:
        attempts.append(len(kept))
        if len(attempts) == 1:
            raise RuntimeError("CUDA out of memory.")

    kept = find_stage_outputs(backbone.module)[1]._kept  # type: ignore[index]
    backbone.module.get_submodule("layer4").register_forward_pre_hook(fail)
    optimizer = torch.optim.SGD(backbone.module.parameters(), lr=0.0)
    schedule = Schedule.of(None, optimizer)
    learner = Learner(model=backbone.module, criterion=nn.CrossEntropyLoss(), optimizer=optimizer, schedule=schedule)
    forgotten: list[int] = []
    clear = step.clear_device_cache
    monkeypatch.setattr(step, "clear_device_cache", lambda **options: (forgotten.append(len(kept)), clear(**options)))
    train_step(learner, (images_BCHW, torch.tensor([0, 1]), ["a", "b"]))
    assert attempts == [3, 3, 3]
    assert forgotten == [0]
    assert not kept


def test_a_convolution_as_head_looks_at_the_last_stage_alone() -> None:
    backbone, _ = build("squeezenet1_0")
    with pytest.raises(ModelError, match="convolution"):
        attach_stage_outputs(backbone.module, ("features.3",), width=10)


def test_one_that_was_saved_comes_back() -> None:
    backbone, images_BCHW = build("timm/test_resnet")
    widen(backbone, images_BCHW)
    tensors = backbone.module.state_dict()
    other, _ = build("timm/test_resnet")
    attach_saved_stage_outputs(
        other.module, head_inputs(backbone.module), tensors, input_spec=other.input_spec, source="a file"
    )
    other.module.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(other.module(images_BCHW), backbone.module(images_BCHW))


def without_head(tensors: dict[str, Tensor]) -> None:
    del tensors["fc.1.weight"]


def narrower(tensors: dict[str, Tensor]) -> None:
    tensors["fc.1.weight"] = tensors["fc.1.weight"][:, 1:]


@pytest.mark.parametrize(
    ("paths", "change"),
    [
        (("layer1", "layer9"), None),
        (("layer1",), None),
        (("layer1", "layer2", "layer3", "layer3"), None),
        (("layer1", "layer2", "layer3"), without_head),
        (("layer1", "layer2", "layer3"), narrower),
        (("layer1", "layer2", "fc"), None),
    ],
    ids=["no such stage", "too few", "twice", "no weights", "too narrow", "the head itself"],
)
def test_one_that_was_saved_otherwise_is_refused(
    paths: tuple[str, ...], change: Callable[[dict[str, Tensor]], None] | None
) -> None:
    backbone, images_BCHW = build("timm/test_resnet")
    widen(backbone, images_BCHW)
    tensors = dict(backbone.module.state_dict())
    if change:
        change(tensors)
    other, _ = build("timm/test_resnet")
    with pytest.raises(ModelError, match="a file: its head looks at stages that the network does not have"):
        attach_saved_stage_outputs(other.module, paths, tensors, input_spec=other.input_spec, source="a file")
