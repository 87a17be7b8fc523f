"""Mixed images: batches in which every image is blended with another, and its target with the other's."""

from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from finetune.data.dataset import sample_seed

# Shapes: B batch, K classes.


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Blends the images of a batch with each other, by draws that are a function of (seed, step) and nothing else.

    `mixup` is the alpha of mixup (Zhang 2018, arXiv 1710.09412), which works on whatever crosses a cut too, `cutmix`
    that of CutMix (Yun 2019, arXiv 1905.04899), for maps only; 0 leaves it out, and with both either comes in turn at
    random.
    """

    mixup: float
    cutmix: float
    class_count: int
    seed: int
    _change: v2.RandomChoice = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kinds = [(v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)]
        changes = [
            kind(alpha=alpha, num_classes=self.class_count, labels_getter=itemgetter(-1))
            for kind, alpha in kinds
            if alpha
        ]
        object.__setattr__(self, "_change", v2.RandomChoice(changes))

    def __call__(
        self, inputs: tuple[torch.Tensor, ...], class_indices_B: torch.Tensor, *, step: int
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Return the blended inputs, of the same shapes, and the targets (B, K) as probabilities."""
        # torchvision blends pictures only: what is flat becomes a picture of one pixel for a moment.
        pictures = [
            tv_tensors.Image(tensor if tensor.ndim == 4 else tensor.flatten(1)[:, :, None, None]) for tensor in inputs
        ]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(sample_seed(self.seed, step, len(class_indices_B)))
            *mixed, targets_BK = self._change(*pictures, class_indices_B)
        shaped = (
            picture.as_subclass(torch.Tensor).view(tensor.shape)
            if tensor.ndim != 4
            else picture.as_subclass(torch.Tensor)
            for picture, tensor in zip(mixed, inputs, strict=True)
        )
        return tuple(shaped), targets_BK
