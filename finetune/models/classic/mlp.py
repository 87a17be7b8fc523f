"""A fully-connected network for MNIST, to compare convolutions with.

Its layer sizes, 28 × 28-500-150-10, are the largest with two hidden layers in the comparison of LeCun et al. 1998,
Gradient-based learning applied to document recognition, figure 9: 2.95 % errors on MNIST, where LeNet-5 makes 0.95 %.

    layer             output   parameters
    input       1 × 28 × 28
    hidden1            500        392,500
    hidden2            150         75,150
    output              10          1,510
    in all                        469,160
"""

from collections import OrderedDict

from torch import nn

from finetune.models.classic.starting_weights import draw_weights, he_normal


def mlp(num_classes: int, *, channels: int) -> nn.Sequential:
    """Build the network of the table, with ReLU in place of the paper's squashing. Starting weights: He et al. 2015.

    The hidden layers are its `features`, so that they count as a body that can be frozen.

    Args:
        num_classes: K, the outputs.
        channels: Channels of the image, 1 or 3.

    Returns:
        The network, (N, channels, 28, 28) → (N, K) logits.
    """
    features = OrderedDict(
        flatten=nn.Flatten(),
        hidden1=nn.Linear(channels * 28 * 28, 500),
        relu1=nn.ReLU(),
        hidden2=nn.Linear(500, 150),
        relu2=nn.ReLU(),
    )
    network = nn.Sequential(OrderedDict(features=nn.Sequential(features), classifier=nn.Linear(150, num_classes)))
    draw_weights(network, he_normal)
    return network
