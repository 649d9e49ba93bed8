"""Who may wait, for how long, and how waiting or running work is called off.

Counts belong to the event loop's thread and need no lock; a `Cancellation` crosses threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from serve.errors import Draining, QueueFull, RequestError

# How much the newest run counts in the average that Retry-After is estimated from: about the last
# ten runs matter.
_AVERAGE_WEIGHT = 0.1


class Cancellation:
    """A reason to stop, set once from any thread; the first reason stands.

    `work_started` is set by the thread that does the work: what has started is let finish when
    the process drains, what has not is called off.
    """

    def __init__(self) -> None:
        self.work_started = False
        self._lock = threading.Lock()
        self._reason: RequestError | None = None
        self._callbacks: list[Callable[[], object]] = []

    @property
    def reason(self) -> RequestError | None:
        return self._reason

    def cancel(self, reason: RequestError) -> None:
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def when_cancelled(self, callback: Callable[[], object]) -> None:
        """Call `callback` on cancellation, at once if that has happened already."""
        with self._lock:
            if self._reason is None:
                self._callbacks.append(callback)
                return
        callback()

    def raise_if_cancelled(self) -> None:
        if self._reason is not None:
            # Raised more than once; each traceback would otherwise be added to the last.
            raise self._reason.with_traceback(None)


class Cancellations:
    """Those of one run's requests: the run stops when nobody waits for it any more."""

    def __init__(self, each: Sequence[Cancellation]) -> None:
        self._each = each

    def raise_if_cancelled(self) -> None:
        """Raise the first request's reason once every one was called off."""
        if all(cancellation.reason is not None for cancellation in self._each):
            self._each[0].raise_if_cancelled()


class Admission:
    """Bounded waiting in front of the one thread that owns the model.

    Args:
        max_waiting: how many may wait beside the one that runs.
        on_waiting: told the number of waiting requests whenever it changes.
    """

    def __init__(self, max_waiting: int, on_waiting: Callable[[int], None]) -> None:
        self._max_waiting = max_waiting
        self._on_waiting = on_waiting
        self._admitted: set[Cancellation] = set()
        self._average_run_seconds = 1.0
        self._draining = False

    @property
    def waiting(self) -> int:
        """Requests that wait: all admitted ones but the one that runs or is about to."""
        return max(0, len(self._admitted) - 1)

    @contextmanager
    def admit(self, cancellation: Cancellation) -> Iterator[None]:
        """Hold a place from here until the enclosed run has ended.

        Raises:
            Draining: the process is going down.
            QueueFull: all places are taken.
        """
        if self._draining:
            raise Draining
        if len(self._admitted) > self._max_waiting:
            raise QueueFull(self.waiting, self._retry_after_seconds())
        self._admitted.add(cancellation)
        self._on_waiting(self.waiting)
        try:
            yield
        finally:
            self._admitted.discard(cancellation)
            self._on_waiting(self.waiting)

    def run_took(self, seconds: float) -> None:
        """Feed the average that Retry-After is estimated from."""
        self._average_run_seconds += _AVERAGE_WEIGHT * (seconds - self._average_run_seconds)

    def drain(self) -> None:
        """Admit nobody from now on and call off all that has not started."""
        self._draining = True
        for cancellation in list(self._admitted):
            if not cancellation.work_started:
                cancellation.cancel(Draining())

    def _retry_after_seconds(self) -> int:
        return max(1, math.ceil(len(self._admitted) * self._average_run_seconds))
