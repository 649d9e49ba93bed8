"""What a server's process holds while it serves, and whether that grows.

A process that leaks holds more with every request. Its memory also moves up and down, and rises at
first while pools, records of the last requests and caches fill. So the first half of a run is left
out, and growth is the slope of a line through the rest, with its 95% interval. The interval is that
of ten blocks' medians: neighbouring samples depend on each other, and would make it too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.stats.intervals import Interval

BLOCKS = 10
_T_95 = 2.306
"""Student's t for 95% and as many degrees of freedom as a line through ten points leaves."""
WARM_SHARE = 0.5
"""The first part of a run that is left out."""

ALLOWED = {"memory_mib": 0.5, "threads": 0.5, "files": 0.5, "series": 0.5}
"""The growth in 1,000 requests that is still flat: 0.5 MiB are 0.5 kB a request, and half a thread
is one in 2,000 requests. One kept request is above, even without its image."""


@dataclass(frozen=True)
class Held:
    """What a process holds after so many requests."""

    requests: int
    memory_mib: float
    """Resident memory without the pages of files: the kernel reads and drops those by itself."""
    threads: int
    files: int
    """Open file descriptors, connections among them."""
    series: int
    """Lines of samples in the metrics."""


def held(pid: int, requests: int, metrics: str) -> Held:
    """What the process holds now.

    Args:
        metrics: its metrics as Prometheus text.
    """
    import psutil

    process = psutil.Process(pid)
    with process.oneshot():
        memory = process.memory_info()
        return Held(
            requests,
            (memory.rss - memory.shared) / 2**20,
            process.num_threads(),
            process.num_fds(),
            sum(1 for line in metrics.splitlines() if line and not line.startswith("#")),
        )


Verdict = Literal["flat", "grows", "undecided"]


@dataclass(frozen=True)
class Growth:
    """The growth of one quantity in 1,000 requests."""

    quantity: str
    first: float
    """Median of the first block after the half that is left out."""
    last: float
    slope: Interval

    @property
    def verdict(self) -> Verdict:
        """`flat` if the whole interval is below what is allowed, `grows` if all of it is above 0
        and not all of it is allowed; `undecided` between."""
        if self.slope.high <= ALLOWED[self.quantity]:
            return "flat"
        return "grows" if self.slope.low > 0 else "undecided"


def growth(samples: Sequence[Held], quantity: str) -> Growth:
    """How a quantity of `Held` changes over a run.

    Raises:
        ValueError: too few samples for ten blocks.
    """
    kept = samples[round(WARM_SHARE * len(samples)) :]
    if len(kept) < BLOCKS:
        raise ValueError(f"{len(kept)} samples are too few: {BLOCKS} and more are needed")
    at = np.array([sample.requests for sample in kept], dtype=float)
    values = np.array([getattr(sample, quantity) for sample in kept], dtype=float)
    medians = [float(np.median(block)) for block in np.array_split(values, BLOCKS)]
    places = [float(np.mean(block)) for block in np.array_split(at / 1000, BLOCKS)]
    return Growth(quantity, medians[0], medians[-1], slope(places, medians))


def slope(places: Sequence[float], values: Sequence[float]) -> Interval:
    """The slope of the least-squares line through `BLOCKS` points, with its 95% interval."""
    x, y = np.asarray(places), np.asarray(values)
    assert len(x) == len(y) == BLOCKS
    spread = float(np.sum((x - x.mean()) ** 2))
    steepness = float(np.sum((x - x.mean()) * (y - y.mean())) / spread)
    rest = y - y.mean() - steepness * (x - x.mean())
    error = _T_95 * float(np.sqrt(np.sum(rest**2) / (BLOCKS - 2) / spread))
    return Interval(steepness, steepness - error, steepness + error)
