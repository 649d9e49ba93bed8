"""Whatever a client sends, its request is one printable line of the log, in both formats.

As a server's parser would never pass it on: the app is called directly, with control characters
also where HTTP has none.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.types import Message

from serve.engine.build import build_runtime
from serve.engine.call import current_call
from serve.server import create_app
from serve.settings import ServeSettings
from serve.telemetry.logs import configure_logging

pytestmark = pytest.mark.usefixtures("logging_as_it_was")

MARK = "Zq7pXw"
FORGED = (
    f'{MARK}\r\n{{"level": "error", "event": "{MARK}"}}\n\x1b[2J\x1b]0;{MARK}\x07\x00\x7f\x85\u2028'
)
KEY = "Wm4tZc8NvR2qLx6Y"
HEADERS = (
    *("x-request-id", "x-fal-request-id", "user-agent", "referer", "host", "accept", "cookie"),
    *("traceparent", "tracestate", "content-type", "content-encoding", "x-forwarded-for", "expect"),
    FORGED,
)
GOOD = {"prompt": "a circle"}
BODIES = (
    {"prompt": FORGED},
    {**GOOD, "request_id": FORGED},
    {**GOOD, "request_id": "a\n"},
    {**GOOD, FORGED: FORGED},
    {**GOOD, "loras": [{"path": FORGED, FORGED: 1}]},
    {**GOOD, "image_url": FORGED, "model": FORGED, "size": FORGED},
    {**GOOD, "trace_context": {"traceparent": FORGED, "tracestate": FORGED}},
    {
        **GOOD,
        "trace_context": {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": FORGED},
    },
)


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    settings = ServeSettings(
        model="demo",
        device="cpu",
        api_keys=f"alice={KEY}",  # type: ignore[arg-type]
        trace_url="https://traces.test/{trace_id}",
    )
    runtime = build_runtime(settings, CollectorRegistry())
    yield create_app(runtime)
    runtime.close(5)


def ask(
    app: FastAPI, method: str, path: str, query: str, headers: dict[str, str], body: Any
) -> int:
    """The status of one request, whose parts reach the app as they are."""
    raw = {"content-type": "application/json", "x-api-key": KEY} | headers
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, read = 0, False

    async def receive() -> Message:
        nonlocal read
        if read:
            await asyncio.Event().wait()  # the client stays
        read = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in raw.items()],
        "client": (FORGED, 1),
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "server": ("127.0.0.1", 80),
    }
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
    return status


def requests() -> Iterator[tuple[str, str, str, dict[str, str], Any]]:
    for path in ("/", "/stream", "/image-to-image", "/v1/images/generations"):
        yield "POST", path, FORGED, {"x-api-key": FORGED}, GOOD
        yield "POST", path, FORGED, {}, FORGED.encode()
        for body in BODIES:
            yield "POST", path, "", {}, body
    for header in HEADERS:
        yield "POST", "/", "", {header: FORGED}, GOOD
    for path in (f"/{FORGED}", f"/v1/models/{FORGED}", f"/timeline/{FORGED}", f"/{FORGED}/stream"):
        yield "GET", path, FORGED, {}, b""
    yield FORGED, "/", "", {}, b""
    yield FORGED, f"/{FORGED}", FORGED, dict.fromkeys(HEADERS, FORGED), b""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_every_request_is_one_printable_line(
    app: FastAPI, capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    configure_logging(log_format, current_call.get)
    for method, path, query, headers, body in requests():
        capsys.readouterr()
        status = ask(app, method, path, query, headers, body)
        assert 400 <= status <= 503
        written = capsys.readouterr().err
        assert written.endswith("\n")
        line = written[:-1]
        assert line.isprintable(), (method, path, headers, body)
        assert MARK not in line
        assert str(status) in line
        if log_format == "json":
            assert json.loads(line)["level"] == "info"
