"""What the middleware does around a request: its ids and trace, its body, a client that leaves."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from metrics.records import RequestTiming
from metrics.sampling import TraceIdentity, TraceSampling
from metrics.timeline import RequestTimeline
from serve.engine.call import Call
from serve.engine.gpu_run import GeneratedPixels
from serve.engine.runtime import ENDPOINTS, Runtime
from serve.engine.waiting.request_queue import QueuedRequest
from serve.http.middleware import RequestMiddleware
from serve.http.request_body import MAX_BODY_BYTES
from serve.settings import ServeSettings
from tests.support.app_client import (
    PROMPT,
    call_app,
    call_until,
    client,
    events,
    fetch,
    post,
    valid,
)


def test_an_ended_request_is_freed_without_garbage_collection(app: FastAPI) -> None:
    """In a cycle its images would stay until a full collection, thousands of requests later."""

    async def requests() -> None:
        async with client(app) as http:
            for path in ("/", "/stream", "/v1/images/generations"):
                answer = await http.post(path, json={"prompt": PROMPT, "num_inference_steps": 2})
                assert answer.status_code == 200
            answer = await http.post("/", json=valid(deadline_seconds=1e-3))
            assert answer.status_code == 504

    async def leave_soon() -> None:
        await asyncio.sleep(0.1)

    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        asyncio.run(requests())
        for path in ("/", "/stream"):
            call_until(app, path, leave_soon)
        gc.collect()
        kept = {type(each) for each in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    of_requests = {Call, QueuedRequest, GeneratedPixels, RequestTimeline}
    assert kept.isdisjoint(of_requests | {asyncio.CancelledError})


@pytest.mark.parametrize(
    ("header", "taken"),
    [("b1946ac9-2492-4d23-8f2b-7f1c7d6c2c11", True), ("short", True), ("a b\tsecret c", False)],
)
def test_fals_request_id_is_taken_over(
    app: FastAPI, caplog: pytest.LogCaptureFixture, header: str, taken: bool
) -> None:
    caplog.set_level("INFO", "serve.http.middleware")
    post(app, valid(num_inference_steps=1), **{"x-fal-request-id": header})
    [line] = [r for r in caplog.records if r.name == "serve.http.middleware"]
    assert (line.__dict__["request_id"] == header) is taken


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODY_PARENT = PARENT.replace("0af7", "beef")


@pytest.mark.parametrize(
    ("body", "header", "expected"),
    [
        ({}, PARENT, PARENT[3:35]),
        ({"trace_context": {"traceparent": BODY_PARENT}}, "", BODY_PARENT[3:35]),
        ({"trace_context": {"traceparent": BODY_PARENT}}, PARENT, BODY_PARENT[3:35]),
        ({"trace_context": {"traceparent": "nonsense"}}, PARENT, PARENT[3:35]),
        ({"trace_context": 7}, PARENT, PARENT[3:35]),
        ({"trace_context": {"traceparent": PARENT.replace("00-", "ff-", 1)}}, PARENT, PARENT[3:35]),
    ],
)
def test_a_callers_trace_by_header_and_by_body(
    app: FastAPI, body: dict[str, Any], header: str, expected: str
) -> None:
    response = post(app, valid(num_inference_steps=1, **body), traceparent=header)
    assert response.json()["trace_id"] == expected


@pytest.mark.parametrize(
    ("body", "accept", "status"),
    [
        ({"colour": "red"}, "", 422),
        ({"prompt": 7}, "", 422),
        ({"width": 72, "height": 72}, "", 422),
        ({"format": "png"}, "image/jpeg", 406),
    ],
)
def test_a_refused_request_is_in_its_callers_trace_and_has_its_name(
    app: FastAPI, body: dict[str, Any], accept: str, status: int
) -> None:
    named = {"trace_context": {"traceparent": BODY_PARENT}, "request_id": "theirs"}
    response = post(app, valid() | body | named, traceparent=PARENT, accept=accept)
    assert response.status_code == status
    assert response.headers["x-trace-id"] == BODY_PARENT[3:35]
    assert response.headers["x-request-id"] == "theirs"


@pytest.mark.parametrize(
    ("body", "header", "linked"),
    [
        ({}, PARENT, PARENT[3:35]),
        ({"trace_context": {"traceparent": BODY_PARENT}}, PARENT, BODY_PARENT[3:35]),
    ],
)
def test_a_caller_that_is_not_trusted_is_linked_to(
    app: FastAPI,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    body: dict[str, Any],
    header: str,
    linked: str,
) -> None:
    identities: list[TraceIdentity] = []
    monkeypatch.setattr(runtime.tracing, "_sampling", TraceSampling(trust_parent=False))
    monkeypatch.setattr(
        runtime.recorder, "record", lambda timing, identity: identities.append(identity)
    )
    response = post(app, valid(num_inference_steps=1, **body), traceparent=header)
    [identity] = identities
    assert response.json()["trace_id"] == identity.trace_id_hex != linked
    assert identity.parent is None
    assert identity.caller is not None
    assert format(identity.caller.trace_id, "032x") == linked


@pytest.mark.parametrize("exported", [True, False])
def test_the_log_line_links_to_a_trace_that_is_exported(
    app: FastAPI,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    exported: bool,
) -> None:
    url = "https://traces.example.com/{trace_id}?view=tree"
    monkeypatch.setattr(runtime, "settings", ServeSettings(device="cpu", trace_url=url))
    identity = TraceIdentity(trace_id=0xABC, span_id=1, exported=exported)
    monkeypatch.setattr(runtime.tracing, "identify", lambda *_: identity)
    caplog.set_level("INFO")
    post(app, valid(num_inference_steps=1))
    [line] = [r for r in caplog.records if r.name == "serve.http.middleware"]
    link = f"https://traces.example.com/{identity.trace_id_hex}?view=tree"
    assert line.__dict__.get("trace_url") == (link if exported else None)


@pytest.mark.parametrize("header", ["nonsense", "00-0-0-0", "é", "00-" + "0" * 32 + "-" + "0" * 16])
def test_a_malformed_traceparent_is_ignored(app: FastAPI, header: str) -> None:
    response = fetch(
        app,
        "POST",
        "/",
        json=valid(num_inference_steps=1),
        headers={"traceparent": header.encode()},
    )
    assert response.status_code == 200


def test_a_body_that_is_too_large(app: FastAPI) -> None:
    response = post(app, b'{"prompt": "' + b"x" * 10_000_000 + b'"}')
    assert response.status_code == 413
    assert str(MAX_BODY_BYTES) in response.json()["detail"]
    assert len(response.content) < 300


def test_a_body_that_never_ends(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http.request_body.MAX_BODY_SECONDS", 0.1)

    async def stalls() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        await asyncio.sleep(60)

    response = fetch(app, "POST", "/", content=stalls())
    assert response.status_code == 408
    assert response.json()["error_type"] == "body_too_slow"


@pytest.mark.parametrize("path", ["/", "/stream"])
def test_a_client_that_leaves_stops_the_work(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    registry = runtime.metrics.registry
    labels = {"error_type": "client_gone"}

    async def leave_soon() -> None:
        await asyncio.sleep(0.3)

    timings: list[RequestTiming] = []
    real = runtime.recorder.record

    def record(timing: RequestTiming, identity: TraceIdentity) -> None:
        timings.append(timing)
        real(timing, identity)

    monkeypatch.setattr(runtime.recorder, "record", record)
    before = registry.get_sample_value("sdxl_errors_total", labels) or 0
    call_until(app, path, leave_soon)
    # The trace has the steps that ran, and those were not all.
    [timing] = timings
    assert timing.outcome == "cancelled"
    assert timing.run is not None
    assert 0 < len(timing.run.steps) < 100
    # Observed on another thread, after the response, which had no reader.
    runtime.recorder._executor.submit(lambda: None).result(10)
    assert registry.get_sample_value("sdxl_errors_total", labels) == before + 1
    assert registry.get_sample_value("sdxl_requests_in_flight") == 0
    assert post(app, valid()).status_code == 200


@pytest.mark.parametrize("path", ["/", "/stream"])
def test_a_deadline_that_is_due_with_the_end_of_the_run_changes_nothing(
    app: FastAPI,
    runtime: Runtime,
    recorded: list[RequestTiming],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    """The event loop finds both due in one turn."""
    deadline_seconds = 2.0
    decode = runtime.loaded.model.decode

    async def once() -> httpx.Response:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + deadline_seconds
        held = threading.Event()

        def hold() -> None:
            held.set()
            runtime._gpu.submit(lambda: None).result(10)  # behind the run
            time.sleep(max(0.0, deadline + 0.5 - loop.time()))

        def decode_while_the_loop_is_held(latents: Any) -> Any:
            loop.call_soon_threadsafe(hold)
            assert held.wait(10)
            return decode(latents)

        monkeypatch.setattr(runtime.loaded.model, "decode", decode_while_the_loop_is_held)
        async with client(app) as http:
            body = valid(deadline_seconds=deadline_seconds)
            return await http.post(path, json=body)

    answer = asyncio.run(once())
    assert answer.status_code == 200
    if path == "/stream":
        assert events(answer.text)[-1][0] == "image"
    (timing,) = recorded
    assert timing.end_ns - timing.start_ns > deadline_seconds * 1e9
    assert (timing.status_code, timing.outcome, timing.failure) == (200, "ok", None)


def test_a_request_that_the_server_gives_up_at_its_end_is_draining(
    runtime: Runtime, recorded: list[RequestTiming], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that hangs does not stop within two steps."""
    monkeypatch.setattr(runtime.readiness, "draining", True)

    async def hangs(_scope: Any, _receive: Any, _send: Any) -> None:
        await asyncio.sleep(60)

    sent: list[Any] = []

    async def story() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        middleware = RequestMiddleware(hangs, lambda: runtime, ENDPOINTS)
        task = asyncio.create_task(call_app(middleware, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        task.cancel()
        await task

    asyncio.run(story())
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error_type"] == "draining"
    [timing] = recorded
    assert timing.status_code == 503
    assert timing.failure is not None
    assert timing.failure.error_type == "draining"
