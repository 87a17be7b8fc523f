"""A converted network gives its own logits at its own size, and on larger pictures what its layers give in each place.

Shapes: B images, C channels, H × W pixels or positions, K classes, D features, N windows.
"""

import copy
from collections import OrderedDict

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from finetune.errors import ModelError
from finetune.models.classic.table import CLASSICS
from finetune.models.dense import DenseClassifier, to_dense
from finetune.models.heads import head_module, load_linear_head, replace_head
from finetune.models.initialize import build_backbone
from finetune.models.neighbours import NeighbourHead
from finetune.models.stage_outputs import attach_stage_outputs, stage_ends


def small_vgg(map_size: int = 3) -> nn.Sequential:
    """Features, a pooling that is idle at 24 × 24 px, and linear layers, as in VGG."""
    torch.manual_seed(0)
    features = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.LocalResponseNorm(3), nn.MaxPool2d(2)),
    )
    classifier = nn.Sequential(
        *(nn.Linear(6 * map_size**2, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 5))
    )
    pooling = nn.AdaptiveAvgPool2d((map_size, map_size))
    return nn.Sequential(OrderedDict(features=features, avgpool=pooling, flatten=nn.Flatten(), classifier=classifier))


def behind_a_pooling(*head: nn.Module) -> nn.Sequential:
    """A convolution, the average over its map, and the layers of `head` on 7 features."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def build(name: str, *, size: int = 64) -> nn.Module:
    """Build torchvision's or timm's network with random weights.

    Its batch norms see a few random images first; without that, deep networks give nearly the same for every image.
    """
    torch.manual_seed(0)
    zoo, architecture = name.split("/")
    if zoo == "timm":
        model = timm.create_model(architecture, num_classes=5)
    else:
        options = {"inception_v3": {"init_weights": False}, "googlenet": {"init_weights": False, "aux_logits": False}}
        model = models.get_model(architecture, num_classes=5, **options.get(architecture, {}))
    norms = [module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        with torch.no_grad():
            model(torch.randn(4, 3, size, size))
    return model.eval()


@torch.inference_mode()
def outputs(model: nn.Module, dense: DenseClassifier, *shape: int) -> tuple[Tensor, Tensor]:
    """Return logits (B, K) and the map (B, K, H', W') of the same two random images."""
    images_BCHW = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    return model(images_BCHW), dense(images_BCHW)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare within a ten thousandth of the largest number."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def assert_slides(model: nn.Module, dense: DenseClassifier, shape: tuple[int, int, int], window: int) -> None:
    """Check every cell of the map on a picture of `shape` against the linear layers on the matching window."""
    image_1CHW = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        map_1KHW = dense(image_1CHW)
        features_1DHW = model.get_submodule("features")(image_1CHW)
        rows, columns = (side - window + 1 for side in features_1DHW.shape[2:])
        places = [(row, column) for row in range(rows) for column in range(columns)]
        windows_ND = torch.cat(
            [features_1DHW[:, :, row : row + window, column : column + window].flatten(1) for row, column in places]
        )
        expected_NK = model.get_submodule("classifier")(windows_ND)
    assert map_1KHW.shape == (1, expected_NK.shape[1], rows, columns)
    assert rows > 1
    assert columns > rows
    assert_close(map_1KHW[0].flatten(1).T, expected_NK)


def test_linear_layers_slide_over_a_larger_picture() -> None:
    model = small_vgg().eval()
    dense = to_dense(model, (3, 24, 24))
    logits_BK, map_BKHW = outputs(model, dense, 3, 24, 24)
    assert map_BKHW.shape == (2, 5, 1, 1)
    assert_close(map_BKHW[:, :, 0, 0], logits_BK)
    assert dense.stride_px == 8
    assert_slides(model, dense, (3, 45, 61), window=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "vgg16_2014"])
def test_vgg16(name: str) -> None:
    torch.manual_seed(0)
    model = models.vgg16() if name == "torchvision" else CLASSICS[name].build(1000, channels=3)
    dense = to_dense(model.eval(), (3, 224, 224))
    logits_BK, map_BKHW = outputs(model, dense, 3, 224, 224)
    assert_close(map_BKHW.mean(dim=(2, 3)), logits_BK)
    assert dense.stride_px == 32
    assert_slides(model, dense, (3, 320, 400), window=7)


CLASSIC_STRIDES = {
    "alexnet2012": 32,
    "knn": 1,
    "lenet5": 4,
    "lenet5_1998": 4,
    "lenet5_relu": 4,
    "lenet5_sigmoid": 4,
    "linear": 1,
    "mlp": 1,
    "small_cnn": 4,
    "vgg16_cifar": 32,
    "vgg16_cifar_2048": 16,
}


@pytest.mark.parametrize(("name", "stride"), CLASSIC_STRIDES.items())
def test_classics(name: str, stride: int) -> None:
    classic = CLASSICS[name]
    channels, size = classic.input_spec.channels, classic.input_spec.image_size_px
    torch.manual_seed(0)
    model = classic.build(10, channels=channels).eval()
    for parameter in model.parameters():  # the baselines on pixels start at zero
        nn.init.normal_(parameter, std=0.05)
    dense = to_dense(model, (channels, size, size))
    logits_BK, map_BKHW = outputs(model, dense, channels, size, size)
    assert map_BKHW.shape == (2, 10, 1, 1)
    assert_close(map_BKHW[:, :, 0, 0], logits_BK)
    assert dense.stride_px == stride
    assert dense(torch.zeros(1, channels, size, size + 2 * stride)).shape == (1, 10, 1, 3)


GLOBALLY_POOLED = {
    "torchvision/resnet18": 64,
    "torchvision/densenet121": 64,
    "torchvision/googlenet": 64,
    "torchvision/inception_v3": 107,
    "torchvision/shufflenet_v2_x0_5": 64,
    "torchvision/efficientnet_b0": 64,
    "torchvision/mobilenet_v2": 64,
    "torchvision/mnasnet0_5": 64,
    "torchvision/regnet_y_400mf": 64,
    "torchvision/squeezenet1_0": 64,
    "torchvision/swin_t": 64,
    "timm/tf_efficientnet_lite0": 64,
    "timm/resnet18": 64,
    "timm/resnetv2_50": 64,  # its output layer is a convolution of 1 × 1
    "timm/regnetx_002": 64,
}


@pytest.mark.parametrize(("name", "size"), GLOBALLY_POOLED.items())
def test_pooling_moves_behind_the_head(name: str, size: int) -> None:
    """These networks take any size, so that they say themselves what the mean of a larger map must be."""
    model = build(name, size=size)
    dense = to_dense(model, (3, size, size))
    for height, width in ((size, size), (size + 32, size + 71)):
        logits_BK, map_BKHW = outputs(model, dense, 3, height, width)
        assert min(map_BKHW.shape[2:]) > 1
        assert float(map_BKHW.std(dim=(2, 3)).max()) > 1e-3 * float(map_BKHW.abs().max())
        assert_close(map_BKHW.mean(dim=(2, 3)), logits_BK)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/inception_v3", "torchvision/swin_t"])
def test_a_head_on_all_stages_sees_their_maps_side_by_side(name: str) -> None:
    """Maps of other sizes than multiples of the last, and with their channels last, among them."""
    backbone = build_backbone(name, num_classes=3, use_pretrained=False)
    size = backbone.input_spec.image_size_px
    model = backbone.module.eval()
    ends = stage_ends(model, backbone.stages, backbone.input_spec)
    attach_stage_outputs(model, tuple(ends), width=head_module(model).in_features + sum(ends.values()))
    nn.init.normal_(head_module(model).weight)
    nn.init.normal_(head_module(model).bias)
    dense = to_dense(model, (3, size, size))
    logits_BK, map_BKHW = outputs(model, dense, 3, size, size)
    assert min(map_BKHW.shape[2:]) > 1
    assert float(map_BKHW.std(dim=(2, 3)).max()) > 1e-3 * float(map_BKHW.abs().max())
    assert_close(map_BKHW.mean(dim=(2, 3)), logits_BK)
    assert dense(torch.randn(1, 3, size + 32, size + 71)).shape[3] > map_BKHW.shape[3]


def test_a_head_on_a_vector_gives_no_map() -> None:
    backbone = build_backbone("lenet5", num_classes=3)
    attach_stage_outputs(backbone.module, ("flatten",), width=84 + 120)
    load_linear_head(backbone.module, torch.randn(3, 84 + 120), torch.zeros(3))
    with pytest.raises(ModelError, match=r"flatten \(Flatten\), which gives no map"):
        to_dense(backbone.module.eval(), (1, 32, 32))


def test_a_map_of_channels_last() -> None:
    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 7, 3)
            self.head = nn.Linear(7, 5)

        def forward(self, images_BCHW: Tensor) -> Tensor:
            maps_BHWD = self.stem(images_BCHW).permute(0, 2, 3, 1)
            return self.head(maps_BHWD.mean((1, 2)))

    model = ChannelsLast().eval()
    logits_BK, map_BKHW = outputs(model, to_dense(model, (3, 16, 16)), 3, 18, 25)
    assert map_BKHW.shape == (2, 5, 16, 23)
    assert_close(map_BKHW.mean(dim=(2, 3)), logits_BK)


def test_a_norm_between_pooling_and_output() -> None:
    norm = nn.BatchNorm1d(7)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model = behind_a_pooling(norm, nn.Dropout(0.5), nn.Linear(7, 5)).eval()
    logits_BK, map_BKHW = outputs(model, to_dense(model, (3, 16, 16)), 3, 20, 31)
    assert map_BKHW.shape == (2, 5, 18, 29)
    assert_close(map_BKHW.mean(dim=(2, 3)), logits_BK)


def test_an_average_over_a_fixed_window_is_global_or_slides() -> None:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 7, 3), nn.ReLU(), nn.AvgPool2d(14), nn.Flatten())
    affine = nn.Sequential(*body, nn.Linear(7, 5)).eval()
    assert outputs(affine, to_dense(affine, (3, 16, 16)), 3, 16, 16)[1].shape == (2, 5, 14, 14)
    hidden = nn.Sequential(*body, nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5)).eval()
    logits_BK, map_BKHW = outputs(hidden, to_dense(hidden, (3, 16, 16)), 3, 16, 16)
    assert map_BKHW.shape == (2, 5, 1, 1)
    assert_close(map_BKHW[:, :, 0, 0], logits_BK)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/squeezenet1_0", "timm/regnetx_002"])
def test_the_map_holds_logits_before_a_log_softmax(name: str) -> None:
    model = build(name)
    dense_before = to_dense(copy.deepcopy(model), (3, 64, 64))
    replace_head(model, 4, head="log_softmax")
    dense = to_dense(model.eval(), (3, 64, 64))
    logits_BK, map_BKHW = outputs(model, dense, 3, 64, 64)
    assert map_BKHW.shape[2:] == outputs(model, dense_before, 3, 64, 64)[1].shape[2:]
    mean_BK = map_BKHW.mean(dim=(2, 3))
    assert (mean_BK.exp().sum(dim=1) - 1).abs().min() > 1e-2
    assert_close(mean_BK.log_softmax(dim=1), logits_BK)


def test_the_model_is_left_as_it_was() -> None:
    model = small_vgg()
    model.get_submodule("features").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    state = torch.get_rng_state()
    to_dense(model, (3, 24, 24))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert [name for name, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_are_shared() -> None:
    model = small_vgg().eval()
    dense = to_dense(model, (3, 24, 24))
    assert not dense.training
    assert {id(parameter) for parameter in dense.parameters()} == {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        model.get_parameter("classifier.0.weight").mul_(-2)
    logits_BK, map_BKHW = outputs(model, dense, 3, 24, 24)
    assert_close(map_BKHW[:, :, 0, 0], logits_BK)


class TwoHeads(nn.Module):
    """A network whose output is the mean of two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = behind_a_pooling()
        self.head, self.other = nn.Linear(7, 5), nn.Linear(7, 5)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BD = self.stem(images_BCHW)
        return (self.head(features_BD) + self.other(features_BD)) / 2


class Asks(nn.Module):
    """A network that looks at its numbers to decide what to compute, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = behind_a_pooling(nn.Linear(7, 5))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.stem(images_BCHW if images_BCHW.sum() > 0 else -images_BCHW)


class EvenSizesOnly(nn.Module):
    """A network that halves its picture into two columns of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(6, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        odd_BCHW, even_BCHW = images_BCHW[..., ::2], images_BCHW[..., 1::2]
        return self.stem(torch.cat([odd_BCHW, even_BCHW], dim=1))


def neighbours() -> nn.Module:
    """A network whose head is a vote of neighbours."""
    head = NeighbourHead(torch.randn(9, 7), torch.arange(9) % 3, class_count=3, neighbours=1)
    return behind_a_pooling(head)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: behind_a_pooling(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5)), r"5 \(ReLU\) stands between the glob"),
        (lambda: behind_a_pooling(nn.LayerNorm(7), nn.Linear(7, 5)), r"4 \(LayerNorm\) stands before the output"),
        (lambda: nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(7, 5)), "MaxPool2"),
        (lambda: small_vgg(map_size=2), r"avgpool \(AdaptiveAvgPool2d\) makes 2 × 2 of a map of 3 × 3"),
        (TwoHeads, "add comes from several tensors, as with several heads"),
        (Asks, "torch.fx cannot trace it"),
        (EvenSizesOnly, "does not take pictures of every size"),
        (neighbours, r"4 \(NeighbourHead\)"),
        (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5)), "4 × 4 of a map of 24 × 24"),
        (
            lambda: nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)),
            "its map does not grow with the picture",
        ),
    ],
)
def test_refusals_name_what_stands_in_the_way(model: type[nn.Module], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        to_dense(model(), (3, 24, 24))
    assert "choose a network" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torchvision/mobilenet_v3_small", r"classifier.1 \(Hardswish\) stands between the global pooling"),
        ("torchvision/convnext_tiny", r"classifier.0 \(LayerNorm2d\)"),
        ("torchvision/vit_b_32", r"a sequence of tokens \(getitem\)"),
        ("timm/vit_tiny_patch16_224", "a sequence of tokens"),
        ("timm/mixer_s32_224", r"a sequence of tokens \(mean\)"),
        ("timm/deit_tiny_distilled_patch16_224", "several heads"),
        ("timm/mobilenetv4_conv_small_035", r"norm_head \(BatchNormAct2d\)"),  # a norm that carries an activation
    ],
)
def test_networks_of_the_zoos_that_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        to_dense(build(name), (3, 224, 224))


def test_wrong_pictures_are_refused() -> None:
    with pytest.raises(ModelError, match="takes no images of 3 × 20 × 20"):
        to_dense(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 20, 20))
    dense = to_dense(small_vgg(), (3, 24, 24))
    with pytest.raises(ModelError, match="40 × 23 px is too small"):
        dense(torch.zeros(1, 3, 40, 23))
