"""The GPU's clock on hardware: what it measures, what it costs, and that nothing else waits."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from metrics.clock import WallAnchor, make_clock
from metrics.timeline import RunTimeline, RunTiming
from serve.admission import Cancellation
from serve.call import Call
from serve.errors import ClientGone
from serve.gpu_thread import LEAD_STEPS, StepPacer
from serve.runtime import Runtime, build_runtime
from serve.schema import TextToImageRequest
from serve.settings import ServeSettings

pytestmark = pytest.mark.gpu

STEPS = 30


class Work:
    """Steps of tens of milliseconds in hundreds of kernels, as a UNet's are."""

    def __init__(self) -> None:
        self.matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.matrix)
        self.small = torch.randn(256, 256, device="cuda")

    def step(self) -> None:
        for _ in range(12):
            torch.matmul(self.matrix, self.matrix, out=self.out)
            for _ in range(8):
                self.small.mul_(1.0)


def run_loop(work: Work, timeline: RunTimeline, steps: int = STEPS) -> list[int]:
    """The service's own pacing around `steps` steps; returns the steps in the order told."""
    told: list[int] = []
    pacer = StepPacer(timeline, Cancellation(), lambda index, _: told.append(index), lambda: None)
    with timeline.stage("denoise"):
        timeline.loop_begins()
        for _ in range(steps):
            work.step()
            pacer.step_enqueued()
    pacer.drain()
    return told


def new_timeline() -> RunTimeline:
    return RunTimeline(make_clock("cuda"), WallAnchor.now(), run_id="r", shape="s", guidance=True)


@pytest.fixture(scope="module")
def work() -> Work:
    work = Work()
    work.step()
    torch.cuda.synchronize()
    return work


def test_the_sum_of_steps_is_the_loops_wall_time(work: Work) -> None:
    timeline = new_timeline()
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    told = run_loop(work, timeline)
    wall_ns = time.perf_counter_ns() - start
    run = timeline.finish()
    assert told == list(range(STEPS))
    assert run.clock == "cuda"
    total = sum(step.duration_ns for step in run.steps)
    assert total == pytest.approx(wall_ns, rel=0.01)
    assert run.error_bound_ns < 500_000


def test_the_host_leads_and_never_by_more_than_its_bound(work: Work) -> None:
    timeline = new_timeline()
    run_loop(work, timeline)
    run = timeline.finish()
    median = sorted(step.duration_ns for step in run.steps)[STEPS // 2]
    leads = [step.lead_ns for step in run.steps[LEAD_STEPS + 1 :]]
    assert min(leads) > 0.5 * median  # the GPU is never starved
    # A step's start is marked before the host waits, so its own step may be in the queue as well.
    assert max(leads) < (LEAD_STEPS + 1.5) * median


def profiled(work: Work, steps: int) -> tuple[RunTiming, Any]:
    from torch.profiler import ProfilerActivity, profile

    timeline = new_timeline()
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:
        run_loop(work, timeline, steps)
        run = timeline.finish()
    return run, profiler


def test_the_loops_only_wait_is_ours(work: Work) -> None:
    _, profiler = profiled(work, 10)
    calls = Counter(
        event.name for event in profiler.events() if event.name.startswith(("cuda", "cu"))
    )
    waits = {name: n for name, n in calls.items() if "Synchronize" in name or "Memcpy" in name}
    # One wait a step; the finish waits for the last event once more; the profiler itself
    # synchronises the device when it stops.
    waits.pop("cudaDeviceSynchronize", None)
    assert set(waits) == {"cudaEventSynchronize"}
    assert waits["cudaEventSynchronize"] <= 10 + 2


def test_steps_agree_with_the_profilers_timeline(work: Work) -> None:
    run, profiler = profiled(work, 10)
    kernels = [
        event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    span_us = max(k.time_range.end for k in kernels) - min(k.time_range.start for k in kernels)
    total_us = sum(step.duration_ns for step in run.steps) / 1e3
    assert total_us == pytest.approx(span_us, rel=0.01)


def test_a_mark_costs_microseconds() -> None:
    clock = make_clock("cuda")
    clock.begin()
    for _ in range(100):
        clock.mark()
    clock.begin()
    start = time.perf_counter_ns()
    for _ in range(100):
        clock.mark()
    each_us = (time.perf_counter_ns() - start) / 100 / 1e3
    print(f"\nmark: {each_us:.2f} us")
    assert each_us < 50


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    settings = ServeSettings(model="demo", device="cuda", compile="off")
    runtime = build_runtime(settings, CollectorRegistry())
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


def generate(runtime: Runtime, call: Call, **changes: Any) -> Any:
    request = TextToImageRequest.model_validate({"prompt": "a red circle", "seed": 1} | changes)
    return asyncio.run(runtime.generate(request, call))


def new_call(runtime: Runtime) -> Call:
    return Call("/", "POST", runtime.tracing.identify())


def test_a_request_on_the_gpu(runtime: Runtime) -> None:
    generate(runtime, new_call(runtime))
    call = new_call(runtime)
    response = generate(runtime, call)
    assert response.timings.clock == "cuda"
    assert len(response.timings.steps_ms) == 20
    run = call.run
    assert run is not None
    steps_ns = sum(step.duration_ns for step in run.steps)
    denoise = run.stage("denoise")
    assert denoise is not None
    assert steps_ns <= denoise.duration_ns
    assert run.error_bound_ns < 1_000_000
    assert run.start_ns - run.error_bound_ns <= run.stages[0].start_ns
    assert run.stages[-1].end_ns <= run.end_ns + run.error_bound_ns


def test_the_same_seed_gives_the_same_image_on_the_gpu(runtime: Runtime) -> None:
    first = generate(runtime, new_call(runtime), format="png")
    assert generate(runtime, new_call(runtime), format="png").image.url == first.image.url


def test_a_cancelled_run_stops_within_its_lead(runtime: Runtime) -> None:
    call = new_call(runtime)

    def on_step(index: int, *_: object) -> None:
        if index == 3:
            call.cancellation.cancel(ClientGone())

    request = TextToImageRequest(prompt="a red circle", num_inference_steps=60)
    with pytest.raises(ClientGone):
        asyncio.run(runtime.generate(request, call, on_step=on_step))
    assert call.run is not None
    assert len(call.run.steps) <= 4 + LEAD_STEPS + 1
