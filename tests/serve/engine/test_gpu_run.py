"""A run of one or more requests: what they share, and what each of them gets."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metrics.clock import WallAnchor
from metrics.spans import placed_spans, request_tree
from metrics.timeline import RequestTimeline
from serve.engine.call import Call
from serve.engine.gpu_run import GpuRun, OnStep, Outcome, RunPart
from serve.engine.runtime import Runtime
from serve.errors import (
    ClientGone,
    DeadlineExceeded,
    DeviceLost,
    GenerationFailed,
    Hang,
    RequestError,
)
from serve.schema import MAX_SEED, TextToImageResponse
from tests.serve.conftest import request
from tests.support.engine import Gate, NewCall, generate


def png(response: TextToImageResponse) -> np.ndarray[Any, Any]:
    data = base64.b64decode(response.image.url.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data))).astype(np.int16)


def together(
    runtime: Runtime, calls: list[Call], *changes: dict[str, Any]
) -> list[TextToImageResponse]:
    requests = [request(format="png", **change) for change in changes]
    return asyncio.run(runtime.generate_together(requests, calls))


THREE: tuple[dict[str, Any], ...] = (
    {"seed": 1},
    {"seed": 2, "prompt": "a blue square", "negative_prompt": "green"},
    {"seed": 3, "negative_prompt": " "},
)


def test_requests_that_share_a_run_get_the_pictures_they_get_alone(
    runtime: Runtime, new_call: NewCall
) -> None:
    calls = [new_call() for _ in THREE]
    answers = together(runtime, calls, *THREE)
    alone = [generate(runtime, new_call(), format="png", **change) for change in THREE]
    for shared, single in zip(answers, alone, strict=True):
        assert shared.seed == single.seed
        assert int(np.abs(png(shared) - png(single)).max()) <= 1
    runs = [call.run for call in calls if call.run is not None]
    assert len({run.run_id for run in runs}) == 1
    assert [run.batch_size for run in runs] == [3, 3, 3]
    assert [len(call.finish(200).observed_runs) for call in calls] == [1, 0, 0]


def test_seeds_with_the_same_lower_bits_are_pictures_of_their_own(
    runtime: Runtime, new_call: NewCall
) -> None:
    seeds = (0, 2**32, 2**53, MAX_SEED)
    answers = together(runtime, [new_call() for _ in seeds], *({"seed": seed} for seed in seeds))
    assert [answer.seed for answer in answers] == list(seeds)
    pictures = [png(answer) for answer in answers]
    for first, second in itertools.combinations(pictures, 2):
        assert np.abs(first - second).mean() > 1
    for seed, picture in zip(seeds, pictures, strict=True):
        alone = png(generate(runtime, new_call(), format="png", seed=seed))
        assert int(np.abs(picture - alone).max()) <= 1


def test_a_run_of_one_request_is_the_same_to_the_byte(runtime: Runtime, new_call: NewCall) -> None:
    (shared,) = together(runtime, [new_call()], {"seed": 7})
    assert shared.image.url == generate(runtime, new_call(), format="png", seed=7).image.url


def test_one_cancelled_request_does_not_stop_the_others_of_its_run(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [new_call(), new_call()]
    outcomes: list[Any] = []
    real = GpuRun.execute

    def watched(run: GpuRun) -> list[Outcome]:
        calls[0].cancellation.cancel(ClientGone())
        outcomes.extend(real(run))
        return outcomes

    monkeypatch.setattr(GpuRun, "execute", watched)
    with pytest.raises(ClientGone):
        together(runtime, calls, {"seed": 1}, {"seed": 2})
    assert isinstance(outcomes[0], ClientGone)
    assert [image.pixels.shape for image in outcomes[1]] == [(128, 128, 3)]
    assert calls[0].failure is not None
    assert calls[1].failure is None


def shared(runtime: Runtime, calls: list[Call], on_step: OnStep, steps: int = 20) -> list[object]:
    """What each of the requests that share one run ends with. `on_step` is the last one's."""

    async def story() -> list[object]:
        gate = await asyncio.to_thread(Gate, runtime)
        waiting = []
        for seed, call in enumerate(calls):
            told = on_step if call is calls[-1] else None
            wanted = request(num_inference_steps=steps, seed=seed)
            waiting.append(asyncio.create_task(runtime.generate(wanted, call, on_step=told)))
        while runtime.queue.waiting < len(calls) - 1 and not waiting[-1].done():
            await asyncio.sleep(0.01)
        await asyncio.to_thread(gate.open)
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(story())


def cancel_in_turn(calls: list[Call], reasons: list[RequestError]) -> OnStep:
    """Cancels one request for each step that has ended."""

    def on_step(index: int, *_: object) -> None:
        calls[index].cancellation.cancel(reasons[index])

    return on_step


def test_each_request_of_a_run_that_was_cancelled_has_its_own_reason(
    runtime: Runtime, new_call: NewCall
) -> None:
    calls = [new_call(), new_call()]
    reasons = [ClientGone(), DeadlineExceeded(1, eta_ms=5.0)]
    assert shared(runtime, calls, cancel_in_turn(calls, reasons)) == reasons
    assert [call.outcome for call in calls] == ["cancelled", "deadline"]
    failures = [call.failure for call in calls]
    assert [each and (each.error_type, each.server_fault) for each in failures] == [
        ("client_gone", False),
        ("deadline_exceeded", True),
    ]


def test_a_request_that_was_cancelled_before_its_run_failed_has_its_own_reason(
    runtime: Runtime, new_call: NewCall
) -> None:
    calls = [new_call(), new_call()]

    def on_step(index: int, *_: object) -> None:
        if index == 1:
            raise ValueError
        calls[0].cancellation.cancel(ClientGone())

    ends = shared(runtime, calls, on_step)
    assert [type(end) for end in ends] == [ClientGone, GenerationFailed]
    assert [call.outcome for call in calls] == ["cancelled", "error"]
    for call in calls:
        assert call.failure is not None
        assert call.run is not None
        assert call.failure.at_ns == call.run.stages[-1].end_ns


def test_a_device_that_is_lost_after_every_request_was_cancelled_is_noticed(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [new_call(), new_call()]

    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("device-side assert")

    def on_step(index: int, *_: object) -> None:
        for call in calls:
            call.cancellation.cancel(ClientGone())
        monkeypatch.setattr(runtime.loaded.model, "device", torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "synchronize", fault)
        fault()

    try:
        ends = shared(runtime, calls, on_step)
        assert [type(end) for end in ends] == [ClientGone, ClientGone]
        assert not runtime.healthy
    finally:
        runtime._device_lost = False


@pytest.mark.parametrize("steps", [1, 20])
def test_a_run_that_hung_and_went_on_leaves_the_process_healthy(
    runtime: Runtime, new_call: NewCall, steps: int
) -> None:
    """A run of one step ends whole; a longer one stops when it finds its requests cancelled."""
    calls = [new_call(), new_call()]

    def on_step(*_: object) -> None:
        runtime.queue.give_up_all(DeviceLost(Hang("denoise", 0, 120.0)))

    try:
        ends = shared(runtime, calls, on_step, steps)
        assert [type(end) for end in ends] == [DeviceLost, DeviceLost]
        runtime._gpu.submit(lambda: None).result(10)
        assert runtime.healthy
        generate(runtime, new_call())
    finally:
        runtime._device_lost = False


def test_a_run_whose_requests_were_all_cancelled_stops(runtime: Runtime, new_call: NewCall) -> None:
    calls = [new_call(), new_call()]
    for call in calls:
        call.cancellation.cancel(ClientGone())
    with pytest.raises(ClientGone):
        together(runtime, calls, {"seed": 1}, {"seed": 2})
    assert [call.run for call in calls] == [None, None]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("seconds", [-3600, 0, 3600])
def test_a_clock_that_steps_between_the_requests_of_a_run_moves_each_trace_as_a_whole(
    runtime: Runtime, new_call: NewCall, seconds: int, fails: bool
) -> None:
    first = new_call()
    stepped = WallAnchor(time.time_ns() + seconds * 10**9, time.perf_counter_ns())
    timeline = RequestTimeline(first.timeline.anchor if seconds == 0 else stepped)
    second = Call("/", "POST", runtime.tracing.identify(), timeline=timeline)

    def on_step(index: int, *_: object) -> None:
        if fails:
            raise ValueError

    ends = shared(runtime, [first, second], on_step, steps=3)
    assert [isinstance(end, GenerationFailed) for end in ends] == [fails, fails]
    assert first.run is not None
    assert second.run is not None
    assert (first.run is second.run) is (seconds == 0)
    assert (second.run.start_ns - first.run.start_ns) / 1e9 == pytest.approx(seconds, abs=60)
    for call in (first, second):
        timing = call.finish(500 if fails else 200)
        assert timing.run is not None
        for part in (timing.run, *timing.stages):
            assert timing.start_ns <= part.start_ns <= part.end_ns <= timing.end_ns
        for span in placed_spans(request_tree(timing)):  # none had to be clamped
            assert (span.start_ns, span.end_ns) == (span.node.start_ns, span.node.end_ns)
        if timing.failure is not None:
            assert timing.failure.at_ns == timing.run.stages[-1].end_ns
    runs = first.run, second.run
    for kind in ("stages", "steps"):
        one, other = ([part.duration_ns for part in getattr(run, kind)] for run in runs)
        assert one == other != []


@pytest.mark.parametrize("cancelled", [1, 2])
def test_a_cancelled_request_leaves_the_queue_at_once(
    runtime: Runtime, new_call: NewCall, cancelled: int
) -> None:
    calls = [new_call(), new_call()]
    reasons = (ClientGone(), DeadlineExceeded(1))

    async def story() -> list[TextToImageResponse]:
        requests = [request(seed=seed) for seed in range(2)]
        waiting = asyncio.create_task(runtime.generate_together(requests, calls))
        await asyncio.sleep(0.05)
        for call, reason in list(zip(calls, reasons, strict=True))[:cancelled]:
            call.cancellation.cancel(reason)
        assert runtime.queue.waiting == max(0, 1 - cancelled)
        left, _ = await asyncio.wait({waiting}, timeout=0.5)
        assert bool(left) is (cancelled == 2)
        gate.open()
        return await waiting

    gate = Gate(runtime)
    with pytest.raises(ClientGone):
        asyncio.run(story())
    assert [call.outcome for call in calls] == (
        ["cancelled", "deadline"] if cancelled == 2 else ["cancelled", "ok"]
    )
    assert [call.run is None for call in calls] == [True, cancelled == 2]
    assert runtime.queue.waiting == 0


@pytest.mark.parametrize(
    "other",
    [{"num_inference_steps": 3}, {"guidance_scale": 4.0}, {"width": 160, "height": 96}],
    ids=["steps", "guidance", "shape"],
)
def test_requests_that_differ_do_not_share_a_run(
    runtime: Runtime, new_call: NewCall, other: dict[str, Any]
) -> None:
    calls = [new_call(), new_call(), new_call()]
    together(runtime, calls, {}, other, {})
    assert [call.run.batch_size for call in calls if call.run] == [2, 1, 2]
    runs = [call.run.run_id for call in calls if call.run]
    assert runs[0] == runs[2] != runs[1]


@pytest.mark.timing
def test_the_sum_of_steps_is_the_loops_wall_time(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host's clock, against a stopwatch around the real pipeline's loop and against
    torch.profiler's timeline of it."""
    from torch.profiler import ProfilerActivity, profile, record_function

    steps = 6
    model = runtime.loaded.model
    denoise = model.denoise
    loop = record_function("the loop")
    moments: list[int] = []

    def watched(*args: Any, on_loop_begins: Any, on_step_enqueued: Any, **kwargs: Any) -> Any:
        def begins() -> None:
            on_loop_begins()
            moments.append(time.perf_counter_ns())
            loop.__enter__()

        def enqueued(index: int, latents: Any) -> None:
            if index == steps - 1:
                loop.__exit__(None, None, None)
                moments.append(time.perf_counter_ns())
            on_step_enqueued(index, latents)

        return denoise(*args, on_loop_begins=begins, on_step_enqueued=enqueued, **kwargs)

    monkeypatch.setattr(model, "denoise", watched)
    call = new_call()
    planned = runtime._plan(request(num_inference_steps=steps), call)

    def work() -> Any:  # on the model's own thread, where the profiler has to be
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            runtime._execute([RunPart(planned, call)], run_id="r")
        return profiler.events()

    events = runtime._gpu.submit(work).result(60)
    profiled_us = next(e.time_range.elapsed_us() for e in events if e.name == "the loop")
    assert call.run is not None
    assert len(call.run.steps) == steps
    total_ns = sum(step.duration_ns for step in call.run.steps)
    assert total_ns == pytest.approx(moments[1] - moments[0], rel=0.01)
    assert total_ns == pytest.approx(profiled_us * 1e3, rel=0.01)
