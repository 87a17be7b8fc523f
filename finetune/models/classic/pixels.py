"""The baseline without a body: raw pixels straight into the output layer.

layer             output   parameters
input       3 × 32 × 32
output              10         30,730
"""

from collections import OrderedDict

from torch import nn


def pixels(num_classes: int, *, channels: int) -> nn.Sequential:
    """Build a linear classifier on the pixels of 32 × 32 images.

    All its weights start at zero: the problem is convex, so that chance has no part in it.

    Args:
        num_classes: K, the outputs.
        channels: Channels of the image, 1 or 3.

    Returns:
        The network, (N, channels, 32, 32) → (N, K) logits, from the pixels in the order channel, row, column.
    """
    output = nn.Linear(channels * 32 * 32, num_classes)
    for parameter in output.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), classifier=output))
