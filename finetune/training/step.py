"""One optimiser step: a batch computed in as many parts as the memory wants, checked, and only then applied."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import convert_to_fp32, send_to_device, slice_tensors
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from finetune.data.dataset import Draft
from finetune.data.loaders import readable
from finetune.errors import DivergedError, first_ten
from finetune.models.device import as_inputs, resolve_device
from finetune.models.stage_outputs import find_stage_outputs
from finetune.runs.processes import ALONE, Processes
from finetune.runs.reporting import LoggingReporter, Reporter
from finetune.training.mixing import Mix
from finetune.training.objectives import main_output, total_loss
from finetune.training.progress import Outcome
from finetune.training.schedules import Schedule
from finetune.training.sharding import ShardedModel, whole_tensor
from finetune.training.sync_norm import SharedStatistics

# Shapes: B batch, C channels, H height, W width, K classes.

LOWER_RATES = "train with a lower --learning-rate and --trunk-learning-rate, or with --max-grad-norm 1"


def build_accelerator(device: torch.device, precision: str) -> Accelerator:
    """Return accelerate's handle on the device, the number format of the training steps and the processes."""
    if AcceleratorState._shared_state:  # an earlier training's choices bind for good otherwise
        AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no" if precision == "fp32" else precision)


@dataclass(kw_only=True)
class Learner:
    """What the loop works on. `max_grad_norm` of 0 does not clip.

    `network` is the whole of which `model` may be the part above a cut; its weights are what is kept and saved.
    `finish` makes images of the drafts in a training batch, where batches hold drafts. `mix` blends images with
    each other, `average` follows the weights. With `keeps_last` the last weights are kept, not those that
    validation finds best. With `keeps_start` the weights of the start are saved, and with `averages_ends` their
    mean with the kept ones is tried in the end. A batch is computed in `parts`, whose gradients are added up. Of
    every batch each of several `processes` computes its share; all take the step of the whole. With
    `shared_statistics` BatchNorm sees the batch of all of them, and with `sharded` a copy of `model` learns in its
    place that is divided among them: who has no share then goes along with `sample`, which counts for nothing.
    """

    model: nn.Module
    network: nn.Module = None  # type: ignore[assignment]
    criterion: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    accelerator: Accelerator = field(default_factory=lambda: build_accelerator(resolve_device("auto"), "fp32"))
    max_grad_norm: float = 0.0
    finish: Callable[[Sequence[Draft]], torch.Tensor] | None = None
    mix: Mix | None = None
    average: ModelEmaV3 | None = None
    keeps_last: bool = False
    keeps_start: bool = False
    averages_ends: bool = False
    parts: int = 1
    processes: Processes = ALONE
    shared_statistics: SharedStatistics | None = None
    sharded: ShardedModel | None = None
    sample: Callable[[], Any] | None = None
    reporter: Reporter = field(default_factory=LoggingReporter)

    def __post_init__(self) -> None:
        self.network = self.network or self.model

    @property
    def trained(self) -> nn.Module:
        """What learns: `model`, or the divided copy of it."""
        return self.sharded.module if self.sharded else self.model

    @property
    def is_in_step(self) -> bool:
        """Whether all processes go through the network together, layer by layer."""
        return self.shared_statistics is not None or self.sharded is not None

    def collect(self) -> None:
        """Bring `model` and `network` up to date with what learns; to be called by all processes."""
        if self.sharded:
            self.sharded.collect()

    def spread(self) -> None:
        """Bring what learns to the weights of `model`; to be called by all processes."""
        if self.sharded:
            self.sharded.spread()

    def reunite(self) -> None:
        """Put `model` itself back in the place of the divided copy, which learns no more."""
        self.sharded = None
        self.model.to(self.accelerator.device)

    def stand_in(self) -> tuple[torch.Tensor, ...]:
        """Return an image that does not count, to go through the network with by the side of the others."""
        assert self.sample is not None
        images, *_ = next(self.placed([self.sample()]))
        return as_inputs(self.finish(images) if self.finish else images)

    def scored(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Iterate over `batches` as they lie on the device; if divided, over None too while others have one left."""
        placed = iter(self.placed(batches))
        if not self.sharded:
            yield from placed
            return
        while self.processes.any((batch := next(placed, None)) is not None):
            yield batch
        self.sharded.end_pass()

    def learning_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimiser moves."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def placed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Iterate over the batches of a loader as they lie on the device.

        Raises:
            ImageError, DataError: A file can no longer be read, or has changed.
        """
        device = self.accelerator.device
        for batch in readable(batches):
            # Only pinned memory may be copied from while Python goes on: any other could be freed by then.
            yield send_to_device(batch, device, non_blocking=device.type == "cuda")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the network its averaged weights for a while; without an average it keeps its own."""
        if self.average is None:
            yield
            return
        own = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
        self.network.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            self.network.load_state_dict(own)


@contextmanager
def undone(learner: Learner) -> Iterator[Learner]:
    """Give a learner in train mode whose steps are for trying: network and random generators are then as before.

    Its optimiser and schedule are used up.
    """
    weights = {name: tensor.detach().clone() for name, tensor in learner.network.state_dict().items()}
    device, optimizer = learner.accelerator.device, learner.optimizer
    if learner.accelerator.scaler is not None:
        optimizer = learner.accelerator.prepare(optimizer)  # which takes the scale out of the gradients
    learner.trained.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield replace(learner, optimizer=optimizer, schedule=Schedule.of(None, learner.optimizer), average=None)
    learner.network.load_state_dict(weights)
    learner.spread()


def train_step(learner: Learner, batch: Sequence[Any] | None, *, step: int = 1) -> Outcome:
    """Take one optimiser step, the `step`-th, and return what it saw.

    `batch` is the share of this process; with None it has none and takes the step of the others.

    Where the memory does not suffice the batch is computed anew in twice as many parts, and all later ones too: the
    update is that of the whole batch, but for BatchNorm in train mode, which sees one part at a time.

    Raises:
        DivergedError: Loss or gradient is not finite; no weight was changed.
        RuntimeError: The memory does not suffice for a single image, on a CPU for two.
    """
    if batch is not None:
        outcome = _learn(learner, batch, step)
    elif learner.is_in_step:
        outcome = _learn_nothing(learner, step)
    else:
        learner.optimizer.zero_grad()
        outcome = Outcome()
        if learner.accelerator.scaler is not None:  # which does not know the device before it has scaled something
            learner.accelerator.scaler.scale(torch.zeros((), device=learner.accelerator.device))
    if learner.processes.count > 1:
        outcome = _join_shares(learner, outcome)
    parameters = learner.learning_parameters()
    if learner.max_grad_norm and learner.accelerator.scaler is not None:
        norm = learner.accelerator.clip_grad_norm_(parameters, learner.max_grad_norm)
    elif learner.max_grad_norm:
        norm = clip_grad_norm_(parameters, learner.max_grad_norm)
    else:
        norm = get_total_norm([each.grad for each in parameters if each.grad is not None])
    if norm is not None and learner.accelerator.scaler is None:  # a loss scaler skips such a step by itself
        _require_finite(whole_tensor(norm), f"gradient norm of step {step}", learner, batch)
    learner.optimizer.step()
    learner.schedule.step_ended()
    if learner.average:
        learner.average.update(learner.network, step=step)
    return outcome


def _learn(learner: Learner, batch: Sequence[Any], step: int) -> Outcome:
    """Put the gradient of `batch` into the parameters, in as many parts as the memory wants."""
    inputs = as_inputs(learner.finish(batch[0]) if learner.finish else batch[0])
    targets = class_indices_B = batch[1]
    if learner.mix:
        inputs, targets = learner.mix(inputs, class_indices_B, step=step)
    while True:
        restore = _snapshot(learner)
        try:
            return _add_gradients(learner, inputs, targets, batch, step)
        except DivergedError:
            restore()
            raise
        except RuntimeError as error:
            is_last = learner.parts >= len(class_indices_B) or learner.is_in_step  # with others, who would wait
            if not should_reduce_batch_size(error) or is_last:
                raise
        restore()
        _halve_parts(learner)  # here, where the failed attempt's tensors are gone


def _learn_nothing(learner: Learner, step: int) -> Outcome:
    """Go through the network with the others, although there is no image to learn from."""
    no_targets = torch.empty(0, dtype=torch.int64, device=learner.accelerator.device)
    return _add_gradients(learner, learner.stand_in(), no_targets, None, step)


def _join_shares(learner: Learner, own: Outcome) -> Outcome:
    """Give every process the gradient of the whole batch, and the mean of what BatchNorm counted, in one exchange."""
    parameters = learner.learning_parameters()
    statistics = [
        statistic
        for module in learner.trained.modules()
        if isinstance(module, _BatchNorm) and module.training
        for statistic in (module.running_mean, module.running_var)
        if statistic is not None
    ]
    whole = [] if learner.sharded else parameters  # the gradient of what is divided has been added up on the way
    is_used = [each.grad is not None for each in whole]
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in whole]
    counts = torch.tensor(
        [own.loss * own.weight, own.right, own.images, own.weight, *is_used], device=learner.accelerator.device
    )
    shares = gradients + [tensor * own.images for tensor in statistics]
    joined = torch.cat([*(tensor.flatten() for tensor in shares), counts])
    learner.processes.sum(joined)
    *sums, counts = joined.split([*(tensor.numel() for tensor in shares), len(counts)])
    loss, right, images, weight, *is_used = counts.tolist()
    for tensor, total in zip(gradients, sums, strict=False):
        tensor.copy_(total.view(tensor.shape) / weight)
    for tensor, total in zip(statistics, sums[len(gradients) :], strict=True):
        tensor.copy_(total.view(tensor.shape) / images)
    for parameter, gradient, has_gradient in zip(whole, gradients, is_used, strict=True):
        parameter.grad = gradient if has_gradient else None
    for parameter in parameters if learner.sharded else []:
        if parameter.grad is not None:
            parameter.grad *= learner.processes.count / weight  # FSDP leaves the mean over processes
    return Outcome(loss=loss / weight, right=round(right), images=round(images), weight=weight)


def _add_gradients(
    learner: Learner, inputs: tuple[torch.Tensor, ...], targets: torch.Tensor, batch: Sequence[Any] | None, step: int
) -> Outcome:
    """Return what was seen of a batch; its gradient lies in the parameters then.

    It is that of the mean loss, or of the sum where several processes add theirs up before they divide.
    """
    learner.optimizer.zero_grad()
    parts = learner.parts
    if not learner.is_in_step:  # as few as are no larger, so that hardly an image is alone
        parts = math.ceil(len(targets) / math.ceil(len(targets) / parts))
    whole = _weight(learner.criterion, targets)
    divisor = whole if learner.processes.count == 1 else 1.0
    total, right = 0.0, 0
    given = [tensor[: len(targets)].tensor_split(parts) for tensor in inputs]
    for *part, targets_B in zip(*given, targets.tensor_split(parts), strict=True):
        # Without a share it goes along with the others by an image that counts for nothing.
        outputs = _outputs(learner, part if len(targets_B) else [each[:1] for each in inputs], len(targets_B))
        share = _weight(learner.criterion, targets_B) / divisor
        loss = total_loss(outputs, targets_B, learner.criterion) * share if share else _zero(outputs)
        _require_finite(loss, f"loss of step {step}", learner, batch)
        learner.accelerator.backward(loss)
        total += loss.item()
        indices_B = targets_B if targets_B.ndim == 1 else targets_B.argmax(dim=1)
        right += int((main_output(outputs).argmax(dim=1) == indices_B).sum())
    mean = total * divisor / whole if whole else 0.0
    return Outcome(loss=mean, right=right, images=len(targets), weight=whole)


def _outputs(learner: Learner, inputs: Sequence[torch.Tensor], counting: int) -> Any:
    """Return what the network gives, in float32, for inputs of which so many count.

    A CPU computes a lone image together with a copy: the gradient of one by itself can come out in other bits
    each time, where several threads share the work.
    """
    has_copy = counting == 1 and learner.accelerator.device.type == "cpu"
    given = [torch.cat([each, each]) for each in inputs] if has_copy else inputs
    if learner.shared_statistics:
        norms: AbstractContextManager[None] = learner.shared_statistics.over(weight=counting / len(given[0]))
    else:
        norms = _lone_image_guard(learner.trained, counting)
    with norms, learner.accelerator.autocast():
        outputs = learner.trained(*given)
    return convert_to_fp32(slice_tensors(outputs, slice(1)) if has_copy else outputs)


def _zero(outputs: Any) -> torch.Tensor:
    """Return a loss of which every weight has a gradient of zeros."""
    given = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([output.sum() for output in given if output is not None]).sum() * 0.0


def _weight(criterion: nn.Module, targets: torch.Tensor) -> float:
    """Return by what `criterion` divides the sum over the images of a batch when it takes their mean."""
    weights_K = getattr(criterion, "weight", None)
    if weights_K is None or targets.ndim == 2 or isinstance(criterion, nn.MultiMarginLoss):
        return len(targets)
    return float(weights_K[targets].sum())


def _snapshot(learner: Learner) -> Callable[[], None]:
    """Return what takes back all that an attempt at a batch moves: statistics of BatchNorm and random generators."""
    buffers = [
        (buffer, buffer.clone())
        for module in learner.trained.modules()
        if isinstance(module, _BatchNorm) and module.training
        for buffer in module.buffers()
    ]
    on_cuda = learner.accelerator.device.type == "cuda"
    generators = (torch.get_rng_state(), torch.cuda.get_rng_state() if on_cuda else None)

    def restore() -> None:
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.set_rng_state(generators[0])
        if generators[1] is not None:
            torch.cuda.set_rng_state(generators[1])

    return restore


def _halve_parts(learner: Learner) -> None:
    learner.optimizer.zero_grad()
    if attached := find_stage_outputs(learner.trained):
        attached[1].forget()
    clear_device_cache(garbage_collection=True)
    learner.parts *= 2
    learner.reporter.warn(
        f"out of memory: from here on a batch is computed in {learner.parts} parts, one after another."
    )
    if any(isinstance(module, _BatchNorm) and module.training for module in learner.trained.modules()):
        learner.reporter.warn("BatchNorm sees one part at a time and so takes its statistics from fewer images.")


def _require_finite(value: torch.Tensor, what: str, learner: Learner, batch: Sequence[Any] | None) -> None:
    if bool(torch.isfinite(value)):
        return
    learner.optimizer.zero_grad()
    rate = learner.optimizer.param_groups[0]["lr"]
    images = f" on {first_ten(batch[2])}" if batch and len(batch) > 2 else ""
    raise DivergedError(
        f"the {what} became {value.item()} at learning rate {rate:g}{images}; that step was not taken",
        LOWER_RATES,
    )


@contextmanager
def _lone_image_guard(model: nn.Module, images: int) -> Iterator[None]:
    """Keep BatchNorm in eval mode for a batch of one image: it has no variance to normalise or to remember."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    if images > 1:
        norms = []
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
