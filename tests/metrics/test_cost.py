"""Telemetry overhead: limits that also hold on a busy machine. `python -m bench micro` measures it.

The time is the thread's own CPU time, the least of several, so other processes do not affect it.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from kernels_warmup.shapes import DEMO_SHAPES
from metrics.catalogue import GenerationMetrics, render
from serve.engine.runtime import ENDPOINTS
from serve.errors import OUTCOMES
from tests.metrics.recorded import declared_service
from tests.metrics.test_catalogue import OPENMETRICS
from tests.metrics.timings import START_NS, request_timing, run_timing


def least_cpu_seconds(work: Callable[[], object], times: int) -> float:
    def once() -> float:
        start = time.thread_time()
        work()
        return time.thread_time() - start

    # Coverage's tracer would take most of the time.
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return min(once() for _ in range(times))
    finally:
        sys.settrace(tracer)


@pytest.fixture(scope="module")
def populated() -> GenerationMetrics:
    """Every series that a default configuration has, an exemplar in about every bucket."""
    metrics = declared_service(CollectorRegistry())
    shapes = [str(shape) for shape in DEMO_SHAPES]
    metrics.set_warm_shapes(shapes)
    random = Random(0)
    for _ in range(5_000):
        steps = tuple(random.lognormvariate(3.5, 1.5) for _ in range(3))
        run = dataclasses.replace(
            run_timing(START_NS, steps), shape=random.choice(shapes), guidance=random.random() < 0.5
        )
        request = request_timing(run=run, outcome=random.choice(OUTCOMES))
        trace = f"{random.getrandbits(128):032x}", f"{random.getrandbits(64):016x}"
        metrics.observe_request(
            dataclasses.replace(
                request,
                endpoint=random.choice(ENDPOINTS),
                end_ns=request.start_ns + round(1e9 * random.lognormvariate(0, 2)),
            ),
            dict(zip(("trace_id", "span_id"), trace, strict=True)),
        )
    return metrics


def test_a_scrape_is_small_and_fast(populated: GenerationMetrics) -> None:
    body, _ = render(populated.registry, OPENMETRICS)
    assert body.count(b" # {") > 200
    assert len(body) < 300_000
    # 20 ms on an idle core; twice that on a core whose other hyperthread is busy.
    seconds = least_cpu_seconds(lambda: render(populated.registry, OPENMETRICS), 10)
    assert seconds < 0.040


def test_recording_a_request_is_fast(populated: GenerationMetrics) -> None:
    run = dataclasses.replace(run_timing(START_NS, (30.0,) * 30), shape=str(DEMO_SHAPES[0]))
    request = request_timing(run=run)
    exemplar = {"trace_id": "a" * 32, "span_id": "b" * 16}
    # 200 us on an idle core, with 30 steps, their queue times and nine other observations.
    seconds = least_cpu_seconds(lambda: populated.observe_request(request, exemplar), 200)
    assert seconds < 0.000_400
