"""The CUDA event clock on a GPU: its accuracy, its overhead, and that nothing else synchronises."""

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
from metrics.gpu import THROTTLE_REASONS, Gpu
from metrics.records import RunTiming
from metrics.timeline import RunTimeline
from serve.engine.build import build_runtime
from serve.engine.call import Call
from serve.engine.cancellation import Cancellation
from serve.engine.gpu_run import RunPart
from serve.engine.gpu_thread import STEPS_AHEAD, StepPacer
from serve.engine.runtime import Runtime
from serve.errors import ClientGone
from serve.schema import TextToImageRequest
from serve.settings import ServeSettings

pytestmark = pytest.mark.gpu

STEPS = 30


class Work:
    """Steps like a UNet's: tens of milliseconds in hundreds of kernels."""

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
    """Run `steps` steps with the service's pacing; returns their indices as they were reported."""
    order: list[int] = []
    pacer = StepPacer(timeline, Cancellation(), lambda index, _: order.append(index), lambda: None)
    with timeline.stage("denoise"):
        timeline.loop_begins()
        for _ in range(steps):
            work.step()
            pacer.step_enqueued()
    pacer.drain()
    return order


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
    order = run_loop(work, timeline)
    wall_ns = time.perf_counter_ns() - start
    run = timeline.finish()
    assert order == list(range(STEPS))
    assert run.clock == "cuda"
    total = sum(step.duration_ns for step in run.steps)
    assert total == pytest.approx(wall_ns, rel=0.01)
    assert run.error_bound_ns < 500_000


def test_the_host_leads_and_never_by_more_than_its_bound(work: Work) -> None:
    timeline = new_timeline()
    run_loop(work, timeline)
    run = timeline.finish()
    median = sorted(step.duration_ns for step in run.steps)[STEPS // 2]
    waited = [step.gpu_queue_ns for step in run.steps[STEPS_AHEAD + 1 :]]
    assert min(waited) > 0.5 * median  # the GPU is never starved
    # A step's start is marked before the host waits, so its own step may be in the queue as well.
    assert max(waited) < (STEPS_AHEAD + 1.5) * median


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


def test_a_step_costs_the_gpus_thread_microseconds(work: Work) -> None:
    """The host's time per step, driver included; on an idle device no wait takes long."""
    timeline = new_timeline()
    pacer = StepPacer(timeline, Cancellation(), lambda *_: None, lambda: None)
    timeline.loop_begins()
    torch.cuda.synchronize()
    times_us = []
    for _ in range(100):
        start = time.perf_counter_ns()
        pacer.step_enqueued()
        times_us.append((time.perf_counter_ns() - start) / 1e3)
        torch.cuda.synchronize()
    median_us = sorted(times_us)[50]
    print(f"\na step: {median_us:.1f} us")
    assert median_us < 50


def test_the_driver_says_which_gpu_this_is_and_what_holds_it_back() -> None:
    gpu = Gpu.open("cuda")
    assert gpu is not None, "nvidia-ml-py is part of the gpu extra"
    assert gpu.identity["hw.name"] == torch.cuda.get_device_name()
    assert str(torch.cuda.get_device_properties(0).uuid) in gpu.identity["hw.id"]
    times_us = []
    for _ in range(50):
        start = time.perf_counter_ns()
        seen = gpu.conditions()
        times_us.append((time.perf_counter_ns() - start) / 1e3)
    print(f"\nconditions: {sorted(times_us)[25]:.0f} us at the median, {max(times_us):.0f} at most")
    assert gpu.failures == 0
    assert seen.throttle <= set(THROTTLE_REASONS)
    assert seen.sm_clock_mhz is not None
    assert seen.max_sm_clock_mhz is not None
    assert 0 < seen.sm_clock_mhz <= seen.max_sm_clock_mhz


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


def test_the_pipelines_loop_waits_for_nothing_but_its_lead(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count the CUDA runtime calls while the real pipeline is in its loop."""
    from torch.profiler import ProfilerActivity, profile, record_function

    steps = 12
    denoise = runtime.loaded.model.denoise
    loop = record_function("the loop")

    def watched(*args: Any, on_loop_begins: Any, on_step_enqueued: Any, **kwargs: Any) -> Any:
        def begins() -> None:
            on_loop_begins()
            loop.__enter__()

        def enqueued(index: int, latents: Any) -> None:
            on_step_enqueued(index, latents)
            if index == steps - 1:
                loop.__exit__(None, None, None)

        return denoise(*args, on_loop_begins=begins, on_step_enqueued=enqueued, **kwargs)

    monkeypatch.setattr(runtime.loaded.model, "denoise", watched)
    call = new_call(runtime)
    request = TextToImageRequest(prompt="a red circle", num_inference_steps=steps, seed=1)
    planned = runtime._plan(request, call)

    def work() -> Any:
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities, acc_events=True) as profiler:
            runtime._execute([RunPart(planned, call)], run_id="r")
        return profiler.events()

    events = runtime._gpu.submit(work).result(120)
    inside = next(event.time_range for event in events if event.name == "the loop")
    calls = Counter(
        event.name
        for event in events
        if event.name.startswith("cuda") and inside.start <= event.time_range.start <= inside.end
    )
    assert calls, "the profiler saw no CUDA call in the loop"
    waits = {name: n for name, n in calls.items() if "Synchronize" in name or name == "cudaMemcpy"}
    assert set(waits) == {"cudaEventSynchronize"}
    assert waits["cudaEventSynchronize"] <= steps


def test_a_request_says_what_the_gpu_went_through(runtime: Runtime) -> None:
    call = new_call(runtime)
    generate(runtime, call)
    assert call.run is not None
    assert 1 <= len(call.run.conditions) <= 2
    assert all(seen.sm_clock_mhz for seen in call.run.conditions)


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
    assert len(call.run.steps) <= 4 + STEPS_AHEAD + 1
