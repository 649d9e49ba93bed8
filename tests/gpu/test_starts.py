"""Starts of the service on a GPU at full size: cold, from the cache, ready early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# In a separate process, because the compiler keeps its results within one. It calls the runtime
# directly, so that it also runs on a machine without a web server's packages.
START = """
import asyncio, json, sys, time
began = time.perf_counter()
from prometheus_client import CollectorRegistry
from serve.engine.call import Call
from serve.engine.build import build_runtime
from serve.schema import TextToImageRequest
from serve.settings import ServeSettings

settings = ServeSettings.model_validate(json.loads(sys.argv[1]))
runtime = build_runtime(settings, CollectorRegistry())

async def story():
    await runtime.start()
    ready = time.perf_counter() - began
    call = Call("/", "POST", runtime.tracing.identify())
    await runtime.generate(TextToImageRequest(prompt="a circle", num_inference_steps=30), call)
    first_image = time.perf_counter() - began
    await runtime._starting
    while settings.cache_dir and "cache_store" not in runtime.readiness.compile:
        await asyncio.sleep(0.1)
    steps = sorted(step.duration_ns / 1e6 for step in call.run.steps)
    print("\\n" + json.dumps({
        "ready_s": ready, "first_image_s": first_image, "step_ms": steps[len(steps) // 2],
        "eager_fallback": call.run.eager_fallback, **runtime.readiness.as_json(),
    }))

asyncio.run(story())
runtime.close(5)
"""


def start(**settings: Any) -> dict[str, Any]:
    settings = {"model": "random:sdxl-base", "device": "cuda", "compile": "default"} | settings
    done = subprocess.run(
        [sys.executable, "-c", START, json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shown = {k: report[k] for k in ("ready_s", "first_image_s", "step_ms", "warmup_ms", "compile")}
    print(f"\n{settings['compile']}: {json.dumps(shown)}")
    return report


def compile_ms(report: dict[str, Any]) -> float:
    return sum(ms for name, ms in report["warmup_ms"].items() if name.startswith("compile"))


def test_cold_and_from_the_cache(tmp_path: Path) -> None:
    settings = {"cache_dir": str(tmp_path / "kept")}
    cold, cached = start(**settings), start(**settings)
    assert (cold["compile"]["cache"], cold["compile"]["cache_store"]) == ("miss", "stored")
    assert (cached["compile"]["cache"], cached["compile"]["cache_store"]) == ("hit", "unchanged")
    assert cached["compile"]["graphs_from_cache"] == cached["compile"]["graphs"]
    assert compile_ms(cached) <= compile_ms(cold) / 4
    assert not cold["eager_fallback"]
    assert not cached["eager_fallback"]


def test_the_first_image_comes_soon_where_blocks_are_compiled() -> None:
    report = start(compile="regional", shapes="1024x1024,1152x896", ready_early=True)
    assert report["shapes"] == ["1024x1024", "1152x896"]
    assert not report["eager_fallback"]
