"""The layers of a network that run once: what they compute, and all that tells them from others."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.features.cut import Cut, feature_trunk
from finetune.models.heads import head_module
from finetune.models.initialize import Backbone
from finetune.models.stage_outputs import head_inputs
from finetune.models.stages import stage_tensors

NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """The first `frozen` stages of `backbone` as `module`, images (B, C, H, W) → one tensor (B, …) or a tuple of them.

    `is_pooled` says that it gives the feature vectors (B, D) that enter the output layer. Of the modules `outputs` it
    gives what is pooled too, for a head that looks at them; behind the vectors in that case.
    """

    backbone: Backbone
    module: nn.Module
    frozen: int
    is_pooled: bool
    outputs: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """How many numbers enter the output layer by itself, D."""
        return int(head_module(self.backbone.module).weight.shape[1])

    @property
    def title(self) -> str:
        """What it computes, in words."""
        what = (
            "pooled features" if self.is_pooled else f"activations behind {self.backbone.stages[self.frozen - 1].name}"
        )
        return f"{self.backbone.name}: {what}"

    @cached_property
    def weights_sha256(self) -> str:
        """The SHA-256 of all its parameters and buffers, with their names."""
        digest = hashlib.sha256()
        for stage in self.backbone.stages[: self.frozen]:
            for name, tensor in stage_tensors(self.backbone.module, stage).items():
                array = tensor.detach().cpu().contiguous()
                digest.update(f"{name} {array.dtype} {tuple(array.shape)};".encode())
                digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def multiply_adds(self) -> int:
        """Multiplications and additions that an image takes, by torch's own counter, on the CPU."""
        spec, counter = self.backbone.input_spec, FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            self.module(torch.zeros(1, spec.channels, spec.image_size_px, spec.image_size_px))
        return int(counter.get_total_flops()) // 2

    def key(self) -> dict[str, Any]:
        """Return what determines its outputs for given images."""
        return {
            "network": self.backbone.name,
            "weights_sha256": self.weights_sha256,
            "frozen_stages": [stage.name for stage in self.backbone.stages[: self.frozen]],
            "is_pooled": self.is_pooled,
            "outputs": list(self.outputs),
        }


def map_dtype(network: nn.Module) -> str:
    """Return the number format for maps inside `network`: float16 if it normalises them, else float32.

    Maps are large, and what reads them was trained with more noise than rounding. But without normalisation the errors
    of a map reach the weights above it undiminished (tests/benchmarks/boundary_cache.py).
    """
    return "<f2" if any(isinstance(module, NORMALISATIONS) for module in network.modules()) else "<f4"


def pooled_trunk(backbone: Backbone, outputs: tuple[str, ...] = ()) -> Trunk:
    """Return everything below the output layer of `backbone`, which gives pooled features.

    Behind them come the `outputs` of the modules at these paths, by default those that its head looks at.
    """
    outputs = outputs or head_inputs(backbone.module)
    return Trunk(
        backbone=backbone,
        module=feature_trunk(backbone.module, outputs),
        frozen=len(backbone.stages) - 1,
        is_pooled=True,
        outputs=outputs,
    )


def boundary_trunk(backbone: Backbone, cut: Cut, frozen: int, *, kept_outputs: tuple[str, ...] = ()) -> Trunk:
    """Return the trunk of `cut`, the first `frozen` stages; the pooled trunk where no more than its features crosses.

    That one gives the `kept_outputs` too, behind the `width` numbers that cross: with them its features are kept.

    Raises:
        ModelError: What crosses is other than tensors with a row for each image.
    """
    if frozen == len(backbone.stages) - 1:
        pooled, spec = pooled_trunk(backbone, kept_outputs), backbone.input_spec
        device = next(backbone.module.parameters()).device
        image_1CHW = torch.linspace(-1, 1, spec.channels * spec.image_size_px**2, device=device).view(
            1, spec.channels, spec.image_size_px, spec.image_size_px
        )
        crossing, features_1D = cut.trunk(image_1CHW), pooled.module(image_1CHW)
        if len(crossing) == 1 and torch.equal(crossing[0], features_1D[:, : pooled.width]):
            return pooled
    return Trunk(
        backbone=backbone, module=cut.trunk, frozen=frozen, is_pooled=False, outputs=head_inputs(backbone.module)
    )
