"""How many images a step takes where that is "auto": as many more as make an image cheaper, by measurement."""

import math

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from finetune.models.device import as_inputs
from finetune.models.initialize import Backbone
from finetune.training.plan import USUAL_BATCH, Plan
from finetune.training.timing import compute_gradients, in_eval_mode, timed

LARGEST = {"sgd": 64, "adam": 128, "adamw": 128}
"""The batches that the rates of `plan` were published with; larger ones would want higher rates."""
FEWEST_STEPS = 20  # an epoch, below which a larger batch learns less from it
WORTH = 0.9  # of the time an image takes, at most, with a batch of twice the size
MEASURED = 3  # steps, of which the quickest counts


def fastest_batch_size(
    backbone: Backbone, plan: Plan, *, images: int, processes: int, device: torch.device, precision: str
) -> int:
    """Return the batch size, of all `processes` together, from which on twice as many images a step are no faster.

    It starts at USUAL_BATCH and ends at what the rates were published with, what the memory holds, and FEWEST_STEPS.

    Args:
        backbone: What learns, with the layers frozen that will be.
        plan: Says with which optimizer.
        images: How many there are to learn from.
        processes: Among which a batch is divided.
        device: Where the network is.
        precision: "fp32", "bf16" or "fp16".
    """
    size, seconds = USUAL_BATCH, math.inf
    with in_eval_mode(backbone.module):
        for candidate in (USUAL_BATCH * 2**power for power in range(8)):
            if candidate > size and (candidate > LARGEST[plan.optimizer] or images < FEWEST_STEPS * candidate):
                break
            try:
                taken = _seconds_an_image(backbone, math.ceil(candidate / processes), device, precision)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                clear_device_cache(garbage_collection=True)
                break
            if taken > WORTH * seconds:
                break
            size, seconds = candidate, taken
    return size


def _seconds_an_image(backbone: Backbone, share: int, device: torch.device, precision: str) -> float:
    spec = backbone.input_spec
    inputs = as_inputs(torch.zeros(share, spec.channels, spec.image_size_px, spec.image_size_px), device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    with torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32"):
        compute_gradients(backbone.module, inputs)
        return (
            min(timed(lambda: compute_gradients(backbone.module, inputs), device)[0] for _ in range(MEASURED)) / share
        )
