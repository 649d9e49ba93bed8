"""The gateway's work: tidy the prompt, call the image app, pass its response on.

A response keeps its status and body. The one exception is 503, which becomes 502: fal would take
the gateway's runner away for a fault of the image app's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import unicodedata
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import httpx
from prometheus_client import CollectorRegistry
from starlette.responses import Response

from metrics.catalogue import GenerationMetrics
from metrics.records import Failure
from metrics.sampling import TraceIdentity
from serve import __version__
from serve.engine.call import Call
from serve.engine.readiness import Readiness, State
from serve.errors import (
    ERROR_TYPES,
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
from serve.http.gateway.image_app_errors import (
    GATEWAY_ERRORS,
    ImageAppFailed,
    ImageAppUnreachable,
    error_type_of,
    explain,
)
from serve.http.gateway.trace import GatewayRecorder, propagated_context
from serve.http.service import received_call
from serve.schema import MAX_PROMPT_CHARACTERS, PromptRequest
from serve.settings import ServeSettings
from serve.telemetry.setup import build_tracing

logger = logging.getLogger(__name__)

SERVICE_NAME = "stepspan-gateway"

CONNECT_SECONDS = 10.0
"""Time limit for a connection to the image app, waiting for a free one of the pool included."""

ANSWER_SECONDS = 5.0
"""How long past the deadline the gateway waits for the image app's response: two steps and the
transfer of the image."""

MAX_ANSWER_BYTES = 32 * 1024 * 1024
"""An inline PNG of 2048x2048 as base64 fits well within."""

MAX_CALLS = 64
"""Calls at a time. One costs a connection, and little memory unless images come inline."""

# Headers of the image app's response that the gateway's caller or fal's queue needs. Not
# `x-fal-stop-runner`: the broken runner is the image app's.
_HEADERS_PASSED_ON = ("content-type", "retry-after", "x-fal-needs-retry", "x-fal-billable-units")
_HEADERS_READ = ("x-trace-id",)

_OUTCOMES_BY_TYPE = {error.error_type: error.outcome for error in REQUEST_ERRORS}

_JOINERS = "\u200c\u200d"  # Persian, Indic scripts and emoji need them


def tidy_prompt(text: str, limit: int = MAX_PROMPT_CHARACTERS) -> str:
    """Normalise a prompt: composed characters (NFC), no control or formatting characters, single
    spaces, none at the ends.

    A prompt longer than `limit` is cut at the end of a word if it has one, else at `limit`. Tidying
    a tidy prompt changes nothing.
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
class ImageAppAddress:
    """The image app's URL, and the headers that every call to it carries."""

    url: str = dataclasses.field(repr=False)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def named_by(
        cls, name: str | None, fal_key: tuple[str, str] | None, fal_host: str
    ) -> ImageAppAddress:
        """The address that `SDXL_GATEWAY_TARGET` names: a URL, or OWNER/APP on fal.

        The key is sent to fal only, never to a URL.

        Raises:
            ConfigurationError: it is not set, is not a valid URL, or is an app on fal while there
                is no key to call it with.
        """
        if name is None:
            raise ConfigurationError(
                "SDXL_GATEWAY_TARGET is not set: the image app's URL, or its OWNER/APP on fal, is "
                "needed."
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


class GatewayClient:
    """Calls the image app for each request of the gateway. A `serve.http.service.Service`."""

    def __init__(
        self,
        settings: ServeSettings,
        image_app: ImageAppAddress,
        registry: CollectorRegistry,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        # The gateway uses no GPU, even if the machine has one.
        settings = settings.model_copy(update={"device": "cpu"})
        if settings.service_name is None and not settings.resource_attributes.get("service.name"):
            settings = settings.model_copy(update={"service_name": SERVICE_NAME})
        self.settings = settings
        self.metrics = GenerationMetrics(
            registry,
            endpoints=("/",),
            outcomes=OUTCOMES,
            error_types=(*ERROR_TYPES, *(error.error_type for error in GATEWAY_ERRORS)),
            build={"version": __version__},
        )
        self.tracing = build_tracing(settings, self.metrics)
        self.recorder = GatewayRecorder(self.tracing, self.metrics)
        self.readiness = Readiness(state=State.READY, phase="ready")
        self._image_app = image_app
        self._http = httpx.AsyncClient(
            headers={"Accept": "application/json", **image_app.headers},
            # None is kept: with one caller's cookie a load balancer would send the requests of all
            # callers to one replica.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            limits=httpx.Limits(max_connections=MAX_CALLS, max_keepalive_connections=MAX_CALLS),
            # The request's deadline limits the response.
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS, pool=CONNECT_SECONDS),
            follow_redirects=False,
            transport=transport,
        )

    @property
    def healthy(self) -> bool:
        return True

    def refusal(self) -> RequestError | None:
        """The error that every request gets now, or None if requests are served."""
        return Draining() if self.readiness.state is State.DRAINING else None

    async def generate(self, request: PromptRequest) -> Response:
        """Serve one validated request: tidy its prompt, call the image app, return its response.

        Raises:
            RequestError: the request failed, and not by an error response of the image app.
        """
        call = received_call()
        if (refusal := self.refusal()) is not None:
            raise refusal
        client_span = self.recorder.begin_client_span(call.identity, self._image_app.url)
        with call.stage("tidy"):
            prompt = tidy_prompt(request.prompt)
            if not prompt:
                problem = FieldProblem(("body", "prompt"), "must not be blank", "value_error")
                raise InvalidRequest([problem])
            negative_prompt = tidy_prompt(request.negative_prompt)
        deadline = min(self.settings.deadline_seconds, request.deadline_seconds or 3600.0)
        remaining = deadline - call.timeline.elapsed_seconds()
        if remaining <= 0:
            raise DeadlineExceeded(deadline)
        context = propagated_context(call.identity, client_span, exporting=self.tracing.exporting)
        body = request.model_dump(exclude_unset=True, exclude={"trace_context"}) | {
            "prompt": prompt,
            "deadline_seconds": remaining,
        }
        if "negative_prompt" in body:
            body["negative_prompt"] = negative_prompt
        if context:
            body["trace_context"] = context
        with call.stage("call"):
            try:
                async with asyncio.timeout(remaining + ANSWER_SECONDS):
                    answer = await self._unless_cancelled(call, self._post(body, context))
            except TimeoutError:
                raise DeadlineExceeded(deadline) from None
            client_span.attributes["http.response.status_code"] = answer.status_code
            if not self.tracing.exporting:
                call.identity = _of_the_same_trace(call.identity, answer)
            response = self._passed_on(answer, call)
        call.timeline.begin("respond")
        return response

    async def _unless_cancelled(
        self, call: Call, posting: Coroutine[Any, Any, httpx.Response]
    ) -> httpx.Response:
        """The image app's response. If the caller disconnects, the connection to the image app is
        closed, and the image app stops within two steps."""
        task = asyncio.create_task(posting)
        call.cancellation.when_cancelled(task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            call.cancellation.raise_if_cancelled()
            raise
        finally:
            task.cancel()

    async def _post(self, body: Mapping[str, Any], context: Mapping[str, str]) -> httpx.Response:
        """The image app's whole response.

        Raises:
            ImageAppUnreachable: no connection was made.
            ImageAppFailed: the response is too large, or ended early.
        """
        # The logs name only the errors' types: their text has the URL, which may hold a password.
        try:
            async with self._http.stream(
                "POST", self._image_app.url, json=body, headers=dict(context)
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
            logger.warning("the image app's response ended early: %s", type(error).__name__)
            raise ImageAppFailed("The image app's answer broke off.") from None
        # Latin-1 has a character for each byte, so any value can be passed on as it came.
        response.headers.encoding = "latin-1"
        headers = {
            name: response.headers[name]
            for name in (*_HEADERS_PASSED_ON, *_HEADERS_READ)
            if name in response.headers
        }
        answer = httpx.Response(
            response.status_code,
            headers=httpx.Headers(headers, encoding="latin-1"),
            content=bytes(content),
        )
        answer.headers.encoding = "latin-1"
        return answer

    def _passed_on(self, answer: httpx.Response, call: Call) -> Response:
        """The image app's response as the gateway's.

        Raises:
            RequestError: the response is not the image app's own.
        """
        status, headers = answer.status_code, dict(answer.headers)
        headers.pop("content-length", None)
        headers.pop("x-trace-id", None)  # the middleware adds ours
        if status == 200:
            if not headers.get("content-type", "").startswith("application/json"):
                raise ImageAppFailed("The image app's address answered something that is no JSON.")
            return Response(answer.content, headers=headers)
        error_type = error_type_of(answer)
        if error_type is None:
            raise explain(answer)
        call.outcome = _OUTCOMES_BY_TYPE.get(error_type, "error")
        call.failure = Failure(
            error_type=error_type,
            exception_type="ImageApp",
            message=f"the image app answered {status}, {error_type}",
            at_ns=call.timeline.now_unix_ns(),
            server_fault=status >= 500,
        )
        if status == 503:
            # A 503 would take the gateway's runner away. The request has not begun, so it may be
            # tried again on another runner.
            status = 502
            headers.setdefault("x-fal-needs-retry", "1")
        return Response(answer.content, status, {**NOT_BILLED, **headers})

    # Shutting down

    def begin_drain(self) -> None:
        """Refuse new requests. Calls in progress may finish."""
        self.readiness.drain()

    async def close(self, budget_seconds: float) -> None:
        """Close the connections and export the remaining spans, in at most `budget_seconds`."""
        self.begin_drain()
        await self._http.aclose()
        await asyncio.to_thread(self.recorder.close, budget_seconds)


def _of_the_same_trace(identity: TraceIdentity, answer: httpx.Response) -> TraceIdentity:
    """The identity with the trace id of the image app's answer, so that our header and log line
    name the trace that the answer's body names. For a gateway that is no part of the trace."""
    trace_id = answer.headers.get("x-trace-id", "")
    if not re.fullmatch(r"[0-9a-f]{32}", trace_id):
        return identity
    return dataclasses.replace(identity, trace_id=int(trace_id, 16))
