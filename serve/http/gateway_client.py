"""What the gateway does: tidies the prompt, calls the image app, and hands its answer on.

Both apps' spans form one tree: the image app is told the identity of the gateway's call span, in
the body and as a header, and that span carries it when it is exported. Answers go through as they
are, statuses too, but for 503, which would make fal take the gateway's runner away for what ails
the image app's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import re
import unicodedata
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry
from starlette.responses import Response

from metrics.catalogue import GenerationMetrics
from metrics.records import Failure, RequestTiming
from metrics.sampling import TraceIdentity
from metrics.spans import call_node, gateway_tree
from serve import __version__
from serve.engine.call import Call
from serve.engine.readiness import Readiness, State
from serve.errors import (
    ERROR_TYPES,
    NO_RETRY,
    NOT_BILLED,
    OUTCOMES,
    REQUEST_ERRORS,
    ConfigurationError,
    DeadlineExceeded,
    Draining,
    FieldProblem,
    InvalidRequest,
    RequestError,
)
from serve.http.asgi import begin
from serve.schema import MAX_PROMPT_CHARACTERS, PromptRequest
from serve.settings import ServeSettings
from serve.telemetry.setup import build_tracing

logger = logging.getLogger(__name__)

SERVICE_NAME = "stepspan-gateway"

CONNECT_SECONDS = 10.0
"""How long a connection to the image app may take, also one that another call has to give back."""

ANSWER_SECONDS = 5.0
"""How much longer than the deadline it is told the image app has for its answer: two steps, and an
upload's worth of bytes."""

MAX_ANSWER_BYTES = 32 * 1024 * 1024
"""An inline PNG of 2048x2048 as base64 fits well within."""

MAX_CALLS = 64
"""Calls at a time. One costs a connection and little else, where images are not answered inline."""

# What of the image app's answer is for the gateway's caller, or for fal's queue before the gateway.
# Not `x-fal-stop-runner`: it is the image app's runner that is broken.
_HEADERS_HANDED_ON = ("content-type", "retry-after", "x-fal-needs-retry", "x-fal-billable-units")

_OUTCOMES_BY_TYPE = {error.error_type: error.outcome for error in REQUEST_ERRORS}

_JOINERS = "\u200c\u200d"  # Persian, Indic scripts and emoji need them


class ImageAppUnreachable(RequestError):
    status = 502
    error_type = "image_app_unreachable"

    def __init__(self) -> None:
        # Nothing has begun, so fal's queue may try again.
        super().__init__("The image app cannot be reached.", {"X-Fal-Needs-Retry": "1"})


class ImageAppFailed(RequestError):
    """What was answered is not from the image app, or not whole."""

    status = 502
    error_type = "image_app_failed"

    def __init__(self, what: str) -> None:
        super().__init__(what)


class ImageAppBusy(RequestError):
    """What stands before the image app, as fal's own gateway does, takes no more."""

    status = 429
    error_type = "image_app_busy"
    outcome = "rejected"

    def __init__(self, retry_after: str) -> None:
        headers = {"Retry-After": retry_after} if retry_after.isdigit() else {}
        super().__init__("The image app takes no more requests at the moment.", headers)


class ImageAppTimedOut(RequestError):
    """What stands before the image app waits no longer; it may be at work still."""

    status = 504
    error_type = "image_app_timed_out"
    outcome = "deadline"

    def __init__(self) -> None:
        super().__init__("The image app did not answer in time.", NO_RETRY)


GATEWAY_ERRORS = (ImageAppUnreachable, ImageAppFailed, ImageAppBusy, ImageAppTimedOut)


def tidy_prompt(text: str, limit: int = MAX_PROMPT_CHARACTERS) -> str:
    """The prompt as the image app is to see it; of a tidy one, the same.

    Composed characters (NFC), no control and formatting characters, single spaces, none at the
    ends, and no longer than `limit`, cut where a word ends if one does.
    """
    text = unicodedata.normalize("NFC", text)
    kept = (
        character
        for character in text
        if character.isspace()
        or character in _JOINERS
        or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
    )
    tidy = " ".join("".join(kept).split())
    if len(tidy) <= limit:
        return tidy
    whole_words = tidy[: limit + 1].rpartition(" ")[0]
    return whole_words or tidy[:limit]


@dataclass(frozen=True, slots=True)
class Target:
    """Where the image app is, and what it is to be told beside the request."""

    url: str = dataclasses.field(repr=False)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def named_by(cls, name: str | None, fal_key: tuple[str, str] | None, fal_host: str) -> Target:
        """The target that `SDXL_GATEWAY_TARGET` names: an address, or an app on fal.

        The key goes to fal alone, never to an address.

        Raises:
            ConfigurationError: it names none, no URL, or an app on fal without a key to call it.
        """
        if name is None:
            raise ConfigurationError(
                "SDXL_GATEWAY_TARGET is not set: the image app's address, or its OWNER/APP on fal, "
                "is needed."
            )
        if name.startswith(("http://", "https://")):
            try:
                _ = httpx.URL(name), urlsplit(name).port
            except (httpx.InvalidURL, ValueError):
                raise ConfigurationError(
                    "SDXL_GATEWAY_TARGET is no URL: http:// or https://, a host, and a port from 1 "
                    "to 65535 is allowed."
                ) from None
            return cls(name)
        if fal_key is None:
            raise ConfigurationError(
                f"SDXL_GATEWAY_TARGET={name!r} is an app on fal: FAL_KEY is needed to call it."
            )
        return cls(f"https://{fal_host}/{name}", {"Authorization": f"Key {':'.join(fal_key)}"})


@dataclass(slots=True)
class _Outgoing:
    """A call to the image app: who it is, and what its span tells."""

    identity: TraceIdentity
    attributes: dict[str, str | int | float | bool]


class Relay:
    """The gateway's one service: what `serve.http.asgi` asks of a runtime, and `relay`."""

    def __init__(
        self,
        settings: ServeSettings,
        target: Target,
        registry: CollectorRegistry,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        # A name of its own, unless the operator gives one; and no GPU, whatever the machine has.
        named = "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        name = settings.service_name or (None if named else SERVICE_NAME)
        settings = settings.model_copy(update={"service_name": name, "device": "cpu"})
        self.settings = settings
        self.metrics = GenerationMetrics(
            registry,
            endpoints=("/",),
            outcomes=OUTCOMES,
            error_types=(*ERROR_TYPES, *(error.error_type for error in GATEWAY_ERRORS)),
            build={"version": __version__},
        )
        self.tracing = build_tracing(settings, self.metrics)
        self.readiness = Readiness(state=State.READY, phase="ready")
        self._target = target
        self._ids = RandomIdGenerator()
        self._propagator = TraceContextTextMapPropagator()
        self._outgoing: dict[int, _Outgoing] = {}
        self._client = httpx.AsyncClient(
            headers=dict(target.headers),
            limits=httpx.Limits(max_connections=MAX_CALLS, max_keepalive_connections=MAX_CALLS),
            # An answer's own time is the request's deadline.
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS, pool=CONNECT_SECONDS),
            follow_redirects=False,
            transport=transport,
        )

    @property
    def healthy(self) -> bool:
        return True

    @property
    def recorder(self) -> Relay:
        return self

    async def relay(self, request: PromptRequest) -> Response:
        """One request, from validated to answered.

        Raises:
            RequestError: what the image app did not answer itself.
        """
        call = begin(self, request)
        if self.readiness.state is State.DRAINING:
            raise Draining
        outgoing = self._outgoing[call.identity.span_id] = self._outgoing_call(call.identity)
        with call.stage("tidy"):
            prompt = tidy_prompt(request.prompt)
            if not prompt:
                problem = FieldProblem(("body", "prompt"), "must not be blank", "value_error")
                raise InvalidRequest([problem])
            negative_prompt = tidy_prompt(request.negative_prompt)
        seconds = min(self.settings.deadline_seconds, request.deadline_seconds or 3600.0)
        left = seconds - call.timeline.elapsed_seconds()
        if left <= 0:
            raise DeadlineExceeded(seconds)
        context = self._context_for(call.identity, outgoing.identity)
        body = request.model_dump(exclude_unset=True, exclude={"trace_context"}) | {
            "prompt": prompt,
            "deadline_seconds": left,
        }
        if "negative_prompt" in body:
            body["negative_prompt"] = negative_prompt
        if context:
            body["trace_context"] = context
        with call.stage("call"):
            try:
                async with asyncio.timeout(left + ANSWER_SECONDS):
                    answer = await self._unless_called_off(call, self._post(body, context))
            except TimeoutError:
                raise DeadlineExceeded(seconds) from None
            outgoing.attributes["http.response.status_code"] = answer.status_code
            response = self._handed_on(answer, call)
        call.timeline.begin("respond")
        return response

    async def _unless_called_off(
        self, call: Call, asking: Coroutine[Any, Any, httpx.Response]
    ) -> httpx.Response:
        """The answer, unless the caller leaves: then the connection closes, and the image app
        stops within two steps."""
        task = asyncio.create_task(asking)
        call.cancellation.when_cancelled(task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            call.cancellation.raise_if_cancelled()
            raise
        finally:
            task.cancel()

    async def _post(self, body: Mapping[str, Any], context: Mapping[str, str]) -> httpx.Response:
        """The image app's answer, read whole. Raises `ImageAppUnreachable` or `ImageAppFailed`."""
        # The types of the errors alone: their text names the address, which may hold a password.
        try:
            async with self._client.stream(
                "POST", self._target.url, json=body, headers=dict(context)
            ) as response:
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_ANSWER_BYTES:
                        raise ImageAppFailed(
                            f"The image app's answer is larger than {MAX_ANSWER_BYTES} bytes."
                        )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            logger.warning("the image app cannot be reached: %s", type(error).__name__)
            raise ImageAppUnreachable from None
        except httpx.HTTPError as error:
            logger.warning("the image app's answer broke off: %s", type(error).__name__)
            raise ImageAppFailed("The image app's answer broke off.") from None
        headers = {
            name: response.headers[name] for name in _HEADERS_HANDED_ON if name in response.headers
        }
        return httpx.Response(response.status_code, headers=headers, content=bytes(content))

    def _handed_on(self, answer: httpx.Response, call: Call) -> Response:
        """The image app's answer as the gateway's. Raises where it is not the image app's."""
        status, headers = answer.status_code, dict(answer.headers)
        headers.pop("content-length", None)
        if status == 200:
            if not headers.get("content-type", "").startswith("application/json"):
                raise ImageAppFailed("The image app's address answered something that is no JSON.")
            return Response(answer.content, headers=headers)
        error_type = _error_type(answer)
        if error_type is None:
            raise _explained(answer)
        call.outcome = _OUTCOMES_BY_TYPE.get(error_type, "error")
        call.failure = Failure(
            error_type=error_type,
            exception_type="ImageApp",
            message=f"the image app answered {status}, {error_type}",
            at_ns=call.timeline.now_unix_ns(),
            server_fault=status >= 500,
        )
        if status == 503:
            # Here it would take this runner away. The request has not begun and may elsewhere.
            status = 502
            headers.setdefault("x-fal-needs-retry", "1")
        return Response(answer.content, status, {**NOT_BILLED, **headers})

    # One tree

    def _outgoing_call(self, identity: TraceIdentity) -> _Outgoing:
        root = SpanContext(
            identity.trace_id,
            identity.span_id,
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
            trace_state=identity.parent.trace_state if identity.parent else None,
        )
        address = urlsplit(self._target.url)
        attributes: dict[str, str | int | float | bool] = {
            "http.request.method": "POST",
            "server.address": address.hostname or "",
            "server.port": address.port or (443 if address.scheme == "https" else 80),
            # Without a name and a password, which an address may hold.
            "url.full": f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}",
        }
        call = dataclasses.replace(identity, span_id=self._ids.generate_span_id(), parent=root)
        return _Outgoing(call, attributes)

    def _context_for(self, identity: TraceIdentity, call: TraceIdentity) -> dict[str, str]:
        """The context that the image app is to continue.

        Where the gateway exports nothing it is no part of the trace: its caller's context goes on
        as it came.
        """
        span = identity.parent or identity.caller
        if self.tracing.exporting:
            flags = TraceFlags(TraceFlags.SAMPLED if identity.exported else TraceFlags.DEFAULT)
            state = identity.parent.trace_state if identity.parent else TraceState()
            if identity.exported and identity.probability < 1:
                state = state.delete("ot").add("ot", _threshold(identity.probability))
            span = SpanContext(call.trace_id, call.span_id, False, flags, state)
        carrier: dict[str, str] = {}
        if span is not None:
            context = set_span_in_context(NonRecordingSpan(span), Context())
            self._propagator.inject(carrier, context)
        return carrier

    def record(self, request: RequestTiming, identity: TraceIdentity) -> None:
        """Tell of a request that has ended; never raises into it."""
        outgoing = self._outgoing.pop(identity.span_id, None)
        try:
            exemplar = None
            if self._emit(request, identity, outgoing):
                exemplar = {"trace_id": identity.trace_id_hex, "span_id": identity.span_id_hex}
            # The stages of its own are on its spans; the histogram's are the image app's.
            ours = tuple(stage for stage in request.stages if stage.name in ("receive", "respond"))
            self.metrics.observe_request(dataclasses.replace(request, stages=ours), exemplar)
        except Exception:
            self.metrics.record_failed()
            logger.exception("a finished request could not be recorded")

    def _emit(
        self, request: RequestTiming, identity: TraceIdentity, outgoing: _Outgoing | None
    ) -> bool:
        """Whether the gateway's spans are on their way."""
        kept_for = self.tracing.worth_keeping(request)
        settled = self.tracing.settle(identity, worth_keeping=kept_for is not None)
        call = request.stage("call")
        own = dataclasses.replace(request, stages=tuple(s for s in request.stages if s is not call))
        queued = settled.exported and self.tracing.emit(settled, gateway_tree(own, settled.caller))
        if queued and outgoing is not None and call is not None:
            of_call, attributes = outgoing.identity, outgoing.attributes
            self.tracing.emit(
                dataclasses.replace(
                    settled, span_id=of_call.span_id, parent=of_call.parent, caller=None
                ),
                call_node(call, request.failure, attributes),
            )
        return queued

    # Ending

    def begin_drain(self) -> None:
        """Start no new call; what is under way may finish."""
        self.readiness.state = State.DRAINING
        self.readiness.phase = "draining"

    async def close(self, budget_seconds: float) -> None:
        """Export what is left, for at most `budget_seconds`."""
        self.begin_drain()
        await self._client.aclose()
        await asyncio.to_thread(self.tracing.shutdown, budget_seconds)


def _threshold(probability: float) -> str:
    """A probability of being sampled as OpenTelemetry's tracestate tells it on, so that the image
    app's spans are weighed like the gateway's: of 14 hexadecimal digits, zeros at the end left
    out."""
    return "th:" + (format(round((1 - probability) * 16**14), "014x").rstrip("0") or "0")


def _error_type(answer: httpx.Response) -> str | None:
    """The `error_type` of an answer that is the image app's own; None of any other."""
    try:
        told = json.loads(answer.content)
    except ValueError:
        return None
    error_type = told.get("error_type") if isinstance(told, dict) else None
    if answer.status_code < 400 or not isinstance(error_type, str):
        return None
    return error_type if re.fullmatch(r"[a-z_]{1,40}", error_type) else None


def _explained(answer: httpx.Response) -> RequestError:
    """What an answer means that something between here and the image app gave."""
    match answer.status_code:
        case 401 | 403:
            return ImageAppFailed("The image app's address refuses the gateway's key.")
        case 404:
            return ImageAppFailed("There is no image app at its address.")
        case 429:
            return ImageAppBusy(answer.headers.get("retry-after", ""))
        case 408 | 504:
            return ImageAppTimedOut()
        case status:
            return ImageAppFailed(f"The image app's address answered {status}.")
