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


def received_call() -> Call:
    """End the `receive` stage of the current call and return the call.

    The request has been read and validated by now.
    """
    call = the_call()
    call.timeline.end()
    return call
