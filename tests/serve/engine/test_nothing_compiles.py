"""After warm-up nothing compiles: mixed requests, cold shapes, and the guard against recompiles.

The compiler here is dynamo with its eager backend. Tracing, guards and recompiles are real, but no
code is generated, because that takes minutes (`make test-slow` has it).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from kernels_warmup.compile import CompiledModel, compile_model
from kernels_warmup.cuda_graphs import PerShape
from kernels_warmup.recipes import RECIPES
from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import compiler_counts
from metrics.slow_reason import slow_reason
from serve.engine.build import build_runtime
from serve.engine.gpu_run import RunPart
from serve.engine.planning import PlannedRequest
from serve.engine.runtime import Runtime
from serve.errors import InvalidRequest
from serve.model.loading import load_model
from serve.schema import EXAMPLE_PICTURE, ImageToImageRequest
from serve.settings.fields import parse_loras
from tests.serve.conftest import request
from tests.serve.engine.demo_runtime import build, counted, generate, new_call, pixels, settings
from tests.support import loras

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own insides

SIZES = (CompiledShape(64, 64), CompiledShape(96, 64))


@pytest.fixture(scope="module")
def compiled(traced: None) -> Iterator[Runtime]:
    """The demo at two sizes, warm. Other sizes are served too, cold."""
    runtime = build(compile="default", shapes=SIZES, serve_cold_shapes=True)
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


def unmeasured(model: Any) -> CompiledModel:
    """The demo compiled by the default recipe plus every rewrite that needs no GPU."""
    recipe = replace(
        RECIPES["default"], group_norm=True, upsample="phases", zero_text=True, time_once=True
    )
    return compile_model(model.pipeline, "default", recipe=recipe)


@pytest.fixture(scope="module")
def rewritten(traced: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """The demo at one size with every rewrite, warm; it has a LoRA of every kind of weight."""
    made = loras.as_peft(loras.make(load_model("demo", None, "cpu").pipeline))
    file = loras.save(made, tmp_path_factory.mktemp("loras") / "ink.safetensors")
    chosen = settings(shapes=(CompiledShape(64, 64),), loras=parse_loras(f"ink={file}"))
    runtime = build_runtime(chosen, CollectorRegistry(), prepare=unmeasured)
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


FIELDS: dict[str, tuple[Any, ...]] = {
    "num_inference_steps": (1, 2, 3, 7),
    "guidance_scale": (0, 1.0, 1.5, 7.25, None),
    "guidance_end": (1, 0.5, 0.9, 0, 0.8, 1.0, 0.6),
    "prompt": ("a red circle", "a " * 150, "赤い丸"),
    "negative_prompt": ("", "blue"),
    "seed": (0, 1, 2**63 - 1),
    "format": ("jpeg", "png", "webp"),
    "size": ((64, 64), (96, 64)),
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


def planned_guided_steps(fields: dict[str, Any]) -> int:
    wanted = request(**fields)
    scale = 5.0 if wanted.guidance_scale is None else wanted.guidance_scale
    steps = fields["num_inference_steps"]
    return PlannedRequest(wanted, CompiledShape(64, 64), steps, scale, 0).guided_steps


def test_the_mix_has_every_pair_of_size_and_guidance() -> None:
    mixed = mixed_requests(50)
    for name, values in FIELDS.items():
        if name != "size":
            assert {fields[name] for fields in mixed} == set(values)
    assert (
        sum(0 < planned_guided_steps(fields) < fields["num_inference_steps"] for fields in mixed)
        > 8
    )
    pairs = {(fields["width"], fields["guidance_scale"]) for fields in mixed}
    assert len(pairs) == len(FIELDS["size"]) * len(FIELDS["guidance_scale"])


def test_nothing_compiles_in_fifty_mixed_requests(compiled: Runtime) -> None:
    before = compiler_counts()
    for fields in mixed_requests(50):
        call = new_call(compiled)
        generate(compiled, call, **fields)
        assert call.run is not None
        assert not call.run.eager_fallback
    for guidance, strength in ((1.0, 0.5), (5.0, 1.0)):
        call = new_call(compiled)
        asyncio.run(
            compiled.generate(
                ImageToImageRequest(
                    prompt="a red circle",
                    num_inference_steps=2,
                    guidance_scale=guidance,
                    image_url=EXAMPLE_PICTURE,
                    strength=strength,
                ),
                call,
            )
        )
        assert call.run is not None
        assert not call.run.eager_fallback
    assert compiler_counts() == before
    assert counted(compiled, "sdxl_recompiles_total") == 0
    assert counted(compiled, "sdxl_cold_shape_runs_total") == 0


def test_nothing_compiles_where_runs_without_negative_have_a_graph(rewritten: Runtime) -> None:
    compiled = rewritten.loaded.compiled
    assert compiled is not None
    full, short, decode = compiled.functions
    # The full function serves runs with and without guidance. The short one serves guidance
    # without a negative prompt.
    assert [len(function.met) for function in (full, short, decode)] == [2, 1, 1]
    assert rewritten.readiness.as_json()["compile"]["graphs"] == 4
    before = compiler_counts()
    served: list[PerShape] = []
    with pytest.MonkeyPatch.context() as patch:
        real = PerShape.__call__

        def watched(self: PerShape, *given: Any, **options: Any) -> Any:
            served.append(self)
            return real(self, *given, **options)

        patch.setattr(PerShape, "__call__", watched)
        for fields in mixed_requests(50):
            call = new_call(rewritten)
            generate(rewritten, call, **fields | {"width": 64, "height": 64})
            assert call.run is not None
            assert not call.run.eager_fallback
    assert compiler_counts() == before
    assert counted(rewritten, "sdxl_recompiles_total") == 0
    assert served.count(decode) == 50
    assert served.count(short) > 15
    assert served.count(full) > 20


def test_nothing_compiles_for_a_lora(rewritten: Runtime) -> None:
    """The compiler's guards watch the weights; a change in place fails none of them."""
    before = compiler_counts()
    for more in ({}, {"guidance_scale": 1.0}, {"negative_prompt": "blue"}):
        fields = {"format": "png", "num_inference_steps": 2, **more}
        drawn = []
        for wanted in ([], [{"path": "ink"}], [{"path": "ink", "scale": -0.5}], []):
            call = new_call(rewritten)
            drawn.append(pixels(generate(rewritten, call, loras=wanted, **fields)))
            assert call.run is not None
            assert not call.run.eager_fallback
        assert np.array_equal(drawn[0], drawn[3])
        assert np.abs(drawn[1].astype(int) - drawn[0]).mean() > 1
        assert not np.array_equal(drawn[1], drawn[2])
    assert compiler_counts() == before
    assert counted(rewritten, "sdxl_recompiles_total") == 0


def test_the_function_for_runs_without_negative_draws_the_same_picture(
    rewritten: Runtime, compiled: Runtime
) -> None:
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
    """They run eagerly, because no run of two was warmed. The test checks which function runs."""
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
    runtime = build(compile="default", shapes=SIZES)
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


def test_readiness_and_metrics_describe_the_start(compiled: Runtime) -> None:
    ready = compiled.readiness.as_json()
    assert ready["shapes"] == ["64x64", "96x64"]
    assert ready["left_out"] == {}
    assert ready["batch_sizes"] == {"64x64": (1,), "96x64": (1,)}  # more where an operator asks
    # One of the UNet with guidance, one without, one of the decoder, for each size.
    assert ready["compile"]["graphs"] == 6
    assert ready["compile"]["mode"] == "default"
    assert list(ready["warmup_ms"]) == [
        "load_model",
        "prepare",
        "compile 64x64",
        "compile 96x64",
        "verify",
        "count_flops 64x64",
        "count_flops 96x64",
    ]
    assert counted(compiled, "sdxl_graph_breaks") == 0
    assert counted(compiled, "sdxl_warmup_duration_seconds", phase="compile") == pytest.approx(
        sum(ms for name, ms in ready["warmup_ms"].items() if name.startswith("compile")) / 1e3
    )


def test_a_recompile_is_counted_and_the_run_is_eager(
    compiled: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The cause is a change that a guard sees and no request can make: a weight's memory layout."""
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
    # Once a run, however many of its steps needed a new compile.
    assert counted(compiled, "sdxl_recompiles_total") == 1
    assert caplog.text.count("does not fit the compiled code and runs eagerly") == 1
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


def test_a_cold_size_is_served_if_the_operator_allows_it(compiled: Runtime) -> None:
    def cold_runs_and_recompiles() -> tuple[float, float]:
        names = ("sdxl_cold_shape_runs_total", "sdxl_recompiles_total")
        return counted(compiled, names[0]), counted(compiled, names[1])

    compiler, runs = compiler_counts(), cold_runs_and_recompiles()
    call = new_call(compiled)
    response = generate(compiled, call, width=136, height=72, num_inference_steps=1)
    assert (response.image.width, response.image.height) == (136, 72)
    assert call.run is not None
    assert call.run.eager_fallback
    assert compiler_counts() == compiler
    assert cold_runs_and_recompiles() == (runs[0] + 1, runs[1])
    for width, height in ((1024, 1024), (130, 72), (64, 32)):
        with pytest.raises(InvalidRequest, match="64x64, 96x64, or any of at most 16384 pixels"):
            generate(compiled, width=width, height=height)
