"""Failures in the shape of OpenAI's API: `{"error": {message, type, param, code}}`.

OpenAI's clients choose the exception's class by the status, and read these four fields from the
body. Our own `trace_id` is beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.errors import FieldProblem, InvalidRequest, RequestError

_INVALID_STATUS = 400
"""OpenAI's status for a wrong field, where this service's own is 422."""

_PARAMETERS = {
    "width": "size",
    "height": "size",
    "num_images": "n",
    "format": "output_format",
    "image_quality": "output_compression",
}
"""The fields of `TextToImageRequest` that OpenAI's API calls by another name."""

_TRY_AGAIN = (429, 503)


def openai_status(error: RequestError | type[RequestError]) -> int:
    """The HTTP status of an error."""
    return _INVALID_STATUS if error.status == InvalidRequest.status else error.status


def openai_headers(error: RequestError) -> Mapping[str, str]:
    """The HTTP headers of an error.

    OpenAI's clients repeat 408, 409, 429 and every 5xx twice, unless `x-should-retry` is false. A
    request that ran out of time or failed in the model would fail again.
    """
    try_again = "true" if error.status in _TRY_AGAIN else "false"
    return {**error.headers, "x-should-retry": try_again}


def openai_error_body(error: RequestError, trace_id: str) -> dict[str, Any]:
    """The JSON object of an error; also the data of a stream's `error` event."""
    message, parameter, code = error.message, None, error.error_type
    if isinstance(error, InvalidRequest):
        message = "; ".join(_sentence(problem) for problem in error.problems)
        parameter = _parameter(error.problems[0])
        code = error.problems[0].kind
    described = {"message": message, "type": _type(error), "param": parameter, "code": code}
    return {"error": described, "trace_id": trace_id}


def _type(error: RequestError) -> str:
    if error.status == 429:
        return "rate_limit_error"
    return "server_error" if error.status >= 500 else "invalid_request_error"


def _parameter(problem: FieldProblem) -> str | None:
    """The field in OpenAI's words; None where the body itself is wrong."""
    names = [str(part) for part in problem.location if part != "body"]
    return _PARAMETERS.get(names[0], names[0]) if names else None


def _sentence(problem: FieldProblem) -> str:
    parameter = _parameter(problem)
    return problem.message if parameter is None else f"{parameter}: {problem.message}"
