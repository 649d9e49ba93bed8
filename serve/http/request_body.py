"""Reading a request's body: limited in size and in time, and by the end of the process."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import Receive

from serve.engine.readiness import Readiness
from serve.errors import BodyTooLarge, BodyTooSlow, ClientGone, Draining

# Two prompts of 2,000 characters, each escaped to twelve bytes, and a tracestate fit well within.
MAX_BODY_BYTES = 64 * 1024
MAX_BODY_SECONDS = 10.0


def check_declared_length(headers: Headers) -> None:
    """Refuse a body by its declared length, before any of it is read.

    Raises:
        BodyTooLarge: it would have more than `MAX_BODY_BYTES`.
    """
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > MAX_BODY_BYTES:
        raise BodyTooLarge(MAX_BODY_BYTES)


async def read_body(receive: Receive, readiness: Readiness) -> bytes:
    """Read the whole body.

    Raises:
        BodyTooLarge: it has more than `MAX_BODY_BYTES`.
        BodyTooSlow: it did not arrive within `MAX_BODY_SECONDS`.
        ClientGone: the client disconnected before its end.
        Draining: the process began to shut down before its end.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS) as limit:

            def stop() -> None:  # called by whoever drains, on any thread
                loop.call_soon_threadsafe(end_within, limit, 0.0)

            with readiness.when_draining(stop):
                return await _read_chunks(receive)
    except TimeoutError:
        raise Draining if readiness.draining else BodyTooSlow(MAX_BODY_SECONDS) from None


def end_within(limit: asyncio.Timeout, seconds: float) -> None:
    """Leave a timeout at most `seconds`, if its block has not ended."""
    soon = asyncio.get_running_loop().time() + seconds
    with suppress(RuntimeError):  # it has ended
        limit.reschedule(min(soon, limit.when() or soon))


async def _read_chunks(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge(MAX_BODY_BYTES)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)
