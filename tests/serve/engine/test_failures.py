"""What a request fails with, and what a failure leaves behind."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from serve.engine.call import Call, current_call
from serve.engine.failures import explain_failure
from serve.engine.runtime import Runtime
from serve.errors import (
    DeviceLost,
    GenerationFailed,
    NonFiniteOutput,
    OutOfMemory,
)
from serve.model.sdxl import Conditioning
from tests.support.engine import NewCall, generate

UNBILLED = {"x-fal-billable-units": "0"}


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

    monkeypatch.setattr(runtime.loaded.model, stage, broken)
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

    monkeypatch.setattr(runtime.loaded.model, "denoise", full)
    with pytest.raises(OutOfMemory) as caught:
        generate(runtime, new_call())
    assert caught.value.headers == UNBILLED | {"X-Fal-Needs-Retry": "0"}
    assert runtime.healthy


def of_the_cpu() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        of_the_cpu(),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemory", 2),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=lambda error: str(error)[:60],
)
def test_a_librarys_failed_allocation_is_out_of_memory(error: Exception) -> None:
    assert isinstance(explain_failure(error, torch.device("cpu")), OutOfMemory)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        ValueError("a prompt that quotes CUBLAS_STATUS_ALLOC_FAILED"),
    ],
    ids=["another status", "another type"],
)
def test_another_failure_of_a_library_is_not_out_of_memory(error: Exception) -> None:
    assert isinstance(explain_failure(error, torch.device("cpu")), GenerationFailed)


def test_values_that_are_not_finite_are_found(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runtime.loaded.model
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

    monkeypatch.setattr(runtime.loaded.model, "denoise", broken)
    monkeypatch.setattr(runtime.loaded.model, "device", torch.device("cuda"))
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

    monkeypatch.setattr(runtime.loaded.clock, "resolve", fault)
    monkeypatch.setattr(runtime.loaded.model, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    try:
        call = new_call()
        # The inputs lie on the CPU whatever the device is said to be.
        monkeypatch.setattr(runtime.loaded.model, "encode_prompts", no_conditioning)
        monkeypatch.setattr(
            runtime.loaded.model, "denoise", lambda *_, **__: torch.zeros(1, 4, 16, 16)
        )
        with pytest.raises(DeviceLost):
            generate(runtime, call)
        assert not runtime.healthy
        assert call.run is not None
        monkeypatch.setattr(runtime.loaded.clock, "begin", fault)
        with pytest.raises(DeviceLost):
            generate(runtime, new_call())
    finally:
        runtime._device_lost = False


def no_conditioning(*_: object, **__: object) -> Conditioning:
    nothing = torch.zeros(0)
    return Conditioning(nothing, nothing, None, None, truncated=(False,))


@pytest.mark.parametrize("stage", ["text_encode", "denoise", "vae_decode", "image_encode"])
def test_a_failure_is_recorded_in_the_stage_that_failed(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        time.sleep(0.005)
        raise ValueError

    if stage == "image_encode":
        monkeypatch.setattr("serve.engine.runtime.encode_image", broken)
    else:
        methods = {"text_encode": "encode_prompts", "denoise": "denoise", "vae_decode": "decode"}
        monkeypatch.setattr(runtime.loaded.model, methods[stage], broken)
    call = new_call()
    with pytest.raises((GenerationFailed, ValueError)):
        generate(runtime, call)
    timing = call.finish(500)
    assert timing.failure is not None
    assert timing.failure.exception_type == "ValueError"
    failed = timing.stage(stage) or (timing.run.stage(stage) if timing.run else None)
    assert failed is not None
    assert failed.start_ns < timing.failure.at_ns <= failed.end_ns


def test_nothing_new_starts_behind_a_hung_run(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime._gpu, "silent_seconds", lambda: 1000.0)
    with pytest.raises(DeviceLost):
        generate(runtime, new_call())


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
    monkeypatch.setattr(runtime.loaded.model, "denoise", broken)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held[0]() is None))
    gc.disable()
    try:
        with pytest.raises(OutOfMemory):
            generate(runtime, new_call())
        assert emptied == [True]
    finally:
        gc.enable()


def test_log_lines_of_the_gpu_thread_belong_to_the_request(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Call | None] = []

    def explain(error: Exception, device: torch.device, own_prompt: bool) -> Any:
        assert not own_prompt
        seen.append(current_call.get())
        return explain_failure(error, device)

    def broken(*_: object, **__: object) -> None:
        raise ValueError

    monkeypatch.setattr("serve.engine.gpu_run.explain_failure", explain)
    monkeypatch.setattr(runtime.loaded.model, "denoise", broken)
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
