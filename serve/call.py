"""One HTTP call while it is served: its timeline, its identity, its way to be called off.

A `Call` is made by the middleware when the request arrives, filled by whoever learns something, and
frozen into a `RequestTiming` when the last byte has left.
"""

from __future__ import annotations

import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from metrics.timeline import Failure, GenerationFacts, RequestTimeline, RequestTiming, RunTiming
from metrics.tracing import TraceIdentity
from serve.admission import Cancellation
from serve.errors import RequestError


@dataclass(slots=True, eq=False)
class Call:
    """A request in progress. Fields are set by one thread at a time, in the order of its life."""

    endpoint: str
    method: str
    identity: TraceIdentity
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    timeline: RequestTimeline = field(default_factory=RequestTimeline)
    cancellation: Cancellation = field(default_factory=Cancellation)
    facts: GenerationFacts | None = None
    run: RunTiming | None = None
    failure: Failure | None = None
    outcome: str = "ok"

    def fail(self, error: RequestError) -> None:
        """Note what the request fails with; the first failure stands."""
        if self.failure is not None:
            return
        self.outcome = error.outcome
        cause = error.__cause__ or error
        self.failure = Failure(
            error_type=error.error_type,
            exception_type=type(cause).__name__,
            message=error.message,
            at_ns=self.timeline.now_unix_ns(),
            server_fault=error.status >= 500,
        )

    def finish(self, status_code: int) -> RequestTiming:
        """Freeze the call, ending now."""
        return self.timeline.finish(
            endpoint=self.endpoint,
            method=self.method,
            status_code=status_code,
            outcome=self.outcome,
            run=self.run,
            observes_run=self.run is not None,
            facts=self.facts,
            failure=self.failure,
        )


current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)
"""The call that the running task or thread works for; logs take their ids from it."""
