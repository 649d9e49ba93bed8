"""The service's errors, and the HTTP response of each.

    ServeError
    ├── ConfigurationError      start-up stops with this sentence; never reaches HTTP
    ├── ModelError              the model cannot be loaded; start-up fails
    └── RequestError            one request fails
        ├── InvalidRequest      422
        │   └── UnusablePicture 422, of image to image
        ├── ModelNotFound       404, only on OpenAI's endpoints
        ├── BodyTooLarge        413
        ├── BodyTooSlow         408
        ├── NotAcceptable       406
        ├── UnsupportedMediaType 415
        ├── TooManyConnections  503
        ├── Unauthorized        401
        ├── KeyLimitReached     429
        ├── QueueFull           429
        ├── DeadlineExceeded    504
        ├── ClientGone          499, in logs and metrics only
        ├── NotReady            503
        ├── Draining            503
        ├── OutOfMemory         500
        ├── NonFiniteOutput     500
        ├── GenerationFailed    500
        ├── DeviceLost          503, and the process is unhealthy
        └── (where nothing is generated)
            ├── InternalError       500
            ├── MalformedHttp       400
            ├── HeadTooLarge        431
            ├── HeadTooSlow         408
            ├── Forbidden           403
            ├── NotFound            404
            └── MethodNotAllowed    405

A message is one sentence for the caller. It never has the request's text, because fal's platform
and the trace keep it. Three headers are for fal: `X-Fal-Needs-Retry: 0` prevents a retry that would
fail again, `x-fal-stop-runner` replaces a broken runner, and `x-fal-billable-units: 0` prevents
fal's default charge for a request without an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

NO_RETRY: Mapping[str, str] = {"X-Fal-Needs-Retry": "0"}
MAX_PROBLEMS = 20
"""How many problems one answer names."""

MAX_NAME_CHARACTERS = 64
"""Longer names of fields are cut."""

MAX_PICTURE_BYTES = 7 * 1024 * 1024
"""Of the file that image to image begins with; in base64 a third more."""

NOT_BILLED: Mapping[str, str] = {"x-fal-billable-units": "0"}


class ServeError(Exception):
    """The base of all errors that this package raises."""


class ConfigurationError(ServeError):
    """A setting is wrong. The text names it, its value and what is allowed."""


class ModelError(ServeError):
    """The model cannot be loaded. The text names it and what was found."""


class RequestError(ServeError):
    """One request fails. Each subclass is a row of the documentation's table of failures."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal"
    outcome: ClassVar[str] = "error"

    def __init__(self, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.cause_type: str | None = None
        """The type of the exception behind this error, if there is one. Only its type is kept: the
        exception would keep a failed run's tensors alive, and its text may quote a prompt."""
        self.headers = {**NOT_BILLED, **(headers or {})}
        self.eta_ms: float | None = None
        """The time that the request was estimated to take from now on, if it was estimated."""


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """What is wrong with one field of a request."""

    location: tuple[str | int, ...]
    message: str
    kind: str


class InvalidRequest(RequestError):
    """A wrong or unknown field, or a shape that is not warm. Names fields, never the input.

    An unknown field's name is input too: it is cut, and so is a long list of problems.
    """

    status = 422
    error_type = "invalid_request"
    outcome = "invalid"

    def __init__(self, problems: list[FieldProblem]) -> None:
        self.problems = [
            FieldProblem(_shortened(p.location), p.message, p.kind) for p in problems[:MAX_PROBLEMS]
        ]
        super().__init__("; ".join(f"{_dotted(p.location)}: {p.message}" for p in self.problems))


class UnusablePicture(InvalidRequest):
    """The picture of image to image is not allowed, cannot be fetched or cannot be decoded.

    Args:
        message: continues the field's name, as "must be ..."; never repeats the URL.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__([FieldProblem(("body", "image_url"), message, kind)])


class ModelNotFound(InvalidRequest):
    """A model that is not served here. OpenAI's clients know it as a 404."""

    status = 404
    error_type = "model_not_found"

    def __init__(self, names: Sequence[str]) -> None:
        message = f"must be one of {', '.join(names)}"
        super().__init__([FieldProblem(("body", "model"), message, self.error_type)])


class BodyTooLarge(RequestError):
    status = 413
    error_type = "body_too_large"
    outcome = "invalid"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is larger than the {limit_bytes} bytes allowed.")


class BodyTooSlow(RequestError):
    status = 408
    error_type = "body_too_slow"
    outcome = "invalid"

    def __init__(self, limit_seconds: float) -> None:
        super().__init__(f"The request body did not arrive within {limit_seconds:g} s.")


class UnsupportedMediaType(RequestError):
    """The body is not declared as JSON. Answers name what is accepted in `Accept` headers."""

    status = 415
    error_type = "unsupported_media_type"
    outcome = "invalid"


class TooManyConnections(RequestError):
    # 503 and not 429, so that a balancer tries another server. It does not occur on fal.
    status = 503
    error_type = "too_many_connections"
    outcome = "rejected"

    def __init__(self) -> None:
        super().__init__(
            "As many connections are open as this server allows. A few more are accepted, for "
            "/health, /ready and /metrics only.",
            {"Retry-After": "1"},
        )


class NotAcceptable(RequestError):
    """The Accept header names no type that the image can have."""

    status = 406
    error_type = "not_acceptable"
    outcome = "invalid"

    def __init__(self, content_types: Iterable[str]) -> None:
        allowed = ", ".join(content_types)
        super().__init__(
            f"The Accept header can name {allowed}, image/* or application/json, and must accept "
            "the type of the body's `format`, if it has one."
        )


class Unauthorized(RequestError):
    """The request has none of the API keys. Its message never says whether a key was given."""

    status = 401
    error_type = "unauthorized"
    # Not "rejected": what scanners send is not for the service's error rate.
    outcome = "invalid"

    def __init__(
        self,
        message: str = (
            "A key is needed, as `Authorization: Bearer KEY`, `Authorization: Key KEY` or "
            "`x-api-key: KEY`."
        ),
    ) -> None:
        super().__init__(message, {"WWW-Authenticate": "Bearer"})


class KeyLimitReached(RequestError):
    status = 429
    error_type = "key_limit_reached"
    # The caller's own limit: the service could serve the request.
    outcome = "invalid"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"{limit} requests with this key's name are in progress, the most that are allowed; "
            "try again when one has ended.",
            {"Retry-After": "1"},
        )


class QueueFull(RequestError):
    # Not 503: fal replaces a runner that responds with 503.
    status = 429
    error_type = "queue_full"
    outcome = "rejected"

    def __init__(self, waiting: int, retry_after_seconds: int, eta_ms: float | None = None) -> None:
        super().__init__(
            f"{waiting} requests are waiting already, the most that are allowed; "
            f"try again in about {retry_after_seconds} s.",
            {"Retry-After": str(retry_after_seconds)},
        )
        self.eta_ms = eta_ms


class DeadlineExceeded(RequestError):
    status = 504
    error_type = "deadline_exceeded"
    outcome = "deadline"

    def __init__(
        self, deadline_seconds: float, eta_ms: float | None = None, refused: bool = False
    ) -> None:
        verb = "cannot be finished" if refused else "was not finished"
        super().__init__(
            f"The request {verb} within its deadline of {deadline_seconds:g} s.", NO_RETRY
        )
        self.eta_ms = eta_ms


class ClientGone(RequestError):
    status = 499
    error_type = "client_gone"
    outcome = "cancelled"

    def __init__(self) -> None:
        super().__init__("The client closed the connection before the answer.")


class NotReady(RequestError):
    status = 503
    error_type = "not_ready"
    outcome = "rejected"

    def __init__(self, why: str) -> None:
        super().__init__(why, {"Retry-After": "5"})


class Draining(RequestError):
    status = 503
    error_type = "draining"
    outcome = "rejected"

    def __init__(self) -> None:
        super().__init__("The process is shutting down and starts no new work.")


class OutOfMemory(RequestError):
    status = 500
    error_type = "out_of_memory"

    def __init__(self) -> None:
        # The request does not fit into another runner either.
        super().__init__("The device ran out of memory on this request.", NO_RETRY)


class NonFiniteOutput(RequestError):
    status = 500
    error_type = "non_finite_output"

    def __init__(self) -> None:
        super().__init__("The model produced values that are not finite.", NO_RETRY)


class GenerationFailed(RequestError):
    status = 500
    error_type = "generation_failed"

    def __init__(self, exception_type: str) -> None:
        super().__init__(f"Generation failed with {exception_type}; the log has the traceback.")
        self.cause_type = exception_type


@dataclass(frozen=True, slots=True)
class Hang:
    """Where a run hangs.

    Attributes:
        stage: the run's stage; empty before its first.
        step: the denoising step that has not ended, from 0; None outside of `denoise`.
        silent_seconds: since the run's last sign of life.
    """

    stage: str
    step: int | None
    silent_seconds: float

    def __str__(self) -> str:
        if not self.stage:
            return "before its first stage"
        return f"in {self.stage}" if self.step is None else f"in {self.stage}, step {self.step}"


class DeviceLost(RequestError):
    """The device fails every call, or a run hangs on it."""

    status = 503
    error_type = "device_lost"

    def __init__(self, hang: Hang | None = None) -> None:
        why = "The device no longer answers"
        if hang is not None:
            why = (
                f"A run hangs {hang}, without a sign of life for {hang.silent_seconds:.0f} seconds"
            )
        super().__init__(
            f"{why}; this process cannot recover.",
            {"x-fal-stop-runner": "1"},
        )
        self.hang = hang


class InternalError(RequestError):
    """A fault of the service itself, in an endpoint that does not generate."""

    def __init__(self, exception_type: str) -> None:
        super().__init__(f"The service failed with {exception_type}; the log has the traceback.")
        self.cause_type = exception_type


class MalformedHttp(RequestError):
    status = 400
    error_type = "malformed_http"
    outcome = "invalid"

    def __init__(self, message: str = "This is not a valid HTTP request.") -> None:
        super().__init__(message)


class Forbidden(RequestError):
    status = 403
    error_type = "forbidden"
    outcome = "rejected"


class HeadTooLarge(RequestError):
    status = 431
    error_type = "head_too_large"
    outcome = "invalid"

    def __init__(self, limit_bytes: int, limit_headers: int) -> None:
        super().__init__(
            f"The request's line and headers are larger than the {limit_bytes} bytes, or more than "
            f"the {limit_headers} headers, allowed."
        )


class HeadTooSlow(RequestError):
    status = 408
    error_type = "head_too_slow"
    outcome = "invalid"

    def __init__(self, limit_seconds: float) -> None:
        super().__init__(f"The request's headers did not arrive within {limit_seconds:g} s.")


class NotFound(RequestError):
    status = 404
    error_type = "not_found"
    outcome = "invalid"

    def __init__(self) -> None:
        super().__init__("There is nothing at this path.")


class MethodNotAllowed(RequestError):
    status = 405
    error_type = "method_not_allowed"
    outcome = "invalid"

    def __init__(self, allowed: Iterable[str]) -> None:
        names = ", ".join(sorted(allowed))
        super().__init__(f"This path is for {names} only.", {"Allow": names})


REQUEST_ERRORS: tuple[type[RequestError], ...] = (
    InvalidRequest,
    ModelNotFound,
    BodyTooLarge,
    BodyTooSlow,
    NotAcceptable,
    UnsupportedMediaType,
    TooManyConnections,
    Unauthorized,
    KeyLimitReached,
    QueueFull,
    DeadlineExceeded,
    ClientGone,
    NotReady,
    Draining,
    OutOfMemory,
    NonFiniteOutput,
    GenerationFailed,
    DeviceLost,
)
"""What can end a request for an image."""

OTHER_ERRORS: tuple[type[RequestError], ...] = (
    MalformedHttp,
    HeadTooLarge,
    HeadTooSlow,
    Forbidden,
    NotFound,
    MethodNotAllowed,
)
"""What else can be answered. Such requests are in no metric and no trace."""

ERROR_TYPES = (*(error.error_type for error in REQUEST_ERRORS), "internal")
"""The closed set of `error_type` label values."""

REJECTIONS = tuple(
    error.error_type
    for error in REQUEST_ERRORS
    if error.outcome == "rejected"
    or error in (Unauthorized, KeyLimitReached, DeadlineExceeded, DeviceLost)
)
"""The error types that may end a request before any work is done for it: the closed set of `reason`
label values."""

OUTCOMES = ("ok", "invalid", "rejected", "deadline", "cancelled", "error")
"""The closed set of `outcome` label values."""


def _dotted(location: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in location)


def _shortened(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    return tuple(
        part[:MAX_NAME_CHARACTERS] + "..."
        if isinstance(part, str) and len(part) > MAX_NAME_CHARACTERS
        else part
        for part in location
    )
