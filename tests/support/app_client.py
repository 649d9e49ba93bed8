"""Requests to an app in this process, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.types import ASGIApp

PROMPT = "a zebra that no error may mention"


@asynccontextmanager
async def client(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


def fetch(app: ASGIApp, method: str, path: str, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with client(app) as http:
            return await http.request(method, path, **options)

    return asyncio.run(once())


def post(app: ASGIApp, body: Any, path: str = "/", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return fetch(
        app, "POST", path, content=content, headers={"content-type": "application/json"} | headers
    )


def valid(**changes: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "num_inference_steps": 2, "seed": 1} | changes


def events(text: str) -> list[tuple[str, Any]]:
    """Server-sent events as (name, data)."""
    found = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def _stays() -> None:
    await asyncio.sleep(600)


async def call_app(
    app: ASGIApp,
    send: Callable[[Any], Awaitable[None]],
    *,
    path: str = "/stream",
    leaves: Callable[[], Awaitable[None]] = _stays,
    **fields: Any,
) -> None:
    """Call the app as a server would.

    Args:
        send: called with each message of the response.
        leaves: returns when the client leaves.
        fields: of the request, which has 100 steps unless they say otherwise.
    """
    content = json.dumps(valid(**{"num_inference_steps": 100} | fields)).encode()
    messages = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await leaves()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
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


def call_until(app: ASGIApp, path: str, leaves: Callable[[], Awaitable[None]]) -> None:
    """Call the app with a client that leaves when `leaves` returns. The response is dropped."""

    async def send(_message: Any) -> None: ...

    asyncio.run(call_app(app, send, path=path, leaves=leaves))
