"""Marks collected while work runs.

The thread that owns the model fills a `RunTimeline`, the request's own threads a `RequestTimeline`.
Neither computes anything while work is under way. `finish()` makes the frozen records of
`records.py` out of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from metrics.clock import Clock, HostClock, Mark, MonotonicNs, WallAnchor
from metrics.records import (
    Failure,
    GenerationFacts,
    GpuConditions,
    RequestTiming,
    RunTiming,
    StageTiming,
    StepTiming,
)


class Ranges(Protocol):
    """What shows a run's stages and steps to a profiler that looks on."""

    def stage(self, name: str) -> AbstractContextManager[None]: ...

    def step_begins(self, index: int) -> None: ...


class RunTimeline:
    """Marks of one run while it works; used by one thread."""

    def __init__(
        self,
        clock: Clock,
        anchor: WallAnchor,
        *,
        run_id: str,
        shape: str,
        guidance: bool,
        batch_size: int = 1,
        ranges: Ranges | None = None,
        monotonic: MonotonicNs = time.perf_counter_ns,
    ) -> None:
        self._clock = clock
        self._anchor = anchor
        self._run_id = run_id
        self._shape = shape
        self._guidance = guidance
        self._batch_size = batch_size
        self._ranges = ranges
        self._monotonic = monotonic
        self._stages: list[tuple[str, Mark, Mark]] = []
        self._step_bounds: list[Mark] = []
        self._start_ns = monotonic()
        clock.begin()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the enclosed work as a stage; a stage that raises is kept, ended where it raised."""
        start = self._clock.mark()
        try:
            with self._ranges.stage(name) if self._ranges else nullcontext():
                yield
        finally:
            self._stages.append((name, start, self._clock.mark()))

    def loop_begins(self) -> None:
        """The denoising loop is about to start: the start of step 0. N steps need N+1 marks."""
        self._step_bounds = [self._clock.mark()]
        if self._ranges:
            self._ranges.step_begins(0)

    def step_enqueued(self) -> int:
        """A step's work has been handed to the device. Returns how many have been so far."""
        self._step_bounds.append(self._clock.mark())
        if self._ranges:
            self._ranges.step_begins(self.steps_enqueued)
        return self.steps_enqueued

    def wait_for_step(self, index: int) -> int:
        """Block until step `index` has ended on the device; returns its duration in ns."""
        start, end = self._step_bounds[index], self._step_bounds[index + 1]
        self._clock.wait(end)
        start_ns, end_ns = self._clock.poll(start), self._clock.poll(end)
        return 0 if start_ns is None or end_ns is None else end_ns - start_ns

    def step_has_ended(self, index: int) -> bool:
        """Whether step `index` has ended on the device; never blocks."""
        return self._clock.poll(self._step_bounds[index + 1]) is not None

    @property
    def steps_enqueued(self) -> int:
        return max(0, len(self._step_bounds) - 1)

    def finish(
        self,
        failed: bool = False,
        eager_fallback: bool = False,
        conditions: Sequence[GpuConditions] = (),
    ) -> RunTiming:
        """Resolve every mark; called once, when all of the run's work is enqueued or has failed.

        Waits for the run's last mark, and so for its copy to the host. A device that faults raises
        here like anywhere else, unless the run has `failed` already: then a device that can no
        longer answer does not cost the timing, and marks fall back to when the host enqueued
        them, as the clock's name says.
        """
        marks = [mark for _, start, end in self._stages for mark in (start, end)]
        marks += self._step_bounds
        clock_name = self._clock.name
        try:
            resolved = self._clock.resolve(marks)
        except RuntimeError:
            if not failed:
                raise
            resolved = HostClock().resolve(marks)
            clock_name = HostClock.name
        end_ns = self._monotonic()
        happened = {
            mark.index: self._anchor.to_unix(ns)
            for mark, ns in zip(marks, resolved.happened_ns, strict=True)
        }
        return RunTiming(
            run_id=self._run_id,
            clock=clock_name,
            shape=self._shape,
            guidance=self._guidance,
            batch_size=self._batch_size,
            start_ns=self._anchor.to_unix(self._start_ns),
            end_ns=self._anchor.to_unix(end_ns),
            stages=tuple(
                StageTiming(name, happened[start.index], happened[end.index])
                for name, start, end in self._stages
            ),
            steps=tuple(
                StepTiming(
                    index=index,
                    start_ns=happened[start.index],
                    end_ns=happened[end.index],
                    gpu_queue_ns=max(
                        0, happened[start.index] - self._anchor.to_unix(start.enqueued_ns)
                    ),
                )
                for index, (start, end) in enumerate(
                    zip(self._step_bounds, self._step_bounds[1:], strict=False)
                )
            ),
            error_bound_ns=resolved.error_bound_ns,
            drift_ns=resolved.drift_ns,
            eager_fallback=eager_fallback,
            conditions=tuple(conditions),
        )


class RequestTimeline:
    """Host moments of one request while it is served.

    Stages follow one another; they may begin on one thread and end on another, but only one is
    open at a time.
    """

    def __init__(
        self,
        anchor: WallAnchor | None = None,
        monotonic: MonotonicNs = time.perf_counter_ns,
    ) -> None:
        self._monotonic = monotonic
        self.anchor = anchor or WallAnchor.now(monotonic=monotonic)
        self._start_ns = self.anchor.monotonic_ns
        self._stages: list[StageTiming] = []
        self._open: tuple[str, int] | None = None

    def begin(self, name: str) -> None:
        """Open a stage now, closing the one before it."""
        self.end()
        self._open = (name, self._monotonic())

    def end(self) -> None:
        """Close the open stage, if there is one."""
        if self._open is None:
            return
        name, start_ns = self._open
        self._open = None
        self._stages.append(StageTiming(name, self.anchor.to_unix(start_ns), self.now_unix_ns()))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin_at_arrival(self, name: str) -> None:
        """Open the first stage at the request's own start."""
        self._open = (name, self._start_ns)

    def now_unix_ns(self) -> int:
        return self.anchor.to_unix(self._monotonic())

    def elapsed_seconds(self) -> float:
        """Seconds since the request arrived."""
        return (self._monotonic() - self._start_ns) / 1e9

    def stage_ms(self, name: str) -> float | None:
        """Milliseconds of a closed stage."""
        stage = next((stage for stage in self._stages if stage.name == name), None)
        return None if stage is None else stage.duration_ns / 1e6

    def finish(
        self,
        *,
        endpoint: str,
        method: str,
        status_code: int,
        outcome: str,
        run: RunTiming | None = None,
        observes_run: bool = False,
        facts: GenerationFacts | None = None,
        failure: Failure | None = None,
        image_bytes: int | None = None,
    ) -> RequestTiming:
        """Close what is open and freeze the request's timing, ending now."""
        self.end()
        return RequestTiming(
            endpoint=endpoint,
            method=method,
            status_code=status_code,
            outcome=outcome,
            start_ns=self.anchor.to_unix(self._start_ns),
            end_ns=self.now_unix_ns(),
            stages=tuple(self._stages),
            run=run,
            observes_run=observes_run,
            facts=facts,
            failure=failure,
            image_bytes=image_bytes,
        )
