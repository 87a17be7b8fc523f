"""AlexNet as it was published in 2012, on one device.

torchvision's `alexnet` is another network, the narrower one of 2014, without response normalisation.

Source: Krizhevsky, Sutskever and Hinton 2012, ImageNet classification with deep convolutional neural networks.

    layer                                    output      parameters
    input                                  3 × 227 × 227
    conv1  11 × 11, stride 4              96 ×  55 ×  55      34,944
    pool1   3 × 3, stride 2               96 ×  27 ×  27
    conv2   5 × 5, padding 2             256 ×  27 ×  27     614,656
    pool2   3 × 3, stride 2              256 ×  13 ×  13
    conv3   3 × 3, padding 1             384 ×  13 ×  13     885,120
    conv4   3 × 3, padding 1             384 ×  13 ×  13   1,327,488
    conv5   3 × 3, padding 1             256 ×  13 ×  13     884,992
    pool5   3 × 3, stride 2              256 ×   6 ×   6
    fc6                                       4096        37,752,832
    fc7                                       4096        16,781,312
    output                                    1000         4,097,000
    in all                                                62,378,344

The paper divides conv2, conv4 and conv5 between two GPUs, which have no connections there; here every map sees all
maps before it. It speaks of 224 × 224 images, but 55 × 55 outputs need 227.
"""

from collections import OrderedDict
from functools import partial

from torch import nn

from finetune.models.classic.starting_weights import draw_weights


def alexnet2012(num_classes: int, *, channels: int) -> nn.Sequential:
    """Build AlexNet with response normalisation, overlapping pooling and dropout.

    Starting weights as in section 5 of the paper: normal with deviation 0.01; biases 1 in conv2, conv4, conv5 and the
    hidden linear layers, which gives their ReLUs positive inputs, and 0 elsewhere.

    Args:
        num_classes: K, the outputs.
        channels: Channels of the image, 1 or 3.

    Returns:
        The network, (N, channels, 227, 227) → (N, K) logits.
    """
    features = OrderedDict(
        conv1=nn.Conv2d(channels, 96, 11, stride=4),
        relu1=nn.ReLU(),
        norm1=_response_norm(),
        pool1=nn.MaxPool2d(3, stride=2),
        conv2=nn.Conv2d(96, 256, 5, padding=2),
        relu2=nn.ReLU(),
        norm2=_response_norm(),
        pool2=nn.MaxPool2d(3, stride=2),
        conv3=nn.Conv2d(256, 384, 3, padding=1),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(384, 384, 3, padding=1),
        relu4=nn.ReLU(),
        conv5=nn.Conv2d(384, 256, 3, padding=1),
        relu5=nn.ReLU(),
        pool5=nn.MaxPool2d(3, stride=2),
    )
    classifier = OrderedDict(
        fc6=nn.Linear(256 * 6 * 6, 4096),
        relu6=nn.ReLU(),
        dropout6=nn.Dropout(0.5),
        fc7=nn.Linear(4096, 4096),
        relu7=nn.ReLU(),
        dropout7=nn.Dropout(0.5),
        output=nn.Linear(4096, num_classes),
    )
    network = nn.Sequential(
        OrderedDict(features=nn.Sequential(features), flatten=nn.Flatten(), classifier=nn.Sequential(classifier))
    )
    draw_weights(network, partial(nn.init.normal_, std=0.01))
    for layer in ("features.conv2", "features.conv4", "features.conv5", "classifier.fc6", "classifier.fc7"):
        nn.init.ones_(network.get_parameter(f"{layer}.bias"))
    return network


def _response_norm() -> nn.LocalResponseNorm:
    """Normalise over 5 neighbouring maps: b = a / (2 + 1e-4 · Σ a²)^0.75, section 3.3 of the paper."""
    neighbours = 5
    # torch divides alpha by the number of neighbours, the paper does not.
    return nn.LocalResponseNorm(neighbours, alpha=1e-4 * neighbours, beta=0.75, k=2.0)
