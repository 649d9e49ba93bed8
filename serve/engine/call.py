"""One HTTP call while it is served: its timeline, its identity, its way to be called off.

A `Call` is made by the middleware when the request arrives, filled by whoever learns something, and
frozen into a `RequestTiming` when the last byte has left.
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
    image_bytes: int | None = None
    first_of_run: bool = True
    """Whether the run is observed with this call; of several calls in one run, the first's."""
    work: asyncio.Task[Any] | None = None
    """What goes on beside the handler, as a stream's generation does."""

    def fail(self, error: RequestError, at_ns: int | None = None) -> None:
        """Note what the request fails with; the first failure stands.

        Call it where the failure happens, while its stage is open: the stage whose time holds
        `at_ns` (Unix nanoseconds, now by default) is the one that is marked.
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
        """Time the enclosed work; a failure in it is noted before the stage closes."""
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
        """Freeze the call, ending now."""
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
"""The call that the running task or thread works for; logs take their ids from it."""
