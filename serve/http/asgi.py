"""What both servers put around the runtime: one middleware, the error table, the endpoints' bodies.

The self-hosted server and the fal app differ in who parses the request and who listens; from the
first byte to the last, what happens in between is here, once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import anyio
from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metrics.catalogue import GenerationMetrics, render
from metrics.records import GenerationFacts, RequestTiming
from metrics.sampling import TraceIdentity
from metrics.tracing import Tracing
from serve.engine.call import Call, current_call
from serve.engine.images import data_uri, encode_image
from serve.engine.readiness import Readiness, State
from serve.engine.runtime import ENDPOINTS, Runtime
from serve.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ClientGone,
    FieldProblem,
    GenerationFailed,
    InvalidRequest,
    RequestError,
)
from serve.schema import TextToImageRequest, TextToImageResponse
from serve.settings import ServeSettings

logger = logging.getLogger(__name__)

# Two prompts of 2,000 characters, each escaped to twelve bytes, and a tracestate fit well within.
MAX_BODY_BYTES = 64 * 1024
# A client that sends too much is heard out to here, so that it reads the answer instead of meeting
# a closed connection; past it the connection is closed.
MAX_DISCARDED_BYTES = 32 * 1024 * 1024
# How long a body may take to arrive; a connection that stalls must not outlast a shutdown.
MAX_BODY_SECONDS = 10.0

KEEPALIVE_SECONDS = 15.0
"""How often a silent stream says a comment, below the minute after which proxies cut it."""

_REQUEST_ID = re.compile(r"[0-9A-Za-z-]{8,64}")

# Kinds of problem whose message could quote the input.
_QUOTING_KINDS = {"json_invalid": "the body is not valid JSON"}


class Tells(Protocol):
    """What is told of finished requests."""

    def record(self, request: RequestTiming, identity: TraceIdentity) -> None: ...


class Service(Protocol):
    """What is served: the runtime, or the gateway's relay before it."""

    @property
    def settings(self) -> ServeSettings: ...
    @property
    def tracing(self) -> Tracing: ...
    @property
    def metrics(self) -> GenerationMetrics: ...
    @property
    def recorder(self) -> Tells: ...
    @property
    def readiness(self) -> Readiness: ...
    @property
    def healthy(self) -> bool: ...


def install(app: FastAPI, runtime: Callable[[], Service | None]) -> None:
    """Put the middleware, the error table and the GET endpoints into an app.

    Args:
        runtime: the runtime, or None while there is none yet; asked at every request.
    """
    app.add_middleware(RequestMiddleware, runtime=runtime)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_exception)

    async def health() -> Response:
        """Alive: the process answers and its device works. Warmth is `/ready`'s business."""
        current = runtime()
        healthy = current is None or current.healthy
        return JSONResponse(
            {"status": "ok" if healthy else "unhealthy"}, status_code=200 if healthy else 503
        )

    async def ready() -> Response:
        """Warm and able to serve; 503 with the start-up's progress until then."""
        current = runtime()
        if current is None:
            return JSONResponse({"state": State.STARTING.value}, status_code=503)
        ok = current.readiness.state is State.READY and current.healthy
        return JSONResponse(current.readiness.as_json(), status_code=200 if ok else 503)

    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/ready", ready, methods=["GET"])


async def metrics_endpoint(request: Request, runtime: Runtime) -> Response:
    """The registry; OpenMetrics when asked for."""
    body, content_type = await asyncio.to_thread(
        render, runtime.metrics.registry, request.headers.get("accept", "")
    )
    return Response(body, headers={"Content-Type": content_type})


async def text_to_image(runtime: Runtime, request: TextToImageRequest) -> Response:
    """The body of `POST /`."""
    call = begin(runtime, request)
    response = await runtime.generate(request, call)
    call.timeline.begin("respond")
    return _json(response)


async def text_to_image_stream(runtime: Runtime, request: TextToImageRequest) -> Response:
    """The body of `POST /stream`: the same request as server-sent events.

    What is refused before work starts is an ordinary response with its status; once the stream has
    begun, a failure is its last event.
    """
    call = begin(runtime, request)
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def on_queued(waiting: int) -> None:
        events.put_nowait(("queued", {"waiting": waiting, "trace_id": call.identity.trace_id_hex}))

    def on_step(index: int, gpu_ms: float, preview: Any) -> None:
        loop.call_soon_threadsafe(events.put_nowait, ("step", (index, gpu_ms, preview)))

    task = asyncio.create_task(runtime.generate(request, call, on_queued, on_step))
    call.work = task
    first = asyncio.create_task(events.get())
    await asyncio.wait({task, first}, return_when=asyncio.FIRST_COMPLETED)
    if not first.done():
        first.cancel()
        await task  # raises the refusal
    return StreamingResponse(
        _stream(call, task, events, first.result()),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(
    call: Call,
    task: asyncio.Task[TextToImageResponse],
    events: asyncio.Queue[tuple[str, Any]],
    first: tuple[str, Any],
) -> AsyncIterator[str | bytes]:
    yield _event(*first)
    task.add_done_callback(lambda _: events.put_nowait(("done", None)))
    while True:
        try:
            async with asyncio.timeout(KEEPALIVE_SECONDS):
                name, payload = await events.get()
        except TimeoutError:
            yield ": waiting\n\n"
            continue
        if name == "done":
            break
        index, gpu_ms, preview = payload
        assert call.facts is not None  # what has steps has been planned
        data = {"index": index, "total": call.facts.num_inference_steps, "gpu_ms": gpu_ms}
        if preview is not None:
            small = await asyncio.to_thread(encode_image, preview, "jpeg")
            data["preview"] = data_uri(small, "jpeg")
        yield _event(name, data)
    try:
        response = task.result()
    except RequestError as error:
        call.fail(error)
        yield _event("error", _error_body(error, call))
    except Exception as error:  # noqa: BLE001 - the stream has begun: its last event tells
        failure = GenerationFailed(type(error).__name__)
        call.fail(failure)
        logger.error("a streamed request failed with %s", type(error).__name__)
        yield _event("error", _error_body(failure, call))
    else:
        call.timeline.begin("respond")
        yield b"event: image\ndata: " + response_body(response) + b"\n\n"


def begin(service: Service, request: TextToImageRequest) -> Call:
    """The request is read and validated; a trace context in its body is preferred to the header."""
    call = current_call.get()
    assert call is not None  # the middleware makes one for every endpoint that generates
    if request.trace_context is not None:
        identity = service.tracing.identify(request.trace_context.carrier())
        if identity.parent is not None or identity.caller is not None:
            call.identity = identity
    call.timeline.end()
    return call


class RequestMiddleware:
    """Times a request from its first byte to its last, bounds its body, notices a client that left.

    Plain ASGI and outermost, so that what other middleware does is inside the measured time.
    """

    def __init__(self, app: ASGIApp, runtime: Callable[[], Service | None]) -> None:
        self._app = app
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        runtime = self._runtime()
        path = _path(scope) if scope["type"] == "http" else ""
        if runtime is None or path not in ENDPOINTS or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return

        headers = Headers(scope=scope)
        call = Call(
            endpoint=path,
            method=scope["method"],
            identity=runtime.tracing.identify(_carrier(headers)),
        )
        # fal's id of the request ties our lines to its own; nothing else is taken from a header.
        if _REQUEST_ID.fullmatch(fal_id := headers.get("x-fal-request-id", "")):
            call.request_id = fal_id
        call.timeline.begin_at_arrival("receive")
        runtime.metrics.request_received()
        token = current_call.set(call)
        status = 500
        started = answered = False

        async def watched_send(message: Message) -> None:
            nonlocal status, started, answered
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                # From here on a closed connection is the caller's good right. The server tells of
                # it while outer middleware may still be on its way out, as fal's is.
                answered = call.cancellation.reason is None
            if message["type"] == "http.response.start":
                started = True
                status = message["status"]
                ours = [(b"x-trace-id", call.identity.trace_id_hex.encode())]
                if runtime.settings.fal_billing and call.facts is not None and status < 400:
                    ours.append((b"x-fal-billable-units", _billable_units(call.facts)))
                message["headers"] = [*message.get("headers", []), *ours]
            await send(message)

        try:
            await self._serve(scope, receive, watched_send, call)
        except Exception as error:
            # The framework's own handler is outside of here and would not know the call.
            failure = GenerationFailed(type(error).__name__)
            call.fail(failure)
            if started:
                raise
            # Without the exception's text: a library's message may quote the prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request failed with %s\n%s", type(error).__name__, frames)
            await _error_response(failure, call)(scope, receive, watched_send)
        except asyncio.CancelledError:
            # The server gave up on the connection; so does the work.
            gone = call.cancellation.reason or ClientGone()
            call.cancellation.cancel(gone)
            call.fail(gone)
            raise
        finally:
            await _settle(call)
            current_call.reset(token)
            runtime.metrics.request_answered()
            if call.cancellation.reason is not None and status < 400 and not answered:
                call.fail(call.cancellation.reason)
            timing = call.finish(499 if call.outcome == "cancelled" else status)
            runtime.recorder.record(timing, call.identity)
            logger.info(
                "%s %s %d %s in %.1f ms",
                call.method,
                call.endpoint,
                timing.status_code,
                timing.outcome,
                timing.duration_ns / 1e6,
                extra=_told(call, runtime.settings.trace_url),
            )

    async def _serve(self, scope: Scope, receive: Receive, send: Send, call: Call) -> None:
        try:
            body = await _read_body(receive)
        except ClientGone as gone:
            call.fail(gone)
            return
        except (BodyTooLarge, BodyTooSlow) as error:
            await _error_response(error, call)(scope, receive, send)
            return

        watcher = asyncio.create_task(_watch_disconnect(receive, call))
        handed_over = False

        async def replay() -> Message:
            nonlocal handed_over
            if not handed_over:
                handed_over = True
                return {"type": "http.request", "body": body, "more_body": False}
            await watcher
            return {"type": "http.disconnect"}

        try:
            await self._app(scope, replay, send)
        finally:
            watcher.cancel()


async def _settle(call: Call) -> None:
    """Wait for what goes on beside the handler, so that a call is told of with its run.

    A stream whose client left is such a call; what was started for it stops within two steps.
    """
    if call.work is None:
        return
    if not call.work.done():
        call.cancellation.cancel(ClientGone())
        with anyio.CancelScope(shield=True):
            await asyncio.wait({call.work})
    if not call.work.cancelled():
        call.work.exception()  # told already; not asking would log it with its text


async def _read_body(receive: Receive) -> bytes:
    """The whole body. Raises `BodyTooLarge`, `BodyTooSlow` or `ClientGone`."""
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


async def _watch_disconnect(receive: Receive, call: Call) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    call.cancellation.cancel(ClientGone())


def _path(scope: Scope) -> str:
    """The path within the app: behind a proxy (fal's gateway) the scope's may hold its prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def _billable_units(facts: GenerationFacts) -> bytes:
    """Megapixels times steps: what an image's time on the GPU is about proportional to."""
    return f"{facts.width * facts.height * facts.num_inference_steps / 1e6:.6f}".encode()


def _told(call: Call, trace_url: str | None) -> dict[str, str]:
    """What the log line of a call says beside its sentence."""
    told = {"trace_id": call.identity.trace_id_hex, "request_id": call.request_id}
    if trace_url is not None and call.identity.exported:
        told["trace_url"] = trace_url.replace("{trace_id}", call.identity.trace_id_hex)
    return told


def _carrier(headers: Headers) -> Mapping[str, str]:
    return {
        "traceparent": headers.get("traceparent", ""),
        "tracestate": headers.get("tracestate", ""),
    }


def _json(response: TextToImageResponse) -> Response:
    return Response(response_body(response), media_type="application/json")


def response_body(response: TextToImageResponse) -> bytes:
    """The response as JSON.

    Not through the framework's encoder, which walks a megabyte of data URI twice. Any encoder walks
    it once, for what may need escaping; base64 has nothing of the kind and is put in as it is.
    """
    image = response.image
    if not image.url.startswith(f"data:{image.content_type};base64,"):
        return response.model_dump_json().encode()
    without = response.model_copy(update={"image": image.model_copy(update={"url": ""})})
    before, after = without.model_dump_json().encode().split(b'"url":""', 1)
    return b"".join((before, b'"url":"', image.url.encode(), b'"', after))


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = []
    for problem in error.errors():
        kind = str(problem["type"])
        problems.append(
            FieldProblem(
                location=tuple(problem["loc"]) if kind != "json_invalid" else ("body",),
                message=_QUOTING_KINDS.get(kind, _without_input(problem)),
                kind=kind,
            )
        )
    return _fail(InvalidRequest(problems))


def _without_input(problem: Mapping[str, Any]) -> str:
    """pydantic's sentence, unless it was made from the input itself."""
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem.get("input")
    if isinstance(value, str) and len(value) > 3 and value in message:
        return "is not allowed"
    return message


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own refusals; a body that is no text at all is one of them."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and current_call.get() is not None:
        return _fail(
            InvalidRequest(
                [FieldProblem(("body",), _QUOTING_KINDS["json_invalid"], "json_invalid")]
            )
        )
    return await http_exception_handler(request, error)


async def _on_request_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _fail(error)


async def _on_exception(_request: Request, error: Exception) -> Response:
    return _fail(GenerationFailed(type(error).__name__))


def _fail(error: RequestError) -> Response:
    call = current_call.get()
    if call is None:
        return PlainTextResponse(error.message, error.status)
    return _error_response(error, call)


def _error_response(error: RequestError, call: Call) -> Response:
    call.fail(error)
    call.timeline.begin("respond")
    return JSONResponse(_error_body(error, call), error.status, headers=error.headers)


def _error_body(error: RequestError, call: Call) -> dict[str, Any]:
    detail: Any = error.message
    if isinstance(error, InvalidRequest):
        detail = [
            {"loc": list(p.location), "msg": p.message, "type": p.kind} for p in error.problems
        ]
    return {
        "detail": detail,
        "error_type": error.error_type,
        "trace_id": call.identity.trace_id_hex,
    }
