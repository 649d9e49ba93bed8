"""Collects marks while work runs.

The thread that owns the model fills a `RunTimeline`, the request's threads a `RequestTimeline`.
Neither computes anything while work runs. `finish()` makes the frozen records of `records.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from metrics.clock import Clock, HostClock, Mark, MonotonicNs, WallAnchor
from metrics.records import (
    Estimate,
    Failure,
    GenerationFacts,
    GpuConditions,
    RequestTiming,
    RunTiming,
    StageTiming,
    StepTiming,
)


class Ranges(Protocol):
    """Marks a run's stages and steps for a profiler."""

    def stage(self, name: str) -> AbstractContextManager[None]: ...

    def step_begins(self, index: int) -> None: ...


class RunTimeline:
    """The marks of one run. For one thread."""

    def __init__(
        self,
        clock: Clock,
        anchor: WallAnchor,
        *,
        run_id: str,
        shape: str,
        guidance: bool,
        guided_steps: int | None = None,
        batch_size: int = 1,
        ranges: Ranges | None = None,
        profile: str | None = None,
        monotonic: MonotonicNs = time.perf_counter_ns,
    ) -> None:
        self._clock = clock
        self._anchor = anchor
        self._run_id = run_id
        self._shape = shape
        self._guidance = guidance
        self._guided_steps = guided_steps
        self._batch_size = batch_size
        self._ranges = ranges
        self._profile = profile
        self._monotonic = monotonic
        self._stages: list[tuple[str, Mark, Mark]] = []
        self._step_starts: list[Mark] = []
        self._step_ends: list[Mark] = []
        self._between_steps: list[tuple[str, Mark, Mark]] = []
        self.stage_begun = ""
        """The last stage that has begun."""
        self._start_ns = monotonic()
        clock.begin()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the enclosed work as a stage. A stage that raises is kept and ends there."""
        self.stage_begun = name
        start = self._clock.mark()
        try:
            with self._ranges.stage(name) if self._ranges else nullcontext():
                yield
        finally:
            self._stages.append((name, start, self._clock.mark()))

    def loop_begins(self) -> None:
        """Mark the start of the loop, which is the start of step 0. N steps need N+1 marks."""
        self._step_starts = [self._clock.mark()]
        if self._ranges:
            self._ranges.step_begins(0)

    def step_enqueued(self) -> int:
        """Mark the end of a step. Returns how many steps have been enqueued."""
        end = self._clock.mark()
        self._step_ends.append(end)
        self._step_starts.append(end)
        if self._ranges:
            self._ranges.step_begins(self.steps_enqueued)
        return self.steps_enqueued

    @contextmanager
    def between_steps(self, name: str) -> Iterator[None]:
        """Time other work in the loop, after the end of a step. The next step starts after it."""
        yield
        end = self._clock.mark()
        self._between_steps.append((name, self._step_starts[-1], end))
        self._step_starts[-1] = end

    def wait_for_step(self, index: int) -> int:
        """Block until step `index` has ended on the device; returns its duration in nanoseconds."""
        start, end = self._step_starts[index], self._step_ends[index]
        self._clock.wait(end)
        start_ns, end_ns = self._clock.poll(start), self._clock.poll(end)
        return 0 if start_ns is None or end_ns is None else end_ns - start_ns

    def step_has_ended(self, index: int) -> bool:
        """Whether step `index` has ended on the device; never blocks."""
        return self._clock.poll(self._step_ends[index]) is not None

    @property
    def loop_begun(self) -> bool:
        return bool(self._step_starts)

    @property
    def steps_enqueued(self) -> int:
        return len(self._step_ends)

    def finish(
        self,
        failed: bool = False,
        eager_fallback: bool = False,
        conditions: Sequence[GpuConditions] = (),
        error_type: str | None = None,
    ) -> RunTiming:
        """Resolve every mark and freeze the run's timing. Call it once, at the run's end.

        Waits for the run's last mark, and so for its copy to the host. Raises RuntimeError if the
        device fails. If the run has `failed` already, the marks fall back to the host's times of
        enqueueing instead, and the clock's name is `host`.
        """
        marks = [mark for _, start, end in self._stages for mark in (start, end)]
        marks += [mark for _, start, end in self._between_steps for mark in (start, end)]
        marks += [*self._step_starts, *self._step_ends]
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
            guided_steps=self._guided_steps,
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
                    zip(self._step_starts, self._step_ends, strict=False)
                )
            ),
            between_steps=tuple(
                StageTiming(name, happened[start.index], happened[end.index])
                for name, start, end in self._between_steps
            ),
            error_bound_ns=resolved.error_bound_ns,
            drift_ns=resolved.drift_ns,
            eager_fallback=eager_fallback,
            conditions=tuple(conditions),
            profile=self._profile,
            error_type=error_type,
        )


class RequestTimeline:
    """The stages of one request on the host's clock, while it is served.

    Stages follow one another: one is open at a time. A stage may begin on one thread and end on
    another.
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
        """Close the open stage and open a new one now."""
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
        """Open the first stage at the request's start."""
        self._open = (name, self._start_ns)

    def now_unix_ns(self) -> int:
        return self.anchor.to_unix(self._monotonic())

    def elapsed_seconds(self) -> float:
        """Seconds since the request arrived."""
        return (self._monotonic() - self._start_ns) / 1e9

    @property
    def closed_stages(self) -> Sequence[StageTiming]:
        return tuple(self._stages)

    def stage_ms(self, name: str) -> float | None:
        """Milliseconds of a closed stage, of all its parts together."""
        parts = [stage.duration_ns for stage in self._stages if stage.name == name]
        return sum(parts) / 1e6 if parts else None

    def finish(
        self,
        *,
        endpoint: str,
        method: str,
        status_code: int,
        outcome: str,
        runs: Sequence[RunTiming] = (),
        observed_runs: Sequence[RunTiming] = (),
        facts: GenerationFacts | None = None,
        failure: Failure | None = None,
        image_bytes: Sequence[int] = (),
        estimate: Estimate | None = None,
        api_key: str | None = None,
    ) -> RequestTiming:
        """Close the open stage and freeze the request's timing, which ends now."""
        self.end()
        return RequestTiming(
            endpoint=endpoint,
            method=method,
            status_code=status_code,
            outcome=outcome,
            start_ns=self.anchor.to_unix(self._start_ns),
            end_ns=self.now_unix_ns(),
            stages=tuple(self._stages),
            runs=tuple(runs),
            observed_runs=tuple(observed_runs),
            facts=facts,
            failure=failure,
            image_bytes=tuple(image_bytes),
            estimate=estimate,
            api_key=api_key,
        )
