"""What the pages of states cost: `GET /stats` and `GET /metrics`, for whoever asks often."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from serve.engine.build import build_runtime
from serve.engine.runtime import Runtime
from serve.http import endpoints
from serve.schema import LoraWeight, TextToImageRequest
from serve.server import create_app
from serve.settings import ServeSettings


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    runtime = build_runtime(ServeSettings(model="demo", device="cpu"), CollectorRegistry())
    yield runtime
    runtime.close(5)


def answers(runtime: Runtime, path: str, number: int) -> list[httpx.Response]:
    """Of requests that are made at the same time."""

    async def at_once() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(runtime), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await asyncio.gather(*(http.get(path) for _ in range(number)))

    return asyncio.run(at_once())


def test_one_thread_at_most_renders_metrics(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, rendering, most = threading.Lock(), 0, 0

    def render(*_: Any) -> tuple[bytes, str]:
        nonlocal rendering, most
        with lock:
            rendering += 1
            most = max(most, rendering)
        time.sleep(0.01)
        with lock:
            rendering -= 1
        return b"", "text/plain"

    monkeypatch.setattr(endpoints, "render", render)
    found = answers(runtime, "/metrics", 8)
    assert [answer.status_code for answer in found] == [200] * 8
    assert most == 1


def test_a_schema_is_derived_once(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    [first] = answers(runtime, "/stats", 1)

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError

    for model in (TextToImageRequest, LoraWeight):
        monkeypatch.setattr(model, "model_json_schema", fail)
    [second] = answers(runtime, "/stats", 1)
    assert second.json()["request"] == first.json()["request"]
    assert first.json()["request"]["guidance_scale"]["maximum"] == 20
