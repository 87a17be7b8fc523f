"""VGG-16, built from its 3 × 3 blocks, for ImageNet and for 32 × 32 images.

Source: Simonyan and Zisserman 2014, Very deep convolutional networks for large-scale image recognition, table 1,
configuration D. Three 3 × 3 convolutions see what one of 7 × 7 sees, with 27 C² weights instead of 49 C².

    block   convolutions 3 × 3, padding 1, then max pooling 2 × 2      output after pooling    parameters
    1       2 of  64                                                    64 × 112 × 112             38,720
    2       2 of 128                                                   128 ×  56 ×  56            221,440
    3       3 of 256                                                   256 ×  28 ×  28          1,475,328
    4       3 of 512                                                   512 ×  14 ×  14          5,899,776
    5       3 of 512                                                   512 ×   7 ×   7          7,079,424
    linear  4096                                                       4096                   102,764,544
    linear  4096                                                       4096                    16,781,312
    output  1000                                                       1000                     4,097,000
    in all                                                                                    138,357,544

Starting weights of all three: He et al. 2015 (variance 2 / fan-out) in the convolutions, and normal with deviation
0.01, as in the paper, in the linear layers. The paper started its deep nets from a shallow one, for want of He's rule.
"""

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial

from torch import nn

from finetune.models.classic.starting_weights import draw_weights

_BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # convolutions and channels, configuration D


def vgg16_2014(num_classes: int, *, channels: int) -> nn.Sequential:
    """Build VGG-16 with the parameter names and shapes of torchvision's `vgg16`, so that its weights load.

    Images larger than 224 × 224 are averaged to 7 × 7 before the linear layers, as torchvision does.

    Args:
        num_classes: K, the outputs.
        channels: Channels of the image, 1 or 3.

    Returns:
        The network, (N, channels, 224, 224) → (N, K) logits.
    """
    classifier = nn.Sequential(
        nn.Linear(512 * 7 * 7, 4096),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, num_classes),
    )
    network = nn.Sequential(
        OrderedDict(
            features=_features(channels, batch_norm=False),
            avgpool=nn.AdaptiveAvgPool2d((7, 7)),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )
    _draw(network)
    return network


def vgg16_cifar(num_classes: int, *, channels: int) -> nn.Sequential:
    """Build VGG-16 with batch normalisation for 32 × 32 images: five poolings leave one pixel for a linear output.

    14,728,266 parameters with 10 classes. Batch normalisation: Ioffe and Szegedy 2015.

    Args:
        num_classes: K, the outputs.
        channels: Channels of the image, 1 or 3.

    Returns:
        The network, (N, channels, 32, 32) → (N, K) logits, from 512 features.
    """
    return _small(_features(channels, batch_norm=True), 512, num_classes)


def vgg16_cifar_2048(num_classes: int, *, channels: int) -> nn.Sequential:
    """Build `vgg16_cifar` without its last pooling, so that the output sees 512 · 2 · 2 = 2,048 features.

    14,743,626 parameters with 10 classes.

    Args:
        num_classes: K, the outputs.
        channels: Channels of the image, 1 or 3.

    Returns:
        The network, (N, channels, 32, 32) → (N, K) logits.
    """
    return _small(_features(channels, batch_norm=True)[:-1], 512 * 2 * 2, num_classes)


def _small(features: nn.Sequential, num_features: int, num_classes: int) -> nn.Sequential:
    """Put one linear layer behind `features`."""
    classifier = nn.Linear(num_features, num_classes)
    network = nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))
    _draw(network)
    return network


def _features(channels: int, *, batch_norm: bool) -> nn.Sequential:
    """Chain the five blocks behind an image of `channels`."""
    layers: list[nn.Module] = []
    for convolutions, width in _BLOCKS:
        layers += _block(convolutions, channels, width, batch_norm=batch_norm)
        channels = width
    return nn.Sequential(*layers)


def _block(convolutions: int, in_channels: int, channels: int, *, batch_norm: bool) -> Iterator[nn.Module]:
    """Yield the layers of one block: 3 × 3 convolutions that keep the size, then a pooling that halves it."""
    for place in range(convolutions):
        yield nn.Conv2d(channels if place else in_channels, channels, 3, padding=1)
        if batch_norm:
            yield nn.BatchNorm2d(channels)
        yield nn.ReLU()
    yield nn.MaxPool2d(2)


def _draw(network: nn.Sequential) -> None:
    features, classifier = network.get_submodule("features"), network.get_submodule("classifier")
    draw_weights(features, partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"))
    draw_weights(classifier, partial(nn.init.normal_, std=0.01))
