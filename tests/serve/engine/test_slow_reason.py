"""Each reason for a slow request, caused on the real pipeline and read from the exported span.

`eager_fallback` needs a compiled model: test_nothing_compiles.py causes it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from metrics.clock import CudaEventClock
from metrics.gpu import Gpu, GpuWatch
from metrics.records import RequestTiming
from metrics.slow_reason import slow_reason
from serve.engine.call import Call
from serve.engine.images import data_uri
from serve.engine.runtime import Runtime
from tests.metrics.fake_nvml import FakeGpu, FakeNvml
from tests.metrics.test_spans import emitted, named
from tests.serve.conftest import request

pytestmark = pytest.mark.timing

NewCall = Callable[[], Call]


async def serve(runtime: Runtime, call: Call, **changes: Any) -> RequestTiming:
    await runtime.generate(request(**changes), call)
    return call.finish(200)


def exported_reason(timing: RequestTiming) -> object:
    """The reason in the exported span; asserts that the timing gives the same."""
    reason = dict(named(emitted(timing), "inference").attributes or {}).get("inference.slow_reason")
    assert reason == slow_reason(timing)
    return reason


def test_an_ordinary_request_has_none(runtime: Runtime, new_call: NewCall) -> None:
    assert exported_reason(asyncio.run(serve(runtime, new_call()))) is None


def test_queue(runtime: Runtime, new_call: NewCall) -> None:
    async def two() -> list[RequestTiming]:
        long = asyncio.create_task(serve(runtime, new_call(), num_inference_steps=30))
        await asyncio.sleep(0.01)
        return [await serve(runtime, new_call(), num_inference_steps=1), await long]

    waited, ran = asyncio.run(two())
    assert exported_reason(waited) == "queue"
    assert exported_reason(ran) is None


def test_upload(runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch) -> None:
    call = new_call()

    def slow(data: bytes, image_format: Any) -> str:
        assert call.run is not None
        time.sleep(max(0.1, call.run.duration_ns / 1e9))
        return data_uri(data, image_format)

    monkeypatch.setattr(runtime, "_upload", slow)
    assert exported_reason(asyncio.run(serve(runtime, call, num_inference_steps=1))) == "upload"


def test_gpu_throttled(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = FakeGpu(reasons=0x40, sm_clock_mhz=900)
    monkeypatch.setattr(runtime, "_gpu_watch", GpuWatch(Gpu(FakeNvml(hot), hot)))
    timing = asyncio.run(serve(runtime, new_call()))
    assert exported_reason(timing) == "gpu_throttled"
    attributes = dict(named(emitted(timing), "inference").attributes or {})
    assert attributes["gpu.throttle_reasons"] == "hardware_thermal"
    assert attributes["gpu.sm_clock_mhz"] == 900
    hot.reasons = 0
    assert exported_reason(asyncio.run(serve(runtime, new_call()))) is None


class IdleDevice:
    """A device that ends all work as soon as it is enqueued, as a starved one does."""

    def __init__(self) -> None:
        self.at_ns = 0

    def record(self) -> None:
        self.at_ns = time.perf_counter_ns()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Any) -> float:
        return float(end.at_ns - self.at_ns) / 1e6


def test_host_starved(runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch) -> None:
    starved = replace(runtime.loaded, clock=CudaEventClock(IdleDevice))
    monkeypatch.setattr(runtime, "_loaded", starved)
    timing = asyncio.run(serve(runtime, new_call(), num_inference_steps=6))
    assert timing.run is not None
    assert timing.run.clock == "cuda"
    assert exported_reason(timing) == "host_starved"
