"""Copies of networks to look at: other modules, the same tensors."""

import copy
from itertools import chain

from torch import nn


def twin_of(model: nn.Module) -> nn.Module:
    """Copy the modules of `model` but not its tensors, so that eval mode and new layers do not reach the original."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
