"""The story of a request on the real demo model, and each way it can go wrong."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client import CollectorRegistry

from kernels_warmup.shapes import CompiledShape
from serve.engine.call import Call, current_call
from serve.engine.runtime import Plan, Runtime, build_runtime
from serve.engine.startup import State
from serve.errors import (
    ClientGone,
    DeadlineExceeded,
    DeviceLost,
    Draining,
    GenerationFailed,
    InvalidRequest,
    ModelError,
    NonFiniteOutput,
    NotReady,
    OutOfMemory,
    QueueFull,
)
from serve.model.sdxl import Conditioning
from serve.schema import TextToImageResponse
from serve.settings import ServeSettings
from tests.serve.conftest import request

NewCall = Callable[[], Call]

UNBILLED = {"x-fal-billable-units": "0"}


def generate(runtime: Runtime, call: Call, **changes: Any) -> TextToImageResponse:
    return asyncio.run(runtime.generate(request(**changes), call))


def test_a_request_is_answered(runtime: Runtime, new_call: NewCall) -> None:
    call = new_call()
    response = generate(runtime, call, num_inference_steps=4, width=160, height=96)
    assert (response.image.width, response.image.height) == (160, 96)
    assert response.image.content_type == "image/jpeg"
    assert base64.b64decode(response.image.url.split(",")[1])[:3] == b"\xff\xd8\xff"
    assert response.seed == 1
    assert response.trace_id == call.identity.trace_id_hex
    assert not response.prompt_truncated
    timings = response.timings
    assert len(timings.steps_ms) == 4
    assert timings.clock == "host"
    assert timings.denoise_ms is not None
    assert sum(timings.steps_ms) <= timings.denoise_ms
    for name in ("queue_ms", "text_encode_ms", "vae_decode_ms", "image_encode_ms", "upload_ms"):
        assert getattr(timings, name) is not None


@pytest.mark.timing
def test_the_sum_of_steps_is_the_loops_wall_time(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host's clock, against a stopwatch around the real pipeline's loop and against
    torch.profiler's timeline of it."""
    from torch.profiler import ProfilerActivity, profile, record_function

    steps = 6
    model = runtime._model
    assert model is not None
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
    plan = runtime._plan(request(num_inference_steps=steps), call)

    def work() -> Any:  # on the model's own thread, where the profiler has to be
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            runtime._run(plan, call, None)
        return profiler.events()

    events = runtime._gpu.submit(work).result(60)
    profiled_us = next(e.time_range.elapsed_us() for e in events if e.name == "the loop")
    assert call.run is not None
    assert len(call.run.steps) == steps
    total_ns = sum(step.duration_ns for step in call.run.steps)
    assert total_ns == pytest.approx(moments[1] - moments[0], rel=0.01)
    assert total_ns == pytest.approx(profiled_us * 1e3, rel=0.01)


def test_the_same_seed_gives_the_same_bytes(runtime: Runtime, new_call: NewCall) -> None:
    first = generate(runtime, new_call(), format="png")
    again = generate(runtime, new_call(), format="png")
    other = generate(runtime, new_call(), format="png", seed=2)
    assert first.image.url == again.image.url
    assert first.image.url != other.image.url


def test_a_seed_is_drawn_and_can_be_used_again(runtime: Runtime, new_call: NewCall) -> None:
    drawn = generate(runtime, new_call(), seed=None, format="png")
    again = generate(runtime, new_call(), seed=drawn.seed, format="png")
    assert drawn.image.url == again.image.url


@pytest.mark.parametrize("changes", [{"guidance_scale": 1.0}, {"negative_prompt": "blue"}])
def test_guidance_and_negative_prompts_change_the_image(
    runtime: Runtime, new_call: NewCall, changes: dict[str, Any]
) -> None:
    plain = generate(runtime, new_call(), format="png")
    changed = generate(runtime, new_call(), format="png", **changes)
    assert plain.image.url != changed.image.url


@pytest.mark.parametrize(("scale", "guided"), [(0, False), (1, False), (1.01, True)])
def test_guidance_of_one_and_below_is_off(scale: float, guided: bool) -> None:
    shape = CompiledShape(128, 128)
    assert Plan(request(), shape, 2, scale, seed=1, run_id="r").guided is guided


def test_a_cut_prompt_is_said(runtime: Runtime, new_call: NewCall) -> None:
    long = "a red circle and " * 60
    assert generate(runtime, new_call(), prompt=long).prompt_truncated


@pytest.mark.parametrize("prompt", ["é", "赤い丸", "🔴" * 50, "\x00", "<|endoftext|>", "{}[]\\n"])
def test_any_prompt_draws_something(runtime: Runtime, new_call: NewCall, prompt: str) -> None:
    generate(runtime, new_call(), prompt=prompt, num_inference_steps=1)


def test_steps_are_told_in_order(runtime: Runtime, new_call: NewCall) -> None:
    told: list[int] = []
    previews: list[Any] = []

    def on_step(index: int, gpu_ms: float, preview: Any) -> None:
        assert gpu_ms > 0
        told.append(index)
        previews.append(preview)

    call = new_call()
    asyncio.run(
        runtime.generate(request(num_inference_steps=5, preview=True), call, on_step=on_step)
    )
    assert told == [0, 1, 2, 3, 4]
    assert all(preview.shape == (16, 16, 3) for preview in previews)


def test_a_shape_that_is_not_warm_is_refused_with_the_list(
    runtime: Runtime, new_call: NewCall
) -> None:
    with pytest.raises(InvalidRequest, match="128x128, 160x96"):
        generate(runtime, new_call(), width=256)


@pytest.mark.timing
def test_unattributed_time_is_small(runtime: Runtime, new_call: NewCall) -> None:
    async def served() -> Call:
        call = new_call()
        call.timeline.begin_at_arrival("receive")
        call.timeline.end()
        await runtime.generate(request(), call)
        return call

    timings = []
    for _ in range(5):
        call = asyncio.run(served())
        timings.append(call.finish(200).unattributed_ns / 1e6)
    # The bound of 5 ms at the median is measured by `make measure`; this catches a lost stage.
    assert min(timings) < 20


class Gate:
    """Holds the model's thread until opened."""

    def __init__(self, runtime: Runtime) -> None:
        self._opened = threading.Event()
        self._entered = threading.Event()
        self._future = runtime._gpu.submit(self._hold)
        self._entered.wait(10)

    def _hold(self) -> None:
        self._entered.set()
        self._opened.wait(30)

    def open(self) -> None:
        self._opened.set()
        self._future.result(10)


def test_a_deadline_passes_while_waiting(runtime: Runtime, new_call: NewCall) -> None:
    gate = Gate(runtime)
    try:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"0\.2 s"):
            generate(runtime, new_call(), deadline_seconds=0.2)
        assert time.monotonic() - start < 5
    finally:
        gate.open()
    assert runtime.admission.waiting == 0
    generate(runtime, new_call())


def test_a_deadline_passes_midway(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []
    monkeypatch.setattr(runtime._model, "decode", decoded.append)
    call = new_call()
    with pytest.raises(DeadlineExceeded):
        generate(runtime, call, num_inference_steps=100, deadline_seconds=0.3)
    assert decoded == []
    assert call.run is not None
    assert 0 <= len(call.run.steps) < 100


def test_a_request_called_off_midway_stops_within_two_steps(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []
    monkeypatch.setattr(runtime._model, "decode", decoded.append)
    call = new_call()

    def on_step(index: int, *_: object) -> None:
        if index == 3:
            call.cancellation.cancel(ClientGone())

    with pytest.raises(ClientGone):
        asyncio.run(runtime.generate(request(num_inference_steps=50), call, on_step=on_step))
    assert decoded == []
    assert call.run is not None
    assert len(call.run.steps) <= 6


def test_a_full_queue_answers_at_once(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 3
    monkeypatch.setattr(runtime.admission, "_max_waiting", limit)

    async def flood() -> list[BaseException | TextToImageResponse]:
        tasks = [
            asyncio.create_task(runtime.generate(request(num_inference_steps=1), new_call()))
            for _ in range(limit + 3)
        ]
        # One has the thread's place and `limit` wait; the others are refused while it is held.
        await asyncio.wait(tasks[-2:])
        assert sum(task.done() for task in tasks) == 2
        gate.open()
        return await asyncio.gather(*tasks, return_exceptions=True)

    gate = Gate(runtime)
    results = asyncio.run(flood())
    refused = [result for result in results if isinstance(result, QueueFull)]
    assert len(refused) == 2
    assert all(isinstance(r, QueueFull | TextToImageResponse) for r in results)
    assert runtime.admission.waiting == 0


@pytest.mark.parametrize("stage", ["encode_prompts", "denoise", "decode"])
def test_an_exception_in_any_stage_is_a_500_without_the_prompt(
    runtime: Runtime,
    new_call: NewCall,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stage: str,
) -> None:
    prompt = "-".join(["ze", "bra"])  # a traceback quotes the source, so it is not spelt there

    def broken(*_: object, **__: object) -> None:
        raise KeyError(prompt)

    monkeypatch.setattr(runtime._model, stage, broken)
    call = new_call()
    with pytest.raises(GenerationFailed) as caught:
        generate(runtime, call, prompt=prompt)
    assert caught.value.status == 500
    assert "KeyError" in caught.value.message
    call.fail(caught.value)
    assert call.failure is not None
    assert call.failure.exception_type == "KeyError"
    assert prompt not in caught.value.message + call.failure.message + caplog.text
    monkeypatch.undo()
    generate(runtime, new_call())


def test_out_of_memory_asks_for_no_retry(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 900 GiB")

    monkeypatch.setattr(runtime._model, "denoise", full)
    with pytest.raises(OutOfMemory) as caught:
        generate(runtime, new_call())
    assert caught.value.headers == UNBILLED | {"X-Fal-Needs-Retry": "0"}
    assert runtime.healthy


def test_values_that_are_not_finite_are_found(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runtime._model
    assert model is not None
    real = model.denoise

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return real(*args, **kwargs) * float("nan")

    monkeypatch.setattr(model, "denoise", poisoned)
    with pytest.raises(NonFiniteOutput):
        generate(runtime, new_call())


def test_a_lost_device_makes_the_process_unhealthy(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(runtime._model, "denoise", broken)
    monkeypatch.setattr(runtime._model, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    try:
        with pytest.raises(DeviceLost) as caught:
            generate(runtime, new_call())
        assert caught.value.headers == UNBILLED | {"x-fal-stop-runner": "1"}
        assert not runtime.healthy
        assert runtime.failed
        with pytest.raises(DeviceLost):
            generate(runtime, new_call())
    finally:
        runtime._device_lost = False


def test_a_fault_that_shows_at_the_copy_to_the_host_is_no_image(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(runtime._clock, "resolve", fault)
    monkeypatch.setattr(runtime._model, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    try:
        call = new_call()
        # The inputs lie on the CPU whatever the device is said to be.
        monkeypatch.setattr(runtime._model, "encode_prompts", no_conditioning)
        monkeypatch.setattr(runtime._model, "denoise", lambda *_, **__: torch.zeros(1, 4, 16, 16))
        with pytest.raises(DeviceLost):
            generate(runtime, call)
        assert not runtime.healthy
        assert call.run is not None
        monkeypatch.setattr(runtime._clock, "begin", fault)
        with pytest.raises(DeviceLost):
            generate(runtime, new_call())
    finally:
        runtime._device_lost = False


def no_conditioning(*_: object, **__: object) -> Conditioning:
    nothing = torch.zeros(0)
    return Conditioning(nothing, nothing, None, None, truncated=(False,))


@pytest.mark.parametrize("stage", ["text_encode", "denoise", "vae_decode", "image_encode"])
def test_a_failure_is_noted_in_the_stage_it_befell(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        time.sleep(0.005)
        raise ValueError

    if stage == "image_encode":
        monkeypatch.setattr("serve.engine.runtime.encode_image", broken)
    else:
        methods = {"text_encode": "encode_prompts", "denoise": "denoise", "vae_decode": "decode"}
        monkeypatch.setattr(runtime._model, methods[stage], broken)
    call = new_call()
    with pytest.raises((GenerationFailed, ValueError)):
        generate(runtime, call)
    timing = call.finish(500)
    assert timing.failure is not None
    assert timing.failure.exception_type == "ValueError"
    failed = timing.stage(stage) or (timing.run.stage(stage) if timing.run else None)
    assert failed is not None
    assert failed.start_ns < timing.failure.at_ns <= failed.end_ns


def test_a_deadline_that_passes_in_the_decode_gives_no_image(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runtime._model
    assert model is not None
    real = model.decode

    def slow(latents: torch.Tensor) -> Any:
        time.sleep(1.5)
        return real(latents)

    uploaded: list[object] = []
    monkeypatch.setattr(model, "decode", slow)
    monkeypatch.setattr(runtime, "_upload", lambda *args: uploaded.append(args))
    with pytest.raises(DeadlineExceeded):
        generate(runtime, new_call(), num_inference_steps=1, deadline_seconds=1.4)
    assert uploaded == []


def test_a_handler_that_is_cancelled_stops_the_work(runtime: Runtime, new_call: NewCall) -> None:
    call = new_call()

    async def story() -> None:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_step(*_: object) -> None:
            loop.call_soon_threadsafe(started.set)

        task = asyncio.create_task(
            runtime.generate(request(num_inference_steps=100), call, on_step=on_step)
        )
        await started.wait()
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(story())
    runtime._gpu.submit(lambda: None).result(30)  # behind whatever still runs
    assert isinstance(call.cancellation.reason, ClientGone)
    assert call.run is not None
    assert len(call.run.steps) < 100


def test_nothing_new_starts_behind_a_hung_run(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime._gpu, "silent_seconds", lambda: 1000.0)
    with pytest.raises(DeviceLost):
        generate(runtime, new_call())


def test_a_drained_runtime_that_was_never_warm_says_so(new_call: NewCall) -> None:
    cold = build_runtime(ServeSettings(model="demo", device="cpu"), CollectorRegistry())
    cold.begin_drain()
    with pytest.raises(Draining):
        generate(cold, new_call())
    cold.close(1)


def test_a_failed_run_leaves_no_tensors_behind(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def broken(*_: object, **__: object) -> None:
        big = torch.zeros(10)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("no")

    emptied: list[bool] = []
    monkeypatch.setattr(runtime._model, "denoise", broken)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held[0]() is None))
    gc.disable()
    try:
        with pytest.raises(OutOfMemory):
            generate(runtime, new_call())
        assert emptied == [True]
    finally:
        gc.enable()


def test_lines_of_the_models_thread_carry_the_request(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Call | None] = []
    real = runtime._explain

    def explain(error: Exception) -> Any:
        seen.append(current_call.get())
        return real(error)

    def broken(*_: object, **__: object) -> None:
        raise ValueError

    monkeypatch.setattr(runtime, "_explain", explain)
    monkeypatch.setattr(runtime._model, "denoise", broken)
    call = new_call()
    token = current_call.set(call)
    with pytest.raises(GenerationFailed):
        generate(runtime, call)
    current_call.reset(token)
    assert seen == [call]


def test_a_failed_upload_falls_back_and_is_counted(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> str:
        raise ConnectionError("storage is down")

    before = runtime.metrics.registry.get_sample_value("sdxl_upload_fallbacks_total")
    monkeypatch.setattr(runtime, "_upload", refuse)
    assert generate(runtime, new_call()).image.url.startswith("data:image/jpeg")
    after = runtime.metrics.registry.get_sample_value("sdxl_upload_fallbacks_total")
    assert before is not None
    assert after == before + 1


def test_a_hung_run_makes_the_process_unhealthy(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runtime.healthy
    monkeypatch.setattr(runtime._gpu, "silent_seconds", lambda: 1000.0)
    assert not runtime.healthy


def test_nothing_is_served_before_it_is_warm(new_call: NewCall) -> None:
    cold = build_runtime(ServeSettings(model="demo", device="cpu"), CollectorRegistry())
    with pytest.raises(NotReady, match="not warm yet"):
        generate(cold, new_call())
    cold.close(1)


def test_a_model_that_cannot_be_loaded_is_said(new_call: NewCall) -> None:
    broken = build_runtime(ServeSettings(model="./nowhere", device="cpu"), CollectorRegistry())
    with pytest.raises(ModelError, match="nowhere"):
        asyncio.run(broken.start())
    assert broken.readiness.state is State.FAILED
    assert not broken.healthy
    with pytest.raises(NotReady, match="could not be started"):
        generate(broken, new_call())
    broken.close(1)


def test_draining_lets_the_running_request_finish() -> None:
    runtime = build_runtime(ServeSettings(model="demo", device="cpu"), CollectorRegistry())

    async def story() -> tuple[Any, Any]:
        await runtime.start()
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_step(*_: object) -> None:
            loop.call_soon_threadsafe(started.set)

        calls = [Call("/", "POST", runtime.tracing.identify()) for _ in range(3)]
        running = asyncio.create_task(
            runtime.generate(request(num_inference_steps=8), calls[0], on_step=on_step)
        )
        waiting = asyncio.create_task(runtime.generate(request(), calls[1]))
        await started.wait()
        runtime.begin_drain()
        with pytest.raises(Draining):
            await runtime.generate(request(), calls[2])
        return await asyncio.gather(running, waiting, return_exceptions=True)

    finished, called_off = asyncio.run(story())
    assert isinstance(finished, TextToImageResponse)
    assert isinstance(called_off, Draining)
    assert runtime.close(1) == 0


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
    runs = {call.run for call in calls}
    assert len(runs) == 1
    assert next(iter(runs)).batch_size == 3  # type: ignore[union-attr]
    assert [call.finish(200).observes_run for call in calls] == [True, False, False]


def test_a_run_of_one_request_is_the_same_to_the_byte(runtime: Runtime, new_call: NewCall) -> None:
    (shared,) = together(runtime, [new_call()], {"seed": 7})
    assert shared.image.url == generate(runtime, new_call(), format="png", seed=7).image.url


def test_one_request_called_off_does_not_stop_those_beside_it(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [new_call(), new_call()]
    outcomes: list[Any] = []
    real = runtime._run_together

    def watched(asked: Any) -> Any:
        calls[0].cancellation.cancel(ClientGone())
        outcomes.extend(real(asked))
        return outcomes

    monkeypatch.setattr(runtime, "_run_together", watched)
    with pytest.raises(ClientGone):
        together(runtime, calls, {"seed": 1}, {"seed": 2})
    assert isinstance(outcomes[0], ClientGone)
    assert outcomes[1][0].shape == (128, 128, 3)
    assert calls[0].failure is not None
    assert calls[1].failure is None


def test_a_run_whose_requests_were_all_called_off_stops(
    runtime: Runtime, new_call: NewCall
) -> None:
    calls = [new_call(), new_call()]
    for call in calls:
        call.cancellation.cancel(ClientGone())
    with pytest.raises(ClientGone):
        together(runtime, calls, {"seed": 1}, {"seed": 2})
    assert [call.run for call in calls] == [None, None]


def test_requests_that_differ_in_steps_cannot_share_a_run(
    runtime: Runtime, new_call: NewCall
) -> None:
    with pytest.raises(ValueError, match="one number of steps"):
        together(runtime, [new_call(), new_call()], {}, {"num_inference_steps": 3})
