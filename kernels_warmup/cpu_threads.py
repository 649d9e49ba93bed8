"""How many threads compute on the CPU, decided before torch is loaded.

OpenMP's runtime reads its environment once, when torch loads it. So each front door calls
`choose_cpu_threads` before its first import of torch. What the user has set is kept.

The number of threads is the number of cores that this process really has: the distinct cores of
its scheduling affinity, at most the CPU quota of its control groups. torch knows the affinity but
not the quota. The number stays the same as long as the process runs, because it decides the last
bits of a picture.

How the threads wait for each other changes with the machine's load; see `cpu_contention.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that set the number of threads."""

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables that set how an OpenMP thread waits: by spinning, and for how long."""

PLACES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables that bind threads to cores."""

INHERITED = "STEPSPAN_CHOSEN_THREADS"
"""Set by this module beside `OMP_NUM_THREADS`, so that a child process does not take the parent's
choice for the user's."""


@dataclass(frozen=True, slots=True)
class CpuThreads:
    """What was chosen.

    Attributes:
        cores: the cores that this process has.
        cpus: the logical CPUs that it may be scheduled on.
        threads: `OMP_NUM_THREADS` as chosen; None: the user's value holds.
        set_by_user: the OpenMP variables that the user has set, with their values.
    """

    cores: int
    cpus: int
    threads: int | None
    set_by_user: dict[str, str]

    @property
    def waiting_is_ours(self) -> bool:
        """Whether the user has left open how threads wait and where they run."""
        return not any(name in self.set_by_user for name in (*WAITING, *PLACES))


def choose_cpu_threads(environment: MutableMapping[str, str] = os.environ) -> CpuThreads:
    """Set `OMP_NUM_THREADS` unless the user has set a number of threads. Safe to call again.

    Only a call before the first import of torch has an effect.
    """
    if INHERITED in environment and environment.get(THREADS[0]) == environment[INHERITED]:
        # Chosen by this process or by a parent of it, which may have had other cores.
        del environment[THREADS[0]]
    environment.pop(INHERITED, None)
    names = (*THREADS, *WAITING, *PLACES)
    set_by_user = {name: environment[name] for name in names if environment.get(name)}
    cores = cores_given()
    threads = None
    if not any(name in set_by_user for name in THREADS):
        threads = cores
        environment[THREADS[0]] = environment[INHERITED] = str(threads)
    return CpuThreads(cores, len(cpus_allowed()), threads, set_by_user)


def cores_given(root: Path = Path("/")) -> int:
    """The cores that this process may use: at least 1.

    Args:
        root: where `/proc` and `/sys` are.
    """
    cores = _distinct_cores(cpus_allowed(), root)
    quota = cpu_quota(root)
    # More threads than the quota has cores would be stopped for a part of every period.
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def cpus_allowed() -> set[int]:
    """The logical CPUs that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _distinct_cores(cpus: set[int], root: Path) -> int:
    """How many cores these CPUs belong to; two hyperthreads of one core count once, as in torch."""
    topology = root / "sys/devices/system/cpu"
    cores = {_read(topology / f"cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in cpus}
    return max(1, len(cores))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPU quota in cores: the smallest of this process's control groups and their parents.

    Reads version 2 (`cpu.max`) and version 1 (`cpu.cfs_quota_us`). None: there is no limit, or it
    cannot be read.
    """
    quotas = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in ("", "unified") if not controllers else (controllers, "cpu", "cpu,cpuacct"):
            top = root / "sys/fs/cgroup" / mount
            group = top / path.lstrip("/")
            # In a container the path may be the host's, and the group itself is mounted at the top.
            for folder in (group, *group.parents):
                if not folder.is_relative_to(top):
                    break
                quotas.append(_quota_of(folder))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    both = (_read(group / "cpu.max") or "").split()
    if len(both) != 2:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        both = [_read(group / name) or "" for name in names]
    try:
        quota, period = map(int, both)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
