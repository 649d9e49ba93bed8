"""How queued and running requests are cancelled, from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from serve.errors import RequestError

T = TypeVar("T")


class Cancellation:
    """Whether a request was cancelled, and why. Set once, from any thread; the first reason
    stays."""

    def __init__(self) -> None:
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

    def forget(self) -> None:
        """The request has ended. Let go of what the callbacks and the reason's traceback hold.

        Both hold the request, which holds this: a cycle that keeps its images until a full garbage
        collection, which a server has every few thousand requests.
        """
        with self._lock:
            self._callbacks = []
            if self._reason is not None:
                self._reason.__traceback__ = None

    def raise_if_cancelled(self) -> None:
        if self._reason is not None:
            # Raised more than once; each traceback would otherwise be added to the last.
            raise self._reason.with_traceback(None)

    async def unless_cancelled(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work`; on cancellation stop it and raise the reason."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)

        def stop() -> None:
            with suppress(RuntimeError):  # the loop has ended long since
                loop.call_soon_threadsafe(task.cancel)

        self.when_cancelled(stop)
        try:
            return await task
        except asyncio.CancelledError:
            self.raise_if_cancelled()
            raise


class Cancellations:
    """Those of one run's requests. The run stops only when every one of them was cancelled."""

    def __init__(self, each: Sequence[Cancellation]) -> None:
        self._each = each

    @property
    def all_cancelled(self) -> bool:
        return all(cancellation.reason is not None for cancellation in self._each)

    def raise_if_cancelled(self) -> None:
        """Raise one of the reasons if every request was cancelled. It only stops the run: each
        request fails with its own reason."""
        if self.all_cancelled:
            self._each[0].raise_if_cancelled()
