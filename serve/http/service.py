"""The interface that serve/http needs from the runtime or the gateway's client."""

from __future__ import annotations

from typing import Protocol

from metrics.catalogue import GenerationMetrics
from metrics.records import RequestTiming
from metrics.sampling import TraceIdentity
from metrics.tracing import Tracing
from serve.engine.call import Call, the_call
from serve.engine.readiness import Readiness
from serve.errors import RequestError
from serve.schema import TextToImageRequest
from serve.settings import ServeSettings


class RequestRecorder(Protocol):
    """Records finished requests."""

    def record(self, request: RequestTiming, identity: TraceIdentity) -> None:
        """Take a finished request; returns at once and never raises."""


class Service(Protocol):
    """Serves requests: `Runtime` does in the image app, `GatewayClient` in the gateway."""

    @property
    def settings(self) -> ServeSettings: ...
    @property
    def tracing(self) -> Tracing: ...
    @property
    def metrics(self) -> GenerationMetrics: ...
    @property
    def recorder(self) -> RequestRecorder: ...
    @property
    def readiness(self) -> Readiness: ...
    @property
    def healthy(self) -> bool: ...
    def refusal(self) -> RequestError | None:
        """The error that every request gets now, or None if requests are served."""


def received_call(service: Service, request: TextToImageRequest) -> Call:
    """End the `receive` stage of the current call and return the call.

    The request has been read and validated by now. A valid trace context in its body replaces the
    one in its headers.
    """
    call = the_call()
    if request.trace_context is not None:
        identity = service.tracing.identify(request.trace_context.carrier())
        if identity.parent is not None or identity.caller is not None:
            call.identity = identity
    if request.request_id:
        call.request_id = request.request_id
    call.timeline.end()
    return call
