"""Failures as HTTP responses: the exception handlers of the app, and the JSON body of an error.

A body has `detail`, `error_type` and `trace_id`. No field holds the request's text: validation
messages that could quote the input are replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from serve.engine.call import Call, current_call
from serve.errors import FieldProblem, GenerationFailed, InvalidRequest, RequestError

_NOT_JSON = "json_invalid"
_NOT_JSON_MESSAGE = "the body is not valid JSON"


def add_exception_handlers(app: FastAPI) -> None:
    """Replace the framework's exception handlers by ours."""
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_exception)


def error_response(error: RequestError, call: Call) -> Response:
    """The HTTP response of a failed call. Marks the call as failed and begins `respond`."""
    call.fail(error)
    call.timeline.begin("respond")
    return JSONResponse(error_body(error, call), error.status, headers=error.headers)


def error_body(error: RequestError, call: Call) -> dict[str, Any]:
    """The JSON object of an error; also the data of a stream's `error` event."""
    detail: Any = error.message
    if isinstance(error, InvalidRequest):
        detail = [
            {"loc": list(p.location), "msg": p.message, "type": p.kind} for p in error.problems
        ]
    body = {
        "detail": detail,
        "error_type": error.error_type,
        "trace_id": call.identity.trace_id_hex,
    }
    return body if error.eta_ms is None else body | {"eta_ms": error.eta_ms}


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _response_of_current_call(
        InvalidRequest([_field_problem(problem) for problem in error.errors()])
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own errors. A body that is not text is one of them, a 400; here it is 422."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and current_call.get() is not None:
        return _response_of_current_call(
            InvalidRequest([FieldProblem(("body",), _NOT_JSON_MESSAGE, _NOT_JSON)])
        )
    return await http_exception_handler(request, error)


async def _on_request_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _response_of_current_call(error)


async def _on_exception(_request: Request, error: Exception) -> Response:
    return _response_of_current_call(GenerationFailed(type(error).__name__))


def _response_of_current_call(error: RequestError) -> Response:
    call = current_call.get()
    if call is None:  # an endpoint that does not generate
        return PlainTextResponse(error.message, error.status)
    return error_response(error, call)


def _field_problem(problem: Mapping[str, Any]) -> FieldProblem:
    """One of pydantic's errors, without the input."""
    kind = str(problem["type"])
    if kind == _NOT_JSON:  # its message and its location quote the body
        return FieldProblem(("body",), _NOT_JSON_MESSAGE, kind)
    return FieldProblem(tuple(problem["loc"]), _message_without_input(problem), kind)


def _message_without_input(problem: Mapping[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem.get("input")
    if isinstance(value, str) and len(value) > 3 and value in message:
        return "is not allowed"
    return message
