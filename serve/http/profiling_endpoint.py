"""`POST /debug/profile`: an operator has the next requests profiled."""

from __future__ import annotations

import logging

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.engine.runtime import Runtime
from serve.errors import Forbidden, InvalidRequest
from serve.http.authentication import is_operator
from serve.http.error_responses import field_problems
from serve.http.request_body import json_object, read_body
from serve.telemetry.profiling import MAX_PROFILES

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1024


class ProfileRequest(BaseModel):
    """How many of the next requests to profile; 0 cancels an earlier request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    requests: int = Field(ge=0, le=MAX_PROFILES)


async def arm_profiling(runtime: Runtime, request: Request) -> Response:
    """The handler of `POST /debug/profile`. Only an operator may use it.

    The body is read after that check, and limited to `MAX_BODY_BYTES`.
    """
    if not is_operator(request.scope, runtime.settings.admin_token):
        raise Forbidden(
            "Only an operator may profile: from this machine, or with SDXL_ADMIN_TOKEN as bearer "
            "token."
        )
    body = await read_body(request.receive, request.headers, runtime.readiness, MAX_BODY_BYTES)
    fields = json_object(request.headers, body)
    try:
        wanted = ProfileRequest.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequest(field_problems(error.errors(), within=("body",))) from None
    runtime.profiling.arm(wanted.requests)
    logger.info("the next %d requests will be profiled", wanted.requests)
    return JSONResponse(
        {"armed": runtime.profiling.armed, "profiles": runtime.profiling.profiles()}
    )
