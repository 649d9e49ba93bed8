"""Whether a request may wait: the queue has room, and its deadline can be met.

Used on the event loop.
"""

from __future__ import annotations

import math

from metrics.records import Estimate
from serve.engine.call import Call
from serve.engine.planning import PlannedRequest
from serve.engine.waiting.estimates import Estimates
from serve.engine.waiting.request_queue import BatchSizes, QueuedRuns, RequestQueue
from serve.engine.waiting.run_order import split
from serve.errors import DeadlineExceeded, Draining, QueueFull

BUSY_MARGIN = 1.1
IDLE_MARGIN = 2.0
"""A request is refused if even its fastest estimate is this many times its time until the deadline.
On an idle server a wrong refusal costs an image and a right one saves at most the deadline, so
there must be no doubt."""


class Admission:
    """Estimates each request, and refuses those that cannot be served in time.

    Args:
        sizes: the numbers of images that a run of a request may have.
    """

    def __init__(self, queue: RequestQueue, estimates: Estimates, sizes: BatchSizes) -> None:
        self._queue = queue
        self._estimates = estimates
        self._sizes = sizes

    def admit(self, planned: PlannedRequest, call: Call, deadline_seconds: float) -> None:
        """Let a request join the queue, and estimate it.

        Args:
            deadline_seconds: counted from the request's arrival.

        Raises:
            Draining: the process is shutting down.
            QueueFull: too many requests wait already.
            DeadlineExceeded: it would not be drawn in time, however fast its run is.
        """
        self.refuse_if_full(planned, call)
        runs = self._runs(planned, call)
        seconds = self._seconds_until_done(runs)
        self._refuse_if_too_late(runs, seconds, deadline_seconds)
        if seconds is not None:
            call.estimate = Estimate(call.timeline.now_unix_ns(), seconds)

    def refuse_if_full(self, planned: PlannedRequest, call: Call) -> None:
        """Refuse a request that cannot join the queue now, before work is done to prepare it.

        Raises:
            Draining: the process is shutting down.
            QueueFull: too many requests wait already.
        """
        if self._queue.draining:
            raise Draining
        if self._queue.full:
            eta_ms = _to_ms(self._seconds_until_done(self._runs(planned, call)))
            raise QueueFull(self._queue.waiting, self._retry_after_seconds(), eta_ms)

    def eta_ms(self, planned: PlannedRequest, call: Call) -> float | None:
        """Milliseconds until an admitted request is done, estimated now; None if unknown."""
        waiting = (each for each in self._queue.state().waiting if each.call is call)
        return _to_ms(self._seconds_until_done(next(waiting, QueuedRuns(planned, call, ()))))

    def _runs(self, planned: PlannedRequest, call: Call) -> QueuedRuns:
        return QueuedRuns(planned, call, tuple(split(planned.num_images, self._sizes(planned))))

    def _refuse_if_too_late(
        self, runs: QueuedRuns, seconds: float | None, deadline_seconds: float
    ) -> None:
        # The deadline ends when the images are drawn, so what follows takes nothing from it.
        state = self._queue.state()
        least = self._estimates.least_seconds_until_drawn(runs, state, self._sizes)
        left = deadline_seconds - runs.call.timeline.elapsed_seconds()
        margin = IDLE_MARGIN if self._queue.idle else BUSY_MARGIN
        if least > max(0.0, margin * left):
            raise DeadlineExceeded(deadline_seconds, _to_ms(seconds), refused=True)

    def _seconds_until_done(self, runs: QueuedRuns) -> float | None:
        return self._estimates.seconds_until_done(runs, self._queue.state(), self._sizes)

    def _retry_after_seconds(self) -> int:
        """When the next place in the queue is free: at the end of the run in progress."""
        running = self._queue.state().running
        left = None if running is None else self._estimates.seconds_left(running)
        return max(1, math.ceil(left or 0))


def _to_ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
