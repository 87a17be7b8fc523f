"""Receptive fields against the closed formula, published numbers and the footprint of a real gradient."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from finetune.models.anatomy import Anatomy, Layer, inspect_network, output_size, receptive_field
from finetune.models.initialize import build_as_published

# Shapes: N images, C channels, H height, W width.


class Sum(nn.Module):
    """Branches added up."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.out = nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.out(sum(branch(x_NCHW) for branch in self.branches))


class Concatenation(Sum):
    """Branches side by side, as in Inception and DenseNet."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.out(torch.cat([branch(x_NCHW) for branch in self.branches], dim=1))


class SqueezeAndExcitation(nn.Module):
    """Channels weighted by what the whole map says."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())
        self.out = nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.out(x_NCHW * self.gate(x_NCHW))


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def conv(inputs: int, outputs: int, kernel: int, **options: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, **options)  # type: ignore[arg-type]


def dense_block() -> nn.Module:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(4, 4, 3, padding=1), conv(8, 4, 3, padding=1)
            self.out = nn.Identity()

        def forward(self, x_NCHW: Tensor) -> Tensor:
            once = torch.cat([x_NCHW, self.first(x_NCHW)], dim=1)
            return self.out(torch.cat([once, self.second(once)], dim=1))

    return Dense()


LOCAL: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: nn.Sequential(
        conv(2, 4, 5, stride=2, padding=1), nn.Softplus(), conv(4, 4, 3, dilation=2, padding=2), nn.AvgPool2d(3, 2)
    ),
    "rectangle": lambda: nn.Conv2d(2, 4, (3, 7), stride=(2, 1), padding=(0, 3)),
    "residual with a strided shortcut": lambda: nn.Sequential(
        conv(2, 4, 3),
        Sum(
            nn.Sequential(conv(4, 6, 3, stride=2, padding=1), nn.Softplus(), conv(6, 6, 3, padding=1)),
            conv(4, 6, 1, stride=2),
        ),
    ),
    "inception": lambda: nn.Sequential(
        conv(2, 4, 3, stride=2),
        Concatenation(
            conv(4, 2, 1),
            conv(4, 2, 3, padding=1),
            conv(4, 2, 5, padding=2),
            nn.Sequential(nn.AvgPool2d(3, 1, padding=1), conv(4, 2, 1)),
        ),
    ),
    "dense": lambda: nn.Sequential(conv(2, 4, 3, stride=2), dense_block()),
    "depthwise separable": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1)
    ),
    "pooling that rounds up": lambda: nn.Sequential(nn.AvgPool2d(3, 2, ceil_mode=True), conv(2, 3, 3, padding=1)),
    "space to depth": lambda: nn.Sequential(nn.PixelUnshuffle(4), conv(32, 4, 3, padding=1)),
    "space to depth by reshaping": lambda: nn.Sequential(
        Function(lambda x: x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)),
        conv(32, 4, 3, padding=1),
    ),
    "every second pixel": lambda: nn.Sequential(
        Function(lambda x: torch.cat([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]], dim=1)), conv(4, 4, 3)
    ),
    "padding by hand": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(2, 4, 4, stride=2)),
    "BatchNorm": lambda: nn.Sequential(conv(2, 4, 3, stride=2), nn.BatchNorm2d(4), conv(4, 4, 3)),
    "channels last": lambda: nn.Sequential(
        conv(2, 4, 4, stride=4), Function(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(4), nn.Linear(4, 6),
        Function(lambda x: x.permute(0, 3, 1, 2)), conv(6, 4, 3, padding=1),
    ),
}  # fmt: skip


PERIODIC: dict[str, Callable[[], nn.Module]] = {
    "nearest": lambda: nn.Sequential(conv(2, 4, 3, stride=4, padding=1), nn.Upsample(scale_factor=2), conv(4, 4, 3)),
    "bilinear": lambda: nn.Sequential(
        conv(2, 4, 3, stride=4, padding=1), nn.Upsample(scale_factor=2, mode="bilinear"), conv(4, 4, 3, padding=1)
    ),
    "uneven bins": lambda: nn.Sequential(conv(2, 4, 2, stride=2), nn.AdaptiveAvgPool2d(14), conv(4, 4, 3, padding=1)),
    "transposed": lambda: nn.Sequential(conv(2, 4, 3, stride=4), nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1)),
    "pixel shuffle": lambda: nn.Sequential(conv(2, 4, 3, stride=4), nn.PixelShuffle(2), conv(1, 4, 3, padding=1)),
    "branch of another size": lambda: nn.Sequential(
        conv(2, 4, 3, padding=1),
        Sum(
            conv(4, 4, 3, padding=1),
            nn.Sequential(conv(4, 4, 3, stride=2, padding=1), conv(4, 4, 3, padding=1), nn.Upsample(scale_factor=2)),
        ),
    ),
    "windows": lambda: Function(windows_of_five),
    "shifted windows": lambda: Function(
        lambda x: windows_of_five(windows_of_five(x).roll((-2, -2), (2, 3))).roll((2, 2), (2, 3))
    ),
}


def windows_of_five(x_NCHW: Tensor) -> Tensor:
    """Attention among 5 × 5 pixels."""
    size = x_NCHW.shape[-1] // 5
    parts = x_NCHW.unflatten(3, (size, 5)).unflatten(2, (size, 5)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4)
    parts = parts.reshape(-1, 25, x_NCHW.shape[1])
    seen = functional.scaled_dot_product_attention(parts, parts, parts)
    return seen.view(-1, size, size, 5, 5, x_NCHW.shape[1]).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def footprint(network: nn.Module, size: int, unit: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return first and last row, and first and last column, of the pixels that move the output at `unit`."""
    network = network.double().eval()
    images_NCHW = torch.rand(1, 2, size, size, dtype=torch.double, requires_grad=True)
    network(images_NCHW)[:, :, unit[0], unit[1]].sum().backward()
    assert images_NCHW.grad is not None
    touched_HW = images_NCHW.grad.abs().sum(dim=(0, 1)) > 0
    rows, columns = touched_HW.any(dim=1).nonzero(), touched_HW.any(dim=0).nonzero()
    return (int(rows.min()), int(rows.max())), (int(columns.min()), int(columns.max()))


def last(network: nn.Module, size: int, channels: int = 2) -> Layer:
    return inspect_network(network, (channels, size, size)).layers[-1]


@pytest.mark.parametrize("name", LOCAL)
def test_the_gradient_of_a_unit_covers_its_field_and_no_more(name: str) -> None:
    torch.manual_seed(0)
    network = LOCAL[name]()
    layer = last(network, 60)
    assert layer.stride is not None
    assert layer.centre is not None
    assert isinstance(layer.receptive_field, tuple)
    assert layer.output_shape is not None
    unit = (layer.output_shape[1] // 2, layer.output_shape[2] // 2 - 1)
    for axis, (first, final) in enumerate(footprint(network, 60, unit)):
        assert final - first + 1 == layer.receptive_field[axis]
        assert (first + final) / 2 == layer.centre[axis] + unit[axis] * layer.stride[axis]


@pytest.mark.parametrize("name", PERIODIC)
def test_where_units_differ_the_field_is_that_of_the_widest(name: str) -> None:
    torch.manual_seed(0)
    network = PERIODIC[name]()
    layer = last(network, 60)
    assert layer.output_shape is not None
    side = layer.output_shape[-1]
    spans = [footprint(network, 60, (unit, unit))[0] for unit in range(side // 2 - 5, side // 2 + 5)]
    widest = max(final - first + 1 for first, final in spans)
    assert layer.receptive_field == (widest, widest)
    assert layer.stride is not None
    assert layer.stride[0] == pytest.approx(60 / side, rel=0.15)


@pytest.mark.parametrize(
    "layer", [SqueezeAndExcitation(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.AdaptiveAvgPool2d(1)], ids=str
)
def test_a_mean_over_positions_sees_the_whole_image(layer: nn.Module) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(conv(2, 4, 3, stride=2, padding=1), layer)
    assert footprint(network, 20, (0, 0)) == ((0, 19), (0, 19))
    seen = last(network, 20)
    assert seen.receptive_field == "image"
    assert seen.stride == ((2, 2) if seen.output_shape == (4, 10, 10) else None)


def test_a_mean_that_leaves_out_the_border_is_not_the_whole_image() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(conv(2, 4, 2, stride=2), nn.AdaptiveAvgPool2d(1))
    assert footprint(network, 21, (0, 0)) == ((0, 19), (0, 19))
    assert last(network, 21).receptive_field == (20, 20)


def test_the_whole_image_stays_the_whole_image_and_keeps_its_grid() -> None:
    seen = last(nn.Sequential(conv(2, 4, 3, padding=1), SqueezeAndExcitation(4), conv(4, 4, 5, stride=2)), 32)
    assert seen.receptive_field == "image"
    assert seen.stride == (2, 2)
    assert seen.centre == (2.0, 2.0)


layers = st.tuples(
    st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.sampled_from(["conv", "pool"])
)


@settings(deadline=None, max_examples=40)
@given(st.lists(layers, min_size=1, max_size=5))
def test_chains_agree_with_the_closed_formulas(chain: list[tuple[int, int, int, int, str]]) -> None:
    modules: list[nn.Module] = []
    size, start, stride_of_all = 4000, 0.0, 1
    for kernel, stride, padding, dilation, kind in chain:
        padding = min(padding, kernel // 2)  # noqa: PLW2901 (a pooling takes no more)
        size = output_size(size, kernel, stride=stride, padding=padding, dilation=dilation)
        modules.append(
            nn.Conv2d(1, 1, kernel, stride=stride, padding=padding, dilation=dilation)
            if kind == "conv"
            else nn.MaxPool2d(kernel, stride, padding=padding, dilation=dilation)
        )
        start += (dilation * (kernel - 1) / 2 - padding) * stride_of_all
        stride_of_all *= stride
    layer = last(nn.Sequential(*modules), 4000, channels=1)
    expected = receptive_field([k for k, *_ in chain], [c[1] for c in chain], [c[3] for c in chain])
    assert layer.output_shape == (1, size, size)
    assert layer.receptive_field == (expected, expected)
    assert layer.stride == (stride_of_all, stride_of_all)
    assert layer.centre == (start, start)


def published(name: str) -> Anatomy:
    module, spec = build_as_published(name)
    return inspect_network(module, (spec.channels, spec.image_size_px, spec.image_size_px))


def by_name(name: str) -> dict[str, Layer]:
    return {layer.name: layer for layer in published(name).layers}


def test_vgg16_as_everybody_works_it_out() -> None:
    layers = by_name("vgg16")
    assert layers["features.28"].receptive_field == (196, 196)
    assert layers["features.30"].receptive_field == (212, 212)
    assert layers["features.30"].stride == (32, 32)
    assert layers["classifier.0"].receptive_field == (212 + 6 * 32,) * 2
    assert layers["classifier.0"].stride is None


@pytest.mark.parametrize(
    ("name", "layer", "kernels", "strides"),
    [
        ("resnet18", "layer4.1.bn2", [7, 3] + [3] * 16, [2, 2] + ([1] * 4 + [2, 1, 1, 1] * 3)),
        # torchvision's ResNet-50 strides in the 3 × 3 of a block (version 1.5), the original in the 1 × 1 before: 483.
        ("resnet50", "layer4.2.bn3", [7, 3] + [3] * 16, [2, 2] + [1] * 3 + [2, 1, 1, 1] + [2] + [1] * 5 + [2, 1, 1]),
    ],
)
def test_the_longest_path_of_a_resnet_counts(name: str, layer: str, kernels: list[int], strides: list[int]) -> None:
    expected = receptive_field(kernels, strides)
    assert expected == {"resnet18": 435, "resnet50": 427}[name]
    assert by_name(name)[layer].receptive_field == (expected, expected)


def test_a_flattened_map_has_no_positions_left() -> None:
    network = nn.Sequential(conv(2, 4, 3, stride=2), nn.Flatten(), nn.Dropout(), nn.Linear(324, 3))
    seen = inspect_network(network, (2, 20, 20)).layers
    assert [layer.stride for layer in seen] == [(2, 2), None, None, None]
    assert [layer.receptive_field for layer in seen] == [(3, 3), (3, 3), (3, 3), (19, 19)]


def test_the_tokens_of_a_transformer_see_a_patch_and_then_everything() -> None:
    layers = by_name("vit_b_16")
    assert layers["conv_proj"].receptive_field == (16, 16)
    assert layers["conv_proj"].stride == (16, 16)
    assert layers["encoder.layers.encoder_layer_0.ln_1"].receptive_field == (16, 16)
    assert layers["encoder.layers.encoder_layer_0.ln_1"].stride is None  # the class token has no place
    assert layers["encoder.layers.encoder_layer_0.self_attention"].receptive_field == "image"
    assert layers["heads.head"].receptive_field == "image"


def test_windows_grow_where_they_are_shifted_and_merged() -> None:
    """A window of Swin is 7 units wide; shifted by 3, it overlaps two of the layer before."""
    layers = by_name("swin_t")
    assert layers["features.1.0.attn"].receptive_field == (7 * 4,) * 2
    assert layers["features.1.1.attn"].receptive_field == (2 * 7 * 4,) * 2
    assert layers["features.7.1.attn"].receptive_field == "image"


def test_what_no_rule_is_known_for_is_told_and_does_not_stop_the_pass() -> None:
    anatomy = inspect_network(
        nn.Sequential(conv(2, 4, 3), Function(lambda x: torch.tril(x)[..., torch.randperm(18)[:9]]), conv(4, 4, 3)),
        (2, 20, 20),
    )
    assert [layer.receptive_field for layer in anatomy.layers] == [(3, 3), None, None]
    assert anatomy.notes == ("no rule for index",)
    assert anatomy.layers[1].output_shape == (4, 18, 9)


def test_writing_into_a_part_is_not_overlooked() -> None:
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = conv(2, 4, 3), conv(4, 4, 3, padding=1), nn.Identity()

        def forward(self, x_NCHW: Tensor) -> Tensor:
            x_NCHW = self.first(x_NCHW)
            x_NCHW[:, :2] += self.second(x_NCHW)[:, :2]
            return self.out(x_NCHW)

    anatomy = inspect_network(Writer(), (2, 20, 20))
    assert [layer.receptive_field for layer in anatomy.layers] == [(3, 3), (5, 5), None]
    assert anatomy.notes == ("writing into a part of a tensor",)


def test_what_does_not_depend_on_the_image_has_no_field() -> None:
    layer = last(nn.Sequential(conv(2, 4, 3), Function(torch.zeros_like), nn.Identity()), 20)
    assert layer.receptive_field is None
    assert not layer.note
    assert math.prod(layer.output_shape or ()) == 4 * 18 * 18
