"""Marks collected while work runs, and the frozen timings they become.

`RunTimeline` is filled by the thread that owns the model, `RequestTimeline` by whoever serves the
request; neither computes anything while work is under way. `finish()` turns them into `RunTiming`
and `RequestTiming`: frozen, in Unix nanoseconds, ready for `recorder.py`. Nothing here knows spans
or metrics.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from metrics.clock import Clock, HostClock, Mark, MonotonicNs, WallAnchor
from metrics.gpu import GpuConditions
from metrics.slow import SlowReason, slow_reason

RUN_STAGES = ("text_encode", "denoise", "vae_decode")
"""Stages on the thread that owns the model, timed by the run's clock."""

REQUEST_STAGES = ("receive", "queue", "image_encode", "upload", "respond")
"""Stages of one request outside its run, timed by the host's clock."""


@dataclass(frozen=True, slots=True)
class StageTiming:
    """One stage of a run or a request, Unix nanoseconds."""

    name: str
    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One denoising step on the run's clock, Unix nanoseconds.

    `gpu_queue_ns` is how long the step waited in the GPU's queue: the GPU's start of the step minus
    the host's time of enqueueing it. Clearly positive, the step waited for the GPU; near zero, the
    GPU waited for the host. Always 0 on the host's clock.
    """

    index: int
    start_ns: int
    end_ns: int
    gpu_queue_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class StepSummary:
    """The steps of one run in three figures."""

    median_ns: int
    slowest_ns: int
    slowest_index: int


@dataclass(frozen=True, slots=True)
class RunTiming:
    """One unit of GPU work: one or more requests of one shape, step count and guidance.

    `start_ns` and `end_ns` are the host's, on the thread that owns the model; stages and steps are
    the run clock's, placed within `error_bound_ns`.
    """

    run_id: str
    clock: str
    shape: str
    guidance: bool
    batch_size: int
    start_ns: int
    end_ns: int
    stages: tuple[StageTiming, ...]
    steps: tuple[StepTiming, ...]
    error_bound_ns: int = 0
    drift_ns: int = 0
    eager_fallback: bool = False
    """Something in it was not compiled for its shape and ran eagerly."""
    conditions: tuple[GpuConditions, ...] = ()
    """What the GPU's driver said while it ran."""
    profile: str | None = None
    """The file its profile is in. Recording it slowed the run, so it says nothing of latency."""

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def profiled(self) -> bool:
        return self.profile is not None

    def stage(self, name: str) -> StageTiming | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def step_summary(self) -> StepSummary | None:
        if not self.steps:
            return None
        slowest = max(self.steps, key=lambda step: step.duration_ns)
        return StepSummary(
            median_ns=round(statistics.median(step.duration_ns for step in self.steps)),
            slowest_ns=slowest.duration_ns,
            slowest_index=slowest.index,
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


@dataclass(frozen=True, slots=True)
class GenerationFacts:
    """What a valid request asked for. Lengths and sizes, never the prompt's text, unless the
    operator turned `prompt` on."""

    model_name: str
    prompt_length: int
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    seed: int
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed. `message` must be free of user text; the caller sees to that.

    What the caller of the service got wrong (`server_fault` false) is told on its span but does
    not make the span an error, as the conventions for servers ask.
    """

    error_type: str
    exception_type: str
    message: str
    at_ns: int
    server_fault: bool = True


@dataclass(frozen=True, slots=True)
class PhaseTiming:
    """One phase of the start-up, Unix nanoseconds; `attributes` say which shape or part."""

    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class WarmupTiming:
    """The start-up from loading the model to ready, or to where it failed."""

    start_ns: int
    end_ns: int
    phases: tuple[PhaseTiming, ...]
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """One request from its first byte read to its last byte written, Unix nanoseconds."""

    endpoint: str
    method: str
    status_code: int
    outcome: str
    start_ns: int
    end_ns: int
    stages: tuple[StageTiming, ...]
    run: RunTiming | None = None
    observes_run: bool = False
    facts: GenerationFacts | None = None
    failure: Failure | None = None
    image_bytes: int | None = None
    """Size of the encoded image, once there is one."""

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def unattributed_ns(self) -> int:
        """What no stage and no run covers: hand-overs between threads and the event loop."""
        covered = sum(stage.duration_ns for stage in self.stages)
        if self.run is not None:
            covered += self.run.duration_ns
        return max(0, self.duration_ns - covered)

    @property
    def slow_reason(self) -> SlowReason | None:
        """Why it was slow, where that is known; see `metrics/slow.py`."""
        return slow_reason(self)

    def stage(self, name: str) -> StageTiming | None:
        return next((stage for stage in self.stages if stage.name == name), None)


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
