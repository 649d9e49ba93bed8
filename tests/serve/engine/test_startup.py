"""From an empty process to a warm one: what is warmed, what is left out, and the guard afterwards.

The compiler here is dynamo with its eager backend: tracing, guards and recompiles are the real
ones, and no code is generated, which takes minutes (`make test-slow` has that).
"""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client import CollectorRegistry

from kernels_warmup.compile import CompiledModel, compile_model
from kernels_warmup.cuda_graphs import Fallbacks, PerShape
from kernels_warmup.recipes import RECIPES, Recipe
from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import UNGUIDED, RunKind, compiler_counts
from metrics.slow_reason import slow_reason
from serve.demo_model import checkpoint_path
from serve.engine.call import Call
from serve.engine.gpu_run import RunPart
from serve.engine.readiness import State
from serve.engine.runtime import Runtime, build_runtime
from serve.errors import InvalidRequest, ModelError
from serve.schema import TextToImageResponse
from serve.settings import ServeSettings
from tests.serve.conftest import request

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own insides


def settings(**changes: Any) -> ServeSettings:
    return ServeSettings(**({"model": "demo", "device": "cpu", "compile": "off"} | changes))


def build(**changes: Any) -> Runtime:
    return build_runtime(settings(**changes), CollectorRegistry())


def new_call(runtime: Runtime) -> Call:
    return Call("/", "POST", runtime.tracing.identify())


def generate(runtime: Runtime, call: Call | None = None, **fields: Any) -> TextToImageResponse:
    return asyncio.run(runtime.generate(request(**fields), call or new_call(runtime)))


def counted(runtime: Runtime, name: str, **labels: str) -> float:
    value = runtime.metrics.registry.get_sample_value(name, labels)
    return 0.0 if value is None else value


def pixels(response: TextToImageResponse) -> np.ndarray:
    data = base64.b64decode(response.image.url.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def traced() -> Iterator[None]:
    """torch.compile without code generation."""
    real = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch,
            "compile",
            lambda function, **_: real(function, backend="eager", fullgraph=True, dynamic=False),
        )
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def compiled(traced: None) -> Iterator[Runtime]:
    """The demo at both its sizes, warm."""
    runtime = build(compile="default")
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


def unmeasured(model: Any) -> CompiledModel:
    """The demo compiled as by default, with every rewrite that needs no GPU."""
    recipe = replace(
        RECIPES["default"], group_norm=True, upsample="phases", zero_text=True, time_once=True
    )
    return compile_model(model.pipeline, "default", recipe=recipe)


@pytest.fixture(scope="module")
def rewritten(traced: None) -> Iterator[Runtime]:
    """The demo at one size with every rewrite, warm."""
    runtime = build_runtime(
        settings(shapes=(CompiledShape(128, 128),)), CollectorRegistry(), prepare=unmeasured
    )
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


FIELDS: dict[str, tuple[Any, ...]] = {
    "num_inference_steps": (1, 2, 3, 7),
    "guidance_scale": (0, 1.0, 1.5, 7.25, None),
    "prompt": ("a red circle", "a " * 150, "赤い丸"),
    "negative_prompt": ("", "blue"),
    "seed": (0, 1, 2**63 - 1),
    "format": ("jpeg", "png", "webp"),
    "size": ((128, 128), (160, 96)),
}


def mixed_requests(count: int) -> list[dict[str, Any]]:
    """Every value of every field, against values of the others that keep changing."""
    sources = {name: itertools.cycle(values) for name, values in FIELDS.items()}
    made = []
    for index in range(count):
        fields = {name: next(source) for name, source in sources.items()}
        if index % 7 == 0:  # the fields' periods share factors; this takes them out of step
            next(sources["size"])
            next(sources["guidance_scale"])
        fields["width"], fields["height"] = fields.pop("size")
        made.append(fields)
    return made


def test_the_mix_has_every_pair_of_size_and_guidance() -> None:
    mixed = mixed_requests(50)
    for name, values in FIELDS.items():
        if name != "size":
            assert {fields[name] for fields in mixed} == set(values)
    pairs = {(fields["width"], fields["guidance_scale"]) for fields in mixed}
    assert len(pairs) == len(FIELDS["size"]) * len(FIELDS["guidance_scale"])


def test_nothing_compiles_in_fifty_mixed_requests(compiled: Runtime) -> None:
    before = compiler_counts()
    for fields in mixed_requests(50):
        call = new_call(compiled)
        generate(compiled, call, **fields)
        assert call.run is not None
        assert not call.run.eager_fallback
    assert compiler_counts() == before
    assert counted(compiled, "sdxl_recompiles_total") == 0
    assert counted(compiled, "sdxl_cold_shape_runs_total") == 0


def test_nothing_compiles_where_runs_without_negative_have_a_graph(rewritten: Runtime) -> None:
    compiled = rewritten.loaded.compiled
    assert compiled is not None
    full, short, decode = compiled.functions
    # With guidance and without by the full one, with guidance away from nothing by the other.
    assert [len(function.met) for function in (full, short, decode)] == [2, 1, 1]
    assert rewritten.readiness.as_json()["compile"]["graphs"] == 4
    before = compiler_counts()
    served: list[PerShape] = []
    with pytest.MonkeyPatch.context() as patch:
        real = PerShape.__call__
        patch.setattr(
            PerShape, "__call__", lambda self, *given: (served.append(self), real(self, *given))[1]
        )
        for fields in mixed_requests(50):
            call = new_call(rewritten)
            generate(rewritten, call, **fields | {"width": 128, "height": 128})
            assert call.run is not None
            assert not call.run.eager_fallback
    assert compiler_counts() == before
    assert counted(rewritten, "sdxl_recompiles_total") == 0
    assert served.count(decode) == 50
    assert served.count(short) > 20
    assert served.count(full) > 20


def test_a_graph_of_its_own_draws_the_same_picture(rewritten: Runtime, compiled: Runtime) -> None:
    for negative_prompt in ("", " ", "blue"):
        ours, theirs = (
            pixels(generate(runtime, negative_prompt=negative_prompt, format="png"))
            for runtime in (rewritten, compiled)
        )
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2


@pytest.mark.parametrize(("negatives", "short"), [(("", " "), True), (("", "blue"), False)])
def test_images_of_one_run_share_what_their_negatives_allow(
    rewritten: Runtime, negatives: tuple[str, ...], short: bool
) -> None:
    """Served eagerly, for no run of two was warmed; what counts is which function it was."""
    assert rewritten.loaded.compiled is not None
    full, without_negative, _ = rewritten.loaded.compiled.functions
    before = (full.fallbacks.cold, without_negative.fallbacks.cold)
    wanted = [request(negative_prompt=n, num_inference_steps=2, seed=3) for n in negatives]
    calls = [new_call(rewritten) for _ in wanted]
    parts = [RunPart(rewritten._plan(*each), each[1]) for each in zip(wanted, calls, strict=True)]
    rewritten._gpu.submit(lambda: rewritten._execute(parts, "r")).result(60)
    after = (full.fallbacks.cold, without_negative.fallbacks.cold)
    assert (after[0] - before[0], after[1] - before[1]) == ((0, 2) if short else (2, 0))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_compiles_in_five_hundred_mixed_requests_of_generated_code() -> None:
    torch.compiler.reset()
    runtime = build(compile="default")
    asyncio.run(runtime.start())
    before = compiler_counts()
    assert before.graphs >= 6
    for fields in mixed_requests(500):
        call = new_call(runtime)
        generate(runtime, call, **fields)
        assert call.run is not None
        assert not call.run.eager_fallback
    assert compiler_counts() == before
    assert counted(runtime, "sdxl_recompiles_total") == 0
    runtime.close(1)
    torch.compiler.reset()


def test_what_the_start_did_is_told(compiled: Runtime) -> None:
    told = compiled.readiness.as_json()
    assert told["shapes"] == ["128x128", "160x96"]
    assert told["left_out"] == {}
    # One of the UNet with guidance, one without, one of the decoder, for each size.
    assert told["compile"]["graphs"] == 6
    assert told["compile"]["mode"] == "default"
    assert list(told["warmup_ms"]) == [
        "load_model",
        "prepare",
        "compile 128x128",
        "compile 160x96",
        "verify",
        "count_flops 128x128",
        "count_flops 160x96",
    ]
    assert counted(compiled, "sdxl_graph_breaks") == 0
    assert counted(compiled, "sdxl_warmup_duration_seconds", phase="compile") == pytest.approx(
        sum(ms for name, ms in told["warmup_ms"].items() if name.startswith("compile")) / 1e3
    )


def test_a_recompile_is_not_taken_but_counted(
    compiled: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Caused by the one thing a guard sees and no request can change: a weight's own layout."""
    plain = generate(compiled, format="png")
    unet = compiled.loaded.model.pipeline.unet
    weight = unet.conv_in.weight
    before = compiler_counts()
    call = new_call(compiled)
    with monkeypatch.context() as patch:
        patch.setattr(weight, "data", weight.data.contiguous().clone())
        again = generate(compiled, call, format="png")
    assert compiler_counts() == before
    assert call.run is not None
    assert call.run.eager_fallback
    assert slow_reason(call.finish(200)) == "eager_fallback"
    # Once a run, however many of its steps would have compiled.
    assert counted(compiled, "sdxl_recompiles_total") == 1
    assert caplog.text.count("not compiled again, run eagerly") == 1
    assert np.abs(pixels(again).astype(int) - pixels(plain).astype(int)).max() <= 2
    call = new_call(compiled)
    generate(compiled, call)
    assert call.run is not None
    assert not call.run.eager_fallback


def test_auto_on_a_cpu_compiles_nothing_and_has_no_fallback(tmp_path: Path) -> None:
    shape = CompiledShape(128, 128)
    auto, off = (
        build(compile=mode, shapes=(shape,), serve_cold_shapes=True, steps=4, cache_dir=tmp_path)
        for mode in ("auto", "off")
    )
    before = compiler_counts()
    for runtime in (auto, off):
        asyncio.run(runtime.start())
    assert auto.readiness.as_json()["compile"] == {
        "mode": "rewritten",
        "attention": "auto",
        "graphs": 0,
        "graphs_from_cache": 0,
    }
    assert off.readiness.as_json()["compile"]["mode"] == "off"
    assert list(tmp_path.iterdir()) == []
    requests: list[dict[str, Any]] = [
        {},
        {"negative_prompt": "blue"},
        {"guidance_scale": 1.0},
        {"width": 136, "height": 72},  # not warm
    ]
    for fields in requests:
        fields |= {"format": "png", "seed": 3}
        call = new_call(auto)
        first, again, plain = (
            generate(auto, call, **fields),
            generate(auto, **fields),
            generate(off, **fields),
        )
        assert call.run is not None
        assert not call.run.eager_fallback
        assert first.image.url == again.image.url
        assert np.abs(pixels(first).astype(int) - pixels(plain)).max() <= 2
    together = [new_call(auto) for _ in range(3)]
    asyncio.run(auto.generate_together([request(seed=seed) for seed in range(3)], together))
    assert all(call.run is not None and not call.run.eager_fallback for call in together)
    assert compiler_counts() == before
    assert counted(auto, "sdxl_cold_shape_runs_total") == 2
    assert counted(auto, "sdxl_recompiles_total") == 0
    for runtime in (auto, off):
        runtime.close(1)


def test_a_size_that_is_not_warm_is_served_where_the_operator_says_so(traced: None) -> None:
    runtime = build(
        compile="default", shapes=(CompiledShape(128, 128),), serve_cold_shapes=True, steps=1
    )
    asyncio.run(runtime.start())
    before = compiler_counts()
    call = new_call(runtime)
    response = generate(runtime, call, width=136, height=72)
    assert (response.image.width, response.image.height) == (136, 72)
    assert call.run is not None
    assert call.run.eager_fallback
    assert compiler_counts() == before
    assert counted(runtime, "sdxl_cold_shape_runs_total") == 1
    assert counted(runtime, "sdxl_recompiles_total") == 0
    for width, height in ((1024, 1024), (130, 72), (64, 32)):
        with pytest.raises(InvalidRequest, match="one of 128x128, or any of at most 16384 pixels"):
            generate(runtime, width=width, height=height)
    runtime.close(1)


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


def test_where_no_size_can_be_warmed_the_start_fails() -> None:
    runtime = build()

    def run_once(shape: CompiledShape, kind: RunKind) -> None:
        raise NotImplementedError("no kernel")

    runtime._warm_once = run_once
    with pytest.raises(NotImplementedError):
        asyncio.run(runtime.start())
    assert runtime.readiness.state is State.FAILED
    runtime.close(1)


def test_ready_early_serves_between_the_sizes() -> None:
    runtime = build(ready_early=True)
    real = runtime._warm_once
    second_may_begin = asyncio.Event()
    served_early: list[str] = []

    async def story() -> None:
        loop = asyncio.get_running_loop()

        def run_once(shape: CompiledShape, kind: RunKind) -> None:
            if shape.width == 160 and kind.guided:
                asyncio.run_coroutine_threadsafe(second_may_begin.wait(), loop).result(60)
            real(shape, kind)

        runtime._warm_once = run_once
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


def test_a_hung_run_shows_while_compiling_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_quantised_says_its_error(mode: str, layers: int) -> None:
    runtime = build(quantize="int8", compile=mode, shapes=(CompiledShape(128, 128),))
    asyncio.run(runtime.start())
    told = runtime.readiness.as_json()["compile"]
    assert told["quantize"] == "int8"
    assert told["quantized_layers"] == layers
    assert 1e-4 < told["quantization_error"] < 0.2
    generate(runtime)
    runtime.close(1)


def few_step_checkpoint(folder: Path, scheduler: str, **config: Any) -> Path:
    """The demo as checkpoints for few steps come: another scheduler's settings, no guidance."""
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
        "EulerDiscreteScheduler",  # as Lightning's
        "EulerAncestralDiscreteScheduler",  # as Turbo's: it draws noise in every step
        "LCMScheduler",
        "DDIMScheduler",  # has no set_begin_index, which tells others where the loop begins
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
    assert set(warmed) == {UNGUIDED}
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


def test_a_way_to_be_fast_can_be_handed_in() -> None:
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
    """What is captured of the text encoders is captured for a number of texts."""
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
