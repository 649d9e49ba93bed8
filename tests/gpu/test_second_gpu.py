"""The service on a GPU that is not the first: what it captures and times is on that one."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

from kernels_warmup.shapes import CompiledShape  # noqa: E402
from serve.engine.build import build_runtime  # noqa: E402
from serve.settings import ServeSettings  # noqa: E402
from tests.serve.engine.demo_runtime import generate, new_call, pixels  # noqa: E402


def drawn_on(device: str) -> list[np.ndarray]:
    """Two prompts, by captured graphs."""
    settings = ServeSettings(
        model="demo", device=device, compile="default", shapes=(CompiledShape(128, 128),)
    )
    runtime = build_runtime(settings, CollectorRegistry())
    asyncio.run(runtime.start())
    images = []
    try:
        for prompt in ("a red circle", "a large blue square"):
            call = new_call(runtime)
            images.append(pixels(generate(runtime, call, prompt=prompt, format="png")))
            assert call.run is not None
            assert not call.run.eager_fallback
            assert all(step.duration_ns > 100_000 for step in call.run.steps)
        memory = runtime.gpu_memory
        assert memory is not None
        assert memory.allocated == torch.cuda.memory_allocated(device)
    finally:
        runtime.close(5)
    return images


def test_the_second_gpu_draws_what_the_first_draws() -> None:
    first, second = drawn_on("cuda:0"), drawn_on("cuda:1")
    for one, other in zip(first, second, strict=True):
        assert np.abs(one.astype(int) - other).mean() < 1
    assert np.abs(second[0].astype(int) - second[1]).mean() > 1
