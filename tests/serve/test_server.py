"""The self-hosted app in process: statuses, errors, events, metrics. Real processes: tests/e2e."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import resource
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from metrics.records import RequestTiming
from metrics.sampling import TraceIdentity, TraceSampling
from metrics.timeline import RequestTimeline
from serve import server
from serve.engine.call import Call, the_call
from serve.engine.gpu_run import GeneratedPixels
from serve.engine.readiness import State
from serve.engine.runtime import ENDPOINTS, Runtime
from serve.engine.waiting.estimates import EVIDENCE_RUNS
from serve.engine.waiting.request_queue import QueuedRequest
from serve.errors import ConfigurationError
from serve.http.middleware import RequestMiddleware
from serve.http.request_body import MAX_BODY_BYTES
from serve.http.server_sent_events import MAX_WAITING_PREVIEWS
from serve.http.sockets.listener import MAX_CONNECTIONS, connection_limit
from serve.server import bind, create_app
from serve.settings import ServeSettings

PROMPT = "a zebra that no error may mention"


@pytest.fixture(scope="session")
def app(runtime: Runtime) -> FastAPI:
    """The app around the shared runtime; its lifespan, which would start another, is not run."""
    return create_app(runtime)


@asynccontextmanager
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


def fetch(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with client(app) as http:
            return await http.request(method, path, **options)

    return asyncio.run(once())


def post(app: FastAPI, body: Any, path: str = "/", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return fetch(
        app, "POST", path, content=content, headers={"content-type": "application/json"} | headers
    )


def valid(**changes: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "num_inference_steps": 2, "seed": 1} | changes


def test_a_request_is_answered(app: FastAPI) -> None:
    response = post(app, valid())
    assert response.status_code == 200
    body = response.json()
    assert body["trace_id"] == response.headers["x-trace-id"]
    assert body["timings"]["receive_ms"] is not None
    assert body["prompt"] == PROMPT
    assert body["prompt_tokens"] > 2
    assert set(body) == {
        "image",
        "images",
        "seed",
        "prompt",
        "timings",
        "trace_id",
        "prompt_truncated",
        "prompt_tokens",
    }


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
            drive(app, path, leave_soon)
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


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"null", "body"),
        (b"[]", "body"),
        (b'"text"', "body"),
        (b"\xff\xfe\x00", "body"),
        (b'{"prompt": "\xff"}', "body"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b"[" * 10_000, "body"),
        ({}, "prompt"),
        (valid(prompt=""), "prompt"),
        (valid(prompt=" "), "prompt"),
        (valid(prompt=[PROMPT]), "prompt"),
        (valid(prompt=PROMPT * 200), "prompt"),
        (valid(num_inference_steps=0), "num_inference_steps"),
        (valid(num_inference_steps=10**40), "num_inference_steps"),
        (valid(guidance_scale=float("nan")), "guidance_scale"),
        (valid(guidance_scale=float("inf")), "guidance_scale"),
        (valid(guidance_scale=-1), "guidance_scale"),
        (valid(width=256), "width"),
        (valid(height=-8), "height"),
        (valid(width=10**20), "width"),
        (valid(seed=2**63), "seed"),
        (valid(format="gif"), "format"),
        (valid(typo=PROMPT), "typo"),
    ],
)
def test_bad_input_is_named_and_never_echoed(
    app: FastAPI, caplog: pytest.LogCaptureFixture, body: Any, field: str
) -> None:
    caplog.set_level("DEBUG")
    response = post(app, body)
    assert response.status_code == 422, response.text
    answer = response.json()
    assert answer["error_type"] == "invalid_request"
    assert len(answer["trace_id"]) == 32
    assert answer["detail"][0]["loc"][-1] == field
    assert "input" not in answer["detail"][0]
    assert len(response.content) < 1000
    assert "zebra" not in response.text + caplog.text


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


def test_the_longest_valid_body_fits(app: FastAPI) -> None:
    emoji = json.dumps("\N{LARGE RED CIRCLE}" * 2000)
    body = f'{{"prompt": {emoji}, "negative_prompt": {emoji}, "num_inference_steps": 1}}'
    assert len(body) < MAX_BODY_BYTES
    assert post(app, body.encode()).status_code == 200


def test_health_and_readiness(app: FastAPI, runtime: Runtime) -> None:
    assert fetch(app, "GET", "/health").json() == {"status": "ok"}
    ready = fetch(app, "GET", "/ready")
    assert ready.status_code == 200
    body = ready.json()
    assert body["state"] == "ready"
    assert body["shapes"] == ["128x128", "160x96"]
    assert {"load_model", "verify", "compile 128x128"} <= set(body["warmup_ms"])


def test_not_ready_and_unhealthy(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.readiness, "state", State.STARTING)
    assert fetch(app, "GET", "/ready").status_code == 503
    assert fetch(app, "GET", "/health").status_code == 200
    answer = post(app, valid())
    assert answer.status_code == 503
    assert answer.json()["error_type"] == "not_ready"
    assert answer.headers["retry-after"] == "5"
    monkeypatch.setattr(runtime.readiness, "state", State.FAILED)
    assert fetch(app, "GET", "/health").status_code == 503


def test_errors_carry_their_headers(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(runtime.loaded.model, "denoise", full)
    answer = post(app, valid())
    assert answer.status_code == 500
    assert answer.json()["error_type"] == "out_of_memory"
    assert answer.headers["x-fal-needs-retry"] == "0"


def test_an_unexpected_exception_is_a_500_that_names_its_type(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LookupError(PROMPT)

    monkeypatch.setattr(runtime, "_plan", broken)
    answer = post(app, valid())
    assert answer.status_code == 500
    assert answer.json()["error_type"] == "generation_failed"
    assert "LookupError" in answer.json()["detail"]
    assert "zebra" not in answer.text


def test_a_deadline_is_a_504(app: FastAPI) -> None:
    answer = post(app, valid(num_inference_steps=100, deadline_seconds=0.05))
    assert answer.status_code == 504
    assert answer.json()["error_type"] == "deadline_exceeded"
    assert answer.headers["x-fal-needs-retry"] == "0"


def test_a_deadline_that_cannot_be_met_is_a_504_at_once(app: FastAPI, runtime: Runtime) -> None:
    for seed in range(EVIDENCE_RUNS):
        post(app, valid(seed=seed))
    rejected = {"reason": "deadline_exceeded"}
    count = runtime.metrics.registry.get_sample_value
    before = count("sdxl_rejections_total", rejected) or 0
    answer = post(app, valid(num_inference_steps=100, deadline_seconds=0.05))
    assert answer.status_code == 504
    assert answer.json()["error_type"] == "deadline_exceeded"
    assert answer.json()["eta_ms"] > 50
    runtime.recorder._executor.submit(lambda: None).result(10)
    assert count("sdxl_rejections_total", rejected) == before + 1


def test_several_images(app: FastAPI) -> None:
    answer = post(app, valid(num_images=3, seed=5))
    assert answer.status_code == 200
    body = answer.json()
    assert [image["seed"] for image in body["images"]] == [5, 6, 7]
    assert body["image"] == body["images"][0]
    assert body["seed"] == 5
    assert len({image["url"] for image in body["images"]}) == 3
    for image in body["images"]:
        data = base64.b64decode(image["url"].removeprefix("data:image/jpeg;base64,"))
        assert data[:3] == b"\xff\xd8\xff"


def test_urls_that_are_not_inline_reach_the_body(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = 'https://cdn.test/"a"'
    urls = iter([odd, "data:image/jpeg;base64,AAAA"])
    monkeypatch.setattr(runtime, "_upload", lambda *_: next(urls))
    body = post(app, valid(num_images=2)).json()
    assert {image["url"] for image in body["images"]} == {odd, "data:image/jpeg;base64,AAAA"}


def test_a_full_queue_is_a_429(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.queue, "_max_waiting", -1)
    answer = post(app, valid())
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["eta_ms"] > 0
    streamed = post(app, valid(), "/stream")
    assert streamed.status_code == 429  # a refusal is a status, not an event


def events(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_stream(app: FastAPI) -> None:
    response = post(app, valid(num_inference_steps=4, preview=True), "/stream")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    received = events(response.text)
    assert [name for name, _ in received] == ["queued", *["step"] * 4, "image"]
    assert received[0][1]["eta_ms"] > 0
    assert [data["index"] for name, data in received if name == "step"] == [0, 1, 2, 3]
    for name, data in received:
        if name == "step":
            assert data["total"] == 4
            assert data["gpu_ms"] > 0
            assert data["preview"].startswith("data:image/jpeg")
    assert received[-1][1]["seed"] == 1
    direct = post(app, valid(num_inference_steps=4))
    assert received[-1][1]["image"] == direct.json()["image"]


def test_a_stream_that_fails_ends_with_an_error_event(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError(PROMPT)

    monkeypatch.setattr(runtime.loaded.model, "decode", broken)
    response = post(app, valid(), "/stream")
    assert response.status_code == 200
    name, data = events(response.text)[-1]
    assert name == "error"
    assert data["error_type"] == "generation_failed"
    assert "zebra" not in response.text


def drive(
    app: FastAPI, path: str, during: Callable[[], Coroutine[Any, Any, None]]
) -> list[dict[str, Any]]:
    """Call the app as a server would, with a client that leaves when `during` returns."""

    async def story() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        body = json.dumps(valid(num_inference_steps=100)).encode()
        first = True

        async def receive() -> dict[str, Any]:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body, "more_body": False}
            await during()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
        }
        await app(scope, receive, send)
        return sent

    return asyncio.run(story())


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
    drive(app, path, leave_soon)
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


async def call_app(
    app: FastAPI, send: Callable[[Any], Coroutine[Any, Any, None]], steps: int = 100
) -> None:
    """Call the app for a stream, as a server would whose client stays."""
    content = json.dumps(valid(num_inference_steps=steps, preview=True)).encode()
    messages = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await asyncio.sleep(600)
        return {"type": "http.disconnect"}

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/stream",
        "raw_path": b"/stream",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    await app(scope, receive, send)


@pytest.fixture
def recorded(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[RequestTiming]:
    """What was handed to the recorder."""
    timings: list[RequestTiming] = []
    monkeypatch.setattr(runtime.recorder, "record", lambda timing, _: timings.append(timing))
    return timings


def test_a_stream_that_is_not_taken_stops_its_work(
    app: FastAPI,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    recorded: list[RequestTiming],
) -> None:
    monkeypatch.setattr(runtime, "settings", ServeSettings(device="cpu", send_seconds=0.2))
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if b"event: step" in sent[-1]:
            await asyncio.sleep(60)  # as a server does whose client does not read

    asyncio.run(call_app(app, send))
    [timing] = recorded
    assert (timing.outcome, timing.status_code) == ("cancelled", 499)
    assert timing.run is not None
    assert len(timing.run.steps) < 100
    assert len(sent) == 3  # the head, `queued`, and the step that was not taken


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


def test_a_client_that_reads_slowly_gets_few_old_previews(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "settings", ServeSettings(device="cpu", send_seconds=600))
    told: list[str] = []

    async def send(message: Any) -> None:
        text = message.get("body", b"").decode()
        told.append(text)
        while len(told) == 3 and the_call().run is None:
            await asyncio.sleep(0.05)  # until the run has ended

    asyncio.run(call_app(app, send, steps=30))
    steps = [data for name, data in events("".join(told)) if name == "step"]
    assert [step["index"] for step in steps] == list(range(30))
    with_preview = [step["index"] for step in steps if "preview" in step]
    assert len(with_preview) <= MAX_WAITING_PREVIEWS + 2  # one on its way, one in a race
    assert with_preview[0] == 0


def test_the_time_of_a_client_that_reads_slowly_is_in_respond(
    app: FastAPI, recorded: list[RequestTiming]
) -> None:
    held_seconds = 0.3
    sent = 0

    async def send(_message: Any) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:  # the first step
            while the_call().timeline.stage_ms("upload") is None:
                await asyncio.sleep(0.01)
            await asyncio.sleep(held_seconds)

    asyncio.run(call_app(app, send, steps=4))
    [timing] = recorded
    upload, respond = timing.stage("upload"), timing.stage("respond")
    assert upload is not None
    assert respond is not None
    assert respond.duration_ns > held_seconds * 1e9
    assert respond.start_ns - upload.end_ns < held_seconds * 1e9 / 3


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


def test_the_number_of_connections_follows_from_the_open_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def limited_to(files: int) -> None:
        monkeypatch.setattr("resource.getrlimit", lambda _: (files, files))

    limited_to(resource.RLIM_INFINITY)
    assert connection_limit(None) == MAX_CONNECTIONS
    assert connection_limit(5000) == 5000
    limited_to(1024)
    room = connection_limit(None)
    assert 800 < room < 1000
    assert connection_limit(room) == room
    with pytest.raises(ConfigurationError, match=f"SDXL_MAX_CONNECTIONS={room + 1} .* {room} is"):
        connection_limit(room + 1)
    limited_to(64)
    with pytest.raises(ConfigurationError, match="64 files"):
        connection_limit(None)


@pytest.mark.parametrize("ignored", [True, False])
def test_sighup_is_left_alone_under_nohup(app: FastAPI, runtime: Runtime, ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with bind("127.0.0.1", 0) as listening:
            process = server._Server(uvicorn.Config(app), runtime, listening, 10)
            with process.capture_signals():
                handler = signal.getsignal(signal.SIGHUP)
        assert handler == (signal.SIG_IGN if ignored else process.handle_exit)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_metrics_in_both_formats(app: FastAPI) -> None:
    post(app, valid())
    plain = fetch(app, "GET", "/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert "sdxl_request_duration_seconds_bucket" in plain.text
    modern = fetch(
        app, "GET", "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name for family in text_string_to_metric_families(modern.text)}
    assert {"sdxl_stage_duration_seconds", "sdxl_denoise_step_duration_seconds"} <= families


def test_an_address_that_cannot_be_bound() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port}"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigurationError, match="cannot listen"):
        bind("127.0.0.1", 99_999)


def test_a_missing_model_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(ConfigurationError, match=r"torch not installed: `pip install 'stepspan\["):
        server.run(ServeSettings(), "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("address", "reached"),
    [
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("0.0.0.0", True),
        ("::", True),
        ("::ffff:0.0.0.0", True),
        ("192.0.2.7", True),
        ("fe80::1%eth0", True),
    ],
)
def test_who_reaches_an_address_is_known(
    caplog: pytest.LogCaptureFixture, address: str, reached: bool
) -> None:
    assert (server.reachable_by(address) is not None) == reached
    server.warn_if_open(ServeSettings(), address, 8080)
    assert ("SDXL_API_KEYS" in caplog.text) == reached
    caplog.clear()
    keyed = ServeSettings(api_keys="alice=Wm4tZc8NvR2qLx6Y")  # type: ignore[arg-type]
    server.warn_if_open(keyed, address, 8080)
    assert caplog.text == ""
