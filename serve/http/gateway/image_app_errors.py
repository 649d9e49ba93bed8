"""What can go wrong between the gateway and the image app, and what an error response of it means.

    RequestError
    ├── ImageAppUnreachable     502, may be tried again
    ├── ImageAppFailed          502
    ├── ImageAppBusy            429
    └── ImageAppTimedOut        504

These cover answers that the image app did not give itself, as fal's own gateway in front of it can.
The image app's own error responses are passed on, unless they are about the gateway's own key.
"""

from __future__ import annotations

import json
import re

import httpx

from serve.errors import (
    NO_RETRY,
    OTHER_ERRORS,
    REQUEST_ERRORS,
    KeyLimitReached,
    ModelNotFound,
    NotAcceptable,
    RequestError,
    Unauthorized,
)


class ImageAppUnreachable(RequestError):
    """No connection: the request has not begun, so fal's queue may try it again."""

    status = 502
    error_type = "image_app_unreachable"

    def __init__(self) -> None:
        super().__init__("The image app cannot be reached.", {"X-Fal-Needs-Retry": "1"})


class ImageAppFailed(RequestError):
    """The response is not from the image app, or is incomplete."""

    status = 502
    error_type = "image_app_failed"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class ImageAppBusy(RequestError):
    """What is in front of the image app accepts no more requests for now."""

    status = 429
    error_type = "image_app_busy"
    outcome = "rejected"

    def __init__(self, retry_after: str) -> None:
        # Not isdigit: "²" is a digit too, and no number.
        headers = {"Retry-After": retry_after} if re.fullmatch("[0-9]+", retry_after) else {}
        super().__init__("The image app takes no more requests at the moment.", headers)


class ImageAppTimedOut(RequestError):
    """What is in front of the image app stopped waiting. The image app may still be working."""

    status = 504
    error_type = "image_app_timed_out"
    outcome = "deadline"

    def __init__(self) -> None:
        super().__init__("The image app did not answer in time.", NO_RETRY)


GATEWAY_ERRORS = (ImageAppUnreachable, ImageAppFailed, ImageAppBusy, ImageAppTimedOut)


_ABOUT_THE_GATEWAYS_KEY: tuple[type[RequestError], ...] = (Unauthorized, KeyLimitReached)
"""The gateway calls the image app with a key of its own, so its caller can mend neither."""

_NOT_PASSED_ON = {error.error_type for error in (*OTHER_ERRORS, *_ABOUT_THE_GATEWAYS_KEY)}

MAX_ERROR_BYTES = 64 * 1024
"""Of an error's body, for it to be parsed. The image app's own are smaller, and parsing the largest
answer that is read would hold the event loop for seconds."""


ANSWERED_ERRORS = (
    *(
        error
        for error in REQUEST_ERRORS
        if error not in (*_ABOUT_THE_GATEWAYS_KEY, NotAcceptable, ModelNotFound)
    ),
    *GATEWAY_ERRORS,
)
"""What the gateway may answer to a request for an image. It has no keys of its own, serves no model
by its name, and answers JSON whatever the Accept header names."""


def error_type_of(response: httpx.Response) -> str | None:
    """The `error_type` of the image app's own answer to a request for an image that failed.

    None for any other response: also where there is an image app, but the address has a wrong path
    or the image app refuses the gateway's key.
    """
    if len(response.content) > MAX_ERROR_BYTES:
        return None
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        return None
    error_type = body.get("error_type") if isinstance(body, dict) else None
    if response.status_code < 400 or not isinstance(error_type, str):
        return None
    if error_type in _NOT_PASSED_ON or not re.fullmatch(r"[a-z_]{1,40}", error_type):
        return None
    return error_type


def explain(response: httpx.Response) -> RequestError:
    """The error for a response that is neither a success nor from the image app itself."""
    match response.status_code:
        case 401 | 403:
            return ImageAppFailed("The image app's address refuses the gateway's key.")
        case 404:
            return ImageAppFailed("There is no image app at its address.")
        case 429:
            return ImageAppBusy(response.headers.get("retry-after", ""))
        case 408 | 504:
            return ImageAppTimedOut()
        case status:
            return ImageAppFailed(f"The image app's address answered {status}.")
