"""Clocks that mark moments of a run without stalling it, and resolve the marks to times afterwards.

A clock belongs to one thread and one run at a time: `begin()`, any number of `mark()`s, one
`resolve()`. Every time in this module is in nanoseconds of the host's monotonic clock
(`time.perf_counter_ns`); `WallAnchor` converts these to Unix nanoseconds. `timeline.py` gives the
marks their meaning.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

MonotonicNs = Callable[[], int]


@dataclass(frozen=True, slots=True)
class WallAnchor:
    """One moment on both of the host's clocks.

    A request has one anchor for its whole life, so a stepped system clock moves the whole trace
    instead of parts of it. The times of a run that requests share are moved to each one's anchor.
    """

    unix_ns: int
    monotonic_ns: int

    @classmethod
    def now(
        cls,
        unix: Callable[[], int] = time.time_ns,
        monotonic: MonotonicNs = time.perf_counter_ns,
    ) -> WallAnchor:
        """Read both clocks; the monotonic one twice, so that the pair is centred."""
        before = monotonic()
        unix_ns = unix()
        return cls(unix_ns=unix_ns, monotonic_ns=(before + monotonic()) // 2)

    def to_unix(self, monotonic_ns: int) -> int:
        return self.unix_ns + (monotonic_ns - self.monotonic_ns)

    def ahead_of(self, other: WallAnchor) -> int:
        """How much later a moment is by this anchor than by another, in nanoseconds."""
        return self.to_unix(other.monotonic_ns) - other.unix_ns


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment to be timed: its index in the run, and the host's time of enqueueing it."""

    index: int
    enqueued_ns: int


@dataclass(frozen=True, slots=True)
class ResolvedMarks:
    """The times of marks, and their error.

    `error_bound_ns` bounds the error of the placement on the host's clock. Differences between
    marks are exact to the device timer's resolution. `drift_ns` is the host's time at the run's end
    minus the same moment calculated from the run's start by the device's clock.
    """

    happened_ns: tuple[int, ...]
    error_bound_ns: int
    drift_ns: int


class Clock(Protocol):
    """The clock of the thread that runs the model."""

    @property
    def name(self) -> str:
        """`host` or `cuda`: an attribute of spans and a field of responses."""

    def begin(self) -> None:
        """Start a run. Earlier marks become invalid."""

    def mark(self) -> Mark:
        """Mark this moment of the run's work. Takes microseconds and never blocks."""

    def poll(self, mark: Mark) -> int | None:
        """The time of a mark, or None if it has not happened yet. Never blocks."""

    def wait(self, mark: Mark) -> None:
        """Block until the mark has happened."""

    def resolve(self, marks: Sequence[Mark]) -> ResolvedMarks:
        """The time of each mark. Synchronises at most once, on the run's last mark."""


class HostClock:
    """The host's monotonic clock: a mark happens when `mark` is called."""

    name = "host"

    def __init__(self, monotonic: MonotonicNs = time.perf_counter_ns) -> None:
        self._monotonic = monotonic
        self._count = 0

    def begin(self) -> None:
        self._count = 0

    def mark(self) -> Mark:
        mark = Mark(index=self._count, enqueued_ns=self._monotonic())
        self._count += 1
        return mark

    def poll(self, mark: Mark) -> int | None:
        return mark.enqueued_ns

    def wait(self, mark: Mark) -> None:
        return None

    def resolve(self, marks: Sequence[Mark]) -> ResolvedMarks:
        return ResolvedMarks(tuple(m.enqueued_ns for m in marks), error_bound_ns=0, drift_ns=0)


class TimingEvent(Protocol):
    """The part of `torch.cuda.Event(enable_timing=True)` that a clock uses."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: TimingEvent, /) -> float:
        """Milliseconds from this event to `end`, as a float32."""


class CudaEventClock:
    """The GPU's clock: timing events recorded on the current stream.

    Events are preallocated, because creating one costs more than recording it. Durations are sums
    of `elapsed_time` between neighbouring events: it is a float32 of milliseconds, so its
    resolution falls with the distance. For the same reason each run has its own anchor.
    """

    name = "cuda"

    def __init__(
        self,
        new_event: Callable[[], TimingEvent],
        monotonic: MonotonicNs = time.perf_counter_ns,
        preallocate: int = 128,
    ) -> None:
        self._new_event = new_event
        self._monotonic = monotonic
        self._events = [new_event() for _ in range(preallocate)]
        self._anchor = new_event()
        self._anchor_before_ns = 0
        self._anchor_after_ns = 0
        self._count = 0

    def begin(self) -> None:
        # The previous run ended with a synchronisation, so the stream is idle and this wait takes
        # microseconds. It places the device's clock between two readings of the host's.
        self._count = 0
        self._anchor_before_ns = self._monotonic()
        self._anchor.record()
        self._anchor.synchronize()
        self._anchor_after_ns = self._monotonic()

    def mark(self) -> Mark:
        index = self._count
        if index == len(self._events):
            self._events.append(self._new_event())
        enqueued_ns = self._monotonic()
        self._events[index].record()
        self._count += 1
        return Mark(index=index, enqueued_ns=enqueued_ns)

    def poll(self, mark: Mark) -> int | None:
        event = self._events[mark.index]
        if not event.query():
            return None
        return self._anchor_after_ns + _milliseconds_to_ns(self._anchor.elapsed_time(event))

    def wait(self, mark: Mark) -> None:
        self._events[mark.index].synchronize()

    def resolve(self, marks: Sequence[Mark]) -> ResolvedMarks:
        if self._count == 0:
            return ResolvedMarks((), error_bound_ns=0, drift_ns=0)
        events = self._events[: self._count]
        events[-1].synchronize()
        synchronised_ns = self._monotonic()

        since_anchor = [_milliseconds_to_ns(self._anchor.elapsed_time(events[0]))]
        for earlier, later in itertools.pairwise(events):
            since_anchor.append(since_anchor[-1] + _milliseconds_to_ns(earlier.elapsed_time(later)))

        # The last event happened before the host's wait for it returned. It also happened between
        # the two host readings around the anchor, plus the device's time since then.
        earliest = self._anchor_before_ns + since_anchor[-1]
        latest = min(synchronised_ns, self._anchor_after_ns + since_anchor[-1])
        offset = latest - since_anchor[-1]
        return ResolvedMarks(
            happened_ns=tuple(offset + since_anchor[m.index] for m in marks),
            error_bound_ns=abs(latest - earliest),
            drift_ns=synchronised_ns - (self._anchor_after_ns + since_anchor[-1]),
        )


def make_clock(device: str) -> Clock:
    """The clock for a torch device string; the only place that depends on the device."""
    if device.split(":")[0] != "cuda":
        return HostClock()
    import torch

    def new_event() -> TimingEvent:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return cast(TimingEvent, event)

    return CudaEventClock(new_event)


def _milliseconds_to_ns(milliseconds: float) -> int:
    return round(milliseconds * 1e6)
