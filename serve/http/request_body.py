"""Reading a request's body: limited in size and in time."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from serve.errors import BodyTooLarge, BodyTooSlow, ClientGone

# Two prompts of 2,000 characters, each escaped to twelve bytes, and a tracestate fit well within.
MAX_BODY_BYTES = 64 * 1024
# Up to here a body that is too large is read and discarded, so that the client receives the 413.
# Past it the 413 is sent at once, and the client may find the connection closed instead.
MAX_DISCARDED_BYTES = 32 * 1024 * 1024
# A connection that stalls must not outlast a shutdown.
MAX_BODY_SECONDS = 10.0


async def read_body(receive: Receive) -> bytes:
    """Read the whole body.

    Raises:
        BodyTooLarge: it has more than `MAX_BODY_BYTES`.
        BodyTooSlow: it did not arrive within `MAX_BODY_SECONDS`.
        ClientGone: the client disconnected before its end.
    """
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS):
            return await _read_chunks(receive)
    except TimeoutError:
        raise BodyTooSlow(MAX_BODY_SECONDS) from None


async def _read_chunks(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
        else:
            chunks.clear()
            if size > MAX_DISCARDED_BYTES:
                raise BodyTooLarge(MAX_BODY_BYTES)
        if not message.get("more_body", False):
            if size > MAX_BODY_BYTES:
                raise BodyTooLarge(MAX_BODY_BYTES)
            return b"".join(chunks)
