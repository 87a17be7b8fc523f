"""LeNet-5 in four forms: as usually built, as printed in 1998, and two modern ones for 28 × 28 images.

Source: LeCun, Bottou, Bengio and Haffner 1998, Gradient-based learning applied to document recognition, section II.

    layer                          output     parameters
    input                       1 × 32 × 32
    C1   convolution 5 × 5      6 × 28 × 28        156
    S2   sub-sampling 2 × 2     6 × 14 × 14          0   (1998:    12)
    C3   convolution 5 × 5     16 × 10 × 10      2,416   (1998: 1,516)
    S4   sub-sampling 2 × 2    16 ×  5 ×  5          0   (1998:    32)
    C5   convolution 5 × 5    120 ×  1 ×  1     48,120
    F6   linear                     84          10,164
    output                          10             850
    in all                                      61,706   (1998: 60,850)

A grey image and 10 classes are assumed. Shapes: B images, C maps, H × W pixels.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain, groupby

import torch
from torch import Tensor, nn

from finetune.models.classic.starting_weights import draw_weights, he_normal

C3_INPUTS = (
    *((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
    *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)),
    (0, 1, 2, 3, 4, 5),
)
"""The maps of S2 that each of the 16 maps of C3 sees: table I of the paper, column by column."""


class ScaledTanh(nn.Module):
    """The squashing function 1.7159 tanh(2x/3), so that f(1) = 1 and f(-1) = -1. Source: the paper, appendix A."""

    def forward(self, sums: Tensor) -> Tensor:
        """Squash weighted sums of any shape."""
        return 1.7159 * torch.tanh(sums * (2 / 3))


class SubSampling(nn.Module):
    """The trainable sub-sampling of S2 and S4: four neighbours are added, times a coefficient, plus a bias, a map."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.sum = nn.AvgPool2d(2, divisor_override=1)
        self.coefficient = nn.Parameter(torch.empty(maps))
        self.bias = nn.Parameter(torch.empty(maps))

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Halve height and width of `maps_BCHW`."""
        sums_BCHW: Tensor = self.sum(maps_BCHW)
        return sums_BCHW * self.coefficient[:, None, None] + self.bias[:, None, None]


class TableConvolution(nn.Module):
    """A 5 × 5 convolution whose output maps each see only the input maps that a table gives them.

    Neighbours in the table with equally many inputs make up one grouped convolution, so that there is no weight for a
    connection that does not exist.
    """

    def __init__(self, table: Sequence[Sequence[int]]) -> None:
        super().__init__()
        runs = [list(run) for _, run in groupby(table, key=len)]
        self.inputs = [list(chain.from_iterable(run)) for run in runs]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(len(inputs), len(run), 5, groups=len(run)) for inputs, run in zip(self.inputs, runs, strict=True)
        )

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Return one map for each line of the table, four pixels less high and wide than the inputs."""
        return torch.cat(
            [convolve(maps_BCHW[:, inputs]) for inputs, convolve in zip(self.inputs, self.convolutions, strict=True)],
            dim=1,
        )


def lenet5(num_classes: int, *, channels: int) -> nn.Sequential:
    """Build LeNet-5 as it is usually built: every map of C3 sees all of S2, ReLU, and sub-sampling takes the largest.

    Image and layer sizes are the paper's. Starting weights: He et al. 2015, Delving deep into rectifiers.

    Args:
        num_classes: K, the outputs.
        channels: Channels of the image, 1 or 3.

    Returns:
        The network, (N, channels, 32, 32) → (N, K) logits.
    """
    features = OrderedDict(
        c1=nn.Conv2d(channels, 6, 5),
        relu1=nn.ReLU(),
        s2=nn.MaxPool2d(2),
        c3=nn.Conv2d(6, 16, 5),
        relu3=nn.ReLU(),
        s4=nn.MaxPool2d(2),
        c5=nn.Conv2d(16, 120, 5),
        relu5=nn.ReLU(),
    )
    classifier = OrderedDict(f6=nn.Linear(120, 84), relu6=nn.ReLU(), output=nn.Linear(84, num_classes))
    network = _chain(features, classifier)
    draw_weights(network, he_normal)
    return network


def lenet5_1998(num_classes: int, *, channels: int) -> nn.Sequential:
    """Build LeNet-5 to the letter of the paper up to F6: 60,000 trainable parameters, each where table I puts it.

    Starting weights are uniform within ±2.4 / fan-in, biases too, the fan-in being the number of inputs of a unit
    (appendix A). Sub-sampling has a coefficient and a bias a map and is squashed like every layer up to F6.

    The output is a linear layer instead of the paper's radial basis units: those measure distances to hand-drawn
    7 × 12 pictures of ASCII characters, which other classes do not have, and give penalties where a cross-entropy needs
    logits.

    Args:
        num_classes: K, the outputs.
        channels: Channels of the image, 1 or 3.

    Returns:
        The network, (N, channels, 32, 32) → (N, K) logits.
    """
    features = OrderedDict(
        c1=nn.Conv2d(channels, 6, 5),
        squash1=ScaledTanh(),
        s2=SubSampling(6),
        squash2=ScaledTanh(),
        c3=TableConvolution(C3_INPUTS),
        squash3=ScaledTanh(),
        s4=SubSampling(16),
        squash4=ScaledTanh(),
        c5=nn.Conv2d(16, 120, 5),
        squash5=ScaledTanh(),
    )
    classifier = OrderedDict(f6=nn.Linear(120, 84), squash6=ScaledTanh(), output=nn.Linear(84, num_classes))
    network = _chain(features, classifier)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 2.4 / module.weight[0].numel()
        elif isinstance(module, SubSampling):
            bound = 2.4 / 4
        else:
            continue
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -bound, bound)
    return network


def lenet5_relu(num_classes: int, *, channels: int) -> nn.Sequential:
    """Build LeNet-5 with ReLU for 28 × 28 images: C1 pads them by 2, so that the layer table stays as it was.

    Sub-sampling takes the plain average. Starting weights: He et al. 2015, Delving deep into rectifiers.

    Args:
        num_classes: K, the outputs.
        channels: Channels of the image, 1 or 3.

    Returns:
        The network, (N, channels, 28, 28) → (N, K) logits.
    """
    features = OrderedDict(
        c1=nn.Conv2d(channels, 6, 5, padding=2),
        relu1=nn.ReLU(),
        s2=nn.AvgPool2d(2),
        c3=nn.Conv2d(6, 16, 5),
        relu3=nn.ReLU(),
        s4=nn.AvgPool2d(2),
    )
    classifier = OrderedDict(
        c5=nn.Linear(16 * 5 * 5, 120),
        relu5=nn.ReLU(),
        f6=nn.Linear(120, 84),
        relu6=nn.ReLU(),
        output=nn.Linear(84, num_classes),
    )
    network = _chain(features, classifier)
    draw_weights(network, he_normal)
    return network


def lenet5_sigmoid(num_classes: int, *, channels: int) -> nn.Sequential:
    """Build LeNet with sigmoids and max pooling for 28 × 28 images without padding.

    Source: Zhang, Lipton, Li and Smola 2019, Dive into deep learning, the chapter on LeNet. Starting weights: Glorot
    and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks, equation 16.

        c1 6 × 24 × 24 (156) · s2 6 × 12 × 12 · c3 16 × 8 × 8 (2,416) · s4 16 × 4 × 4 · c5 120 (30,840) ·
        f6 84 (10,164) · output 10 (850), in all 44,426 parameters

    Args:
        num_classes: K, the outputs.
        channels: Channels of the image, 1 or 3.

    Returns:
        The network, (N, channels, 28, 28) → (N, K) logits.
    """
    features = OrderedDict(
        c1=nn.Conv2d(channels, 6, 5),
        sigmoid1=nn.Sigmoid(),
        s2=nn.MaxPool2d(2),
        c3=nn.Conv2d(6, 16, 5),
        sigmoid3=nn.Sigmoid(),
        s4=nn.MaxPool2d(2),
    )
    classifier = OrderedDict(
        c5=nn.Linear(16 * 4 * 4, 120),
        sigmoid5=nn.Sigmoid(),
        f6=nn.Linear(120, 84),
        sigmoid6=nn.Sigmoid(),
        output=nn.Linear(84, num_classes),
    )
    network = _chain(features, classifier)
    draw_weights(network, nn.init.xavier_uniform_)
    return network


def _chain(features: OrderedDict[str, nn.Module], classifier: OrderedDict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(features=nn.Sequential(features), flatten=nn.Flatten(), classifier=nn.Sequential(classifier))
    )
