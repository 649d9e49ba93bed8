"""The newest finished requests, kept in memory: their timelines, and the latency of their steps.

A timeline is the request's span tree as JSON, with the times that the exporter gives to the spans.
It never has a prompt.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from metrics.families.budget import Budget
from metrics.records import RequestTiming, RunTiming
from metrics.sampling import TraceIdentity
from metrics.slow_reason import slow_reason
from metrics.spans import placed_spans, request_tree
from serve.errors import Unauthorized

MOST_REQUESTS = 50
"""How many finished requests are kept."""
MOST_RUNS = 256
WINDOW_SECONDS = 60.0
"""Runs that ended within this time count for the latency of steps."""


class RecentRequests:
    """Filled on the recorder's thread, read on the event loop."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._requests: deque[tuple[RequestTiming, TraceIdentity]] = deque(maxlen=MOST_REQUESTS)
        self._runs: deque[tuple[float, RunTiming]] = deque(maxlen=MOST_RUNS)

    def add(self, request: RequestTiming, identity: TraceIdentity) -> None:
        """Keep a finished request. Its identity says whether its trace is exported.

        One without a key is not kept: whoever sends many of them would displace all others.
        """
        if request.failure is not None and request.failure.error_type == Unauthorized.error_type:
            return
        now = self._monotonic()
        with self._lock:
            self._requests.append((request, identity))
            for run in request.observed_runs:
                if run.steps and not run.profiled:
                    self._runs.append((now, run))

    def timelines(self) -> list[dict[str, Any]]:
        """All that are kept, the newest first."""
        with self._lock:
            kept = list(self._requests)
        return [timeline(request, identity) for request, identity in reversed(kept)]

    def timeline_of(self, trace_id: str) -> dict[str, Any] | None:
        """The newest request of a trace, or None if it is not kept (any more)."""
        with self._lock:
            kept = list(self._requests)
        for request, identity in reversed(kept):
            if identity.trace_id_hex == trace_id:
                return timeline(request, identity)
        return None

    @property
    def last_run(self) -> RunTiming | None:
        """The newest run of the window."""
        runs = self._window()
        return runs[-1] if runs else None

    def steps(self, budget: Budget | None) -> dict[str, Any] | None:
        """Median and 95th percentile of the steps in the window, in milliseconds; None: no run.

        Only steps with the newest run's shape, number of images and guidance count, because others
        take another time.

        Args:
            budget: gives the time that a step at this shape may take.
        """
        runs = self._window()
        if not runs:
            return None
        newest = runs[-1]
        like = [r for r in runs if (r.shape, r.batch_size) == (newest.shape, newest.batch_size)]
        steps_ms = sorted(
            step.duration_ns / 1e6
            for run in like
            for step in run.steps_by_guidance.get(newest.guidance, ())
        )
        budget_ms = None
        if budget is not None:
            width, height = map(int, newest.shape.split("x"))
            budget_ms = budget.step_seconds * 1e3 * (width * height / budget.pixels)
        return {
            "shape": newest.shape,
            "batch_size": newest.batch_size,
            "count": len(steps_ms),
            "median_ms": statistics.median(steps_ms),
            "p95_ms": steps_ms[min(len(steps_ms) - 1, int(0.95 * len(steps_ms)))],
            "budget_ms": budget_ms,
        }

    def _window(self) -> list[RunTiming]:
        since = self._monotonic() - WINDOW_SECONDS
        with self._lock:
            return [run for ended, run in self._runs if ended >= since]


def timeline(request: RequestTiming, identity: TraceIdentity) -> dict[str, Any]:
    """One request as JSON: what it was, how it ended, and every span with its start after the
    request's own.

    Seeds are strings, because a browser's numbers end at 2^53.
    """
    root = request_tree(request, steps=True)
    facts = request.facts
    asked: dict[str, Any] = {}
    if facts is not None:
        asked = {
            "model": facts.model_name,
            "width": facts.width,
            "height": facts.height,
            "num_inference_steps": facts.num_inference_steps,
            "guidance_scale": facts.guidance_scale,
            "num_images": facts.num_images,
            "seed": str(facts.seed),
            "loras": [name for name, _ in facts.loras],
        }
    spans = []
    for span in placed_spans(root):
        node = span.node
        shown: dict[str, Any] = {
            "name": node.name,
            "depth": span.depth,
            "clock": span.clock,
            "start_ms": (span.start_ns - request.start_ns) / 1e6,
            "ms": (span.end_ns - span.start_ns) / 1e6,
        }
        if "inference.step.index" in node.attributes:
            shown["index"] = node.attributes["inference.step.index"]
            shown["gpu_queue_ms"] = node.attributes["inference.step.gpu_queue_ms"]
        if "inference.batch.size" in node.attributes:
            shown["batch_size"] = node.attributes["inference.batch.size"]
        if node.error is not None:
            shown["failed"] = True
        spans.append(shown)
    return {
        "trace_id": identity.trace_id_hex,
        "exported": identity.exported,
        "endpoint": request.endpoint,
        "status": request.status_code,
        "outcome": request.outcome,
        "error_type": None if request.failure is None else request.failure.error_type,
        "slow_reason": slow_reason(request),
        "started_at": request.start_ns / 1e9,
        "duration_ms": request.duration_ns / 1e6,
        "unattributed_ms": request.unattributed_ns / 1e6,
        "estimate_ms": None if request.estimate is None else request.estimate.seconds * 1e3,
        "request": asked,
        "spans": spans,
    }
