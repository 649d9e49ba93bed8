"""How long a request will take, from the times of the runs before it.

Step and stage times are measured anyway. For each image size, with and without guidance, with and
without a picture to begin with, and for each number of images, the newest runs are kept: their
median is the estimate, their fastest the bound that decides whether a deadline can be met.
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
    coming_batches,
)

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

    def run_seconds(self, steps: int) -> float:
        return self.before + steps * self.step + self.after

    def scaled(self, factor: float) -> Pace:
        return Pace(self.before * factor, self.step * factor, self.after * factor)

    @classmethod
    def of(cls, run: RunTiming) -> Pace:
        """The pace of a run whose stages have all run."""
        denoise = run.stage("denoise")
        assert denoise is not None
        return cls(
            (denoise.start_ns - run.start_ns) / 1e9,
            denoise.duration_ns / 1e9 / len(run.steps),
            (run.end_ns - denoise.end_ns) / 1e9,
        )

    @classmethod
    def between(cls, low: Pace, high: Pace, share: float) -> Pace:
        def at(one: float, other: float) -> float:
            return one + share * (other - one)

        return cls(at(low.before, high.before), at(low.step, high.step), at(low.after, high.after))


@dataclass(frozen=True, slots=True)
class _Seen:
    """The newest runs of one kind, as what is asked of them."""

    median: Pace
    fastest: Pace


_Kind = tuple[str, bool, bool]
"""The image size, whether there is guidance, and whether a picture is encoded first."""


class Estimates:
    """Learns from every run and every answer. Runs are observed on the GPU thread, everything else
    happens on the event loop."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._runs: dict[tuple[_Kind, int], deque[Pace]] = {}
        self._seen: dict[_Kind, dict[int, _Seen]] = {}
        self._observed_at: dict[_Kind, deque[float]] = {}
        self._last_run: RunTiming | None = None
        self._last_ended_at = -math.inf
        self._following: dict[tuple[str, bool, bool, int, int], deque[int]] = {}
        """The images of the last runs of a kind that followed a run of that many images."""
        self._answers: dict[tuple[str, str, int], deque[float]] = {}

    # Learning

    def observe_run(self, run: RunTiming, serving: bool) -> None:
        """Learn from a run whose stages have all run.

        Args:
            serving: it was for requests. A run of the warm-up gives a first estimate, and is no
                evidence to refuse a request by.
        """
        if run.profiled or run.eager_fallback or run.between_steps or not run.steps:
            return
        kind = _kind_of_run(run)
        newest = self._runs.setdefault((kind, run.batch_size), deque(maxlen=NEWEST))
        if not serving:
            newest.clear()  # the runs before it may have compiled
        newest.append(Pace.of(run))
        seen = _Seen(
            Pace(*(statistics.median(values) for values in _by_field(newest))),
            Pace(*(min(values) for values in _by_field(newest))),
        )
        # A new mapping, which a reader on the other thread sees whole.
        self._seen[kind] = {**self._seen.get(kind, {}), run.batch_size: seen}
        if serving:
            observed = self._observed_at.setdefault(kind, deque(maxlen=EVIDENCE_RUNS))
            observed.append(self._monotonic())
            self._observe_order(run)

    def _observe_order(self, run: RunTiming) -> None:
        """Learn how many images a run has that begins where another ends."""
        before, self._last_run = self._last_run, run
        self._last_ended_at = self._monotonic()
        if before is not None and run.start_ns - before.end_ns < BACK_TO_BACK_NS:
            kind = *_kind_of_run(run), len(run.steps), before.batch_size
            self._following.setdefault(kind, deque(maxlen=NEWEST_PAIRS)).append(run.batch_size)

    def observe_answer(self, planned: PlannedRequest, seconds: float) -> None:
        """Learn how long a request took from its last run's end until its images were stored."""
        self._answers.setdefault(_answer_kind(planned), deque(maxlen=NEWEST)).append(seconds)

    # Estimating

    def pace(self, planned: PlannedRequest, images: int, fastest: bool = False) -> Pace | None:
        """The pace of a run of such requests; None if none has been measured.

        A number of images that has not been measured is estimated from those that have.
        """
        seen = self._seen.get(_kind(planned)) or self._seen.get(_without_picture(planned), {})
        if not seen:
            return None
        known = {count: each.fastest if fastest else each.median for count, each in seen.items()}
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
        seen = self._answers.get(_answer_kind(planned))
        if not seen:
            return 0.0
        return min(seen) if fastest else statistics.median(seen)

    def has_evidence(self, planned: PlannedRequest) -> bool:
        """Whether enough runs of this size are recent enough to refuse a request by."""
        observed = self._observed_at.get(_kind(planned), ())
        since = self._monotonic() - EVIDENCE_SECONDS
        return sum(at >= since for at in list(observed)) >= EVIDENCE_RUNS

    def images_after(self, planned: PlannedRequest, images: int) -> int:
        """The images of a usual run of such requests that follows a run of `images` images.

        Steady clients repeat themselves: those of a run come back when it has ended, and wait
        together for the run after the next.
        """
        kind = *_kind(planned), planned.steps_to_run, images
        following = list(self._following.get(kind, ()))
        return statistics.median_high(following) if following else 1

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
        for batch in coming_batches(runs, lambda run: sizes(run.planned)):
            if not missing:
                break
            planned = batch[0].planned
            # Others will join until it begins, as they did before.
            expected = 1 if fastest else self.images_after(planned, images)
            images = sum(run.next_images for run in batch)
            images = max(images, min(expected, sizes(planned)[-1]))
            pace = self.pace(planned, images, fastest)
            if pace is None:
                return None
            seconds += pace.run_seconds(planned.steps_to_run)
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
        pace = self.pace(planned, batch.images, fastest)
        if pace is None:
            return None
        steps = planned.steps_to_run
        done, since = batch.steps_done, self._monotonic() - batch.progress_at
        if done == 0:
            least = pace.after + (steps - 1) * pace.step
            return max(pace.run_seconds(steps) - since, least)
        if done < steps:
            return pace.after + (steps - done) * pace.step - min(since, pace.step)
        return max(0.0, pace.after - since)


def _by_field(paces: Iterable[Pace]) -> Iterable[tuple[float, ...]]:
    return zip(*((pace.before, pace.step, pace.after) for pace in paces), strict=True)


def _kind_of_run(run: RunTiming) -> _Kind:
    return run.shape, run.guidance, run.stage("vae_encode") is not None


def _kind(planned: PlannedRequest) -> _Kind:
    return str(planned.shape), planned.guided, planned.from_picture


def _without_picture(planned: PlannedRequest) -> _Kind:
    """The kind that estimates a run with a picture until one has been measured: it lacks only the
    picture's encoding."""
    return str(planned.shape), planned.guided, False


def _answer_kind(planned: PlannedRequest) -> tuple[str, str, int]:
    return str(planned.shape), planned.request.format, planned.num_images
