"""The one thread that owns the model: what runs on it, how far it may run ahead, and whether it
still moves.

CUDA graphs are thread-local, so loading, warm-up and serving share this thread. It is a daemon: a
hung device must not keep the process from exiting.
"""

from __future__ import annotations

import contextvars
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from metrics.timeline import RunTimeline
from serve.engine.admission import Cancellation, Cancellations

T = TypeVar("T")

LEAD_STEPS = 2
"""How many steps the host may be ahead of the device. One is enough to keep the device fed while
the host enqueues the next; two leave room for a late host, and make cancellation, deadlines and
progress true to within two steps."""


class GpuThread:
    """Runs work in the order it was submitted, one piece at a time."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._last_sign_of_life: float | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="gpu", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queue `work`; its future can be cancelled until it starts."""
        future: Future[T] = Future()
        # In the caller's context, so that what the work logs carries the caller's ids.
        context = contextvars.copy_context()
        self._queue.put((future, lambda: context.run(work)))
        return future

    def sign_of_life(self) -> None:
        """Called by running work whenever it has got somewhere."""
        self._last_sign_of_life = self._monotonic()

    def silent_seconds(self) -> float:
        """How long the running work has shown no sign of life; 0 when nothing runs."""
        last = self._last_sign_of_life
        return 0.0 if last is None else self._monotonic() - last

    def stop(self, timeout_seconds: float) -> bool:
        """Let the running work end and start no other. False if it did not end in time."""
        self._stopping = True
        self._queue.put(None)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, work = item
            if self._stopping:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            self.sign_of_life()
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - whoever waits for the future decides
                # The frames that have ended would keep the run's tensors alive as long as the
                # exception lives.
                _clear_frames(error)
                future.set_exception(error)
            finally:
                self._last_sign_of_life = None
            # The traceback's frames would keep the run's tensors alive until the next run.
            del future, work, item


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


class StepPacer:
    """The pipeline's step callback: marks the step, bounds the host's lead, stops when told to.

    Args:
        on_step: told `(index, duration_ns)` of each step once it has ended on the device, in
            order; called on this thread.
    """

    def __init__(
        self,
        timeline: RunTimeline,
        cancellation: Cancellation | Cancellations,
        on_step: Callable[[int, int], None],
        sign_of_life: Callable[[], None],
    ) -> None:
        self._timeline = timeline
        self._cancellation = cancellation
        self._on_step = on_step
        self._sign_of_life = sign_of_life
        self._told = 0

    def step_enqueued(self) -> None:
        """A step's work has been enqueued. Raises the reason if the request was called off."""
        enqueued = self._timeline.step_enqueued()
        self._tell_until(enqueued - LEAD_STEPS)
        while self._told < enqueued and self._timeline.step_has_ended(self._told):
            self._tell_until(self._told + 1)
        self._cancellation.raise_if_cancelled()

    def drain(self) -> None:
        """Wait for the steps not yet told of; call it once all of the run's work is enqueued."""
        self._tell_until(self._timeline.steps_enqueued)

    def _tell_until(self, count: int) -> None:
        while self._told < count:
            duration_ns = self._timeline.wait_for_step(self._told)
            self._sign_of_life()
            self._on_step(self._told, duration_ns)
            self._told += 1
