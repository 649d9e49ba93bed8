"""The time of one call: the median over many series of calls, with its interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CallTime:
    """The time of one call, in microseconds."""

    name: str
    what: str
    median_us: float
    low_us: float
    high_us: float


def time_call(
    name: str, what: str, call: Callable[[], object], series: int, calls: int
) -> CallTime:
    """Time `calls` calls in a row, `series` times."""
    call()
    taken = []
    for _ in range(series):
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter_ns() - start) / calls)
    return summary(name, what, taken)


def summary(name: str, what: str, nanoseconds: Sequence[float]) -> CallTime:
    """The median and interval of the nanoseconds that the calls took."""
    from bench.stats.intervals import interval

    found = interval([value / 1000 for value in nanoseconds])
    return CallTime(name, what, found.point, found.low, found.high)
