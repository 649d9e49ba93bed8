"""How long a request will take, from the times of the runs before it.

Step and stage times are measured anyway. For each image size, with and without guidance, and for
each number of images, the newest runs are kept: their median is the estimate, their fastest the
bound that decides whether a deadline can be met.
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
"""A deadline is judged by runs if at least this many are not older than this. So a service that was
slow for a while accepts requests again, and measures."""


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


class _Newest:
    """The newest runs of one kind. A run whose guidance ends early shows, of the kind without
    guidance, how long a step takes."""

    def __init__(self) -> None:
        self.before: deque[float] = deque(maxlen=NEWEST)
        self.step: deque[float] = deque(maxlen=NEWEST)
        self.after: deque[float] = deque(maxlen=NEWEST)

    def summary(self, of: Callable[[Iterable[float]], float]) -> Pace:
        return Pace(*(of(values or [0.0]) for values in (self.before, self.step, self.after)))


@dataclass(frozen=True, slots=True)
class _Seen:
    """The newest runs of one kind, as what is asked of them.

    Attributes:
        whole: whether there were runs of this kind, and not only some steps of other runs.
    """

    median: Pace
    fastest: Pace
    whole: bool


def _stage_seconds(run: RunTiming, name: str) -> float:
    """How long a stage took that not every run has; 0 if this one had none."""
    stage = run.stage(name)
    return 0.0 if stage is None else stage.duration_ns / 1e9


def _typical(seconds: Iterable[float], fastest: bool) -> float:
    """The median, or the least; 0 while none is measured."""
    seen = list(seconds)
    if not seen:
        return 0.0
    return min(seen) if fastest else statistics.median(seen)


class Estimates:
    """Learns from every run and every answer. Runs are observed on the GPU thread, everything else
    happens on the event loop."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._runs: dict[tuple[str, bool, int], _Newest] = {}
        self._seen: dict[tuple[str, bool], dict[int, _Seen]] = {}
        self._observed_at: dict[tuple[str, bool], deque[float]] = {}
        self._last_run: RunTiming | None = None
        self._last_ended_at = -math.inf
        self._following: dict[tuple[str, int, int, int], deque[int]] = {}
        """The images of the last runs of a kind that followed a run of that many images."""
        self._answers: dict[tuple[str, str, int], deque[float]] = {}
        self._swaps: deque[float] = deque(maxlen=NEWEST)
        """Seconds of the last changes of LoRAs."""
        self._encodes: dict[str, deque[float]] = {}
        """By shape, seconds for each image of the last runs that began with pictures."""

    # Learning

    def observe_run(self, run: RunTiming, serving: bool) -> None:
        """Learn from a run whose stages have all run.

        Args:
            serving: it was for requests. A run of the warm-up gives a first estimate, and is no
                evidence to refuse a request by.
        """
        if run.profiled or run.eager_fallback or run.between_steps or not run.steps:
            return
        if (swap := _stage_seconds(run, "lora_swap")) > 0:
            self._swaps.append(swap)
        if (encode := _stage_seconds(run, "vae_encode")) > 0:
            encodes = self._encodes.setdefault(run.shape, deque(maxlen=NEWEST))
            if not serving:
                encodes.clear()
            encodes.append(encode / run.batch_size)
        kind = run.shape, run.guidance
        for guidance in run.steps_by_guidance:
            if not serving:
                # The runs before it may have compiled.
                self._runs.pop((run.shape, guidance, run.batch_size), None)
            self._learn(run, guidance)
        if serving:
            observed = self._observed_at.setdefault(kind, deque(maxlen=EVIDENCE_RUNS))
            observed.append(self._monotonic())
            self._observe_order(run)

    def _learn(self, run: RunTiming, guidance: bool) -> None:
        """Learn from a run's steps with or without guidance, and from its other stages if it is a
        run of that kind."""
        denoise = run.stage("denoise")
        assert denoise is not None
        newest = self._runs.setdefault((run.shape, guidance, run.batch_size), _Newest())
        steps = run.steps_by_guidance[guidance]
        # Time between the steps counts as theirs.
        begin = run.steps[steps[0].index - 1].end_ns if steps[0].index else denoise.start_ns
        end = steps[-1].end_ns if steps[-1] is not run.steps[-1] else denoise.end_ns
        newest.step.append((end - begin) / 1e9 / len(steps))
        if guidance == run.guidance:
            special = _stage_seconds(run, "lora_swap") + _stage_seconds(run, "vae_encode")
            newest.before.append((denoise.start_ns - run.start_ns) / 1e9 - special)
            newest.after.append((run.end_ns - denoise.end_ns) / 1e9)
        seen = _Seen(newest.summary(statistics.median), newest.summary(min), bool(newest.before))
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
        self._answers.setdefault(_answer_kind(planned), deque(maxlen=NEWEST)).append(seconds)

    # Estimating

    def run_estimate(
        self, planned: PlannedRequest, images: int, fastest: bool = False
    ) -> RunEstimate | None:
        """A run of such requests; None if none has been measured."""
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
        """The pace of runs of one kind; None if none has been measured.

        A number of images that has not been measured is estimated from those that have.

        Args:
            whole: of whole runs; otherwise single steps are enough, and the rest may be 0.
        """
        seen = self._seen.get((shape, guidance), {})
        known = {
            count: each.fastest if fastest else each.median
            for count, each in seen.items()
            if each.whole or not whole
        }
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

    def answer_seconds(self, planned: PlannedRequest, fastest: bool = False) -> float:
        """From the end of the last run until the images are stored; 0 while none is measured."""
        return _typical(self._answers.get(_answer_kind(planned), ()), fastest)

    def has_evidence(self, planned: PlannedRequest) -> bool:
        """Whether enough runs of this size are recent enough to refuse a request by."""
        observed = self._observed_at.get((str(planned.shape), planned.guided), ())
        since = self._monotonic() - EVIDENCE_SECONDS
        return sum(at >= since for at in list(observed)) >= EVIDENCE_RUNS

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
        return _typical(self._swaps, fastest)

    def _encode_seconds(self, shape: str, fastest: bool) -> float:
        """Seconds of encoding one picture; 0 while none is measured."""
        return _typical(self._encodes.get(shape, ()), fastest)

    # Forecasts

    def seconds_until_done(
        self, target: QueuedRuns, queue: QueueState, sizes: BatchSizes, fastest: bool = False
    ) -> float | None:
        """Seconds from now until a request's images are stored; None if that is not known.

        Args:
            target: the request: one of the queue, or one that would join it.
            fastest: the shortest time that is possible, instead of the likely one: every run at
                the pace of the fastest, and no request joins a run that has not begun.
        """
        running = queue.running
        seconds = 0.0
        if running is not None:
            left = self.seconds_left(running, fastest)
            if left is None:
                return None
            seconds = left
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
            if estimate is None:
                return None
            seconds += estimate.seconds
            missing -= sum(run.call is target.call for run in batch)
        if running is None and not queue.waiting and not fastest and target.images:
            seconds += queue.max_wait_seconds
        return seconds + self.answer_seconds(target.planned, fastest)

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
