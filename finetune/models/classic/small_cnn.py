"""The small convolutional network that introductory courses train on MNIST.

Source: Morvan Zhou 2017, PyTorch tutorial 401.

layer                                   output     parameters
input                                1 × 28 × 28
conv1  5 × 5, padding 2             16 × 28 × 28        416
pool1  2 × 2                        16 × 14 × 14
conv2  5 × 5, padding 2             32 × 14 × 14     12,832
pool2  2 × 2                        32 ×  7 ×  7
output                                   10          15,690
in all                                               28,938
"""

from collections import OrderedDict

from torch import nn

from finetune.models.classic.starting_weights import draw_weights, he_normal


def small_cnn(num_classes: int, *, channels: int) -> nn.Sequential:
    """Build the network of the table, with ReLU and max pooling. Starting weights: He et al. 2015.

    Args:
        num_classes: K, the outputs.
        channels: Channels of the image, 1 or 3.

    Returns:
        The network, (N, channels, 28, 28) → (N, K) logits.
    """
    features = OrderedDict(
        conv1=nn.Conv2d(channels, 16, 5, padding=2),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(16, 32, 5, padding=2),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
    )
    classifier = nn.Linear(32 * 7 * 7, num_classes)
    network = nn.Sequential(OrderedDict(features=nn.Sequential(features), flatten=nn.Flatten(), classifier=classifier))
    draw_weights(network, he_normal)
    return network
