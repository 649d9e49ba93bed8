"""Answers that are sent before the request's body has arrived.

A 413 to a declared length, a 405, or a 503 while the process shuts down need not wait for the body.
But a server that answers and closes while the client still sends resets the connection, and the
client may never read the answer (RFC 9112, 9.6). So such an answer is sent at once and says
`Connection: close`; then the rest of the body is read and dropped for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.request_body import end_within
from serve.http.service import Service

MAX_DROPPED_BYTES = 32 * 1024 * 1024
MAX_DROPPED_SECONDS = 2.0
DRAINING_SECONDS = 0.5
"""Takes the place of `MAX_DROPPED_SECONDS` while the process shuts down."""

OVER_THE_LIMIT = "over_the_limit"
"""A key of the ASGI scope's `state`: there are too many connections, and this one may only read the
process's state."""

_CLOSE = (b"connection", b"close")


class EarlyAnswers:
    """ASGI middleware around everything that answers.

    Args:
        service: returns the service, or None before there is one.
    """

    def __init__(self, app: ASGIApp, service: Callable[[], Service | None]) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(headers := Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        body_ended = early = False
        last: Message | None = None

        async def receive_watched() -> Message:
            nonlocal body_ended
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                body_ended = True
            return message

        async def send_watched(message: Message) -> None:
            nonlocal early, last
            if message["type"] == "http.response.start":
                early = not body_ended
                if early:
                    message["headers"] = [*message.get("headers", []), _CLOSE]
            elif early and not message.get("more_body", False):
                # Ended after the body, because the server closes the connection then.
                last = {**message, "body": b""}
                message = {**message, "more_body": True}
            await send(message)

        await self._app(scope, receive_watched, send_watched)
        if last is not None:
            # A client that has asked whether to send its body does not send it now.
            asked_first = "100-continue" in headers.get("expect", "").lower()
            if not (body_ended or asked_first or OVER_THE_LIMIT in scope.get("state", {})):
                await self._drop_body(receive)
            await send(last)

    async def _drop_body(self, receive: Receive) -> None:
        service = self._service()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(MAX_DROPPED_SECONDS) as limit:

                def hurry() -> None:  # called by whoever drains, on any thread
                    loop.call_soon_threadsafe(end_within, limit, DRAINING_SECONDS)

                if service is None:
                    await _read_to_the_end(receive)
                else:
                    with service.readiness.when_draining(hurry):
                        await _read_to_the_end(receive)
        except TimeoutError:
            pass


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


async def _read_to_the_end(receive: Receive) -> None:
    dropped = 0
    while dropped < MAX_DROPPED_BYTES:
        message = await receive()
        dropped += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
