"""Failures as HTTP responses: the exception handlers of the app, and the JSON body of an error.

A body has `detail`, `error_type` and `trace_id`. No field holds the request's text: validation
messages that could quote the input are replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from metrics.tracing import drawn_identity
from serve.engine.call import Call, the_call
from serve.errors import (
    MAX_PROBLEMS,
    FieldProblem,
    GenerationFailed,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestError,
)
from serve.http.openai_errors import openai_error_body, openai_headers, openai_status
from serve.http.security_headers import SECURITY_HEADERS

logger = logging.getLogger(__name__)

OPENAI_PREFIX = "/v1/"
"""The paths whose errors have the shape of OpenAI's API."""


def add_exception_handlers(app: FastAPI) -> None:
    """Replace the framework's exception handlers by ours."""
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_exception)


def error_response(
    error: RequestError, call: Call, more: Mapping[str, Any] | None = None
) -> Response:
    """The HTTP response of a failed call. Marks the call as failed and begins `respond`.

    Args:
        more: further fields of the body.
    """
    call.fail(error)
    call.timeline.begin("respond")
    body = {**(more or {}), **error_body(error, call)}
    if _is_openai(call):
        return JSONResponse(body, openai_status(error), headers=openai_headers(error))
    return JSONResponse(body, error.status, headers=error.headers)


def error_body(error: RequestError, call: Call) -> dict[str, Any]:
    """The JSON object of an error; also the data of a stream's `error` event."""
    trace_id = call.identity.trace_id_hex
    return openai_error_body(error, trace_id) if _is_openai(call) else _body(error, trace_id)


def _is_openai(call: Call) -> bool:
    return call.endpoint.startswith(OPENAI_PREFIX)


def response_outside_the_app(error: RequestError) -> JSONResponse:
    """The response to a request that never reached the app, for example because it is not HTTP.

    Draws its trace id, and logs one line with it. `raw_headers` and `body` are what a server's
    protocol can write.
    """
    trace_id = drawn_identity().trace_id_hex
    logger.info("%d %s", error.status, error.error_type, extra={"trace_id": trace_id})
    headers = {**SECURITY_HEADERS, **error.headers, "x-trace-id": trace_id}
    return JSONResponse(_body(error, trace_id), error.status, headers=headers)


def field_problems(
    problems: Sequence[Mapping[str, Any]], within: tuple[str | int, ...] = ()
) -> list[FieldProblem]:
    """Pydantic's errors without the input, as many as an answer names.

    Args:
        within: where the validated value is.
    """
    return [
        FieldProblem((*within, *problem["loc"]), _without_input(problem), problem["type"])
        for problem in problems[:MAX_PROBLEMS]
    ]


def _body(error: RequestError, trace_id: str) -> dict[str, Any]:
    detail: Any = error.message
    if isinstance(error, InvalidRequest):
        detail = [
            {"loc": list(p.location), "msg": p.message, "type": p.kind} for p in error.problems
        ]
    body = {"detail": detail, "error_type": error.error_type, "trace_id": trace_id}
    return body if error.eta_ms is None else body | {"eta_ms": error.eta_ms}


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(InvalidRequest(field_problems(error.errors())), the_call())


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own errors: an unknown path, or a path without this method."""
    assert isinstance(error, HTTPException)
    failure: RequestError
    match error.status_code:
        case 404:
            failure = NotFound()
        case 405:
            failure = MethodNotAllowed(_allowed_methods(request))
        case status:
            failure = RequestError(f"The request could not be served: {status}.")
    return error_response(failure, the_call())


async def _on_request_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error, the_call())


async def _on_exception(_request: Request, error: Exception) -> Response:
    """An exception outside of the middleware, which handles all others."""
    return response_outside_the_app(GenerationFailed(type(error).__name__))


def _allowed_methods(request: Request) -> Iterable[str]:
    """The methods of all routes with this path. The framework names those of the first only."""
    allowed: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            allowed |= getattr(route, "methods", None) or set()
    return allowed


def _without_input(problem: Mapping[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem.get("input")
    if isinstance(value, str) and len(value) > 3 and value in message:
        return "is not allowed"
    return message
