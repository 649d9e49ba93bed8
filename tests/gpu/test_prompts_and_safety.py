"""On a GPU: prompts of several chunks replay graphs of their own, and the safety check waits for
nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

from kernels_warmup.compile import compile_model  # noqa: E402
from kernels_warmup.recipes import Recipe  # noqa: E402
from kernels_warmup.shapes import CompiledShape  # noqa: E402
from serve.model.loading import load_model  # noqa: E402
from serve.model.safety_checker import Preprocessing, SafetyChecker  # noqa: E402
from serve.model.sdxl import SdxlModel  # noqa: E402
from tests.support.tiny_checker import SIDE, tiny_checker  # noqa: E402

SHAPE = CompiledShape(128, 128)
SHORT, LONG = "a red circle", "a red circle " * 40
CAPTURED = Recipe(scope="none", replay="captured", text_once=True, text_encoders=True)


@pytest.fixture(scope="module")
def model() -> Iterator[SdxlModel]:
    model = load_model("demo", None, "cuda", "float32")
    yield model
    del model
    gc.collect()
    torch.cuda.empty_cache()


def draw(model: SdxlModel, prompt: str, chunks: int) -> torch.Tensor:
    return model.denoise(
        model.encode_prompts([prompt], ["blue"], True, SHAPE, chunks),
        shape=SHAPE,
        num_inference_steps=3,
        guidance_scale=5.0,
        seeds=[3],
        on_loop_begins=lambda: None,
        on_step_enqueued=lambda *_: None,
    )


def test_runs_of_one_and_two_chunks_do_not_replay_each_others_graphs(model: SdxlModel) -> None:
    runs = ((SHORT, 1), (LONG, 2), (SHORT, 2), (LONG, 1))
    expected = [draw(model, *run) for run in runs]
    compiled = compile_model(model.pipeline, recipe=CAPTURED)
    model.text = compiled.text
    for chunks in (2, 1):
        draw(model, "warm-up", chunks)
    compiled.freeze()
    for _ in range(2):
        for run, latents in zip(runs, expected, strict=True):
            torch.testing.assert_close(draw(model, *run), latents, atol=0.02, rtol=0.02)
    assert compiled.fallbacks.cold == 0
    assert not torch.allclose(expected[0], expected[2], atol=0.02)
    assert not torch.allclose(expected[1], expected[3], atol=0.02)


def test_the_safety_check_waits_for_nothing_and_flags_as_on_the_cpu() -> None:
    """PyTorch raises at every synchronising call."""
    checker = tiny_checker()
    checker.concept_embeds_weights.fill_(0.1)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (8, 4, 4, 3), generator=generator, dtype=torch.uint8)
    pixels = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)
    preprocessing = Preprocessing(SIDE, SIDE)
    expected = SafetyChecker(checker, preprocessing).flagged(pixels).tolist()
    on_gpu = SafetyChecker(checker.to("cuda"), preprocessing)
    there = pixels.to("cuda")
    on_gpu.flagged(there)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flags = on_gpu.flagged(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert flags.tolist() == expected
