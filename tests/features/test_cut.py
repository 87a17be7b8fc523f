"""Trunk and rest together are the network, bit for bit, and training the rest is training the frozen network.

Shapes: B images, C channels, H × W pixels, K classes, D features.
"""

import copy
from collections.abc import Callable, Sequence

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.inception import InceptionOutputs

from finetune.errors import ModelError
from finetune.features.cut import cut_model, feature_trunk, possible_cuts
from finetune.models.classic.table import CLASSICS
from finetune.models.freezing import freeze_stages, hold_batch_norm
from finetune.models.heads import head_module
from finetune.models.initialize import build_backbone
from finetune.models.stages import Stage, find_stages
from finetune.training.objectives import total_loss

CUTS: dict[str, tuple[int, ...]] = {  # the names of the catalog and where they are cut; nowhere named is everywhere
    "lenet5": (),
    "lenet5_1998": (),
    "lenet5_relu": (),
    "lenet5_sigmoid": (),
    "small_cnn": (),
    "mlp": (),
    "vgg16_cifar": (),
    "vgg16_cifar_2048": (),
    "alexnet2012": (2, 4),
    "vgg16_2014": (6,),
    "efficientnet_lite0": (),
    "resnet18": (),
    "resnet50": (3, 5),
    "alexnet": (1, 3, 4),
    "vgg16": (5, 6),
    "squeezenet": (),
    "densenet121": (1, 4, 7, 8),
    "googlenet": (1, 6, 11),
    "inception": (10,),
    "mobilenet_v3_small": (1, 7, 14),
    "swin_t": (1, 4, 8),
    "vit_b_16": (5, 13),
    "timm/convnext_tiny.fb_in22k": (1, 3, 5),
    "timm/vit_tiny_patch16_224": (1, 6, 13),
    "timm/test_vit": (),
    "timm/test_resnet": (),
    "timm/hrnet_w18_small": (3, 6),  # several maps cross, and a stage changes the list it is given
    "timm/deit_tiny_distilled_patch16_224": (6, 13),  # two output layers
}
OWN_SIZE = ("inception", "timm/hrnet_w18_small", "timm/deit_tiny_distilled_patch16_224")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str) -> tuple[nn.Module, tuple[Stage, ...], Tensor]:
    """Return a network with random weights, its stages and two images for it."""
    size = None if name in (*OWN_SIZE, *CLASSICS) else 64  # for the sake of time
    backbone = build_backbone(name, num_classes=5, use_pretrained=False, image_size=size)
    size = backbone.input_spec.image_size_px
    return backbone.module, backbone.stages, torch.randn(2, backbone.input_spec.channels, size, size)


class Free(nn.Module):
    """A network of three layers with what its forward does between them left to the test."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 6, 3)
        self.offset = nn.Parameter(torch.randn(6))
        self.fc = nn.Linear(6, 5)
        self.late = nn.Dropout(0.5)
        self.between = between

    def forward(self, images_BCHW: Tensor, scale: Tensor | None = None) -> Tensor:
        maps_BCHW = self.second(self.first(images_BCHW).relu())
        if scale is not None:
            maps_BCHW = maps_BCHW * scale
        return self.fc(self.between(self, maps_BCHW.mean((2, 3))))


def free(between: Callable[[nn.Module, Tensor], Tensor]) -> tuple[nn.Module, tuple[Stage, ...], Tensor]:
    model = Free(between)
    return model, find_stages_of_free(model), torch.randn(2, 3, 8, 8)


def find_stages_of_free(model: nn.Module) -> tuple[Stage, ...]:
    stages = (
        Stage(name="stem", modules=("first",), tensors=("offset",), is_body=True),
        Stage(name="second", modules=("second",), tensors=(), is_body=True),
        Stage(name="head", modules=("fc", "late"), tensors=(), is_body=False),
    )
    assert {name.split(".")[0] for name, _ in model.named_parameters()} <= {"first", "second", "offset", "fc"}
    return stages


def depends_on_values(model: nn.Module, features_BD: Tensor) -> Tensor:
    """Ask for values, as torch.fx cannot trace it."""
    return features_BD if features_BD.sum() > 1e9 else features_BD.relu()


def assert_same(found: object, expected: object) -> None:
    """Compare bit for bit, also where a network returns several tensors."""
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)
    else:
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


def assert_whole(model: nn.Module, stages: Sequence[Stage], count: int, images_BCHW: Tensor) -> None:
    """Check that the parts give what the network gives, and leave alone what crosses between them."""
    cut = cut_model(model.eval(), stages, count)
    crossing = cut.trunk(images_BCHW)
    before = [tensor.clone() for tensor in crossing]
    with torch.no_grad():
        assert_same(cut.rest(*crossing), model(images_BCHW))
    assert_same([*crossing], before)
    assert all(len(tensor) == len(images_BCHW) for tensor in crossing)
    assert cut.boundary == stages[count - 1].name


@pytest.mark.parametrize("name", CUTS)
def test_parts_give_what_the_network_gives(name: str) -> None:
    model, stages, images_BCHW = build(name)
    counts = CUTS[name] or range(1, len(stages))
    assert set(counts) <= set(possible_cuts(model, stages))
    for count in counts:
        assert_whole(model, stages, count, images_BCHW)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 512), ("efficientnet_lite0", 1280), ("densenet121", 1024), ("vit_b_16", 768)]
)
def test_pooled_features_cross_before_the_head(name: str, size: int) -> None:
    model, stages, images_BCHW = build(name)
    (features_BD,) = cut_model(model, stages, len(stages) - 1).trunk(images_BCHW)
    assert features_BD.shape == (2, size)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 3),
        ("efficientnet_lite0", 5),  # with functional dropout before the head
        ("mobilenet_v3_small", 13),
        ("swin_t", 5),  # with stochastic depth
        ("inception", 11),
    ],
)
def test_training_the_rest_is_training_the_frozen_network(name: str, count: int) -> None:
    model, stages, images_BCHW = build(name)
    if name == "efficientnet_lite0":
        model.drop_rate = 0.5
    whole = copy.deepcopy(model).train()
    freeze_stages(whole, stages, count)
    cut = cut_model(model, stages, count)
    cut.rest.train()
    torch.manual_seed(1)
    expected = whole(images_BCHW)
    torch.manual_seed(1)
    found = cut.rest(*cut.trunk(images_BCHW))
    assert_same(found, expected)

    start = copy.deepcopy(model.state_dict())
    for part, outputs in ((whole, expected), (cut.rest, found)):
        total_loss(outputs, torch.tensor([0, 3]), nn.CrossEntropyLoss()).backward()
        torch.optim.SGD(filter(lambda p: p.grad is not None, part.parameters()), lr=0.1).step()
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=1e-6, msg=key)
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, start[key])}
    assert moved


def test_rest_is_the_models_own() -> None:
    model, stages, images_BCHW = build("resnet18")
    cut = cut_model(model.eval(), stages, 3)
    own = dict(model.named_parameters())
    shared = dict(cut.rest.named_parameters())
    assert {name.split(".")[0] for name in shared} == {"layer3", "layer4", "fc"}
    assert all(parameter is own[name] for name, parameter in shared.items())
    assert cut.rest.state_dict().keys() < model.state_dict().keys()
    assert {module for module in cut.rest.modules() if [*module.parameters(recurse=False)]} <= set(model.modules())

    before_BK = model(images_BCHW)
    crossing = cut.trunk(images_BCHW)
    cut.rest(*crossing).square().sum().backward()
    torch.optim.SGD(cut.rest.parameters(), lr=0.01).step()
    after_BK = model(images_BCHW)
    assert not torch.allclose(after_BK, before_BK)
    assert torch.equal(cut.rest(*crossing), after_BK)


def test_a_copy_of_the_rest_has_its_own_weights() -> None:
    model, stages, images_BCHW = build("lenet5")
    cut = cut_model(model.eval(), stages, 2)
    twin = copy.deepcopy(cut.rest)
    crossing = cut.trunk(images_BCHW)
    before_BK = twin(*crossing)
    nn.init.zeros_(head_module(model).weight)
    assert torch.equal(twin(*crossing), before_BK)
    assert not torch.equal(cut.rest(*crossing), before_BK)


def test_trunk_stays_in_eval_mode_and_keeps_no_gradients() -> None:
    model, stages, images_BCHW = build("mobilenet_v3_small")
    cut = cut_model(model.train(), stages, 5)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = cut.trunk(images_BCHW)
    assert_same(cut.trunk.train()(images_BCHW), expected)
    assert not any(module.training for module in cut.trunk.modules())
    assert not any(tensor.requires_grad for tensor in expected)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, statistics[name]), name


@pytest.mark.parametrize("count", [2, 8])
def test_model_is_left_as_it_was(count: int) -> None:
    model, stages, images_BCHW = build("efficientnet_lite0")
    model.train()
    model.get_submodule("blocks.3").eval()
    freeze_stages(model, stages, 1)
    modes = {name: module.training for name, module in model.named_modules()}
    forward = model.forward
    cut = cut_model(model, stages, count)
    feature_trunk(model)(images_BCHW)
    cut.trunk(images_BCHW)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.forward == forward
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert cut.rest.training


def test_pinned_modules_stay_pinned() -> None:
    model, stages, _ = build("resnet18")
    freeze_stages(model, stages, 4)
    rest = cut_model(model, stages, 2).rest.train()
    assert not any(module.training for module in rest.get_submodule("layer3").modules())
    assert all(module.training for module in rest.get_submodule("layer4").modules())
    hold_batch_norm(model)  # also after the cut
    rest.train()
    assert not any(module.training for module in rest.modules() if isinstance(module, nn.BatchNorm2d))
    assert rest.get_submodule("fc").training


def test_rest_draws_functional_dropout_in_train_mode_only() -> None:
    model, stages, images_BCHW = build("efficientnet_lite0")
    model.drop_rate = 0.5  # timm passes it to functional.dropout in the forward of the network itself
    for count in (5, len(stages) - 1):
        cut = cut_model(model, stages, count)
        freeze_stages(model, stages, len(stages) - 1)  # so that no BatchNorm moves
        crossing = cut.trunk(images_BCHW)
        cut.rest.train()
        assert not torch.equal(cut.rest(*crossing), cut.rest(*crossing))
        cut.rest.eval()
        assert torch.equal(cut.rest(*crossing), model.eval()(images_BCHW))
        cut.rest.training = True  # as those do who put back the modes that they found
        assert not torch.equal(cut.rest(*crossing), cut.rest(*crossing))


def test_dropout_below_the_boundary_is_not_drawn() -> None:
    def between(model: nn.Module, features_BD: Tensor) -> Tensor:
        return functional.dropout(features_BD, 0.5, model.training)

    model, _, images_BCHW = free(between)
    head_last = (  # the layer that follows the dropout belongs to the trunk, too
        Stage(name="stem", modules=("first", "second"), tensors=("offset",), is_body=True),
        Stage(name="hidden", modules=("fc",), tensors=(), is_body=False),
        Stage(name="head", modules=("late",), tensors=(), is_body=False),
    )
    cut = cut_model(model.train(), head_last, 2)
    assert torch.equal(cut.rest(*cut.trunk(images_BCHW)), model.eval()(images_BCHW))


@pytest.mark.parametrize(
    "between",
    [
        lambda model, features_BD: model.late(features_BD),
        lambda model, features_BD: functional.dropout(features_BD.relu(), 0.5, model.training),
        lambda model, features_BD: features_BD + torch.randn_like(features_BD) if model.training else features_BD,
    ],
    ids=["a dropout registered after the head", "functional dropout", "noise"],
)
def test_what_is_random_above_the_boundary_is_drawn_anew(between: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, stages, images_BCHW = free(between)
    cut = cut_model(model.train(), stages, 2)
    crossing = cut.trunk(images_BCHW)
    assert crossing[0].shape == (2, 6)
    torch.manual_seed(1)
    expected = model(images_BCHW)
    torch.manual_seed(1)
    assert torch.equal(cut.rest(*crossing), expected)
    assert not torch.equal(cut.rest(*crossing), expected)
    assert torch.equal(cut.rest.eval()(*crossing), model.eval()(images_BCHW))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "between",
    [
        lambda model, features_BD: features_BD + model.offset,
        lambda model, features_BD: features_BD + model.offset.expand(features_BD.shape[0], -1),
        lambda model, features_BD: features_BD * torch.tensor(0.5),
        lambda model, features_BD: (features_BD.add_(1), features_BD.add_(1))[1],
    ],
    ids=["a parameter of the trunk", "a size", "a constant", "the same step twice"],
)
def test_one_tensor_crosses_whatever_the_forward_takes_besides(
    count: int, between: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    model, stages, images_BCHW = free(between)
    assert_whole(model, stages, count, images_BCHW)
    cut = cut_model(model, stages, count)
    assert len(cut.trunk(images_BCHW)) == 1
    assert cut.rest.state_dict().keys() <= model.state_dict().keys()


def test_inception_keeps_its_auxiliary_head() -> None:
    model, stages, images_BCHW = build("inception")
    shapes = {
        8: [(768, 17, 17)],
        10: [(768, 17, 17)],  # it feeds the auxiliary head as well
        11: [(768, 17, 17), (768, 1, 1)],  # the convolutions of the auxiliary head are in the trunk
        14: [(768, 1, 1), (2048,)],
    }
    for count, expected in shapes.items():
        cut = cut_model(model, stages, count)
        crossing = cut.trunk(images_BCHW)
        assert [tuple(tensor.shape[1:]) for tensor in crossing] == expected
        outputs = cut.rest.train()(*crossing)
        assert isinstance(outputs, InceptionOutputs)
        assert outputs.aux_logits.shape == (2, 5)
        assert isinstance(cut.rest.eval()(*crossing), Tensor)


def test_untraceable_network_is_cut_at_its_features_only() -> None:
    model, stages, images_BCHW = free(depends_on_values)
    with pytest.raises(
        ModelError, match=r"Free cannot be cut before stage second: torch\.fx cannot trace it"
    ) as refusal:
        cut_model(model, stages, 1)
    assert refusal.value.hint == "the pooled features are the only boundary"
    assert possible_cuts(model, stages) == (2,)
    assert_whole(model, stages, 2, images_BCHW)


def test_untraceable_network_with_log_softmax() -> None:
    model, stages, images_BCHW = free(depends_on_values)
    model.fc = nn.Sequential(nn.Linear(6, 5), nn.LogSoftmax(dim=1))
    model.late = nn.Identity()
    assert_whole(model, stages, 2, images_BCHW)
    assert cut_model(model, stages, 2).rest.state_dict().keys() == {"fc.0.weight", "fc.0.bias"}


def test_zoo_network_that_cannot_be_traced() -> None:
    model = timm.create_model("twins_pcpvt_small", num_classes=5)
    stages = find_stages(model)
    assert possible_cuts(model, stages) == (len(stages) - 1,)
    assert_whole(model, stages, len(stages) - 1, torch.randn(2, 3, 224, 224))


def test_untraceable_network_is_refused_where_code_follows_its_output_layer() -> None:
    class Scaled(Free):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            return 2 * super().forward(images_BCHW)

    model = Scaled(depends_on_values)
    cut = cut_model(model, find_stages_of_free(model), 2)
    with pytest.raises(ModelError, match="no module follows"):
        cut.trunk(torch.randn(2, 3, 8, 8))


def test_stages_out_of_order_are_refused_and_the_others_named() -> None:
    model, (stem, second, head), _ = free(lambda model, features_BD: features_BD)
    upper = Stage(name="late", modules=(), tensors=("offset",), is_body=True)
    stem = Stage(name="stem", modules=stem.modules, tensors=(), is_body=True)
    with pytest.raises(ModelError, match="cannot be cut before stage stem: stage second needs the result of a later"):
        cut_model(model, (second, stem, upper, head), 1)
    assert possible_cuts(model, (second, stem, upper, head)) == (2, 3)
    with pytest.raises(ModelError) as refusal:
        cut_model(model, (second, stem, upper, head), 1)
    assert refusal.value.hint == "cut it at the pooled features, or before one of late"


def test_trunk_refuses_what_has_no_row_for_each_image() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 4, 2, 2)

        def forward(self, images_BCHW: Tensor) -> tuple[Tensor, int]:
            maps_BCHW = self.embed(images_BCHW)
            return maps_BCHW.flatten(2), maps_BCHW.shape[2]

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.mixed, self.fc = Tokens(), nn.Conv1d(4, 4, 1), nn.Linear(4, 5)

        def forward(self, images_BCHW: Tensor) -> Tensor:
            tokens_BCT, height = self.tokens(images_BCHW)
            return self.fc(self.mixed(tokens_BCT).unflatten(2, (height, -1)).mean((2, 3)))

    model = Windows()
    stages = tuple(
        Stage(name=name, modules=(module,), tensors=(), is_body=name != "head")
        for name, module in (("stem", "tokens"), ("mixed", "mixed"), ("head", "fc"))
    )
    cut = cut_model(model, stages, 1)
    with pytest.raises(ModelError, match="cannot be cut behind stem: int crosses there"):
        cut.trunk(torch.randn(2, 3, 8, 8))
    assert_whole(model, stages, 2, torch.randn(2, 3, 8, 8))


def test_a_constant_is_the_same_step_in_both_modes_under_whatever_name() -> None:
    """torch.fx numbers the tensors that a forward makes; this one makes another before it in train mode."""

    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.fc = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

        def forward(self, images_BCHW: Tensor) -> Tensor:
            scale = torch.tensor([0.5]) if self.training else 1.0
            maps_BCHW = self.body(self.stem(images_BCHW) * torch.tensor([2.0]))
            return self.fc(maps_BCHW.mean((2, 3)) * scale)

    model = Constants()
    stages = tuple(
        Stage(name=name, modules=(module,), tensors=(), is_body=name != "head")
        for name, module in (("stem", "stem"), ("body", "body"), ("head", "fc"))
    )
    images_BCHW = torch.randn(2, 3, 8, 8)
    for count in (1, 2):
        cut = cut_model(model, stages, count)
        assert len(cut.trunk(images_BCHW)) == 1
        for is_training in (True, False):
            model.train(is_training)
            cut.rest.train(is_training)
            assert torch.equal(cut.rest(*cut.trunk(images_BCHW)), model(images_BCHW))


@pytest.mark.parametrize("count", [-1, 0, 5])
def test_count_out_of_range_is_our_own_mistake(count: int) -> None:
    model, stages, _ = build("lenet5")
    assert len(stages) == 5
    with pytest.raises(AssertionError, match="the trunk cannot hold"):
        cut_model(model, stages, count)


def test_network_that_is_all_head_has_no_cut() -> None:
    model, stages, _ = build("linear")
    assert possible_cuts(model, stages) == ()


@pytest.mark.parametrize("name", ["resnet18", "squeezenet", "inception", "timm/test_vit", "lenet5"])
def test_feature_trunk_gives_the_pooled_input_of_the_output_layer(name: str) -> None:
    model, _, images_BCHW = build(name)
    features_BD = feature_trunk(model.train())(images_BCHW)
    seen: list[Tensor] = []
    with head_module(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        model.eval()(images_BCHW)
    expected = seen[0].mean((2, 3)) if name == "squeezenet" else seen[0]
    assert torch.equal(features_BD, expected)
    assert features_BD.shape == (2, head_module(model).weight.shape[1])
    assert not features_BD.requires_grad


def test_feature_trunk_needs_an_output_layer() -> None:
    with pytest.raises(ModelError, match="has no linear or convolutional output layer"):
        feature_trunk(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")  # ONNX is written by way of it or of export
@pytest.mark.parametrize("name", ["efficientnet_lite0", "squeezenet", "timm/test_vit"])
def test_parts_can_be_exported(name: str) -> None:
    model, stages, images_BCHW = build(name)
    cut = cut_model(model.eval(), stages, 3)
    crossing = cut.trunk(images_BCHW)
    images = (images_BCHW,)
    for part, inputs in ((cut.trunk, images), (cut.rest, crossing), (feature_trunk(model), images)):
        if name == "timm/test_vit":  # it compares sizes itself, of which the older tracer warns
            exported = torch.export.export(part, inputs).module()
        else:
            exported = torch.jit.trace(part, inputs, check_trace=False)
        assert_same(exported(*inputs), part(*inputs))
