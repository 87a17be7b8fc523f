"""A training that is to be done in time: image size and epochs are planned by measurement, and it stops before the end.

The first steps are taken for their time only and undone. What was planned is kept on a resume; only the stop is new.
"""

import itertools
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from finetune.data.decode import decode_image
from finetune.data.loaders import EpochSampler, then_none
from finetune.data.table import ImageTable
from finetune.errors import ConfigError, ImageError
from finetune.models.device import as_inputs
from finetune.runs.environment import available_cores
from finetune.runs.processes import ALONE, Processes
from finetune.runs.records import InputSpec
from finetune.training.loop import evaluate_loss
from finetune.training.progress import Progress
from finetune.training.step import Learner, train_step, undone

MEASURED_STEPS = 4  # after one to warm up, if they do not take too long
MEASURED_SHARE = 0.03  # of the time left that each of two measurements may take, but for its first two steps
MEASURED_IMAGES = 8
DECODED_IMAGES = 16  # spread over all, of which the pace of decoding is taken
ENDING_SECONDS = 4.0  # to score the model, write it and draw the plots, beside one pass over the held-out images
USABLE = 0.9  # of the time left when the epochs are planned: a machine is not always as fast as it was measured
SMALLER_SHARES = (0.75, 0.5)  # of the side that an image has by default
SIZE_STEP_PX = 32  # by which most networks divide the side of an image
FORWARDS_AN_EPOCH = 3  # forward and backward of everything take about as long as three times forward


def first_began(began: float, processes: Processes) -> float:
    """Return when a job began, by time.monotonic(), if a launcher has restarted it; else that it `began` now."""
    name, now = f"began, rank {processes.rank}", time.time() - time.monotonic()  # another machine counts otherwise
    if said := processes.recall(name):
        return float(said) - now
    processes.remember(name, str(began + now))
    return began


def decoding_pace(table: ImageTable, spec: InputSpec) -> float:
    """Return the seconds that reading and decoding an image takes by all cores, from a few spread over `table`."""
    started, decoded = time.monotonic(), 0
    for place in range(0, len(table), math.ceil(len(table) / DECODED_IMAGES)):
        with suppress(ImageError):  # the scan will tell
            decode_image(table.path(table.rows[place]), short_side_px=spec.resize_px)
            decoded += 1
    return (time.monotonic() - started) / max(decoded, 1) / available_cores()


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What an epoch takes in seconds: the first, in which images are decoded, and a later one, with its validation.

    `scoring` is what scoring all that is held out takes, once in the end.
    """

    first_epoch: float
    later_epoch: float
    validation: float
    scoring: float


class Budget:
    """The time a training may take, and a watcher that stops it in time.

    Args:
        seconds: The budget.
        began: When it began to run, by time.monotonic().
        processes: Those that stop together, as soon as one of them has no time left.
    """

    def __init__(self, seconds: float, *, began: float, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.seconds = seconds
        self.deadline = began + seconds
        self.ending = ENDING_SECONDS

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.deadline - time.monotonic()

    @property
    def is_used_up(self) -> bool:
        """Whether no more remains than it takes to end."""
        return self.processes.any(self.left < self.ending)

    def epoch_started(self, progress: Progress) -> None:
        """Nothing to do."""

    def step_ended(self, progress: Progress) -> None:
        """Stop while there is time left to score and write the model."""
        if self.is_used_up:
            progress.stop_reason = f"the budget of {self.seconds:.0f} s is used up"

    epoch_ended = step_ended

    def image_size(
        self,
        network: nn.Module,
        spec: InputSpec,
        *,
        images: int,
        decode_seconds: float,
        device: torch.device,
        is_studied: bool = True,
    ) -> int:
        """Return the largest image size, from that of `spec` to half of it, at which there is time for an epoch.

        Args:
            network: It looks at every image once if it `is_studied`, and learns from it in an epoch.
            spec: What the network sees.
            images: How many images there are, for each process.
            decode_seconds: What reading and decoding an image takes.
            device: Where `network` is.
            is_studied: Whether it looks at the images before it learns.

        Raises:
            ConfigError: There is no time to decode each image, and look at it, once.
        """
        size_px = spec.image_size_px
        images_BCHW = torch.zeros(MEASURED_IMAGES, spec.channels, size_px, size_px)
        inputs = as_inputs(images_BCHW, device)
        network.eval()
        with torch.inference_mode():
            network(*inputs)
            started = time.monotonic()
            float(network(*inputs).sum())  # waits for a GPU
        seeing = (time.monotonic() - started) / MEASURED_IMAGES * images

        def needed(size: int, *, epochs: int) -> float:
            passes = is_studied + FORWARDS_AN_EPOCH * epochs
            return decode_seconds * images * (1 + epochs) + seeing * passes * (size / size_px) ** 2

        smaller = (round(share * size_px / SIZE_STEP_PX) * SIZE_STEP_PX for share in SMALLER_SHARES)
        sizes = [size_px, *(size for size in smaller if SIZE_STEP_PX <= size < size_px)]
        affordable = self.left - self.ending
        if affordable <= 0:
            raise ConfigError(
                f"--budget {self.seconds:.0f}s does not do: to start took {self.seconds - self.left:.0f} s, and "
                f"{self.ending:.0f} s are kept for the end",
                self._longer(needed(size_px, epochs=1) - affordable),
            )
        for size in sizes:
            if needed(size, epochs=1) <= affordable:
                return size
        least = needed(sizes[-1], epochs=0)
        if least > affordable:
            raise ConfigError(
                f"--budget {self.seconds:.0f}s does not do: a look at each of the {images:,} images takes "
                f"about {least:.0f} s, and {affordable:.0f} s are left",
                self._longer(needed(sizes[-1], epochs=1) - affordable),
            )
        return sizes[-1]

    def _longer(self, seconds: float) -> str:
        return f"take a longer --budget, such as {math.ceil((self.seconds + seconds) / 60)}m"

    def fit(self, pace: Pace, *, most: int, validations: int = 1) -> int:
        """Return how many epochs of this `pace`, `most` at most, there is time for, and stop in time for their end.

        `validations` is how many follow the last step, which may have to cut its epoch short.
        """
        self.ending = ENDING_SECONDS + validations * pace.validation + pace.scoring
        usable = (self.left - self.ending) * USABLE
        fitting = 1 + math.floor((usable - pace.first_epoch) / pace.later_epoch) if usable >= pace.first_epoch else 0
        return min(most, fitting)


def measure_pace(learner: Learner, loaders: dict[str, DataLoader[Any]], *, left: float) -> Pace:
    """Take the first steps twice and undo them; the second time images come from wherever the first has put them.

    With less time `left`, in seconds, fewer steps are taken.

    The learner's optimiser and schedule are used up by it; its network and the random generators are as before.
    """
    with undone(learner) as trying:
        seconds = []
        for _ in range(2):
            sampler = loaders["train"].batch_sampler
            if isinstance(sampler, EpochSampler):
                sampler.start(0)
            times = [time.monotonic()]
            batches = then_none(learner.placed(loaders["train"]), len(loaders["train"]))
            for batch in itertools.islice(batches, MEASURED_STEPS + 1):
                train_step(trying, batch)
                times.append(time.monotonic())
                took_long = len(times) > 2 and times[-1] - times[0] > MEASURED_SHARE * left
                if learner.processes.any(took_long):
                    break
            warm = times[1:] if len(times) > 2 else times  # of a single step the first is all there is
            seconds.append((warm[-1] - warm[0]) / (len(warm) - 1))
        started = time.monotonic()
        validated = evaluate_loss(trying, itertools.islice(loaders["valid"], MEASURED_STEPS)).images
        an_image = (time.monotonic() - started) / validated
    images = {split: len(loader.dataset) for split, loader in loaders.items()}  # type: ignore[arg-type]
    validation = an_image * images["valid"]
    first, later = (each * len(loaders["train"]) + validation for each in seconds)
    return Pace(
        first_epoch=max(first, later),
        later_epoch=later,
        validation=validation,
        scoring=an_image * (images["valid"] + images.get("test", 0)),
    )
