"""One HTTP request while it is served: its trace identity, its timing, its cancellation.

The middleware makes a `Call` when a request arrives. Each layer fills in what it knows. When the
last byte of the response has left, it is frozen into a `RequestTiming`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from metrics.records import Failure, GenerationFacts, RequestTiming, RunTiming
from metrics.sampling import TraceIdentity
from metrics.timeline import RequestTimeline
from serve.engine.admission import Cancellation
from serve.errors import GenerationFailed, RequestError


@dataclass(slots=True, eq=False)
class Call:
    """A request in progress. One thread at a time sets its fields."""

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
    image_bytes: int | None = None
    first_of_run: bool = True
    """Whether this call is the first of its run. The run's metrics are recorded with that one."""
    work: asyncio.Task[Any] | None = None
    """The task that works for the request beside its handler, as for a stream."""

    def fail(self, error: RequestError, at_ns: int | None = None) -> None:
        """Record why the request fails. The first failure stays.

        Call it while the stage that fails is open: the failed stage is the one whose time contains
        `at_ns` (Unix nanoseconds; default: now).
        """
        if self.failure is not None:
            return
        self.outcome = error.outcome
        self.failure = Failure(
            error_type=error.error_type,
            exception_type=error.cause_type or type(error).__name__,
            message=error.message,
            at_ns=self.timeline.now_unix_ns() if at_ns is None else at_ns,
            server_fault=error.status >= 500,
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the enclosed work as a stage. A failure in it is recorded before the stage ends."""
        with self.timeline.stage(name):
            try:
                yield
            except RequestError as error:
                self.fail(error)
                raise
            except Exception as error:
                self.fail(GenerationFailed(type(error).__name__))
                raise

    def finish(self, status_code: int) -> RequestTiming:
        """Freeze the call. It ends now."""
        return self.timeline.finish(
            endpoint=self.endpoint,
            method=self.method,
            status_code=status_code,
            outcome=self.outcome,
            run=self.run,
            observes_run=self.run is not None and self.first_of_run,
            facts=self.facts,
            failure=self.failure,
            image_bytes=self.image_bytes,
        )


current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)
"""The call that the running task or thread works for; log lines take their ids from it."""


def the_call() -> Call:
    """The current call. The middleware makes one for every request."""
    call = current_call.get()
    assert call is not None
    return call
