"""The bounded queue in front of the GPU thread, and how queued or running requests are cancelled.

`Admission` is used on the event loop's thread only and needs no lock. A `Cancellation` is used
from any thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from serve.errors import Draining, QueueFull, RequestError

# The weight of the newest run in the moving average behind Retry-After: about the last ten runs
# count.
_AVERAGE_WEIGHT = 0.1


class Cancellation:
    """Whether a request was cancelled, and why. Set once, from any thread; the first reason stays.

    `work_started` is set by the GPU thread. When the process drains, a request that has started may
    finish; one that has not is cancelled.
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
    """Those of one run's requests. The run stops only when every one of them was cancelled."""

    def __init__(self, each: Sequence[Cancellation]) -> None:
        self._each = each

    @property
    def all_cancelled(self) -> bool:
        return all(cancellation.reason is not None for cancellation in self._each)

    def when_all_cancelled(self, callback: Callable[[], object]) -> None:
        """Call `callback` on the last cancellation, at once if that has happened already. It may be
        called more than once."""

        def one_cancelled() -> None:
            if self.all_cancelled:
                callback()

        for cancellation in self._each:
            cancellation.when_cancelled(one_cancelled)

    def raise_if_cancelled(self) -> None:
        """Raise the first request's reason if every request was cancelled."""
        if self.all_cancelled:
            self._each[0].raise_if_cancelled()


class Admission:
    """Bounds how many requests wait for the GPU thread.

    Args:
        max_waiting: how many may wait, not counting the one that runs.
        on_waiting: called with the number of waiting requests whenever it changes.
    """

    def __init__(self, max_waiting: int, on_waiting: Callable[[int], None]) -> None:
        self._max_waiting = max_waiting
        self._on_waiting = on_waiting
        self._admitted: set[Cancellation] = set()
        self._average_run_seconds = 1.0
        self._draining = False

    @property
    def waiting(self) -> int:
        """How many requests wait: all admitted ones but the one that runs or is about to run."""
        return max(0, len(self._admitted) - 1)

    @contextmanager
    def admit(self, cancellation: Cancellation) -> Iterator[None]:
        """Hold a place from here until the enclosed run has ended.

        Raises:
            Draining: the process is shutting down.
            QueueFull: too many requests wait already.
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
        """Add a run's duration to the average behind Retry-After."""
        self._average_run_seconds += _AVERAGE_WEIGHT * (seconds - self._average_run_seconds)

    def drain(self) -> None:
        """Admit no request from now on, and cancel those that have not started."""
        self._draining = True
        for cancellation in list(self._admitted):
            if not cancellation.work_started:
                cancellation.cancel(Draining())

    def cancel_all(self) -> None:
        """Cancel every request that holds a place, also those that have started."""
        for cancellation in list(self._admitted):
            cancellation.cancel(Draining())

    def _retry_after_seconds(self) -> int:
        return max(1, math.ceil(len(self._admitted) * self._average_run_seconds))
