"""One call that tells what happened: spans first, then metrics. It never raises into a request.

Recording runs on a thread of its own, after the response has left: a request never waits for its
telemetry, and a full queue or a broken exporter is telemetry's trouble alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from metrics.catalogue import GenerationMetrics
from metrics.records import RequestTiming, WarmupTiming
from metrics.sampling import TraceIdentity
from metrics.slow_reason import slow_reason
from metrics.spans import Attributes, request_tree, warmup_tree
from metrics.tracing import Tracing

logger = logging.getLogger(__name__)


StepSpans = Literal["all", "slow", "summary"]
"""Whose steps become spans: every request's, those of requests that failed or were slow, or
nobody's. The median, the slowest and its index are told in any case."""


class Recorder:
    """Writes finished timings as spans and metrics, in the order they are handed over."""

    def __init__(
        self, tracing: Tracing, metrics: GenerationMetrics, steps: StepSpans = "all"
    ) -> None:
        self._tracing = tracing
        self._metrics = metrics
        self._steps = steps
        self.left_behind = False
        """Whether a thread is still at it though the time for it is over."""
        # One thread: spans of one request stay together, and the queue order is the export order.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")

    def record(self, request: RequestTiming, identity: TraceIdentity) -> None:
        """Hand over a finished request; returns at once."""
        self.submit(lambda: self._record(request, identity))

    def record_warmup(self, warmup: WarmupTiming, attributes: Attributes) -> None:
        """Hand over a finished start-up as a trace of its own; returns at once."""
        identity = self._tracing.identify()

        def record() -> None:
            # One trace a process: a start that failed is kept, whatever the ratio says.
            settled = self._tracing.settle(identity, worth_keeping=warmup.failure is not None)
            if settled.exported:
                self._tracing.emit(settled, warmup_tree(warmup, attributes))

        self.submit(record)

    def close(self, budget_seconds: float, on_recorded: Callable[[], None] = lambda: None) -> int:
        """Record what was handed over and shut tracing down, within the budget.

        Args:
            on_recorded: called in between; the metrics say all that they will say of requests.

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
        kept_for = self._tracing.worth_keeping(request)
        settled = self._tracing.settle(identity, worth_keeping=kept_for is not None)
        slow = kept_for is not None or slow_reason(request) is not None
        steps = self._steps == "all" or (self._steps == "slow" and slow)
        exemplar = None
        if settled.exported and self._tracing.emit(
            settled, request_tree(request, steps, settled.caller)
        ):
            exemplar = {"trace_id": identity.trace_id_hex, "span_id": identity.span_id_hex}
        self._metrics.observe_request(request, exemplar)

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` on the recorder's thread; what it raises is counted and logged."""

        def guarded() -> None:
            try:
                work()
            except Exception:
                # Nobody waits for this result; a request must not fail for its telemetry.
                self._metrics.record_failed()
                logger.exception("a finished request could not be recorded")

        try:
            self._executor.submit(guarded)
        except RuntimeError:  # closed: the process is going down
            self._metrics.record_failed()
