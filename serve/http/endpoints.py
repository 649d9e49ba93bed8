"""The endpoints that both servers share, and `install`, which puts them into an app.

The self-hosted server and the fal app differ in who parses the request and who listens on the
port. Everything between is the same code, in this folder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from metrics.catalogue import render
from serve.engine.call import the_call
from serve.engine.readiness import Readiness
from serve.engine.runtime import ENDPOINTS, Runtime
from serve.errors import REQUEST_ERRORS, DeviceLost, NotReady, RequestError
from serve.http.error_responses import add_exception_handlers, error_response
from serve.http.image_responses import as_image_request, image_response, wants_image
from serve.http.middleware import RequestMiddleware
from serve.http.openapi import install_document
from serve.http.request_body import MAX_BODY_BYTES
from serve.http.responses import json_response
from serve.http.routes import add_get_route
from serve.http.security_headers import SecurityHeaders
from serve.http.service import Service, received_call
from serve.http.sockets.early_answers import EarlyAnswers
from serve.schema import TextToImageRequest


def install(
    app: FastAPI,
    service: Callable[[], Service | None],
    endpoints: Collection[str] = ENDPOINTS,
    errors: Sequence[type[RequestError]] = REQUEST_ERRORS,
    connection_errors: Sequence[type[RequestError]] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
) -> None:
    """Put the middleware, the exception handlers, `/health`, `/ready` and the OpenAPI document into
    an app.

    Args:
        service: returns the service, or None before there is one. Called for every request.
        endpoints: the paths that generate. Their requests are traced and counted.
        errors: what they may answer, faults of the service itself aside.
        connection_errors: what the server may answer to any request instead of the app.
        max_body_bytes: of a request for an image without a picture.
    """
    app.add_middleware(
        RequestMiddleware, service=service, endpoints=endpoints, max_body_bytes=max_body_bytes
    )
    app.add_middleware(EarlyAnswers, service=service)  # around the other
    app.add_middleware(SecurityHeaders)  # around both
    # A redirect would lead to the address in the request's Host header, and from https to http.
    app.router.redirect_slashes = False
    add_exception_handlers(app)

    async def health() -> Response:
        """200 while the process and its device work, also before the model is warm; else 503."""
        current = service()
        if current is None or current.healthy:
            return JSONResponse({"status": "ok"})
        error = current.refusal() or DeviceLost()
        hang = error.hang if isinstance(error, DeviceLost) else None
        where = {} if hang is None else {"hang": asdict(hang)}
        return error_response(error, the_call(), {"status": "unhealthy", **where})

    async def ready() -> Response:
        """200 when the model is warm and can serve; until then 503 with the start-up's progress."""
        current = service()
        readiness = Readiness() if current is None else current.readiness
        error = NotReady("The process is starting.") if current is None else current.refusal()
        if error is None:
            return JSONResponse(readiness.as_json())
        return error_response(error, the_call(), readiness.as_json())

    add_get_route(app, "/health", health)
    add_get_route(app, "/ready", ready)
    install_document(app, service, endpoints, (*errors, RequestError), connection_errors)


async def text_to_image(runtime: Runtime, request: TextToImageRequest) -> Response:
    """The handler of `POST /` and `POST /image-to-image`: JSON, or an image if the Accept header
    names an image type."""
    accept = the_call().accept
    as_image = wants_image(accept)
    if as_image:
        request = as_image_request(request, accept)
    call = received_call()
    response = await runtime.generate(request, call)
    call.timeline.begin("respond")
    return image_response(response) if as_image else json_response(response)


async def metrics_endpoint(request: Request, runtime: Runtime, rendering: asyncio.Lock) -> Response:
    """The handler of `GET /metrics`: OpenMetrics if the Accept header names it, else text.

    Args:
        rendering: held meanwhile. The threads that render also encode images, so one at most is
            busy with it, however many ask.
    """
    async with rendering:
        body, content_type = await asyncio.to_thread(
            render, runtime.metrics.registry, request.headers.get("accept", "")
        )
    return Response(body, headers={"Content-Type": content_type})
