"""The processes of one job: which of them this is, its share of the work, and what they tell each other.

A launcher such as torchrun or `accelerate launch` starts them, on one machine or on several; by default there is one.
"""

import atexit
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.errors import ConfigError, FinetuneError, RunError
from finetune.runs.environment import available_cores

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # in the environment, how often torchrun of this machine has restarted the job
STEP_TIMEOUT = timedelta(minutes=5)  # for what all do at the same pace: a training step
EPOCH_TIMEOUT = timedelta(hours=1)  # for how far one may be behind in an evaluation, or at work on a save
WORK_TIMEOUT = timedelta(days=1)  # where some wait for the long work of others; a process that ends is noticed at once
START, MEETING_POLL_SECONDS = "start", 0.05


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of its job; `rank` 0 is the main one, which alone writes and speaks.

    The local numbers are those of this machine. What waits for the others is to be called by all, in the same order.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    group: Any = None
    """Over which they talk, by way of the CPU."""
    epoch_group: Any = None
    """The same processes while they train, where none does long work that others wait for."""
    store: Any = None
    """What torchrun keeps for its job, over restarts too."""
    is_restarted: bool = False
    """Whether a launcher has started the job again."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def in_epoch(self) -> "Processes":
        """Return them as they are while they train: one that hangs is given up after an hour, not a day."""
        return replace(self, group=self.epoch_group)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return every `count`-th of `items`: those that are this process's to do."""
        return items[self.rank :: self.count]

    def local_share(self, items: Sequence[T]) -> Sequence[T]:
        """Return those of `items` that are this process's to do if every machine does all of them."""
        return items[self.local_rank :: self.local_count]

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every process, by rank, once all have come here."""
        if self.count == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def gather_shares(self, values: Sequence[T]) -> list[T]:
        """Return what all processes made of the items of their `share`, in the order of the items."""
        shares = self.gather(list(values))
        if self.count == 1:
            return shares[0]
        whole: list[Any] = [None] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            whole[rank :: self.count] = share
        return whole

    def any(self, claim: bool) -> bool:
        """Tell whether `claim` is true in any process."""
        return self.most(int(claim)) > 0

    def most(self, number: int) -> int:
        """Return the greatest `number` of all processes."""
        if self.count == 1:
            return number
        import torch
        from torch import distributed

        greatest = torch.tensor(number)
        distributed.all_reduce(greatest, op=distributed.ReduceOp.MAX, group=self.group)
        return int(greatest)

    def wait(self) -> None:
        """Go on once all have come here."""
        self.most(0)

    def remember(self, name: str, text: str) -> None:
        """Keep `text` for the time after a restart by torchrun."""
        if self.store is not None:
            self.store.set(name, text)

    def recall(self, name: str) -> str | None:
        """Return what this job has kept under `name` before it was restarted."""
        if self.store is None or not self.is_restarted or not self.store.check([name]):
            return None
        return str(self.store.get(name).decode())

    def from_main(self, work: Callable[[], T]) -> T:
        """Let the main process do `work` and return to all what it made.

        Raises:
            SystemExit: In the others, with the exit code, where it failed; the main process says why.
        """
        if self.count == 1:
            return work()
        from torch import distributed

        answer: list[Any] = [0, None]  # exit code and what was made
        if self.is_main:
            try:
                answer[1] = work()
            except BaseException as error:
                answer[0] = error.exit_code if isinstance(error, FinetuneError) else 1
                with suppress(RuntimeError):  # the others may have ended already
                    distributed.broadcast_object_list(answer, group=self.group)
                raise
        distributed.broadcast_object_list(answer, group=self.group)
        if answer[0]:
            raise SystemExit(answer[0])
        made: T = answer[1]
        return made

    def same(self, tensors: "Iterable[torch.Tensor]") -> None:
        """Fill `tensors` with what the main process has in them."""
        if self.count > 1:
            from torch import distributed

            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def stack(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Return the `tensor` of every process, (count, …), where it lies."""
        if self.count == 1:
            return tensor[None]
        from torch import distributed

        stacked = tensor.new_empty(self.count * tensor.numel())
        distributed.all_gather_into_tensor(stacked, tensor.flatten())
        return stacked.view(self.count, *tensor.shape)

    def sum(self, tensor: "torch.Tensor") -> None:
        """Add up `tensor` over all processes, in place, where it lies."""
        if self.count > 1:
            from torch import distributed

            distributed.all_reduce(tensor)


ALONE = Processes()
"""The one process of a job that no launcher has started."""


def launched_rank() -> int:
    """Return the rank that a launcher has given to this process, 0 without one; needs no torch."""
    return int(os.environ.get("RANK", "0")) if launched_count() > 1 else 0


def launched_count() -> int:
    """Return how many processes a launcher has started for this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(device: str) -> Processes:
    """Meet the other processes of this job, if a launcher has started any; each takes a GPU of its own.

    Args:
        device: What to compute on, as in `--device`: "auto", "cpu", "cuda" or "mps".

    Raises:
        ConfigError: They cannot compute there together.
        RunError: Some of them do not come.
    """
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if launched_count() == 1 and not is_torchrun:
        return ALONE
    import torch
    from accelerate import PartialState
    from torch import distributed
    from torch.distributed import rendezvous  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import PrefixStore

    store, rank, count = next(rendezvous("env://"))
    is_restarted = os.environ.get(RESTARTS, "0") != "0"
    if count == 1:
        return Processes(store=store, is_restarted=is_restarted)
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    is_on_cpu = device == "cpu" or not torch.cuda.is_available()
    _require_devices(device, local_count, is_on_cpu=is_on_cpu)
    if local_count == count and sys.platform == "linux":  # one machine: nothing is to be seen from outside
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
    if os.environ.get("OMP_NUM_THREADS") == "1" and is_torchrun:  # which sets it so, however many cores there are
        torch.set_num_threads(available_cores())
    if rank == 0 and not distributed.is_initialized():
        is_restarted |= store.check([START])  # torchrun does not count a start that is due to a machine that joined
    start, is_restarted = meet(store, rank, count, is_restarted=is_restarted)
    if not distributed.is_initialized():
        atexit.register(distributed.destroy_process_group)  # else its threads may abort an interpreter that ends
    fresh = PrefixStore(start, store)
    state = PartialState(cpu=is_on_cpu, store=fresh, rank=rank, world_size=count, timeout=STEP_TIMEOUT)
    return Processes(
        rank=state.process_index,
        count=state.num_processes,
        local_rank=state.local_process_index,
        local_count=local_count,
        group=distributed.new_group(backend="gloo", timeout=WORK_TIMEOUT),
        epoch_group=distributed.new_group(backend="gloo", timeout=EPOCH_TIMEOUT),
        store=store if is_torchrun else None,
        is_restarted=is_restarted,
    )


def meet(store: Any, rank: int, count: int, *, is_restarted: bool) -> tuple[str, bool]:
    """Wait for the other processes of this start of the job; return a name for it, and whether any `is_restarted`.

    The store outlives a restart by the launcher, and with it what processes have written that have ended. How often
    the job was restarted does not tell one start from another: every machine counts only what failed on it.

    Raises:
        RunError: They have not all come in the time of a step.
    """
    me = f"{'again' if is_restarted else 'first'}-{uuid.uuid4().hex}"
    if rank == 0:
        store.set(START, me)
        others = [f"{me}/{other}" for other in range(1, count)]
        try:
            store.wait(others, STEP_TIMEOUT)
        except RuntimeError as error:
            raise _missed(rank, count) from error
        present = [me, *(store.get(other).decode() for other in others)]
        store.set(f"{me}/present", ",".join(present))
        return me, any(each.startswith("again") for each in present)
    start, present, deadline = "", [], time.monotonic() + STEP_TIMEOUT.total_seconds()
    while me not in present:  # what was said of an earlier start may stand there still
        if time.monotonic() > deadline:
            raise _missed(rank, count)
        if store.check([START]) and (said := store.get(START).decode()) != start:
            start = said
            store.set(f"{start}/{rank}", me)
        if start and store.check([f"{start}/present"]):
            present = store.get(f"{start}/present").decode().split(",")
        time.sleep(MEETING_POLL_SECONDS)
    return start, any(each.startswith("again") for each in present)


def _missed(rank: int, count: int) -> RunError:
    return RunError(
        f"process {rank} of {count} has not met the others within {STEP_TIMEOUT.total_seconds() / 60:.0f} minutes",
        "start all of them with the same launcher and options, on machines that reach each other",
    )


def _require_devices(device: str, local_count: int, *, is_on_cpu: bool) -> None:
    import torch

    if is_on_cpu and (device == "mps" or (device == "auto" and torch.backends.mps.is_available())):
        raise ConfigError("several processes cannot compute on one Apple GPU", "use --device cpu, or one process")
    if not is_on_cpu and local_count > torch.cuda.device_count():
        raise ConfigError(
            f"{local_count} processes were started for {torch.cuda.device_count()} GPUs",
            "start one process for each, or use --device cpu",
        )
    if not is_on_cpu and "LOCAL_RANK" not in os.environ:
        raise ConfigError("the launcher does not say which GPU is whose", "set LOCAL_RANK, or use torchrun")


@contextmanager
def peer_faults() -> Iterator[None]:
    """Say in plain words that another process of the job has ended: torch says so wherever this one waits for it.

    Raises:
        RunError: One did.
    """
    try:
        yield
    except RuntimeError as error:
        if launched_count() == 1 or not _is_of_peers(error):
            raise
        raise RunError(
            f"another process of this job has ended or does not answer ({str(error).splitlines()[0]})",
            "its own message says why; --resume goes on from the last save",
        ) from error


def _is_of_peers(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))
