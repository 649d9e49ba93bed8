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

from metrics.records import Estimate, Failure, GenerationFacts, RequestTiming, RunTiming
from metrics.sampling import TraceIdentity
from metrics.timeline import RequestTimeline
from serve.engine.cancellation import Cancellation
from serve.errors import GenerationFailed, RequestError


@dataclass(slots=True, eq=False)
class Call:
    """A request in progress. One thread at a time sets its fields."""

    endpoint: str
    method: str
    identity: TraceIdentity
    accept: str = ""
    """The request's Accept header."""
    api_key: str | None = None
    """The name of its caller's key; None if no key is needed, or none was right."""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    timeline: RequestTimeline = field(default_factory=RequestTimeline)
    cancellation: Cancellation = field(default_factory=Cancellation)
    facts: GenerationFacts | None = None
    runs: list[RunTiming] = field(default_factory=list)
    """The runs that drew its images so far."""
    observed_runs: set[str] = field(default_factory=set)
    """The ids of the runs whose metrics are recorded with this call."""
    total_steps: int = 0
    """The denoising steps of all its runs together."""
    estimate: Estimate | None = None
    failure: Failure | None = None
    outcome: str = "ok"
    image_bytes: tuple[int, ...] = ()
    drawn: bool = False
    """Whether its images are there. The queue sets it under its lock."""
    finished: bool = False
    """Whether it was frozen; a run that ends later is not in its record."""
    work: asyncio.Task[Any] | None = None
    """The task that works for the request beside its handler, as for a stream."""

    @property
    def run(self) -> RunTiming | None:
        """Its last run so far; None before the first has ended."""
        return self.runs[-1] if self.runs else None

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
        self.finished = True
        self.cancellation.forget()
        return self.timeline.finish(
            endpoint=self.endpoint,
            method=self.method,
            status_code=status_code,
            outcome=self.outcome,
            runs=self.runs,
            observed_runs=[run for run in self.runs if run.run_id in self.observed_runs],
            facts=self.facts,
            failure=self.failure,
            image_bytes=self.image_bytes,
            estimate=self.estimate,
            api_key=self.api_key,
        )


current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)
"""The call that the running task or thread works for; log lines take their ids from it."""


def the_call() -> Call:
    """The current call. The middleware makes one for every request."""
    call = current_call.get()
    assert call is not None
    return call
