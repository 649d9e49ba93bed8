"""Guidance that ends within a run on a GPU, on SDXL base's architecture: the change from one
captured graph to the other waits for nothing, captures nothing and reads the right text."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

from kernels_warmup.compile import CompiledModel, compile_model  # noqa: E402
from kernels_warmup.recipes import Recipe  # noqa: E402
from kernels_warmup.shapes import CompiledShape  # noqa: E402
from serve.model.loading import load_model  # noqa: E402
from serve.model.schedulers import Schedule  # noqa: E402
from serve.model.sdxl import Conditioning, SdxlModel  # noqa: E402
from serve.settings import SchedulerName  # noqa: E402

SHAPE = CompiledShape(1024, 1024)
STEPS = 6
GUIDED = 3

CAPTURED = Recipe(scope="none", replay="captured", text_once=True, zero_text=True)


def encode(model: SdxlModel, negative: str = "", guidance_ends: bool = True) -> Conditioning:
    return model.encode_prompts(
        ["a lighthouse in a storm"], [negative], True, SHAPE, guidance_ends=guidance_ends
    )


def denoise(
    model: SdxlModel,
    conditioning: Conditioning,
    guided_steps: int | None,
    on_loop_begins: Callable[[], None] = lambda: None,
    on_step: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    return model.denoise(
        conditioning,
        shape=SHAPE,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        seeds=[3],
        on_loop_begins=on_loop_begins,
        on_step_enqueued=lambda index, _: on_step(index),
        guided_steps=guided_steps,
    )


@pytest.fixture(scope="module", params=["euler", "ddim", "lcm"])
def model(request: pytest.FixtureRequest) -> Iterator[SdxlModel]:
    name: SchedulerName = request.param
    model = load_model("random:sdxl-base", None, "cuda", "bfloat16", Schedule(name))
    yield model
    del model
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def eager(model: SdxlModel) -> dict[str, torch.Tensor]:
    """Mixed runs of the unchanged model, with and without a negative prompt."""
    return {
        negative: denoise(model, encode(model, negative), GUIDED) for negative in ("", "blurry")
    }


@pytest.fixture(scope="module")
def captured(model: SdxlModel, eager: dict[str, torch.Tensor]) -> CompiledModel:
    """Warm for runs with guidance in all steps and in none, and frozen."""
    compiled = compile_model(model.pipeline, recipe=CAPTURED)
    model.text = compiled.text
    for negative in ("", "blurry"):
        for guided_steps in (None, 0):
            denoise(model, encode(model, negative, guidance_ends=False), guided_steps)
    compiled.freeze()
    return compiled


def test_a_mixed_run_of_captured_graphs_is_the_eager_one(
    model: SdxlModel, eager: dict[str, torch.Tensor], captured: CompiledModel
) -> None:
    for negative, expected in eager.items():
        result = denoise(model, encode(model, negative), GUIDED)
        whole = denoise(model, encode(model, negative), None)
        error = (result - expected).float().norm() / expected.float().norm()
        other = (whole - expected).float().norm() / expected.float().norm()
        print(f"relative distance {error:.4f}; with guidance in all steps {other:.4f}")
        assert error < 0.5 * other
    assert captured.fallbacks.cold == captured.fallbacks.recompiles == 0


def test_nothing_waits_for_the_device_in_the_loop(
    model: SdxlModel, captured: CompiledModel
) -> None:
    """PyTorch raises at every synchronising call from the loop's begin to its last step."""
    conditioning = encode(model)
    denoise(model, conditioning, GUIDED)
    torch.cuda.synchronize()

    def stepped(index: int) -> None:
        if index == STEPS - 1:
            torch.cuda.set_sync_debug_mode("default")

    try:
        denoise(
            model,
            conditioning,
            GUIDED,
            on_loop_begins=lambda: torch.cuda.set_sync_debug_mode("error"),
            on_step=stepped,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert captured.fallbacks.cold == captured.fallbacks.recompiles == 0


def test_a_step_without_guidance_takes_about_half_the_time(
    model: SdxlModel, captured: CompiledModel
) -> None:
    event: Any = torch.cuda.Event
    marks = [event(enable_timing=True) for _ in range(STEPS + 1)]
    denoise(
        model,
        encode(model),
        GUIDED,
        on_loop_begins=marks[0].record,
        on_step=lambda index: marks[index + 1].record(),
    )
    torch.cuda.synchronize()
    took = [one.elapsed_time(other) for one, other in pairwise(marks)]
    guided, unguided = min(took[:GUIDED]), min(took[GUIDED:])
    print(f"{guided:.1f} ms and {unguided:.1f} ms")
    assert 0.35 * guided < unguided < 0.7 * guided
