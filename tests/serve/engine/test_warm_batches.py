"""Which numbers of images a run may have, and that none of them compiles while requests are served.

torch.compile makes graphs here, and no code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from kernels_warmup.cuda_graphs import Fallbacks
from kernels_warmup.shapes import CompiledShape
from kernels_warmup.warmup import RunKind, compiler_counts
from serve.engine.call import Call
from serve.engine.runtime import Runtime
from serve.schema import TextToImageResponse
from tests.serve.conftest import request
from tests.serve.engine import demo_runtime
from tests.serve.engine.demo_runtime import new_call

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own insides


def build(**changes: Any) -> Runtime:
    return demo_runtime.build(**{"compile": "auto", "shapes": (CompiledShape(64, 64),)} | changes)


def generate(runtime: Runtime, **fields: Any) -> tuple[Call, TextToImageResponse]:
    call = new_call(runtime)
    return call, asyncio.run(runtime.generate(request(**fields), call))


def sizes(runtime: Runtime) -> object:
    return runtime.readiness.as_json()["batch_sizes"]


@pytest.fixture(scope="module")
def compiled(traced: None) -> Iterator[Runtime]:
    """The compiled demo at one size, warm for up to four images."""
    runtime = build(compile="default", max_batch=4)
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


def test_a_compiled_model_is_warmed_for_powers_of_two(compiled: Runtime) -> None:
    assert sizes(compiled) == {"64x64": (1, 2, 4)}
    # Of the UNet one for 1, 2, 4 and 8 latents, of the decoder one for 1, 2 and 4.
    assert compiled.readiness.as_json()["compile"]["graphs"] == 7


@pytest.mark.parametrize(("images", "runs"), [(1, [1]), (2, [2]), (3, [2, 1]), (4, [4])])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_no_run_compiles(compiled: Runtime, images: int, runs: list[int], scale: float) -> None:
    before = compiler_counts()
    call, answer = generate(compiled, num_images=images, guidance_scale=scale)
    assert len(answer.images) == images
    assert [run.batch_size for run in call.runs] == runs
    assert not any(run.eager_fallback for run in call.runs)
    assert compiler_counts() == before
    assert compiled.loaded.fallbacks == Fallbacks()


def test_waiting_requests_fill_the_largest_warm_run(compiled: Runtime) -> None:
    calls = [new_call(compiled) for _ in range(7)]
    wanted = [request(seed=seed, negative_prompt="blue" * (seed % 2)) for seed in range(7)]
    asyncio.run(compiled.generate_together(wanted, calls))
    assert [call.runs[0].batch_size for call in calls] == [4, 4, 4, 4, 2, 2, 1]
    assert not any(run.eager_fallback for call in calls for run in call.runs)


def test_the_batch_label_has_the_warm_sizes(compiled: Runtime) -> None:
    generate(compiled, num_images=4)
    compiled.recorder.submit(lambda: None)
    labels = {
        sample.labels["batch"]
        for family in compiled.metrics.registry.collect()
        if family.name == "sdxl_denoise_step_duration_seconds"
        for sample in family.samples
    }
    assert labels == {"1", "2", "4"}


def test_a_number_of_images_that_cannot_be_warmed_is_left_out(traced: None) -> None:
    runtime = build(compile="default", max_batch=4, guidance_scale=1.0)
    real = runtime._warm_once

    def run_once(shape: CompiledShape, kind: RunKind) -> None:
        if kind.images > 1:
            raise NotImplementedError("no kernel")
        real(shape, kind)

    runtime._warm_once = run_once  # type: ignore[method-assign]
    asyncio.run(runtime.start())
    told = runtime.readiness.as_json()
    assert told["shapes"] == ["64x64"]
    assert told["left_out"] == {}
    assert told["batch_sizes"] == {"64x64": (1,)}
    call, _ = generate(runtime, num_images=2, guidance_scale=1.0)
    assert [run.batch_size for run in call.runs] == [1, 1]
    runtime.close(1)


@pytest.mark.parametrize(
    ("changes", "largest"),
    [
        ({}, 8),
        pytest.param({"compile": "off"}, 8, marks=pytest.mark.slow),
        ({"max_batch": 3}, 3),
        pytest.param({"max_batch": 1}, 1, marks=pytest.mark.slow),
    ],
)
def test_a_model_without_graphs_runs_any_number(changes: dict[str, Any], largest: int) -> None:
    runtime = build(**changes)
    asyncio.run(runtime.start())
    assert sizes(runtime) == {"64x64": tuple(range(1, largest + 1))}
    runtime.close(1)
