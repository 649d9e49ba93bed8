"""The tracing pipeline: who a request is, whether it is exported, and the way out of the process.

A private provider passed by hand, never the global one: another library in the process may have
claimed that (importing fal does), and then nothing would ever be exported. A request's tree is
built when the request has ended, so the provider itself samples nothing: `identify` draws the ids
and makes the head decision at the request's start, and `emit` builds only what was chosen.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_ON,
    Decision,
    ParentBased,
    Sampler,
    TraceIdRatioBased,
)
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import SpanContext, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

logger = logging.getLogger(__name__)

SCOPE_NAME = "stepspan"
SCHEMA_URL = Schemas.V1_44_0.value
ROOT_SPAN = "text-to-image"

# A request of 30 steps is 38 spans and one of 100 steps 108. A GPU serves about one such request a
# second and the demo model about five, so a queue of 8,192 rides out some 40 s to 200 s of a dead
# backend, at about 1.5 kB a span 12 MB. A batch of 512 is 13 requests and under 200 kB on the wire,
# far below every backend's limit. One second instead of the SDK's five is how soon a trace can be
# looked at; it costs at most one small export a second.
MAX_QUEUE_SIZE = 8192
MAX_EXPORT_BATCH_SIZE = 512
SCHEDULE_DELAY_MILLIS = 1000.0

SettledSpans = Callable[[str, int], None]
"""Told a value of `catalogue.SPAN_RESULTS` and how many spans it befell."""


@dataclass(frozen=True, slots=True)
class TraceIdentity:
    """A request's place in a trace, drawn when it arrives and used when it has ended."""

    trace_id: int
    span_id: int
    exported: bool
    parent: SpanContext | None = None

    @property
    def trace_id_hex(self) -> str:
        return format(self.trace_id, "032x")

    @property
    def span_id_hex(self) -> str:
        return format(self.span_id, "016x")


class PendingIdGenerator(IdGenerator):
    """Hands the ids of the identity in hand to the next root span, and random ones to the rest.

    Spans are emitted by one thread at a time (`Tracing.start_root` holds a lock), so one slot is
    enough.
    """

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self.pending: TraceIdentity | None = None

    def generate_trace_id(self) -> int:
        return self.pending.trace_id if self.pending else self._random.generate_trace_id()

    def generate_span_id(self) -> int:
        pending, self.pending = self.pending, None
        return pending.span_id if pending else self._random.generate_span_id()


class WatchedExporter(SpanExporter):
    """Counts what became of every batch handed to the exporter it wraps."""

    def __init__(self, exporter: SpanExporter, on_settled: SettledSpans) -> None:
        self._exporter = exporter
        self._on_settled = on_settled
        self.settled = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self.settled += len(spans)
            exported = result is SpanExportResult.SUCCESS
            self._on_settled("exported" if exported else "failed", len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class Tracing:
    """Identities for requests, and a tracer for the spans of those chosen for export.

    Args:
        sampler: the head decision.
        exporter: where spans go, or None: then identities are still drawn (a response and a log
            line carry a trace id either way) and nothing is exported.
        resource: what every span is said to come from.
        on_settled: counts exported, failed and dropped spans.
    """

    def __init__(
        self,
        sampler: Sampler,
        exporter: SpanExporter | None,
        resource: Resource,
        on_settled: SettledSpans,
        version: str = "",
    ) -> None:
        self._sampler = sampler
        self._random = RandomIdGenerator()
        self._propagator = TraceContextTextMapPropagator()
        self._on_settled = on_settled
        self._submitted = 0
        self._emitting = threading.Lock()
        self._ids = PendingIdGenerator()
        self._watched: WatchedExporter | None = None
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        if exporter is not None:
            self._watched = WatchedExporter(exporter, on_settled)
            # Sampled already, and shut down by us within a bound: the SDK's own exit hook waits
            # for half a minute on a dead backend.
            self._provider = TracerProvider(
                sampler=ALWAYS_ON,
                resource=resource,
                shutdown_on_exit=False,
                id_generator=self._ids,
            )
            self._provider.add_span_processor(_batch_processor(self._watched))
            self._tracer = self._provider.get_tracer(SCOPE_NAME, version, schema_url=SCHEMA_URL)

    @property
    def exporting(self) -> bool:
        return self._tracer is not None

    def identify(self, *carriers: Mapping[str, str]) -> TraceIdentity:
        """Draw a request's ids and decide on its export.

        Args:
            carriers: mappings that may hold `traceparent` and `tracestate`, the preferred first.
                A malformed one is passed over, as the W3C recommendation asks.
        """
        parent: SpanContext | None = None
        context = Context()
        for carrier in carriers:
            context = self._propagator.extract(carrier, context=Context())
            candidate = trace.get_current_span(context).get_span_context()
            if candidate.is_valid:
                parent = candidate
                break
        trace_id = parent.trace_id if parent else self._random.generate_trace_id()
        decision = self._sampler.should_sample(context, trace_id, ROOT_SPAN, SpanKind.SERVER)
        return TraceIdentity(
            trace_id=trace_id,
            span_id=self._random.generate_span_id(),
            exported=self.exporting and decision.decision is Decision.RECORD_AND_SAMPLE,
            parent=parent,
        )

    def emit(self, identity: TraceIdentity, build: Callable[[Tracer, Context], int]) -> None:
        """Let `build` emit the tree whose root carries `identity`.

        `build` receives the tracer and the root's parent context, starts the root first, and
        returns how many spans it ended.
        """
        if self._tracer is None or not identity.exported:
            return
        parent = Context()
        if identity.parent is not None:
            parent = trace.set_span_in_context(trace.NonRecordingSpan(identity.parent), parent)
        with self._emitting:
            self._ids.pending = identity
            try:
                self._submitted += build(self._tracer, parent)
            finally:
                self._ids.pending = None

    def shutdown(self, budget_seconds: float) -> int:
        """Export what is queued, for at most `budget_seconds`. Returns how many spans were lost.

        The SDK's own flush ignores its time limit, so it runs in a daemon thread that is left
        behind when the budget is spent.
        """
        if self._provider is None or self._watched is None:
            return 0
        flusher = threading.Thread(
            target=self._provider.shutdown, name="span-shutdown", daemon=True
        )
        flusher.start()
        flusher.join(budget_seconds)
        lost = max(0, self._submitted - self._watched.settled)
        if lost:
            self._on_settled("dropped", lost)
            logger.warning(
                "%d spans were not exported within the %.1f s allowed at shutdown",
                lost,
                budget_seconds,
            )
        return lost


def _batch_processor(exporter: SpanExporter) -> BatchSpanProcessor:
    """Our sizes where the operator named none; an `OTEL_BSP_*` variable always wins."""

    def ours(variable: str, value: float) -> float | None:
        return None if os.environ.get(variable) else value

    queue_size = ours("OTEL_BSP_MAX_QUEUE_SIZE", MAX_QUEUE_SIZE)
    batch_size = ours("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", MAX_EXPORT_BATCH_SIZE)
    if queue_size is None and batch_size is not None:
        # The SDK refuses a batch larger than the queue; a small queue means small batches.
        batch_size = min(batch_size, int(os.environ["OTEL_BSP_MAX_QUEUE_SIZE"]))
    return BatchSpanProcessor(
        exporter,
        max_queue_size=None if queue_size is None else int(queue_size),
        max_export_batch_size=None if batch_size is None else int(batch_size),
        schedule_delay_millis=ours("OTEL_BSP_SCHEDULE_DELAY", SCHEDULE_DELAY_MILLIS),
    )


def ratio_sampler(rate: float) -> Sampler:
    """The default head decision: a caller's decision stands, else one trace in 1/`rate`."""
    return ParentBased(root=TraceIdRatioBased(rate))


def otlp_exporter() -> SpanExporter:
    """The OTLP/HTTP protobuf exporter; it reads the standard `OTEL_EXPORTER_OTLP_*` variables."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
