"""The one thread that owns the model, and the pacing of a run's steps on it.

CUDA graphs are thread-local, so loading, warm-up and serving share this thread. It is a daemon: a
hung device must not keep the process from exiting.
"""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from metrics.timeline import RunTimeline
from serve.engine.cancellation import Cancellation, Cancellations
from serve.engine.failures import clear_frames

T = TypeVar("T")

STEPS_AHEAD = 2
"""How many steps the host may enqueue ahead of the device. One step keeps the device busy while the
host enqueues the next. The second leaves room for a late host. Cancellation, deadlines and progress
are accurate to this many steps."""


class GpuThread:
    """Runs work in the order in which it was submitted, one piece at a time."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any], bool] | None] = (
            queue.SimpleQueue()
        )
        self._last_sign_of_life: float | None = None
        self._may_be_silent = False
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="gpu", daemon=True)
        self._thread.start()

    @property
    def native_id(self) -> int:
        """The kernel's id of the thread."""
        assert self._thread.native_id is not None  # it was started
        return self._thread.native_id

    def submit(self, work: Callable[[], T], may_be_silent: bool = False) -> Future[T]:
        """Queue `work`. Its future can be cancelled until it starts.

        Args:
            may_be_silent: the work may take minutes without a sign of life, as a compile does.
        """
        future: Future[T] = Future()
        # In the caller's context, so that what the work logs carries the caller's ids.
        context = contextvars.copy_context()
        self._queue.put((future, lambda: context.run(work), may_be_silent))
        return future

    def sign_of_life(self) -> None:
        """The running work has made progress. Called by the work itself."""
        self._last_sign_of_life = self._monotonic()

    def silent_seconds(self) -> float:
        """How long the running work has shown no sign of life; 0 if nothing runs, or if what runs
        may be silent."""
        last = self._last_sign_of_life
        return 0.0 if last is None or self._may_be_silent else self._monotonic() - last

    def stop(self, timeout_seconds: float) -> bool:
        """Let the running work end and start no other. Returns False if it did not end in time."""
        self._stopping = True
        self._queue.put(None)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, work, may_be_silent = item
            if self._stopping:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            self._may_be_silent = may_be_silent
            self.sign_of_life()
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - the future's reader handles it
                clear_frames(error)
                future.set_exception(error)
            finally:
                self._last_sign_of_life = None
            # The traceback's frames would keep the run's tensors alive until the next run.
            del future, work, item


class StepPacer:
    """The timing of a run's steps: marks each, bounds the host's lead, stops a cancelled run.

    Args:
        on_step: called with `(index, duration_ns)` of each step once it has ended on the device, in
            order, on this thread.
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
        self._reported = 0

    def step_enqueued(self) -> None:
        """A step's work has been enqueued. Raises the reason if every request was cancelled."""
        enqueued = self._timeline.step_enqueued()
        self._report_until(enqueued - STEPS_AHEAD)
        while self._reported < enqueued and self._timeline.step_has_ended(self._reported):
            self._report_until(self._reported + 1)
        self._cancellation.raise_if_cancelled()

    def drain(self) -> None:
        """Wait for the steps not yet reported. Call it when all of the run's work is enqueued."""
        self._report_until(self._timeline.steps_enqueued)

    def _report_until(self, count: int) -> None:
        while self._reported < count:
            duration_ns = self._timeline.wait_for_step(self._reported)
            self._sign_of_life()
            self._on_step(self._reported, duration_ns)
            self._reported += 1
