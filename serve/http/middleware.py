"""The middleware around every endpoint.

For a request for an image it

- draws the trace identity, and times the request from when its head was read to its last byte;
- checks the caller's key, and reads the body within limits;
- cancels the work when the client disconnects;
- hands the finished request to the recorder, and logs one line about it.

For any other request it checks the key, and gives an error the trace id that its log line has.
"""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metrics.records import GenerationFacts
from metrics.tracing import Carrier, drawn_identity
from serve.engine.call import Call, current_call
from serve.engine.runtime import IMAGE_TO_IMAGE, IMAGE_TO_IMAGE_STREAM
from serve.errors import (
    ClientGone,
    Draining,
    GenerationFailed,
    InternalError,
    NotFound,
    QueueFull,
    RequestError,
    TooManyConnections,
    Unauthorized,
)
from serve.http.authentication import METRICS, Authentication
from serve.http.error_responses import error_response
from serve.http.request_body import (
    MAX_BODY_BYTES,
    MAX_PICTURE_BODY_BYTES,
    json_object,
    read_body,
)
from serve.http.service import Service
from serve.http.sockets.early_answers import OVER_THE_LIMIT
from serve.schema import REQUEST_ID, well_formed_context
from serve.settings import ServeSettings

logger = logging.getLogger(__name__)

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
_REQUEST_ID = re.compile(REQUEST_ID)

_WITH_PICTURES = (IMAGE_TO_IMAGE, IMAGE_TO_IMAGE_STREAM)
FOR_EVERY_CONNECTION = ("/health", "/ready", METRICS)
"""What a connection over the limit may still read, so that the process can be watched."""

PICTURES_BESIDE_WAITING = 32
"""How many requests with a picture may be in progress beside as many as may wait. Each holds its
body, up to 10 MiB, and further ones are refused before theirs is read."""


class RequestMiddleware:
    """Makes a `Call` for each request, and finishes it.

    Plain ASGI and the outermost middleware, so that the measured time includes every other one.

    Args:
        service: returns the service, or None before there is one.
        endpoints: the paths that generate. Requests to others are in no trace and no metric.
        max_body_bytes: of a request to them without a picture.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Callable[[], Service | None],
        endpoints: Collection[str],
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._app = app
        self._service = service
        self._endpoints = endpoints
        self._max_body_bytes = max_body_bytes
        self._authentication = Authentication()
        self._pictures = 0
        """Requests in progress whose body may hold a picture."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service = self._service()
        path = _path(scope)
        generates = path in self._endpoints and scope["method"] == "POST"
        call = _new_call(service, path, scope)
        token = current_call.set(call)
        try:
            if service is not None and generates:
                await self._generate(service, call, scope, receive, send)
            else:
                await self._answer(service, call, scope, receive, send)
        finally:
            current_call.reset(token)

    async def _generate(
        self, service: Service, call: Call, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Serve a request for an image, then record it."""
        response = _ResponseWatch(send, call, service.settings)
        service.metrics.request_received()
        # Left after the work has ended: a client that leaves a stream may not begin the next one
        # while the first still runs.
        with ExitStack() as places:
            try:
                places.enter_context(self._authentication.admitted(service, call, scope))
                limit_bytes = self._max_body_bytes
                if call.endpoint in _WITH_PICTURES:
                    places.enter_context(self._picture_admitted(service))
                    limit_bytes = MAX_PICTURE_BODY_BYTES
                await self._serve(scope, receive, response.send, call, service, limit_bytes)
            except RequestError as refused:
                if isinstance(refused, Unauthorized):
                    # Whoever has no key does not decide what is exported.
                    call.identity = service.tracing.identify()
                await error_response(refused, call)(scope, receive, response.send)
            except Exception as error:
                # The framework's handler for these runs outside of here, without the current call.
                failure = GenerationFailed(type(error).__name__)
                call.fail(failure)
                if response.started:
                    raise
                _log_without_text(error)
                await error_response(failure, call)(scope, receive, response.send)
            except asyncio.CancelledError:
                # The server does not wait for this request any longer: the work ends too.
                draining = service.readiness.draining
                reason = call.cancellation.reason or (Draining() if draining else ClientGone())
                call.cancellation.cancel(reason)
                call.fail(reason)
                if not draining or response.started:
                    raise
                await error_response(reason, call)(scope, receive, response.send)
            finally:
                try:
                    await _end_work(call)
                finally:
                    _finish(service, call, response)

    async def _answer(
        self, service: Service | None, call: Call, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Serve any other request. Only an error has a trace id, because only then the log has it
        too."""
        status: int | None = None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400:
                    message["headers"] = [
                        *message.get("headers", []),
                        (b"x-trace-id", call.identity.trace_id_hex.encode()),
                        (b"x-request-id", call.request_id.encode()),
                    ]
            await send(message)

        try:
            if not call.endpoint.isprintable():
                # The router's patterns also match before a final line break, so "/metrics\n" would
                # be routed as "/metrics" but not be checked as that.
                raise NotFound
            if call.endpoint not in FOR_EVERY_CONNECTION:
                _check_connection(scope)
            self._authentication.check(service, call, scope)
            await self._app(scope, receive, watched)
        except (NotFound, TooManyConnections, Unauthorized) as refused:
            await error_response(refused, call)(scope, receive, watched)
        except Exception as error:
            if status is not None:
                raise
            _log_without_text(error)
            await error_response(InternalError(type(error).__name__), call)(scope, receive, watched)
        if status is not None and status >= 400:
            # An unknown method or path is the client's text, and so it is not logged.
            route = scope.get("route")
            refused_here = status in (Unauthorized.status, TooManyConnections.status)
            unrouted = "(refused)" if refused_here else "(unknown path)"
            logger.info(
                "%s %s %d",
                call.method if call.method in _METHODS else "(other method)",
                unrouted if route is None else route.path,
                status,
                extra={"trace_id": call.identity.trace_id_hex, "request_id": call.request_id},
            )

    @contextmanager
    def _picture_admitted(self, service: Service) -> Iterator[None]:
        """Count a request with a picture until its work has ended. Raises QueueFull."""
        if self._pictures >= service.settings.max_waiting + PICTURES_BESIDE_WAITING:
            raise QueueFull(self._pictures, retry_after_seconds=1)
        self._pictures += 1
        try:
            yield
        finally:
            self._pictures -= 1

    async def _serve(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        call: Call,
        service: Service,
        limit_bytes: int,
    ) -> None:
        """Read the body, then run the app with it while watching for a disconnect."""
        headers = Headers(scope=scope)
        try:
            _check_connection(scope)
            body = await read_body(receive, headers, service.readiness, limit_bytes)
            if len(body) > MAX_BODY_BYTES:
                # It takes milliseconds.
                fields = await asyncio.to_thread(json_object, headers, body)
            else:
                fields = json_object(headers, body)
        except ClientGone as gone:
            call.fail(gone)
            return
        except RequestError as error:
            await error_response(error, call)(scope, receive, send)
            return
        _name_by_body(service, call, fields)

        disconnect = asyncio.create_task(_cancel_on_disconnect(receive, call))
        body_sent = False

        async def receive_read_body() -> Message:
            nonlocal body_sent
            if not body_sent:
                body_sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await disconnect
            return {"type": "http.disconnect"}

        try:
            await self._app(scope, receive_read_body, send)
        finally:
            disconnect.cancel()


class _ResponseWatch:
    """Passes a response on, adds our headers to it, and notes how far it has come.

    A client that does not take it in time has left, as far as the request is concerned. (Under the
    self-hosted server its connection is closed at the same time; see `connections.py`.)
    """

    def __init__(self, send: Send, call: Call, settings: ServeSettings) -> None:
        self._send = send
        self._call = call
        self._fal_billing = settings.fal_billing
        self._send_seconds = settings.send_seconds
        self._not_taken = False
        self.status = 500
        self.started = False
        self.complete = False
        """Whether the last byte was sent before the client disconnected. From then on the client
        may close the connection; the server can report that while outer middleware, as fal's, is
        still returning."""

    async def send(self, message: Message) -> None:
        call = self._call
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = call.cancellation.reason is None
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            ours = [
                (b"x-trace-id", call.identity.trace_id_hex.encode()),
                (b"x-request-id", call.request_id.encode()),
            ]
            if timing := _server_timing(call):
                ours.append((b"server-timing", timing))
            if self._fal_billing and call.facts is not None and self.status < 400:
                ours.append((b"x-fal-billable-units", _billable_units(call.facts)))
            message["headers"] = [*message.get("headers", []), *ours]
        if self._not_taken:
            return
        try:
            async with asyncio.timeout(self._send_seconds):
                await self._send(message)
        except TimeoutError:
            self._not_taken = True
            self.complete = False
            call.cancellation.cancel(ClientGone())


def _new_call(service: Service | None, path: str, scope: Scope) -> Call:
    headers = Headers(scope=scope)
    carrier = _trace_carrier(headers)
    identity = drawn_identity() if service is None else service.tracing.identify(carrier)
    call = Call(path, scope["method"], identity, headers.get("accept", ""))
    # The caller's own, or fal's, which makes our log lines searchable beside fal's.
    for name in ("x-request-id", "x-fal-request-id"):
        if _REQUEST_ID.fullmatch(request_id := headers.get(name, "")):
            call.request_id = request_id
            break
    call.timeline.begin_at_arrival("receive")
    return call


def _name_by_body(service: Service, call: Call, fields: Mapping[str, Any]) -> None:
    """Let the body name its caller's trace and the request, in place of the headers.

    Before the fields are checked, so that a request that is refused for one of them is in its
    caller's trace too.
    """
    context = well_formed_context(fields.get("trace_context"))
    if context is not None:
        identity = service.tracing.identify(context.carrier())
        if identity.parent is not None or identity.caller is not None:
            call.identity = identity
    request_id = fields.get("request_id")
    if isinstance(request_id, str) and _REQUEST_ID.fullmatch(request_id):
        call.request_id = request_id


def _check_connection(scope: Scope) -> None:
    """Refuse a request of a connection over the limit.

    Raises:
        TooManyConnections: it is one.
    """
    if OVER_THE_LIMIT in scope.get("state", {}):
        raise TooManyConnections


def _server_timing(call: Call) -> bytes:
    """The stages that have ended, as browsers show them beside a response; milliseconds."""
    timeline = call.timeline.closed_stages
    model = [stage for run in call.runs for stage in run.stages]
    stages = sorted((*timeline, *model), key=lambda stage: stage.start_ns)
    return ", ".join(f"{s.name};dur={s.duration_ns / 1e6:.2f}" for s in stages).encode()


def _log_without_text(error: Exception) -> None:
    """Log where an exception came from. Its text stays out: a library's message may quote the
    prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a request failed with %s\n%s", type(error).__name__, frames)


async def _cancel_on_disconnect(receive: Receive, call: Call) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    call.cancellation.cancel(ClientGone())


async def _end_work(call: Call) -> None:
    """Wait for the call's own task, so that the call is recorded with its run.

    A stream's generation is such a task. If the client has left it is cancelled first, and stops
    within two steps.
    """
    if call.work is None:
        return
    if not call.work.done():
        call.cancellation.cancel(ClientGone())
        with anyio.CancelScope(shield=True):
            await asyncio.wait({call.work})
    if not call.work.cancelled():
        call.work.exception()  # already handled; unless retrieved, asyncio logs it with its text
    call.work = None  # its context has the call: a cycle


def _finish(service: Service, call: Call, response: _ResponseWatch) -> None:
    """Freeze the call, record it, and log its one line."""
    service.metrics.request_answered()
    if call.cancellation.reason is not None and response.status < 400 and not response.complete:
        call.fail(call.cancellation.reason)
    timing = call.finish(499 if call.outcome == "cancelled" else response.status)
    service.recorder.record(timing, call.identity)
    logger.info(
        "%s %s %d %s in %.1f ms",
        call.method,
        call.endpoint,
        timing.status_code,
        timing.outcome + ("" if timing.failure is None else f" ({timing.failure.error_type})"),
        timing.duration_ns / 1e6,
        extra=_log_fields(call, service.settings.trace_url),
    )


def _log_fields(call: Call, trace_url: str | None) -> dict[str, str]:
    fields = {"trace_id": call.identity.trace_id_hex, "request_id": call.request_id}
    if call.api_key is not None:
        fields["api_key"] = call.api_key
    if trace_url is not None and call.identity.exported:
        fields["trace_url"] = trace_url.replace("{trace_id}", call.identity.trace_id_hex)
    return fields


def _path(scope: Scope) -> str:
    """The path within the app. Behind a proxy (fal's gateway) the scope's may include a prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def _billable_units(facts: GenerationFacts) -> bytes:
    """Megapixels times steps that run, to which an image's time on the GPU is about proportional,
    of all images."""
    pixels = facts.width * facts.height * facts.num_images
    return f"{pixels * facts.steps_to_run / 1e6:.6f}".encode()


def _trace_carrier(headers: Headers) -> Carrier:
    """The caller's trace context.

    W3C allows several `tracestate` headers, to be combined in order, but one `traceparent` only:
    combined as RFC 9110 (5.3) combines repeated headers, it is malformed, also if both are equal.
    A malformed `traceparent` starts a new trace.
    """
    traceparents = headers.getlist("traceparent")
    if len(traceparents) != 1:
        return {}
    return {"traceparent": traceparents, "tracestate": headers.getlist("tracestate")}
