"""How the CPU's threads wait for each other: by spinning, or on a busy machine by sleeping.

GNU's OpenMP runtime (libgomp) lets a thread that waits for another spin for milliseconds. That is
right where every thread has a core: a model as small as the demo starts hundreds of parallel loops
a step, and waking a thread costs more than such a loop. It is ruinous where another process has one
of the cores: the thread that is waited for does not run while the others spin, and a request takes
ten times as long and more. No fixed spin count is good at both (bench/results/notes.md).

So a thread of this module measures how much of the CPU others use, and changes the waiting:

- libgomp spins 100 times instead of 300,000 where there are more OpenMP threads than CPUs (the
  manual of GOMP_SPINCOUNT). A team of OpenMP threads that sleep is enough to be more.
- The computing threads are kept together on the cores that others leave free. Else the scheduler
  may keep one of them beside the other process, where each wake-up waits for its turn.

Neither changes what is computed: the number of threads, which decides the last bits, is the same.
On CUDA nothing of this runs.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels_warmup.cpu_threads import CpuThreads, cpus_allowed

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 0.1
"""Between two measurements. The kernel counts a CPU's idle time in steps of 10 ms."""
SHARE_OF_TIME = 0.01
"""The most that measuring may take of one core; /proc/stat is slow to read on large machines."""
CALM_MEASUREMENTS = 5
"""How many measurements in a row must find room before threads spin again."""
REMEMBERED = 10
"""How many measurements say how many CPUs are free."""


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds so far.

    Attributes:
        at: `time.monotonic`.
        idle: of the CPUs that this process may use, all together.
        own: used by this process.
    """

    at: float
    idle: float
    own: float


def read_usage(cpus: set[int], stat: Path = Path("/proc/stat")) -> Usage | None:
    """None where the system does not say."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None
    at, own = time.monotonic(), time.process_time()
    ticks, found = 0, 0
    for line in lines:
        name, *fields = line.split()
        if re.fullmatch(r"cpu\d+", name) and int(name[3:]) in cpus:
            ticks += int(fields[3]) + int(fields[4])  # idle, and idle with a disk to wait for
            found += 1
    if found < len(cpus):
        return None
    return Usage(at, ticks / os.sysconf("SC_CLK_TCK"), own)


def cores_used_by_others(before: Usage, after: Usage, cpus: int) -> float:
    """How many of the CPUs others have used between two readings. Time that a hypervisor has taken
    counts as used."""
    seconds = max(after.at - before.at, 1e-9)
    busy = cpus - (after.idle - before.idle) / seconds
    return max(0.0, busy - (after.own - before.own) / seconds)


class Judge:
    """Decides from measurements whether threads should yield.

    Args:
        cpus: logical CPUs that this process may use.
        threads: OpenMP threads that compute.
    """

    def __init__(self, cpus: int, threads: int) -> None:
        self._cpus = cpus
        self._spare = max(0, cpus - threads)
        # Each CPU's idle time is rounded down by up to a tenth of an interval.
        self._noise = 0.3 + 0.1 * math.sqrt(cpus)
        self._calm = 0
        self._recent: deque[float] = deque(maxlen=REMEMBERED)
        self.contended = False

    def judge(self, others: float) -> bool:
        """Take a measurement; returns whether others need cores that the threads would use."""
        self._recent.append(others)
        if others > self._spare + self._noise:
            self.contended, self._calm = True, 0
        elif others > self._spare + self._noise / 2:
            self._calm = 0
        else:
            self._calm += 1
            if self._calm >= CALM_MEASUREMENTS:
                self.contended = False
        return self.contended

    def free_cpus(self) -> int:
        """How many CPUs others have left free lately; 0: not even one.

        Of the recent measurements the largest counts: where others want every CPU, they use less of
        them while our threads compute too.
        """
        return max(0, self._cpus - math.ceil(max(self._recent) - 0.25))


class SleepingTeam:
    """OpenMP threads that only sleep, so that there are more than CPUs. Ended by `release`.

    Raises:
        OSError, AttributeError: torch runs on another OpenMP runtime.
    """

    def __init__(self, threads: int) -> None:
        # A thread of its own, because a team belongs to the thread that has started it.
        self._stop = threading.Event()
        library, libc = _libgomp(), ctypes.CDLL(None)
        # The entry point that compilers generate calls to: runs a function on every thread.
        # `free(NULL)` does nothing.
        start, nothing = library.GOMP_parallel, libc.free
        start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        start.restype = None

        def hold() -> None:
            start(ctypes.cast(nothing, ctypes.c_void_p), None, threads, 0)
            self._stop.wait()

        self._thread = threading.Thread(target=hold, name="sleeping-team", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._stop.set()
        self._thread.join()


def _libgomp() -> ctypes.CDLL:
    """The OpenMP runtime that this process has loaded. Raises OSError if it is another."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libgomp"):
            return ctypes.CDLL(path)
    raise OSError("libgomp is not loaded")


class CpuContention:
    """Watches the machine and changes how the computing threads wait, until `close`.

    Args:
        threads: OpenMP threads that compute.
        owner: the native id of the thread that starts them.
    """

    def __init__(self, threads: int, owner: int) -> None:
        self._threads = threads
        self._owner = owner
        self._cpus = cpus_allowed()
        self._judge = Judge(len(self._cpus), threads)
        self._team: SleepingTeam | None = None
        self._kept_on = self._cpus
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cpu-contention", daemon=True)
        self._thread.start()

    @property
    def yielding(self) -> bool:
        """Whether threads sleep soon instead of spinning."""
        return self._team is not None

    def close(self) -> None:
        """Stop watching; threads wait again as libgomp has them."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        before, interval = read_usage(self._cpus), INTERVAL_SECONDS
        try:
            while before is not None and not self._stop.wait(interval):
                began = time.thread_time()
                after = read_usage(self._cpus)
                if after is None:
                    break
                self._apply(cores_used_by_others(before, after, len(self._cpus)))
                before = after
                interval = max(INTERVAL_SECONDS, (time.thread_time() - began) / SHARE_OF_TIME)
        except (OSError, AttributeError) as error:
            # Images are generated without it, slowly on a busy machine.
            logger.warning("how CPU threads wait cannot be changed: %s", type(error).__name__)
        finally:
            self._spin()

    def _apply(self, others: float) -> None:
        if not self._judge.judge(others):
            self._spin()
            return
        if self._team is None:
            # One more than CPUs, together with the computing threads.
            self._team = SleepingTeam(max(2, len(self._cpus) - self._threads + 2))
        free = self._judge.free_cpus()
        self._keep_on(set(sorted(self._cpus)[:free]) or self._cpus)

    def _spin(self) -> None:
        self._keep_on(self._cpus)
        if self._team is not None:
            self._team.release()
            self._team = None

    def _keep_on(self, cpus: set[int]) -> None:
        if cpus == self._kept_on:
            return
        self._kept_on = cpus
        left_out: set[int | None] = set()
        if cpus != self._cpus:
            left_out = {thread.native_id for thread in threading.enumerate()} - {self._owner}
        for task in map(int, os.listdir("/proc/self/task")):
            if task not in left_out:  # libgomp's threads have no name to know them by
                try:
                    os.sched_setaffinity(task, cpus)
                except ProcessLookupError:
                    continue  # it has ended meanwhile


class ComputingThreads:
    """The threads that compute on the CPU, from the choice of their number to the process's end."""

    def __init__(self, chosen: CpuThreads) -> None:
        self._chosen = chosen
        self._threads = 0
        self._contention: CpuContention | None = None

    def loaded(self, device: str, owner: int) -> None:
        """The model is loaded, and torch with it. Where the model is on the CPU, begin to watch,
        unless the user has chosen how threads wait, or there is no other thread to wait for.

        Args:
            device: of the model, as torch names it.
            owner: the native id of the thread that calls torch.
        """
        import torch

        self._threads = torch.get_num_threads()
        if (
            device == "cpu"
            and self._threads > 1
            and self._chosen.waiting_is_ours
            and hasattr(os, "sched_setaffinity")
            and read_usage(cpus_allowed()) is not None
        ):
            self._contention = CpuContention(self._threads, owner)
        logger.info("threads on the CPU: %s", self.describe())

    def describe(self) -> dict[str, Any]:
        """As `/ready` shows them. `threads` is 0 until torch is loaded."""
        watch = self._contention
        waiting = "yielding" if watch is not None and watch.yielding else "spinning"
        return {
            "threads": self._threads,
            "cores": self._chosen.cores,
            "waiting": "as OpenMP does" if watch is None else waiting,
            "set_by_user": self._chosen.set_by_user,
        }

    def close(self) -> None:
        """Stop watching."""
        if self._contention is not None:
            self._contention.close()
