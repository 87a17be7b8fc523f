"""Random starting weights: one rule drawn over all layers of a network. Shared by the networks of this folder."""

from collections.abc import Callable

from torch import Tensor, nn


def draw_weights(network: nn.Module, rule: Callable[[Tensor], Tensor]) -> None:
    """Draw the weights of every convolution and linear layer of `network` in place, and set their biases to zero.

    Args:
        network: Any network whose convolutions and linear layers have biases.
        rule: Fills a weight tensor in place from torch's default generator, such as `nn.init.xavier_uniform_`.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            rule(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)


def he_normal(weight: Tensor) -> Tensor:
    """Fill `weight` in place for a layer before a ReLU: normal, variance 2 / fan-in.

    Source: He et al. 2015, Delving deep into rectifiers, equation 10.
    """
    return nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu")
