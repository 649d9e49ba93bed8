"""Trace identity and span export.

The provider is private and passed by hand. Another library may have claimed the global one
(importing fal does), and then nothing would be exported. A request's tree is built after the
request has ended, so the provider itself samples everything it gets: `identify` draws the ids and
decides at the start, `decide_at_end` decides at the end, and `emit` builds the chosen trees only.

Every span is accounted for: it was exported, it was lost with a counted result, or it waits.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import MeterProvider, NoOpMeterProvider
from opentelemetry.sdk.environment_variables import OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED
from opentelemetry.sdk.metrics import MeterProvider as SdkMeterProvider
from opentelemetry.sdk.metrics import TraceBasedExemplarFilter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import Link, SpanContext, SpanKind, Tracer, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes
from prometheus_client import CollectorRegistry

from metrics.batch_sizes import BatchSizes as BatchSizes  # the bench's worker gets it from here
from metrics.records import RequestTiming
from metrics.sampling import KeepReason, TraceIdentity, TraceSampling
from metrics.spans import SpanNode, emit

logger = logging.getLogger(__name__)

SCOPE_NAME = "stepspan"
SCHEMA_URL = Schemas.V1_44_0.value

PROBABILITY = "sampling.probability"
"""On every exported span: the probability that it was exported. Its weight is 1/p."""

MAX_TRACE_STATE_CHARACTERS = 512
"""W3C: at least 512 characters of a `tracestate` should be passed on. More is not, because every
exported span repeats it: 8 kB on each of a batch's 512 spans would exceed what backends accept."""

Carrier = Mapping[str, str | Sequence[str]]
"""May hold `traceparent`, and `tracestate` as one text or as several, in order."""

HONEYCOMB_SAMPLE_RATE = "SampleRate"
"""The weight as Honeycomb reads it: 1/p as an integer."""
MAX_HONEYCOMB_SAMPLE_RATE = 2**31 - 1
"""Honeycomb keeps it in 32 bits. An OTLP attribute has 64, which 1/p may exceed too."""

CountResults = Callable[[str, int], None]
"""Counts spans by result: a value of `catalogue.SPAN_RESULTS`, and how many spans."""


class PresetIds(IdGenerator, Sampler):
    """Gives the next root span the ids of an identity that was drawn before.

    The provider calls it when a span starts. All other spans get random ids. Every span gets the
    identity's probability. One thread at a time emits spans (`Tracing.emit` holds a lock), so one
    slot is enough.
    """

    def __init__(self, honeycomb: bool) -> None:
        self._random = RandomIdGenerator()
        self._honeycomb = honeycomb
        self._root: TraceIdentity | None = None
        self._attributes: dict[str, int | float] = {}

    def use_for_next_root(self, identity: TraceIdentity) -> None:
        self._root = identity
        self._attributes = {PROBABILITY: identity.probability}
        if self._honeycomb:
            weight = min(1 / identity.probability, MAX_HONEYCOMB_SAMPLE_RATE)
            self._attributes[HONEYCOMB_SAMPLE_RATE] = max(1, round(weight))

    def generate_trace_id(self) -> int:
        return self._root.trace_id if self._root else self._random.generate_trace_id()

    def generate_span_id(self) -> int:
        root, self._root = self._root, None
        return root.span_id if root else self._random.generate_span_id()

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Sample everything: a trace that is not exported never comes here."""
        parent = trace.get_current_span(parent_context).get_span_context()
        return SamplingResult(
            Decision.RECORD_AND_SAMPLE,
            {**(attributes or {}), **self._attributes},
            parent.trace_state if parent.is_valid else None,
        )

    def get_description(self) -> str:
        return "DecidedBefore"


class SpanLedger(SpanProcessor):
    """Accounts for every span: ended, and by result. Safe for several threads."""

    def __init__(self, on_ended: Callable[[int], None], on_result: CountResults) -> None:
        self._lock = threading.Lock()
        self._on_ended = on_ended
        self._on_result = on_result
        self._closed = False
        self.outstanding = 0
        """Spans in the queue and in the batch that is being exported."""

    def on_end(self, span: ReadableSpan) -> None:
        self._on_ended(1)
        with self._lock:
            self.outstanding += 1

    def count_dropped(self, count: int, reason: str) -> None:
        """Count spans that were dropped before they were built."""
        self._on_ended(count)
        self._on_result(reason, count)

    def count_results(self, results: Mapping[str, int]) -> None:
        """Count spans that left the queue, by result. Does nothing after `close`."""
        with self._lock:
            if self._closed:
                return
            self.outstanding -= sum(results.values())
        for result, count in results.items():
            if count:
                self._on_result(result, count)

    def close(self, reason: str) -> int:
        """Count all outstanding spans as `reason`; returns how many."""
        with self._lock:
            self._closed = True
            lost, self.outstanding = self.outstanding, 0
        if lost:
            self._on_result(reason, lost)
        return lost


class _WatchedExporter(SpanExporter):
    """Wraps an exporter and counts the result of every batch."""

    def __init__(
        self, exporter: SpanExporter, ledger: SpanLedger, take_rejected: Callable[[], int]
    ) -> None:
        self._exporter = exporter
        self._ledger = ledger
        self._take_rejected = take_rejected

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            rejected = min(self._take_rejected(), len(spans))
            if result is SpanExportResult.SUCCESS:
                self._ledger.count_results(
                    {"exported": len(spans) - rejected, "rejected": rejected}
                )
            else:
                self._ledger.count_results({"failed": len(spans)})
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


@dataclass(frozen=True, slots=True)
class SpanDestination:
    """Where spans go.

    Args:
        exporter: sends them.
        take_rejected: returns how many spans of accepted batches the backend refused since the last
            call.
        honeycomb: whether every span needs Honeycomb's sample rate.
        meter_provider: for the SDK's metrics of itself; None: it has none.
    """

    exporter: SpanExporter
    take_rejected: Callable[[], int] = lambda: 0
    honeycomb: bool = False
    meter_provider: MeterProvider | None = None


class Tracing:
    """Draws identities for requests, and exports the trees of the chosen ones.

    Args:
        sampling: chooses the requests.
        destination: where spans go. None: nothing is exported, but identities are still drawn,
            because responses and log lines carry a trace id in any case.
        resource: describes the process, on every span.
        on_ended: counts spans that ended.
        on_result: counts spans by result.
        batches: the batch processor's sizes; None: the defaults.
        limits: the SDK's limits of a span; None: those of the environment.
    """

    def __init__(
        self,
        sampling: TraceSampling,
        destination: SpanDestination | None,
        resource: Resource,
        *,
        on_ended: Callable[[int], None],
        on_result: CountResults,
        version: str = "",
        batches: BatchSizes | None = None,
        limits: SpanLimits | None = None,
    ) -> None:
        self._sampling = sampling
        self._ids = RandomIdGenerator()
        self._propagator = TraceContextTextMapPropagator()
        self._ledger = SpanLedger(on_ended, on_result)
        self._emitting = threading.Lock()
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        self.left_behind = False
        """Whether a thread still exports although its time at shutdown is over."""
        if destination is not None:
            self._preset_ids = PresetIds(destination.honeycomb)
            # `shutdown` is bounded; the SDK's exit hook would wait half a minute for a dead
            # backend.
            self._provider = TracerProvider(
                sampler=self._preset_ids,
                resource=resource,
                shutdown_on_exit=False,
                id_generator=self._preset_ids,
                span_limits=limits,
                # Else the SDK loads the global provider that OTEL_PYTHON_METER_PROVIDER names.
                meter_provider=NoOpMeterProvider(),
            )
            watched = _WatchedExporter(
                destination.exporter, self._ledger, destination.take_rejected
            )
            sizes = batches or BatchSizes()
            self._queue_size = sizes.queue_size
            self._provider.add_span_processor(self._ledger)
            self._provider.add_span_processor(
                _batch_processor(watched, sizes, destination.meter_provider)
            )
            self._tracer = self._provider.get_tracer(SCOPE_NAME, version, schema_url=SCHEMA_URL)

    @property
    def exporting(self) -> bool:
        return self._tracer is not None

    @property
    def outstanding(self) -> int:
        """Spans in the queue and in the batch that is being exported."""
        return self._ledger.outstanding

    def identify(self, *carriers: Carrier) -> TraceIdentity:
        """Draw a request's ids and decide on its export at its start.

        Args:
            carriers: in order of precedence. As W3C requires, a malformed `traceparent` means that
                there is no caller, and a malformed `tracestate` alone that it is empty.
        """
        identity = self._sampling.decide_at_start(
            self._ids.generate_trace_id(), self._ids.generate_span_id(), self._caller(carriers)
        )
        return identity if self.exporting else _never_exported(identity)

    def keep_reason(self, request: RequestTiming) -> KeepReason | None:
        """Why tail sampling wants to keep a request that has ended, or None."""
        return self._sampling.keep_reason(request)

    def decide_at_end(self, identity: TraceIdentity, keep: bool) -> TraceIdentity:
        """Decide on the export of a request that has ended. For one thread."""
        return self._sampling.decide_at_end(identity, keep)

    def emit(self, identity: TraceIdentity, tree: SpanNode) -> bool:
        """Emit a tree whose root has the ids of `identity`; returns whether it was queued.

        If the queue has no room, the whole tree is dropped. The SDK would drop the oldest spans
        instead and leave trees with holes.
        """
        if self._tracer is None or not identity.exported:
            return False
        parent = Context()
        if identity.parent is not None:
            parent = trace.set_span_in_context(trace.NonRecordingSpan(identity.parent), parent)
        with self._emitting:
            if self._ledger.outstanding + tree.size > self._queue_size:
                self._ledger.count_dropped(tree.size, "queue_full")
                return False
            self._preset_ids.use_for_next_root(identity)
            emit(self._tracer, parent, tree)
        return True

    def shutdown(self, budget_seconds: float) -> int:
        """Export the queue within `budget_seconds`; returns how many spans were lost.

        The SDK's flush ignores its time limit, so it runs in a daemon thread that may outlive the
        budget.
        """
        if self._provider is None:
            return 0
        flusher = threading.Thread(
            target=self._provider.shutdown, name="span-shutdown", daemon=True
        )
        flusher.start()
        flusher.join(budget_seconds)
        self.left_behind = flusher.is_alive()
        lost = self._ledger.close("shutdown")
        if lost:
            logger.warning(
                "%d spans were not exported within the %.1f s allowed at shutdown",
                lost,
                budget_seconds,
            )
        return lost

    def _caller(self, carriers: Sequence[Carrier]) -> SpanContext | None:
        for carrier in carriers:
            context = self._propagator.extract(carrier, context=Context())
            caller = trace.get_current_span(context).get_span_context()
            if caller.is_valid:
                return SpanContext(
                    caller.trace_id,
                    caller.span_id,
                    is_remote=True,
                    trace_flags=caller.trace_flags,
                    trace_state=shortened(caller.trace_state),
                )
        return None


def drawn_identity() -> TraceIdentity:
    """A new identity that is never exported, for what no `Tracing` is there for."""
    ids = RandomIdGenerator()
    return TraceIdentity(ids.generate_trace_id(), ids.generate_span_id(), exported=False)


def shortened(state: TraceState) -> TraceState:
    """A trace state of at most `MAX_TRACE_STATE_CHARACTERS`, cut as W3C says.

    Whole entries are removed: those of more than 128 characters first, then from the end. `ot`
    stays: it is OpenTelemetry's own, and holds the caller's sampling probability.
    """
    entries = {key: f"{key}={value}" for key, value in state.items()}
    from_the_end = [key for key in reversed(entries) if key != "ot"]
    long = [key for key in from_the_end if len(entries[key]) > 128]
    for key in (*long, *(key for key in from_the_end if key not in long)):
        if len(",".join(entries.values())) <= MAX_TRACE_STATE_CHARACTERS:
            break
        del entries[key]
    return TraceState([(key, state[key]) for key in entries])


def _never_exported(identity: TraceIdentity) -> TraceIdentity:
    return dataclasses.replace(identity, exported=False, may_be_kept=False)


def _batch_processor(
    exporter: SpanExporter, sizes: BatchSizes, meter_provider: MeterProvider | None
) -> BatchSpanProcessor:
    with _self_metrics(meter_provider):
        return BatchSpanProcessor(
            exporter,
            max_queue_size=sizes.queue_size,
            max_export_batch_size=sizes.export_batch_size,
            schedule_delay_millis=sizes.schedule_delay_millis,
            meter_provider=meter_provider or NoOpMeterProvider(),
        )


@contextmanager
def _self_metrics(meter_provider: MeterProvider | None) -> Iterator[None]:
    """In this context, new parts of the SDK report metrics of themselves to `meter_provider`.

    The SDK's only switch is an environment variable, which it reads when it creates a part. A value
    that the operator set is kept.
    """
    name = OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED
    if meter_provider is None or name in os.environ:
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        del os.environ[name]


def sdk_metrics(registry: CollectorRegistry) -> MeterProvider:
    """A provider for the SDK's metrics of itself (`otel_sdk_*`), scraped with `registry`."""
    reader = PrometheusMetricReader(
        disable_target_info=True, scope_info_enabled=False, registry=registry
    )
    return SdkMeterProvider(
        [reader],
        resource=Resource.get_empty(),
        shutdown_on_exit=False,
        # Its default is read from the environment, where an empty value would be an error.
        exemplar_filter=TraceBasedExemplarFilter(),
    )


def otlp_destination(
    honeycomb: bool, meter_provider: MeterProvider | None, timeout_seconds: float | None = None
) -> SpanDestination:
    """The OTLP/HTTP endpoint of the standard `OTEL_EXPORTER_OTLP_*` variables.

    Args:
        timeout_seconds: time limit for one export, retries included; None: the environment's.
    """
    from metrics.otlp import otlp_exporter

    with _self_metrics(meter_provider):
        exporter, answers = otlp_exporter(meter_provider, timeout_seconds)
    return SpanDestination(exporter, answers.take_rejected, honeycomb, meter_provider)


def console_destination(meter_provider: MeterProvider | None) -> SpanDestination:
    """Standard output, where the SDK's own exporter writes each span as JSON."""
    return SpanDestination(ConsoleSpanExporter(out=sys.stdout), meter_provider=meter_provider)
