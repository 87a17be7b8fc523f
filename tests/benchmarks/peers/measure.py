"""One whole process, measured from outside: seconds of the clock and of the processors, peak memory. Linux only."""

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""Taken out of the environment: each tool computes with as many threads as it chooses."""

SAMPLE_SECONDS = 0.25


def measure(command: Sequence[str | Path], *, log: Path, **environment: str) -> dict[str, Any]:
    """Run `command` to its end and return its exit code, seconds and memory; what it prints goes to `log`.

    The seconds are those of the whole process, imports included; those of the processors include its child processes.
    The memory is the peak resident size of the largest process or, where there are several at a time, of all of them
    with shared pages counted once.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
    with log.open("w") as file:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**inherited, "HF_HUB_OFFLINE": "1", **environment},
            cwd=log.parent,
        )
        with MemoryWatch(process.pid) as memory:
            try:
                _, status, usage = os.wait4(process.pid, 0)  # alone gives the usage of this one process
            except BaseException:
                process.kill()
                raise
            seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "exit_code": process.returncode,
        "wall_seconds": round(seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_mb": round(max(usage.ru_maxrss * 1_024, memory.peak_bytes) / 2**20),
    }


class MemoryWatch:
    """Samples the memory of a process and its descendants while it is entered."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            family = descendants(self.pid)
            if len(family) > 1:  # alone, the kernel's own record of the peak is exact and costs nothing
                self.peak_bytes = max(self.peak_bytes, sum(map(proportional_bytes, family)))


def descendants(pid: int) -> list[int]:
    """Return the ids of a process and of all it has started that still runs."""
    family = [pid]
    for member in family:
        try:
            for task in Path(f"/proc/{member}/task").iterdir():
                family += map(int, (task / "children").read_text().split())
        except OSError:  # it has just ended
            continue
    return family


def proportional_bytes(pid: int) -> int:
    """Return the resident size of a process, a page that n processes share counted as an n-th; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1_024 for line in lines if line.startswith("Pss:"))
