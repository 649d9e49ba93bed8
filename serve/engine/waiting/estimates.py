"""How long a request will take, from the times of the runs before it.

Step and stage times are measured anyway. For each image size, with and without guidance, and for
each number of images, the newest runs are kept: their median is the estimate, their fastest the
bound that decides whether a deadline can be met. Only what was measured often and recently enough
counts for that bound: a request that is refused measures nothing, so an old spell of slow runs
would refuse requests for ever.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from metrics.records import RunTiming
from serve.engine.planning import PlannedRequest
from serve.engine.waiting.request_queue import (
    Batch,
    BatchSizes,
    QueuedRuns,
    QueueState,
)
from serve.engine.waiting.run_order import coming_batches

NEWEST = 16
"""How many runs of a kind count."""
NEWEST_PAIRS = 5
"""How many runs count of those that followed another. Fewer, because clients come and go."""
BACK_TO_BACK_NS = 50_000_000
"""A run that begins this soon after another had requests that waited for it."""
EVIDENCE_RUNS = 5
EVIDENCE_SECONDS = 300.0
"""Durations are evidence to refuse a request by if at least this many of their kind are not older
than this. So a service that was slow for a while accepts requests again, and measures."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The seconds of a run before its steps, of one step, and after its steps."""

    before: float
    step: float
    after: float

    def scaled(self, factor: float) -> Pace:
        return Pace(self.before * factor, self.step * factor, self.after * factor)

    @classmethod
    def between(cls, low: Pace, high: Pace, share: float) -> Pace:
        def at(one: float, other: float) -> float:
            return one + share * (other - one)

        return cls(at(low.before, high.before), at(low.step, high.step), at(low.after, high.after))


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """The estimated seconds of a run before its steps, of each of its steps, and after them.

    Attributes:
        guided_step, unguided_step: one step with guidance, and one without.
        guided_steps: how many steps have guidance; they are the first ones.
        steps: how many steps there are.
    """

    before: float
    guided_step: float
    unguided_step: float
    after: float
    guided_steps: int
    steps: int

    @property
    def seconds(self) -> float:
        return self.before + self.steps_seconds(0) + self.after

    def steps_seconds(self, done: int) -> float:
        """The steps that are left when `done` have ended."""
        guided = max(0, self.guided_steps - done)
        unguided = self.steps - max(done, self.guided_steps)
        return guided * self.guided_step + unguided * self.unguided_step

    def step_seconds(self, index: int) -> float:
        return self.guided_step if index < self.guided_steps else self.unguided_step


class _Durations:
    """The newest durations of one kind, in seconds."""

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=NEWEST)
        self._served_at: deque[float] = deque(maxlen=EVIDENCE_RUNS)

    def add(self, seconds: float, at: float | None) -> None:
        """Add a duration that ended at `at`; None: it is the warm-up's, and no evidence."""
        self.seconds.append(seconds)
        if at is not None:
            self._served_at.append(at)

    @property
    def evidence_at(self) -> float:
        """Since when there has been enough to refuse a request by; -inf if there is not."""
        served_at = list(self._served_at)
        return served_at[0] if len(served_at) == EVIDENCE_RUNS else -math.inf

    def summary(self, of: Callable[[Iterable[float]], float]) -> float:
        """The median or the least; 0 while none is measured."""
        return of(list(self.seconds) or [0.0])


class _Newest:
    """The newest runs of one kind. A run whose guidance ends early counts as a run with guidance,
    and its later steps as steps of the kind without."""

    def __init__(self) -> None:
        self.before = _Durations()
        self.step = _Durations()
        self.after = _Durations()

    def summary(self, of: Callable[[Iterable[float]], float]) -> Pace:
        return Pace(*(each.summary(of) for each in (self.before, self.step, self.after)))


@dataclass(frozen=True, slots=True)
class _Seen:
    """The newest runs of one kind, summarised for estimates.

    Attributes:
        whole: whether there were runs of this kind, and not only some steps of other runs.
        whole_evidence_at: `evidence_at` of the runs of this kind.
        step_evidence_at: the same of the steps, those of other runs included.
    """

    median: Pace
    fastest: Pace
    whole: bool
    whole_evidence_at: float
    step_evidence_at: float


def _stage_seconds(run: RunTiming, name: str) -> float:
    """How long a stage took that not every run has; 0 if this one had none."""
    stage = run.stage(name)
    return 0.0 if stage is None else stage.duration_ns / 1e9


class Estimates:
    """Learns from every run and every answer. Runs are observed on the GPU thread, everything else
    happens on the event loop."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._runs: dict[tuple[str, bool, int], _Newest] = {}
        self._seen: dict[tuple[str, bool], dict[int, _Seen]] = {}
        self._last_run: RunTiming | None = None
        self._last_ended_at = -math.inf
        self._following: dict[tuple[str, int, int, int], deque[int]] = {}
        """The images of the last runs of a kind that followed a run of that many images."""
        self._answers: dict[tuple[str, str, int], _Durations] = {}
        self._swaps = _Durations()
        """Of changes of LoRAs."""
        self._encodes: dict[str, _Durations] = {}
        """By shape, for each image of the runs that began with pictures."""

    # Learning

    def observe_run(self, run: RunTiming, serving: bool) -> None:
        """Learn from a run whose stages have all run.

        Args:
            serving: it was for requests. A run of the warm-up gives a first estimate, and is no
                evidence to refuse a request by.
        """
        if run.profiled or run.eager_fallback or run.between_steps or not run.steps:
            return
        at = self._monotonic() if serving else None
        if (swap := _stage_seconds(run, "lora_swap")) > 0:
            self._swaps.add(swap, at)
        if (encode := _stage_seconds(run, "vae_encode")) > 0:
            if not serving:
                self._encodes.pop(run.shape, None)
            self._encodes.setdefault(run.shape, _Durations()).add(encode / run.batch_size, at)
        for guidance in run.steps_by_guidance:
            if not serving:
                # The runs before it may have compiled.
                self._runs.pop((run.shape, guidance, run.batch_size), None)
            self._learn(run, guidance, at)
        if serving:
            self._observe_order(run)

    def _learn(self, run: RunTiming, guidance: bool, at: float | None) -> None:
        """Learn from a run's steps with or without guidance, and from its other stages if it is a
        run of that kind."""
        denoise = run.stage("denoise")
        assert denoise is not None
        newest = self._runs.setdefault((run.shape, guidance, run.batch_size), _Newest())
        steps = run.steps_by_guidance[guidance]
        # Time between the steps counts as theirs.
        begin = run.steps[steps[0].index - 1].end_ns if steps[0].index else denoise.start_ns
        end = steps[-1].end_ns if steps[-1] is not run.steps[-1] else denoise.end_ns
        newest.step.add((end - begin) / 1e9 / len(steps), at)
        if guidance == run.guidance:
            special = _stage_seconds(run, "lora_swap") + _stage_seconds(run, "vae_encode")
            newest.before.add((denoise.start_ns - run.start_ns) / 1e9 - special, at)
            newest.after.add((run.end_ns - denoise.end_ns) / 1e9, at)
        seen = _Seen(
            median=newest.summary(statistics.median),
            fastest=newest.summary(min),
            whole=bool(newest.before.seconds),
            whole_evidence_at=newest.before.evidence_at,
            step_evidence_at=newest.step.evidence_at,
        )
        # A new mapping, which a reader on the other thread sees whole.
        of_kind = self._seen.get((run.shape, guidance), {})
        self._seen[run.shape, guidance] = {**of_kind, run.batch_size: seen}

    def _observe_order(self, run: RunTiming) -> None:
        """Learn how many images a run has that begins where another ends."""
        before, self._last_run = self._last_run, run
        self._last_ended_at = self._monotonic()
        if before is not None and run.start_ns - before.end_ns < BACK_TO_BACK_NS:
            guided = sum(map(run.has_guidance, run.steps))
            kind = run.shape, guided, len(run.steps), before.batch_size
            self._following.setdefault(kind, deque(maxlen=NEWEST_PAIRS)).append(run.batch_size)

    def observe_answer(self, planned: PlannedRequest, seconds: float) -> None:
        """Learn how long a request took from its last run's end until its images were stored."""
        answers = self._answers.setdefault(_answer_kind(planned), _Durations())
        answers.add(seconds, self._monotonic())

    # Estimating

    def run_estimate(
        self, planned: PlannedRequest, images: int, fastest: bool = False
    ) -> RunEstimate | None:
        """A run of such requests; None if none has been measured.

        Args:
            fastest: as fast as the fastest, of those that there is evidence of.
        """
        shape = str(planned.shape)
        pace = self._pace(shape, planned.guided, images, fastest)
        if pace is None:
            return None
        steps, guided_steps = planned.steps_to_run, planned.guided_steps
        before = pace.before
        if planned.from_picture:
            before += images * self._encode_seconds(shape, fastest)
        unguided_step = pace.step
        if 0 < guided_steps < steps:
            unguided = self._pace(shape, False, images, fastest, whole=False)
            # Half the UNet's batch, until one is measured.
            unguided_step = pace.step / 2 if unguided is None else unguided.step
        return RunEstimate(before, pace.step, unguided_step, pace.after, guided_steps, steps)

    def _pace(
        self, shape: str, guidance: bool, images: int, fastest: bool, whole: bool = True
    ) -> Pace | None:
        """The pace of runs of one kind; None if none has been measured, or for the fastest if there
        is no evidence of any.

        A number of images that has not been measured is estimated from those that have.

        Args:
            whole: of whole runs; otherwise single steps are enough, and the rest may be 0.
        """
        seen = self._seen.get((shape, guidance), {})
        if fastest:
            known = {
                count: each.fastest
                for count, each in seen.items()
                if self._is_evidence(each.whole_evidence_at if whole else each.step_evidence_at)
            }
        else:
            known = {c: each.median for c, each in seen.items() if each.whole or not whole}
        if not known:
            return None
        if images in known:
            return known[images]
        lower = max((count for count in known if count < images), default=None)
        upper = min((count for count in known if count > images), default=None)
        if lower is not None and upper is not None:
            share = (images - lower) / (upper - lower)
            return Pace.between(known[lower], known[upper], share)
        if lower is not None:  # at worst in proportion, at best no slower
            return known[lower] if fastest else known[lower].scaled(images / lower)
        assert upper is not None
        return known[upper].scaled(images / upper) if fastest else known[upper]

    def answer_seconds(self, planned: PlannedRequest) -> float:
        """From the end of the last run until the images are stored; 0 while none is measured."""
        return self._typical(self._answers.get(_answer_kind(planned)))

    def _is_evidence(self, evidence_at: float) -> bool:
        return evidence_at >= self._monotonic() - EVIDENCE_SECONDS

    def _typical(self, durations: _Durations | None, fastest: bool = False) -> float:
        """The median; 0 while none is measured. Or the least, 0 without evidence."""
        if durations is None:
            return 0.0
        if not fastest:
            return durations.summary(statistics.median)
        return durations.summary(min) if self._is_evidence(durations.evidence_at) else 0.0

    def images_after(self, planned: PlannedRequest, images: int) -> int:
        """The images of a usual run of such requests that follows a run of `images` images.

        Steady clients repeat themselves: those of a run come back when it has ended, and wait
        together for the run after the next.
        """
        kind = str(planned.shape), planned.guided_steps, planned.steps_to_run, images
        following = list(self._following.get(kind, ()))
        return statistics.median_high(following) if following else 1

    def swap_seconds(self, fastest: bool = False) -> float:
        """Seconds of a change of LoRAs; 0 while none is measured."""
        return self._typical(self._swaps, fastest)

    def _encode_seconds(self, shape: str, fastest: bool) -> float:
        """Seconds of encoding one picture; 0 while none is measured."""
        return self._typical(self._encodes.get(shape), fastest)

    # Forecasts

    def seconds_until_done(
        self, target: QueuedRuns, queue: QueueState, sizes: BatchSizes
    ) -> float | None:
        """Seconds from now until a request's images are stored; None if that is not known.

        Args:
            target: the request: one of the queue, or one that would join it.
        """
        drawn = self._seconds_until_drawn(target, queue, sizes)
        return None if drawn is None else drawn + self.answer_seconds(target.planned)

    def least_seconds_until_drawn(
        self, target: QueuedRuns, queue: QueueState, sizes: BatchSizes
    ) -> float:
        """The shortest possible time until a request's last run has ended.

        Every run is as fast as the fastest one, and no request joins a run that has not begun. A
        run that there is no evidence of counts as no time.
        """
        return self._seconds_until_drawn(target, queue, sizes, fastest=True) or 0.0

    def _seconds_until_drawn(
        self, target: QueuedRuns, queue: QueueState, sizes: BatchSizes, fastest: bool = False
    ) -> float | None:
        running = queue.running
        seconds = 0.0
        if running is not None:
            left = self.seconds_left(running, fastest)
            if left is None and not fastest:
                return None
            seconds = left or 0.0
        joined = any(each.call is target.call for each in queue.waiting)
        waiting = queue.waiting if joined else [*queue.waiting, target]
        runs = [run for each in waiting for run in each.runs()]
        missing = len(target.images)
        images = self._images_before(running)
        loras = queue.loras
        for batch in coming_batches(runs, lambda run: sizes(run.planned), loras):
            if not missing:
                break
            planned = batch[0].planned
            if planned.loras != loras:
                loras = planned.loras
                seconds += self.swap_seconds(fastest)
            # Others will join until it begins, as they did before.
            expected = 1 if fastest else self.images_after(planned, images)
            images = sum(run.next_images for run in batch)
            images = max(images, min(expected, sizes(planned)[-1]))
            estimate = self.run_estimate(planned, images, fastest)
            if estimate is None and not fastest:
                return None
            seconds += 0.0 if estimate is None else estimate.seconds
            missing -= sum(run.call is target.call for run in batch)
        if running is None and not queue.waiting and not fastest and target.images:
            seconds += queue.max_wait_seconds
        return seconds

    def _images_before(self, running: Batch | None) -> int:
        """The images of the run that the next one follows; 0 if it follows none."""
        if running is not None:
            return running.images
        last, ended_at = self._last_run, self._last_ended_at
        recent = self._monotonic() - ended_at < BACK_TO_BACK_NS / 1e9
        return last.batch_size if last is not None and recent else 0

    def seconds_left(self, batch: Batch, fastest: bool = False) -> float | None:
        """Seconds until the run in progress ends; None if that is not known."""
        planned = batch.parts[0].planned
        run = self.run_estimate(planned, batch.images, fastest)
        if run is None:
            return None
        done, since = batch.steps_done, self._monotonic() - batch.progress_at
        if done == 0:
            return max(run.seconds - since, run.after + run.steps_seconds(1))
        if done < run.steps:
            return run.after + run.steps_seconds(done) - min(since, run.step_seconds(done))
        return max(0.0, run.after - since)


def _answer_kind(planned: PlannedRequest) -> tuple[str, str, int]:
    return str(planned.shape), planned.request.format, planned.num_images
