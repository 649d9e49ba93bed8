"""The tracing pipeline: who a request is, and the way its spans take out of the process.

A private provider passed by hand, never the global one: another library in the process may have
claimed that (importing fal does), and then nothing would ever be exported. A request's tree is
built when the request has ended, so the provider itself samples nothing: `identify` draws the ids
and makes the head decision at the request's start, `settle` has the last word, and `emit` builds
only what was chosen.

The books balance: every span that ended was exported, was refused or lost for a reason that is
counted, or waits.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import MeterProvider
from opentelemetry.sdk.environment_variables import OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED
from opentelemetry.sdk.metrics import MeterProvider as SdkMeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import Link, SpanContext, SpanKind, Tracer, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes
from prometheus_client import CollectorRegistry

from metrics.records import RequestTiming
from metrics.sampling import KeepReason, Sampling, TraceIdentity
from metrics.spans import SpanNode, emit

logger = logging.getLogger(__name__)

SCOPE_NAME = "stepspan"
SCHEMA_URL = Schemas.V1_44_0.value

# The batch processor's sizes. A request is ten spans and one a step. A GPU serves about one request
# of 30 steps a second and the demo model about five shorter ones; call it five of 40 spans.
SPANS_PER_REQUEST = 10 + 30
MOST_SPANS_PER_REQUEST = 10 + 100
REQUESTS_PER_SECOND = 5
# A backend that is being redeployed is back within half a minute: until then nothing is lost. What
# that holds, 8,192 spans of about 1.5 kB, is 12 MB, the most that telemetry ever keeps.
OUTAGE_SECONDS = 30
MAX_QUEUE_SIZE = 2 ** math.ceil(math.log2(SPANS_PER_REQUEST * REQUESTS_PER_SECOND * OUTAGE_SECONDS))
# A dozen requests and under 200 kB on the wire, far below every backend's limit; at the highest
# rate a batch fills in two and a half seconds, so it is the delay that decides when one leaves.
MAX_EXPORT_BATCH_SIZE = 512
# How soon a trace can be looked at. It costs at most one small export a second.
SCHEDULE_DELAY_MILLIS = 1000

PROBABILITY = "sampling.probability"
"""On every exported span: how likely it was to be exported; 1/p is how many it stands for."""

HONEYCOMB_SAMPLE_RATE = "SampleRate"
"""The same as Honeycomb reads it, which weighs its counts by it: 1/p as a whole number."""

SpansSettled = Callable[[str, int], None]
"""Told a value of `catalogue.SPAN_RESULTS` and how many spans it befell."""


class PresetIds(IdGenerator, Sampler):
    """What the provider asks when a span starts: gives the ids of the identity in hand to the next
    root, random ones to the rest, and its probability to all of them.

    Spans are emitted by one thread at a time (`Tracing.emit` holds a lock), so one slot is enough.
    """

    def __init__(self, honeycomb: bool) -> None:
        self._random = RandomIdGenerator()
        self._honeycomb = honeycomb
        self._root: TraceIdentity | None = None
        self._attributes: dict[str, int | float] = {}

    def take(self, identity: TraceIdentity) -> None:
        self._root = identity
        self._attributes = {PROBABILITY: identity.probability}
        if self._honeycomb:
            self._attributes[HONEYCOMB_SAMPLE_RATE] = max(1, round(1 / identity.probability))

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
        """Everything: what is not exported never comes here."""
        parent = trace.get_current_span(parent_context).get_span_context()
        return SamplingResult(
            Decision.RECORD_AND_SAMPLE,
            {**(attributes or {}), **self._attributes},
            parent.trace_state if parent.is_valid else None,
        )

    def get_description(self) -> str:
        return "DecidedBefore"


class SpanLedger(SpanProcessor):
    """How many spans have ended, and what became of them. Added up by several threads."""

    def __init__(self, on_ended: Callable[[int], None], on_settled: SpansSettled) -> None:
        self._lock = threading.Lock()
        self._on_ended = on_ended
        self._on_settled = on_settled
        self._closed = False
        self.outstanding = 0
        """Spans that wait or are on their way."""

    def on_end(self, span: ReadableSpan) -> None:
        self._on_ended(1)
        with self._lock:
            self.outstanding += 1

    def never_built(self, count: int, reason: str) -> None:
        """Spans that would have ended and were given up before."""
        self._on_ended(count)
        self._on_settled(reason, count)

    def settle(self, results: Mapping[str, int]) -> None:
        """Spans that left, by what became of them; too late once the books are closed."""
        with self._lock:
            if self._closed:
                return
            self.outstanding -= sum(results.values())
        for result, count in results.items():
            if count:
                self._on_settled(result, count)

    def close(self, reason: str) -> int:
        """Nothing settles any more; returns how many spans that befell."""
        with self._lock:
            self._closed = True
            lost, self.outstanding = self.outstanding, 0
        if lost:
            self._on_settled(reason, lost)
        return lost


class _WatchedExporter(SpanExporter):
    """Enters in the books what became of every batch handed to the exporter it wraps."""

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
                self._ledger.settle({"exported": len(spans) - rejected, "rejected": rejected})
            else:
                self._ledger.settle({"failed": len(spans)})
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


@dataclass(frozen=True, slots=True)
class SpanDestination:
    """Where spans go.

    Args:
        exporter: takes them there.
        take_rejected: how many spans the backend refused, of batches that it accepted, since it
            was last asked.
        honeycomb: whether the backend wants its own sample rate on every span.
        meter_provider: where the SDK counts its own doings, or None: it does not.
    """

    exporter: SpanExporter
    take_rejected: Callable[[], int] = lambda: 0
    honeycomb: bool = False
    meter_provider: MeterProvider | None = None


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The batch span processor's queue and batch sizes, in spans, and its delay."""

    queue_size: int = MAX_QUEUE_SIZE
    export_batch_size: int = MAX_EXPORT_BATCH_SIZE
    schedule_delay_millis: int = SCHEDULE_DELAY_MILLIS

    @classmethod
    def chosen(
        cls,
        queue_size: int | None = None,
        export_batch_size: int | None = None,
        schedule_delay_millis: int | None = None,
    ) -> BatchSizes:
        """The sizes given, and the defaults for those that are None."""
        queue_size = queue_size or MAX_QUEUE_SIZE
        return cls(
            queue_size,
            # The SDK refuses a batch larger than the queue; a small queue means small batches.
            export_batch_size or min(MAX_EXPORT_BATCH_SIZE, queue_size),
            schedule_delay_millis or SCHEDULE_DELAY_MILLIS,
        )


class Tracing:
    """Identities for requests, and a tracer for the spans of those chosen for export.

    Args:
        sampling: which requests are chosen.
        destination: where spans go, or None: then identities are still drawn (a response and a log
            line carry a trace id either way) and nothing is exported.
        resource: what every span is said to come from.
        on_ended: counts spans that ended.
        on_settled: counts what became of them.
        batches: the batch processor's sizes; the defaults unless given.
    """

    def __init__(
        self,
        sampling: Sampling,
        destination: SpanDestination | None,
        resource: Resource,
        *,
        on_ended: Callable[[int], None],
        on_settled: SpansSettled,
        version: str = "",
        batches: BatchSizes | None = None,
    ) -> None:
        self._sampling = sampling
        self._ids = RandomIdGenerator()
        self._propagator = TraceContextTextMapPropagator()
        self._ledger = SpanLedger(on_ended, on_settled)
        self._emitting = threading.Lock()
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        self.left_behind = False
        """Whether a thread still tries to export though the time for it is over."""
        if destination is not None:
            self._preset_ids = PresetIds(destination.honeycomb)
            # Shut down by us within a bound: the SDK's own exit hook waits for half a minute on a
            # dead backend.
            self._provider = TracerProvider(
                sampler=self._preset_ids,
                resource=resource,
                shutdown_on_exit=False,
                id_generator=self._preset_ids,
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
        """Spans that wait or are on their way."""
        return self._ledger.outstanding

    def identify(self, *carriers: Mapping[str, str]) -> TraceIdentity:
        """Draw a request's ids and decide on its export.

        Args:
            carriers: mappings that may hold `traceparent` and `tracestate`, the preferred first.
                A malformed one is passed over, as the W3C recommendation asks.
        """
        identity = self._sampling.decide(
            self._ids.generate_trace_id(), self._ids.generate_span_id(), self._caller(carriers)
        )
        return identity if self.exporting else _never_exported(identity)

    def worth_keeping(self, request: RequestTiming) -> KeepReason | None:
        """Why a request that has ended is worth more than the ratio's word, or None."""
        return self._sampling.worth_keeping(request)

    def settle(self, identity: TraceIdentity, worth_keeping: bool) -> TraceIdentity:
        """The last word on a request that has ended: whether it is exported, and how likely that
        was. For one thread."""
        return self._sampling.settle(identity, worth_keeping)

    def emit(self, identity: TraceIdentity, tree: SpanNode) -> bool:
        """Emit a tree whose root gets the ids of `identity`; returns whether it was queued.

        A tree for which the queue has no room is dropped whole. The SDK would drop the oldest spans
        instead, and leave trees with holes.
        """
        if self._tracer is None or not identity.exported:
            return False
        parent = Context()
        if identity.parent is not None:
            parent = trace.set_span_in_context(trace.NonRecordingSpan(identity.parent), parent)
        with self._emitting:
            if self._ledger.outstanding + tree.size > self._queue_size:
                self._ledger.never_built(tree.size, "queue_full")
                return False
            self._preset_ids.take(identity)
            emit(self._tracer, parent, tree)
        return True

    def shutdown(self, budget_seconds: float) -> int:
        """Export what is queued, for at most `budget_seconds`. Returns how many spans were lost.

        The SDK's own flush ignores its time limit, so it runs in a daemon thread that is left
        behind when the budget is spent.
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

    def _caller(self, carriers: Sequence[Mapping[str, str]]) -> SpanContext | None:
        for carrier in carriers:
            context = self._propagator.extract(carrier, context=Context())
            caller = trace.get_current_span(context).get_span_context()
            if caller.is_valid:
                return caller
        return None


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
            meter_provider=meter_provider,
        )


@contextmanager
def _self_metrics(meter_provider: MeterProvider | None) -> Iterator[None]:
    """Within it, parts of the SDK that are made count their own doings on `meter_provider`.

    The SDK knows no other switch than a variable of the environment, read as each part is made. An
    operator's word stands.
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
    """A provider whose metrics are scraped with `registry`: for the SDK's own health, whose names
    begin with `otel_sdk_`."""
    reader = PrometheusMetricReader(
        disable_target_info=True, scope_info_enabled=False, registry=registry
    )
    return SdkMeterProvider([reader], resource=Resource.get_empty(), shutdown_on_exit=False)


def otlp_destination(honeycomb: bool, meter_provider: MeterProvider | None) -> SpanDestination:
    """The OTLP/HTTP endpoint that the standard `OTEL_EXPORTER_OTLP_*` variables name."""
    from metrics.otlp import otlp_exporter

    with _self_metrics(meter_provider):
        exporter, answers = otlp_exporter(meter_provider)
    return SpanDestination(exporter, answers.take_rejected, honeycomb, meter_provider)
