"""A request answered as server-sent events, and the events of `POST /stream`.

These are `queued`, one `step` for each denoising step, then `image` or `error`. Each event has its
name inside its data too, because fal's clients read only that. Another API has other events from
the same request; it gives an `EventFormat` of its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.engine.call import Call
from serve.engine.gpu_run import Previews
from serve.engine.images import data_uri, encode_image
from serve.engine.runtime import Runtime
from serve.errors import GenerationFailed, RequestError
from serve.http.error_responses import error_body
from serve.http.responses import response_body
from serve.http.service import received_call
from serve.schema import TextToImageRequest, TextToImageResponse

logger = logging.getLogger(__name__)

KEEPALIVE_SECONDS = 10.0
"""A stream without events sends a comment this often. fal's clients give up after 15 s, proxies
after a minute."""

KEEPALIVE = b": waiting\n\n"


_Step = tuple[int, float, Any]


class EventFormat(Protocol):
    """What a stream sends at each moment of a request. An empty result sends nothing."""

    def queued(self, waiting: int) -> bytes:
        """The request is queued; `waiting` requests are."""

    async def step(self, index: int, gpu_ms: float, preview: Any) -> bytes:
        """A step has ended. `preview` is (height, width, 3) uint8, or None."""

    def done(self, response: TextToImageResponse) -> bytes:
        """The images are there."""

    def failed(self, error: RequestError) -> bytes:
        """The request has failed."""


MAX_WAITING_PREVIEWS = 8
"""Previews kept for a client that reads slowly. It gets the further steps without one."""


async def text_to_image_stream(runtime: Runtime, request: TextToImageRequest) -> Response:
    """The handler of `POST /stream` and `POST /image-to-image/stream`."""
    call = received_call()
    return await stream(runtime, request, call, StreamEvents(call))


async def stream(
    runtime: Runtime,
    request: TextToImageRequest,
    call: Call,
    events: EventFormat,
    previews: Previews | None = None,
) -> Response:
    """Serve a request as a stream of events.

    A request that fails before it is queued gets an ordinary error response with its status. After
    that the status is sent, so a later failure is the stream's last event.

    Args:
        previews: as for `Runtime.generate`.
    """
    loop = asyncio.get_running_loop()
    queued: asyncio.Future[int] = loop.create_future()
    steps: asyncio.Queue[_Step | None] = asyncio.Queue()

    def on_step(index: int, gpu_ms: float, preview: Any) -> None:  # on the GPU thread
        if steps.qsize() >= MAX_WAITING_PREVIEWS:
            preview = None
        loop.call_soon_threadsafe(steps.put_nowait, (index, gpu_ms, preview))

    generation = asyncio.create_task(
        runtime.generate(request, call, queued.set_result, on_step, previews)
    )
    call.work = generation
    either: set[asyncio.Future[Any]] = {generation, queued}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not queued.done():
        await generation  # raises the error that ended it before it was queued

    def generated(done: asyncio.Task[TextToImageResponse]) -> None:
        if not done.cancelled():
            if (error := done.exception()) is not None:
                call.fail(_as_request_error(error))
            # Not with the last event: a client that reads slowly is still taking the steps.
            call.timeline.begin("respond")
        steps.put_nowait(None)

    generation.add_done_callback(generated)
    return _EventStream(
        _send(generation, queued.result(), steps, events),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


class _EventStream(StreamingResponse):
    """A stream that ends with its events.

    The middleware watches for a client that leaves, and cancels the request: then the events end.
    Starlette would watch too and cancel the sending task. The exception of that would be in a
    reference cycle with the whole request, which stays until a garbage collection.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stream_response(send)


def _as_request_error(error: BaseException) -> RequestError:
    return error if isinstance(error, RequestError) else GenerationFailed(type(error).__name__)


async def _send(
    generation: asyncio.Task[TextToImageResponse],
    waiting: int,
    steps: asyncio.Queue[_Step | None],
    events: EventFormat,
) -> AsyncIterator[bytes]:
    yield events.queued(waiting)
    while True:
        try:
            async with asyncio.timeout(KEEPALIVE_SECONDS):
                step = await steps.get()
        except TimeoutError:
            yield KEEPALIVE
            continue
        if step is None:
            break
        yield await events.step(*step)
    try:
        response = generation.result()
    except Exception as error:  # noqa: BLE001 - the status is sent: the last event reports it
        if not isinstance(error, RequestError):
            logger.error("a streamed request failed with %s", type(error).__name__)
        yield events.failed(_as_request_error(error))
    else:
        yield events.done(response)


class StreamEvents:
    """The events of `POST /stream`."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def queued(self, waiting: int) -> bytes:
        data: dict[str, Any] = {"waiting": waiting, "trace_id": self._call.identity.trace_id_hex}
        if self._call.estimate is not None:
            data["eta_ms"] = self._call.estimate.seconds * 1e3
        return event("queued", data)

    async def step(self, index: int, gpu_ms: float, preview: Any) -> bytes:
        data: dict[str, Any] = {"index": index, "total": self._call.total_steps, "gpu_ms": gpu_ms}
        if preview is not None:
            jpeg = await asyncio.to_thread(encode_image, preview, "jpeg")
            data["preview"] = data_uri(jpeg, "jpeg")
        return event("step", data)

    def done(self, response: TextToImageResponse) -> bytes:
        # The body is a JSON object: the type goes in front of its first field. It is ASCII, as all
        # other events are: httpx, requests and `str.splitlines` also end a line at the separators
        # of Unicode (U+0085, U+2028, U+2029), which a prompt may have.
        body = response_body(response, ascii_only=True)
        return encoded_event("image", b'{"type":"image",' + body[1:])

    def failed(self, error: RequestError) -> bytes:
        return event("error", error_body(error, self._call))


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """One server-sent event. Its name is in its data too, as `type`."""
    return encoded_event(name, json.dumps({"type": name, **data}).encode())


def encoded_event(name: str, data: bytes) -> bytes:
    """One server-sent event, of data that is JSON in ASCII already."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)
