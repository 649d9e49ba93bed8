"""`POST /stream`: a request answered as server-sent events.

The events are `queued`, one `step` for each denoising step, then `image` or `error`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response, StreamingResponse

from serve.engine.call import Call
from serve.engine.images import data_uri, encode_image
from serve.engine.runtime import Runtime
from serve.errors import GenerationFailed, RequestError
from serve.http.error_responses import error_body
from serve.http.responses import response_body
from serve.http.service import received_call
from serve.schema import TextToImageRequest, TextToImageResponse

logger = logging.getLogger(__name__)

KEEPALIVE_SECONDS = 15.0
"""A stream without events sends a comment this often. Proxies close a silent one after a minute."""


MAX_WAITING_PREVIEWS = 8
"""Previews kept for a client that reads slowly. It gets the further steps without one."""


async def text_to_image_stream(runtime: Runtime, request: TextToImageRequest) -> Response:
    """The handler of `POST /stream`.

    A request that fails before it is queued gets an ordinary error response with its status. After
    the first event the status is sent, so a later failure is the stream's last event.
    """
    call = received_call(runtime, request)
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def on_queued(waiting: int) -> None:
        events.put_nowait(("queued", {"waiting": waiting, "trace_id": call.identity.trace_id_hex}))

    def on_step(index: int, gpu_ms: float, preview: Any) -> None:  # on the GPU thread
        if events.qsize() >= MAX_WAITING_PREVIEWS:
            preview = None
        loop.call_soon_threadsafe(events.put_nowait, ("step", (index, gpu_ms, preview)))

    generation = asyncio.create_task(runtime.generate(request, call, on_queued, on_step))
    call.work = generation
    first = asyncio.create_task(events.get())
    await asyncio.wait({generation, first}, return_when=asyncio.FIRST_COMPLETED)
    if not first.done():
        first.cancel()
        await generation  # raises the error that ended it before it was queued
    return StreamingResponse(
        _events(call, generation, events, first.result()),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _events(
    call: Call,
    generation: asyncio.Task[TextToImageResponse],
    events: asyncio.Queue[tuple[str, Any]],
    first: tuple[str, Any],
) -> AsyncIterator[str | bytes]:
    yield _event(*first)
    generation.add_done_callback(lambda _: events.put_nowait(("done", None)))
    while True:
        try:
            async with asyncio.timeout(KEEPALIVE_SECONDS):
                name, payload = await events.get()
        except TimeoutError:
            yield ": waiting\n\n"
            continue
        if name == "done":
            break
        yield _event(name, await _step_data(call, *payload))
    try:
        response = generation.result()
    except RequestError as error:
        call.fail(error)
        yield _event("error", error_body(error, call))
    except Exception as error:  # noqa: BLE001 - the status is sent: the last event reports it
        failure = GenerationFailed(type(error).__name__)
        call.fail(failure)
        logger.error("a streamed request failed with %s", type(error).__name__)
        yield _event("error", error_body(failure, call))
    else:
        call.timeline.begin("respond")
        yield b"event: image\ndata: " + response_body(response) + b"\n\n"


async def _step_data(call: Call, index: int, gpu_ms: float, preview: Any) -> dict[str, Any]:
    assert call.facts is not None  # set before the first step
    data: dict[str, Any] = {
        "index": index,
        "total": call.facts.num_inference_steps,
        "gpu_ms": gpu_ms,
    }
    if preview is not None:
        jpeg = await asyncio.to_thread(encode_image, preview, "jpeg")
        data["preview"] = data_uri(jpeg, "jpeg")
    return data


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
