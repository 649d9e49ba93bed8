"""A profile of a request on a GPU, and NVTX ranges around it."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from serve.engine.build import build_runtime
from serve.engine.call import Call
from serve.engine.runtime import Runtime
from serve.schema import TextToImageRequest
from serve.settings import ServeSettings
from serve.telemetry.profiling import Profiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 3


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """The demo model with captured graphs, whose kernels must be in a profile too."""
    settings = ServeSettings(
        model="demo", device="cuda", profile_dir=tmp_path_factory.mktemp("profiles"), nvtx=True
    )
    runtime = build_runtime(settings, CollectorRegistry())
    asyncio.run(runtime.start())
    yield runtime
    runtime.close(5)


def generate(runtime: Runtime) -> Call:
    call = Call("/", "POST", runtime.tracing.identify())
    call.timeline.begin_at_arrival("receive")
    request = TextToImageRequest(prompt="a red circle", num_inference_steps=STEPS, seed=1)
    asyncio.run(runtime.generate(request, call))
    return call


def test_a_profile_holds_the_kernels_of_every_step(runtime: Runtime) -> None:
    runtime.profiling.arm(1)
    call = generate(runtime)
    assert call.run is not None
    assert call.run.profile is not None
    assert call.run.clock == "cuda"
    assert runtime.profiling.close(120)
    path: Path = runtime.settings.profile_dir / call.run.profile  # type: ignore[operator]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert len(kernels) > STEPS
    ranges = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {f"denoise_step {index}" for index in range(STEPS)} <= ranges
    assert f"denoise_step {STEPS}" not in ranges


def test_the_next_request_is_not_slowed(runtime: Runtime) -> None:
    assert generate(runtime).run.profile is None  # type: ignore[union-attr]


def test_nvtx_ranges_are_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    popped: list[None] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", pushed.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: popped.append(None))
    ranges = Profiling(None, nvtx=True).ranges(2)
    assert ranges is not None
    with ranges.stage("denoise"):
        for index in range(3):
            ranges.step_begins(index)
    assert pushed == ["denoise", "denoise_step 0", "denoise_step 1"]
    assert len(popped) == len(pushed)
