"""Finds a run that hangs, and answers its requests.

Nothing else would notice: the GPU thread waits for the device, and the requests for the GPU thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

from serve.engine.gpu_run import GpuRun
from serve.engine.gpu_thread import GpuThread
from serve.engine.readiness import Readiness, State
from serve.engine.waiting.request_queue import QueuedRequest, RequestQueue
from serve.errors import DeviceLost, Hang

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
SILENCE_LIMIT_SECONDS = 120.0
"""A run that shows no sign of life for this long hangs. The slowest step and decode of a full-size
model on a CPU stay well below it."""

GIVE_UP_SECONDS = 5.0
"""A cancelled request is answered without the end of its run once the run has been silent for this
long. A run that goes on stops within two steps."""


class Watchdog:
    """Watches the GPU thread from a thread of its own.

    Args:
        on_change: called on that thread when a run begins to hang, or goes on after all.
    """

    def __init__(
        self,
        gpu: GpuThread,
        queue: RequestQueue,
        readiness: Readiness,
        on_change: Callable[[], None],
    ) -> None:
        self._gpu = gpu
        self._queue = queue
        self._readiness = readiness
        self._on_change = on_change
        self._closed = threading.Event()
        self.run: GpuRun | None = None
        """The run in progress. Set by the GPU thread."""

    def start(self) -> None:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    @property
    def hang(self) -> Hang | None:
        """Where the run in progress hangs, if it does."""
        if self._readiness.state is State.STARTING:
            return None  # the platform's own limit on start-up applies
        silent_seconds = self._gpu.silent_seconds()
        if silent_seconds < SILENCE_LIMIT_SECONDS:
            return None
        run = self.run
        stage, step = ("", None) if run is None else run.position
        return Hang(stage, step, silent_seconds)

    def answer_if_cancelled(self, queued: QueuedRequest) -> None:
        """Once the request is cancelled, answer it also if its run hangs. Call it on the event
        loop."""
        loop = asyncio.get_running_loop()

        def cancelled() -> None:  # on any thread
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._give_up_if_silent, loop, queued)

        queued.call.cancellation.when_cancelled(cancelled)

    def _give_up_if_silent(self, loop: asyncio.AbstractEventLoop, queued: QueuedRequest) -> None:
        if queued.future.done():
            return
        left = GIVE_UP_SECONDS - self._gpu.silent_seconds()
        if left > 0:
            loop.call_later(left, self._give_up_if_silent, loop, queued)
        else:
            self._queue.give_up(queued)

    def _watch(self) -> None:
        hung = False
        while not self._closed.wait(CHECK_SECONDS):
            hang = self.hang
            if hang is not None and not hung:
                run = self.run
                logger.error(
                    "a run hangs %s: the process is unhealthy, and all its requests fail",
                    hang,
                    extra=None if run is None else {"trace_id": run.trace_id},
                )
                self._queue.give_up_all(DeviceLost(hang))
            elif hang is None and hung:
                logger.warning(
                    "the run that hung continues or has ended; requests are served again"
                )
            if hung != (hang is not None):
                hung = hang is not None
                self._on_change()
