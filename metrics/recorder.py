"""One call that records a finished request: spans first, then metrics.

Recording runs on a thread of its own, after the response. A request never waits for its telemetry
and never fails because of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

from metrics.catalogue import GenerationMetrics
from metrics.records import RequestTiming, WarmupTiming
from metrics.sampling import TraceIdentity
from metrics.slow_reason import slow_reason
from metrics.spans import Attributes, request_tree, warmup_tree
from metrics.tracing import Tracing

logger = logging.getLogger(__name__)


StepSpans = Literal["all", "slow", "summary"]
"""Which requests have a span for each step: all, those that failed or were slow, or none. The
median, the slowest step and its index are attributes of `denoise` in any case."""


class Recorder:
    """Writes finished timings as spans and metrics, in the order of the calls."""

    def __init__(
        self, tracing: Tracing, metrics: GenerationMetrics, steps: StepSpans = "all"
    ) -> None:
        self._tracing = tracing
        self._metrics = metrics
        self._steps = steps
        self.left_behind = False
        """Whether a thread still works although its time at shutdown is over."""
        self._listeners: list[Callable[[RequestTiming, TraceIdentity], None]] = []
        # One thread: spans of one request stay together, and the queue order is the export order.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")

    def record(self, request: RequestTiming, identity: TraceIdentity) -> None:
        """Record a finished request later, on the recorder's thread; returns at once."""
        self.submit(lambda: self._record(request, identity))

    def listen(self, listener: Callable[[RequestTiming, TraceIdentity], None]) -> None:
        """Call `listener` with every recorded request, on the recorder's thread. The identity says
        whether the request's trace was chosen for export in the end."""
        self._listeners.append(listener)

    def record_warmup(self, warmup: WarmupTiming, attributes: Attributes) -> None:
        """Record a finished start-up as a trace of its own; returns at once."""
        identity = self._tracing.identify()

        def record() -> None:
            # One trace a process: a failed start is kept, whatever the ratio decided.
            decided = self._tracing.decide_at_end(identity, keep=warmup.failure is not None)
            if decided.exported:
                self._tracing.emit(decided, warmup_tree(warmup, attributes))

        self.submit(record)

    def close(self, budget_seconds: float, on_recorded: Callable[[], None] = lambda: None) -> int:
        """Record all pending requests, then shut tracing down, within the budget.

        Args:
            on_recorded: called in between, when the metrics contain every request.

        Returns how many spans were lost.
        """
        deadline = time.monotonic() + budget_seconds
        last = self._executor.submit(lambda: None)
        self._executor.shutdown(wait=False)
        try:
            last.result(timeout=budget_seconds)
        except TimeoutError:
            logger.warning("some finished requests were not recorded in time")
        on_recorded()
        lost = self._tracing.shutdown(max(0.0, deadline - time.monotonic()))
        self.left_behind = self._tracing.left_behind or not last.done()
        return lost

    def _record(self, request: RequestTiming, identity: TraceIdentity) -> None:
        keep_reason = self._tracing.keep_reason(request)
        decided = self._tracing.decide_at_end(identity, keep=keep_reason is not None)
        slow = keep_reason is not None or slow_reason(request) is not None
        steps = self._steps == "all" or (self._steps == "slow" and slow)
        exemplar = None
        with self._failure_counted():  # the metrics count a request without spans too
            if decided.exported and self._tracing.emit(
                decided, request_tree(request, steps, decided.caller)
            ):
                exemplar = {"trace_id": identity.trace_id_hex, "span_id": identity.span_id_hex}
        self._metrics.observe_request(request, exemplar)
        for listener in self._listeners:
            listener(request, decided)

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` on the recorder's thread. An exception is counted and logged."""

        def guarded() -> None:
            with self._failure_counted():
                work()

        try:
            self._executor.submit(guarded)
        except RuntimeError:  # closed: the process ends
            self._metrics.record_failed()

    @contextmanager
    def _failure_counted(self) -> Iterator[None]:
        """Count and log an exception instead of raising it: nothing fails because of telemetry."""
        try:
            yield
        except Exception:
            self._metrics.record_failed()
            logger.exception("a finished request could not be recorded")
