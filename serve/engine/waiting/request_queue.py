"""The bounded queue in front of the GPU thread.

First come, first served: a run takes the first request of the queue. It also takes every other
request that has the same shape, step count, guidance scale and LoRAs and still fits. So a request
of an unusual shape waits for the requests before it and for no other. The exception are requests
that differ in their LoRAs: `run_order.first_of` groups them, within a bound.

Requests join on the event loop, the GPU thread takes them, and a cancelled one leaves from any
thread. The GPU thread never waits for the event loop.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from metrics.records import LoraSet
from serve.engine.call import Call
from serve.engine.gpu_run import GeneratedPixels, OnStep, Outcome, Previews, RunPart
from serve.engine.planning import PlannedRequest
from serve.engine.waiting.run_order import begun_with, first_batch, first_of, pass_over, split
from serve.errors import Draining, OutOfMemory, RequestError

BatchSizes = Callable[[PlannedRequest], Sequence[int]]
"""The numbers of images that a run of such a request may have, ascending."""

RETURN_SECONDS = 0.02
"""How long the clients of a shared run take to send their next requests, all but the slowest: they
have to receive their images first."""


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """A request from the moment it is queued until its last run has ended.

    Attributes:
        parts: the images of each of its runs that has not begun.
        future: its outcome, as `Outcome` of the whole request; raises what is no RequestError.
        alone: it shares no run, because a shared one ran out of memory.
        started: whether its first run has begun.
        passed_over: how many runs were begun before it that came after it.
    """

    planned: PlannedRequest
    call: Call
    on_step: OnStep | None
    previews: Previews | None
    parts: deque[range]
    joined_at: float
    future: Future[Outcome] = field(default_factory=Future)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    alone: bool = False
    started: bool = False
    running: bool = False
    images: list[GeneratedPixels] = field(default_factory=list)
    runs_done: int = 0
    passed_over: int = 0

    @property
    def run_key(self) -> object:
        return self.planned.run_key

    @property
    def loras(self) -> LoraSet:
        return self.planned.loras

    @property
    def next_images(self) -> int:
        return len(self.parts[0])

    def take_part(self) -> RunPart:
        """Its next run begins."""
        self.started = self.running = True
        steps = self.planned.steps_to_run
        self.call.total_steps = steps * (self.runs_done + len(self.parts))
        return RunPart(
            self.planned,
            self.call,
            self.parts.popleft(),
            self.on_step,
            steps * self.runs_done,
            self.previews,
        )


@dataclass(eq=False, slots=True)
class Batch:
    """The requests of one run, each with the images that the run draws for it."""

    requests: list[QueuedRequest]
    parts: list[RunPart]
    progress_at: float
    """When it began, or its last step ended; seconds of the queue's clock."""
    steps_done: int = 0

    @property
    def images(self) -> int:
        return sum(len(part.images) for part in self.parts)


@dataclass(frozen=True, slots=True)
class QueuedRuns:
    """A request's runs that have not begun, by their numbers of images."""

    planned: PlannedRequest
    call: Call
    images: tuple[int, ...]
    alone: bool = False
    passed_over: int = 0

    def runs(self) -> list[QueuedRun]:
        return [
            QueuedRun(self.planned, self.call, images, self.alone, self.passed_over)
            for images in self.images
        ]


@dataclass(eq=False, slots=True)
class QueuedRun:
    """One of these runs."""

    planned: PlannedRequest
    call: Call
    next_images: int
    alone: bool
    passed_over: int = 0

    @property
    def run_key(self) -> object:
        return self.planned.run_key

    @property
    def loras(self) -> LoraSet:
        return self.planned.loras


@dataclass(frozen=True, slots=True)
class QueueState:
    """The queue at one moment: the run in progress, and what waits in its order."""

    running: Batch | None
    waiting: list[QueuedRuns]
    max_wait_seconds: float
    loras: LoraSet = ()
    """Of the last run that has begun: what the weights have after it."""


class RequestQueue:
    """The requests that wait for the GPU thread, in their order.

    Args:
        max_waiting: how many may wait, not counting those that run.
        max_wait_seconds: how long a request that arrives at an idle GPU thread waits for others to
            fill its run. None: `RETURN_SECONDS` at most, and only until as many requests have come
            as shared the run before; a client that is alone never waits.
        on_waiting: called with the number of waiting requests whenever it changes.
    """

    def __init__(
        self,
        max_waiting: int,
        max_wait_seconds: float | None,
        on_waiting: Callable[[int], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_waiting = max_waiting
        self._max_wait_seconds = max_wait_seconds
        self._on_waiting = on_waiting
        self._monotonic = monotonic
        self._changed = threading.Condition()
        self._queue: list[QueuedRequest] = []
        self._running: Batch | None = None
        self._requests_before = 1
        """How many requests shared the last run."""
        self._loras: LoraSet = ()
        """Of the last run."""
        self._draining = False

    @property
    def waiting(self) -> int:
        """How many requests wait. The one that is about to run on an idle GPU thread does not."""
        with self._changed:
            return self._count_waiting()

    @property
    def full(self) -> bool:
        """Whether no further request may wait."""
        with self._changed:
            waiting = self._count_not_started() - (self._running is None)
            return waiting >= self._max_waiting

    @property
    def idle(self) -> bool:
        """Whether a request that joins would begin at once."""
        return self._running is None and not self._queue

    @property
    def draining(self) -> bool:
        return self._draining

    def state(self) -> QueueState:
        """A copy that does not change."""
        with self._changed:
            waiting = [
                QueuedRuns(
                    each.planned,
                    each.call,
                    tuple(map(len, each.parts)),
                    each.alone,
                    each.passed_over,
                )
                for each in self._queue
            ]
            return QueueState(self._running, waiting, self._max_wait_seconds or 0.0, self._loras)

    # On the event loop

    def join(
        self,
        planned: PlannedRequest,
        call: Call,
        on_step: OnStep | None,
        sizes: Sequence[int],
        previews: Previews | None = None,
    ) -> QueuedRequest:
        """Put a request at the end of the queue. Its `queue` stage has begun.

        The caller makes the GPU thread take a batch for each of the request's runs.

        Args:
            sizes: the numbers of images that its runs may have.
        """
        parts: deque[range] = deque()
        for images in split(planned.num_images, sizes):
            first = parts[-1].stop if parts else 0
            parts.append(range(first, first + images))
        queued = QueuedRequest(planned, call, on_step, previews, parts, self._monotonic())
        # Whoever stops waiting for it cancels its call; the future itself cannot be cancelled.
        queued.future.set_running_or_notify_cancel()
        with self._changed:
            self._queue.append(queued)
            self._report()
        call.cancellation.when_cancelled(lambda: self._leave(queued))
        return queued

    def cancel_unless_drawn(self, call: Call, reason: RequestError) -> None:
        """Cancel a request, queued or not, unless its images are there."""
        with self._changed:  # so that its last run does not end meanwhile
            if not call.drawn:
                call.cancellation.cancel(reason)

    def cancel_all(self) -> None:
        """Cancel every request, also those whose run has begun."""
        for each in self._every():
            self.cancel_unless_drawn(each.call, Draining())

    def give_up_all(self, reason: RequestError) -> None:
        """Fail every request now, also those whose run has begun and hangs."""
        for each in self._every():
            self.cancel_unless_drawn(each.call, reason)
            self.give_up(each)

    def give_up(self, queued: QueuedRequest) -> None:
        """Fail a cancelled request without the end of its run, unless its outcome is known."""
        with self._changed:
            if queued.future.done():
                return
            reason = queued.call.cancellation.reason
            assert reason is not None
            queued.future.set_result(reason.with_traceback(None))

    def _every(self) -> list[QueuedRequest]:
        with self._changed:
            running = () if self._running is None else self._running.requests
            return [*running, *self._queue]

    def drain(self) -> None:
        """Cancel the requests that have not started. The others may finish."""
        with self._changed:
            self._draining = True
            waiting = [queued for queued in self._queue if not queued.started]
        for queued in waiting:
            queued.call.cancellation.cancel(Draining())

    def close(self) -> None:
        """No run begins any more: what still waits fails."""
        self.drain()
        with self._changed:
            waiting = list(self._queue)
        for queued in waiting:
            queued.call.cancellation.cancel(Draining())

    def _leave(self, queued: QueuedRequest) -> None:
        """A request was cancelled. If it runs, its outcome is known at the end of the run."""
        with self._changed:
            if queued in self._queue:
                self._queue.remove(queued)
            queued.parts.clear()
            self._report()
            if queued.running or queued.future.done():
                return
            reason = queued.call.cancellation.reason
            assert reason is not None
            queued.future.set_result(reason.with_traceback(None))

    # On the GPU thread

    def step_ended(self, batch: Batch) -> None:
        batch.steps_done += 1
        batch.progress_at = self._monotonic()

    def take(self, sizes: BatchSizes) -> Batch | None:
        """Begin the next run; None if no request waits."""
        with self._changed:
            while self._queue:
                place = first_of(self._queue, self._loras)
                head = self._queue[place]
                allowed = sizes(head.planned)
                requests = first_batch(begun_with(self._queue, place), allowed)
                missing = allowed[-1] - sum(each.next_images for each in requests)
                left = self._wait_left(head, len(requests)) if missing > 0 else 0.0
                if left <= 0:
                    break
                self._changed.wait(left)
            else:
                return None
            batch = Batch(requests, [each.take_part() for each in requests], self._monotonic())
            self._running = batch
            self._requests_before = len(requests)
            self._loras = head.planned.loras
            pass_over(self._queue, place)
            self._queue = [each for each in self._queue if each.parts]
            self._report()
            return batch

    def _wait_left(self, head: QueuedRequest, batched: int) -> float:
        """How long the GPU thread may still wait for more requests. It only waits if it has nothing
        else to do: every waiting request is in the batch."""
        if head.started or head.alone or self._draining or batched < len(self._queue):
            return 0.0
        longest = self._max_wait_seconds
        if longest is None:
            longest = RETURN_SECONDS if batched < self._requests_before else 0.0
        return head.joined_at + longest - self._monotonic()

    def end(self, batch: Batch, outcomes: Sequence[Outcome]) -> int:
        """A run has ended. Returns how many further runs its requests need because of that."""
        further = 0
        with self._changed:
            self._running = None
            for queued, part, outcome in zip(batch.requests, batch.parts, outcomes, strict=True):
                queued.running = False
                if isinstance(outcome, OutOfMemory) and batch.images > 1:
                    further += self._try_again(queued, part)
                    outcome = []
                self._end_part(queued, outcome)
            self._report()
        return further

    def fail(self, batch: Batch, error: BaseException) -> None:
        """A run has ended with an exception that is no failure of its requests."""
        with self._changed:
            self._running = None
            for queued in batch.requests:
                queued.running = False
                if queued in self._queue:
                    self._queue.remove(queued)
                if not queued.future.done():  # it may have been given up
                    queued.future.set_exception(error)
            self._report()

    def _try_again(self, queued: QueuedRequest, part: RunPart) -> int:
        """Put a part back at its place, to be drawn image by image and shared with no request."""
        if queued.call.cancellation.reason is not None:
            return 0
        if not queued.parts:
            # It is older than every request that still waits.
            self._queue.insert(sum(each.alone for each in self._queue), queued)
        queued.alone = True
        queued.parts.extendleft(range(image, image + 1) for image in reversed(part.images))
        queued.runs_done -= 1
        return len(part.images)

    def _end_part(self, queued: QueuedRequest, outcome: Outcome) -> None:
        queued.runs_done += 1
        reason: RequestError | None = queued.call.cancellation.reason
        if isinstance(outcome, RequestError):
            reason = outcome
        else:
            queued.images += outcome
        if reason is not None:
            if queued in self._queue:
                self._queue.remove(queued)
            queued.parts.clear()
            if not queued.future.done():  # it may have been given up
                queued.future.set_result(reason.with_traceback(None))
        elif queued.parts:
            queued.call.timeline.begin("queue")
        else:
            queued.call.drawn = True
            queued.future.set_result(queued.images)

    # Counting

    def _report(self) -> None:
        """Something has changed: the gauge shows it, and a GPU thread that waits looks again."""
        self._on_waiting(self._count_waiting())
        self._changed.notify()

    def _count_waiting(self) -> int:
        return max(0, self._count_not_started() - (self._running is None))

    def _count_not_started(self) -> int:
        return sum(not queued.started for queued in self._queue)
