"""Start-up: which shapes are warmed, which are left out, and what stops it."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from kernels_warmup.compile import CompiledModel, compile_model
from kernels_warmup.cuda_graphs import Fallbacks
from kernels_warmup.recipes import Recipe
from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import FROM_PICTURE, UNGUIDED, RunKind
from metrics.clock import WallAnchor
from metrics.records import WarmupTiming
from metrics.spans import Attributes, placed_spans, warmup_tree
from serve.demo_model import checkpoint_path
from serve.engine.build import build_runtime
from serve.engine.loaded_model import LoadedModel
from serve.engine.readiness import State
from serve.engine.runtime import Runtime
from serve.errors import InvalidRequest, ModelError
from serve.model.sdxl import SdxlModel
from tests.serve.conftest import request
from tests.serve.engine.demo_runtime import build, generate, new_call, settings

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own insides


def test_a_size_that_fails_is_left_out_and_the_others_serve(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = build()
    real = runtime._warm_once

    def run_once(shape: CompiledShape, kind: RunKind) -> None:
        if shape.width == 128:
            raise NotImplementedError("no kernel")
        real(shape, kind)

    runtime._warm_once = run_once
    asyncio.run(runtime.start())
    assert runtime.readiness.state is State.READY
    assert runtime.readiness.as_json()["shapes"] == ["160x96"]
    assert runtime.readiness.as_json()["left_out"] == {"128x128": "NotImplementedError"}
    assert caplog.text.count("128x128 could not be warmed and will not be served") == 1
    generate(runtime)
    with pytest.raises(InvalidRequest, match="one of 160x96"):
        generate(runtime, width=128, height=128)
    runtime.close(1)


def phases_recorded(runtime: Runtime) -> list[tuple[str, bool]]:
    """The phases of the start's trace, each with whether it is an error; filled at its end."""
    phases: list[tuple[str, bool]] = []

    def record(warmup: WarmupTiming, attributes: Attributes) -> None:
        tree = warmup_tree(warmup, attributes)
        phases.extend((node.name, node.error is not None) for node in tree.children)

    runtime.recorder.record_warmup = record  # type: ignore[method-assign]
    return phases


def test_where_no_size_can_be_warmed_the_start_fails() -> None:
    runtime = build()
    phases = phases_recorded(runtime)

    def run_once(shape: CompiledShape, kind: RunKind) -> None:
        raise NotImplementedError("no kernel")

    runtime._warm_once = run_once
    with pytest.raises(NotImplementedError):
        asyncio.run(runtime.start())
    assert runtime.readiness.state is State.FAILED
    assert phases == [
        ("load_model", False),
        ("prepare", False),
        ("compile 128x128", True),
        ("compile 160x96", True),
        ("verify", True),
    ]
    runtime.close(1)


def test_the_trace_of_a_start_that_fails_has_the_phase_that_failed(tmp_path: Path) -> None:
    runtime = build(model=str(tmp_path))
    phases = phases_recorded(runtime)
    with pytest.raises(ModelError):
        asyncio.run(runtime.start())
    assert phases == [("load_model", True)]
    runtime.close(1)


def test_the_trace_of_a_start_that_is_cut_off_has_the_phase_in_progress() -> None:
    runtime = build(ready_early=True)
    phases = phases_recorded(runtime)
    begun: list[str] = []

    async def story() -> None:
        second_may_begin = hold_the_second_size(runtime)
        await runtime.start(on_progress=begun.append)
        while "compile 160x96" not in begun:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(runtime.close, 1)
        second_may_begin.set()

    asyncio.run(story())
    assert phases == [
        ("load_model", False),
        ("prepare", False),
        ("compile 128x128", False),
        ("compile 160x96", True),
    ]


def test_a_clock_that_steps_while_the_model_loads_moves_no_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[WarmupTiming] = []
    runtime = build(shapes="128x128")
    monkeypatch.setattr(
        runtime.recorder, "record_warmup", lambda timing, _: recorded.append(timing)
    )
    load, now = runtime._startup._load, WallAnchor.now

    def an_hour_earlier(**clocks: Any) -> WallAnchor:
        anchor = now(**clocks)
        return dataclasses.replace(anchor, unix_ns=anchor.unix_ns - 3600 * 10**9)

    def load_and_step() -> LoadedModel:
        loaded = load()
        monkeypatch.setattr(WallAnchor, "now", an_hour_earlier)
        return loaded

    monkeypatch.setattr(runtime._startup, "_load", load_and_step)
    asyncio.run(runtime.start())
    runtime.close(1)
    [timing] = recorded
    assert {"load_model", "compile 128x128", "verify"} <= {phase.name for phase in timing.phases}
    for placed in placed_spans(warmup_tree(timing, {})):
        assert (placed.start_ns, placed.end_ns) == (placed.node.start_ns, placed.node.end_ns)


def test_the_log_says_what_is_missing_where_the_warm_up_cannot_compile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else names it: the start's error has the exception's type only."""

    lines = ["Failed to find C compiler.", "It was looked for in many places."]

    def compiled(*_: object, **__: object) -> None:
        raise RuntimeError("\n".join(lines))

    monkeypatch.setattr(SdxlModel, "denoise", compiled)
    runtime = build(shapes=(CompiledShape(128, 128),))
    with pytest.raises(ModelError, match="RuntimeError"):
        asyncio.run(runtime.start())
    assert f"a run failed with RuntimeError: {lines[0]}\n" in caplog.text
    assert lines[1] not in caplog.text
    runtime.close(1)


def hold_the_second_size(runtime: Runtime) -> asyncio.Event:
    """Hold the warm-up before 160x96 until the event is set. Called on the event loop."""
    real, loop, may_begin = runtime._warm_once, asyncio.get_running_loop(), asyncio.Event()

    def run_once(shape: CompiledShape, kind: RunKind) -> None:
        if shape.width == 160 and kind.guided:
            asyncio.run_coroutine_threadsafe(may_begin.wait(), loop).result(60)
        real(shape, kind)

    runtime._warm_once = run_once
    return may_begin


def test_ready_early_serves_between_the_sizes() -> None:
    runtime = build(ready_early=True)
    served_early: list[str] = []

    async def story() -> None:
        second_may_begin = hold_the_second_size(runtime)
        await runtime.start()
        assert runtime.readiness.as_json()["state"] == "ready"
        assert runtime.readiness.as_json()["shapes"] == ["128x128"]
        assert runtime.healthy
        with pytest.raises(InvalidRequest, match=r"must be one of 128x128$"):
            await runtime.generate(request(width=160, height=96), new_call(runtime))
        waiting = asyncio.create_task(runtime.generate(request(), new_call(runtime)))
        await asyncio.sleep(0.05)
        second_may_begin.set()
        served_early.append((await waiting).image.url[:10])
        assert runtime._starting is not None
        await runtime._starting
        await runtime.generate(request(width=160, height=96), new_call(runtime))

    asyncio.run(story())
    assert served_early == ["data:image"]
    assert runtime.readiness.as_json()["shapes"] == ["128x128", "160x96"]
    assert "verify" in runtime.readiness.as_json()["warmup_ms"]
    runtime.close(1)


def test_a_batch_size_without_memory_stays_away_while_other_sizes_warm() -> None:
    runtime = build(ready_early=True, max_batch=3)

    async def story() -> None:
        second_may_begin = hold_the_second_size(runtime)
        await runtime.start()
        denoise = runtime.loaded.model.denoise

        def without_memory(*args: Any, seeds: list[int], **options: Any) -> torch.Tensor:
            if len(seeds) > 1:
                raise torch.OutOfMemoryError
            return denoise(*args, seeds=seeds, **options)

        runtime.loaded.model.denoise = without_memory  # type: ignore[method-assign]
        waiting = asyncio.create_task(runtime.generate(request(num_images=2), new_call(runtime)))
        await asyncio.sleep(0.05)
        second_may_begin.set()
        assert len((await waiting).images) == 2
        assert runtime._starting is not None
        await runtime._starting

    asyncio.run(story())
    assert runtime.readiness.shapes == (CompiledShape(128, 128), CompiledShape(160, 96))
    assert runtime.readiness.as_json()["batch_sizes"] == {"128x128": (1,), "160x96": (1, 2, 3)}
    runtime.close(1)


def test_a_hung_run_is_unhealthy_and_a_long_compile_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = build(shapes=(CompiledShape(128, 128),))
    asyncio.run(runtime.start())
    for may_be_silent in (False, True):
        started, release = threading.Event(), threading.Event()

        def work(started: threading.Event = started, release: threading.Event = release) -> None:
            started.set()
            release.wait(30)

        future = runtime._gpu.submit(work, may_be_silent=may_be_silent)
        assert started.wait(30)
        now = time.monotonic()
        monkeypatch.setattr(runtime._gpu, "_monotonic", lambda now=now: now + 1000)
        assert runtime.healthy is may_be_silent
        monkeypatch.undo()
        release.set()
        future.result(30)
    runtime.close(1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention": "cudnn"}, "SDXL_ATTENTION=cudnn cannot be used here: .*this is cpu"),
        ({"attention": "xformers", "compile": "default"}, "SDXL_ATTENTION=xformers cannot be used"),
        ({"quantize": "fp8"}, "SDXL_QUANTIZE=fp8 cannot be used here: fp8 needs an Ada or Hopper"),
    ],
)
def test_what_cannot_be_used_here_stops_the_start(changes: Any, sentence: str) -> None:
    runtime = build(**changes)
    with pytest.raises(ModelError, match=sentence):
        asyncio.run(runtime.start())
    assert runtime.readiness.state is State.FAILED
    runtime.close(1)


# Of four blocks the feed-forward's two products, and QKV where it is fused.
@pytest.mark.parametrize(("mode", "layers"), [("off", 8), ("auto", 12)])
def test_readiness_reports_the_quantisation_error(mode: str, layers: int) -> None:
    runtime = build(quantize="int8", compile=mode, shapes=(CompiledShape(128, 128),))
    asyncio.run(runtime.start())
    ready = runtime.readiness.as_json()["compile"]
    assert ready["quantize"] == "int8"
    assert ready["quantized_layers"] == layers
    assert 1e-4 < ready["quantization_error"] < 0.2
    generate(runtime)
    runtime.close(1)


def few_step_checkpoint(folder: Path, scheduler: str, **config: Any) -> Path:
    """The demo like a few-step checkpoint: with another scheduler, and without guidance."""
    shutil.copytree(checkpoint_path(), folder, copy_function=functools.partial(_link))
    path = folder / "scheduler" / "scheduler_config.json"
    changed = json.loads(path.read_text()) | {"_class_name": scheduler} | config
    path.unlink()
    path.write_text(json.dumps(changed))
    index = folder / "model_index.json"
    parts = json.loads(index.read_text()) | {"scheduler": ["diffusers", scheduler]}
    index.unlink()
    index.write_text(json.dumps(parts))
    return folder


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(source)


Start = Callable[..., Runtime]


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param("EulerDiscreteScheduler", marks=pytest.mark.slow),  # as Lightning's
        "EulerAncestralDiscreteScheduler",  # as Turbo's: it draws noise in every step
        pytest.param("LCMScheduler", marks=pytest.mark.slow),
        "DDIMScheduler",  # has no set_begin_index, at whose call the loop of the others begins
    ],
)
def test_a_checkpoint_for_few_steps_without_guidance(scheduler: str, tmp_path: Path) -> None:
    model = few_step_checkpoint(tmp_path / "few", scheduler, timestep_spacing="trailing")
    warmed: list[RunKind] = []
    runtime = build(
        model=str(model), steps=4, guidance_scale=0.0, shapes=(CompiledShape(128, 128),)
    )
    real = runtime._warm_once

    def run_once(shape: CompiledShape, kind: RunKind) -> None:
        warmed.append(kind)
        real(shape, kind)

    runtime._warm_once = run_once
    asyncio.run(runtime.start())
    assert set(warmed) == {UNGUIDED, FROM_PICTURE}
    assert type(runtime.loaded.model.pipeline.scheduler).__name__ == scheduler
    call = new_call(runtime)
    by_default = generate(runtime, call, num_inference_steps=None, format="png")
    assert call.facts is not None
    assert (call.facts.num_inference_steps, call.facts.guidance_scale) == (4, 0.0)
    assert len(by_default.timings.steps_ms) == 4
    assert call.run is not None
    assert not call.run.guidance
    for steps in (1, 2, 8):
        timings = generate(runtime, num_inference_steps=steps, guidance_scale=1.0).timings
        assert len(timings.steps_ms) == steps
        assert all(ms > 0 for ms in timings.steps_ms)
    again = generate(runtime, num_inference_steps=4, format="png")
    assert again.image.url == by_default.image.url
    with pytest.raises(InvalidRequest, match="must be at most 1: this model runs without guidance"):
        generate(runtime, guidance_scale=5.0)
    runtime.close(1)


def test_the_caller_may_prepare_the_model() -> None:
    prepared: list[CompiledModel] = []

    def prepare(model: Any) -> CompiledModel:
        prepared.append(compile_model(model.pipeline, "off", attention="math"))
        return prepared[0]

    runtime = build_runtime(settings(), CollectorRegistry(), prepare=prepare)
    asyncio.run(runtime.start())
    assert [one.attention for one in prepared] == ["math"]
    assert runtime.readiness.as_json()["compile"]["attention"] == "math"
    runtime.close(1)


def test_a_request_finds_its_texts_warm_with_and_without_a_negative_prompt() -> None:
    """Text encoders are captured for a number of texts."""
    recipe = Recipe(scope="none", replay="none", text_encoders=True)
    runtime = build_runtime(
        settings(shapes=(CompiledShape(128, 128),)),
        CollectorRegistry(),
        prepare=lambda model: compile_model(model.pipeline, recipe=recipe),
    )
    asyncio.run(runtime.start())
    compiled = runtime.loaded.compiled
    assert compiled is not None
    *_, first, second = compiled.functions
    texts = {(((count, 77), torch.int64),) for count in (1, 2)}
    assert first.met == second.met == texts
    assert runtime.loaded.model.text is compiled.text
    for negative in ("", "blue"):
        for scale in (5.0, 1.0):
            call = new_call(runtime)
            generate(runtime, call, negative_prompt=negative, guidance_scale=scale)
            assert call.run is not None
            assert not call.run.eager_fallback
    assert compiled.fallbacks == Fallbacks()
    runtime.close(1)
