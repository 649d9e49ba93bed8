"""Trace identity, head sampling, export and shutdown, with the SDK's real processor."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from metrics.batch_sizes import (
    MAX_EXPORT_BATCH_SIZE,
    MAX_QUEUE_SIZE,
    MOST_SPANS_PER_REQUEST,
    SPANS_PER_REQUEST,
    BatchSizes,
)
from metrics.catalogue import SPAN_RESULTS, render
from metrics.sampling import KeepRules, TraceIdentity, TraceSampling
from metrics.spans import SpanNode, request_tree
from metrics.tracing import (
    HONEYCOMB_SAMPLE_RATE,
    PROBABILITY,
    SpanDestination,
    Tracing,
    sdk_metrics,
)
from tests.metrics.timings import START_NS, request_timing, run_timing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED_PARENT = PARENT[:-2] + "00"


def tracing(
    exporter: SpanExporter | None,
    rate: float = 1.0,
    batches: BatchSizes | None = None,
    **destination: Any,
) -> tuple[Tracing, Counter[str]]:
    """A pipeline, and its counts: spans by result, and all that ended."""
    counts: Counter[str] = Counter()

    def on_result(result: str, count: int) -> None:
        assert result in SPAN_RESULTS
        counts[result] += count

    pipeline = Tracing(
        TraceSampling(rate, keep=KeepRules()),
        None if exporter is None else SpanDestination(exporter, **destination),
        Resource.create({}),
        on_ended=lambda count: counts.update(ended=count),
        on_result=on_result,
        batches=batches,
    )
    return pipeline, counts


def emit_two(pipeline: Tracing, identity: TraceIdentity | None = None) -> bool:
    return pipeline.emit(identity or pipeline.identify(), TWO_SPANS)


TWO_SPANS = SpanNode("root", 1, 4, children=(SpanNode("child", 2, 3),))


def test_a_callers_context_is_continued() -> None:
    exporter = InMemorySpanExporter()
    pipeline, _ = tracing(exporter)
    identity = pipeline.identify({"traceparent": PARENT, "tracestate": "vendor=1"})
    assert identity.trace_id_hex == "0af7651916cd43dd8448eb211c80319c"
    assert identity.exported
    emit_two(pipeline, identity)
    pipeline.shutdown(5)
    child, root = exporter.get_finished_spans()
    assert root.context is not None
    assert root.context.span_id == identity.span_id
    assert root.parent is not None
    assert format(root.parent.span_id, "016x") == "b7ad6b7169203331"
    assert root.parent.is_remote
    assert root.context.trace_state.get("vendor") == "1"
    assert child.parent is not None
    assert child.parent.span_id == identity.span_id


def test_an_unsampled_callers_decision_is_followed() -> None:
    exporter = InMemorySpanExporter()
    pipeline, counts = tracing(exporter)
    identity = pipeline.identify({"traceparent": UNSAMPLED_PARENT})
    assert not identity.exported
    assert identity.trace_id_hex == PARENT[3:35]
    emit_two(pipeline, identity)
    assert pipeline.shutdown(5) == 0
    assert exporter.get_finished_spans() == ()
    assert counts == {}


@pytest.mark.parser
@given(st.text(max_size=80))
def test_a_malformed_context_is_ignored(text: str) -> None:
    pipeline, _ = tracing(None)
    identity = pipeline.identify({"traceparent": text, "tracestate": text})
    assert identity.parent is None or len(text) >= 55
    assert identity.trace_id != 0


def test_the_first_carrier_that_holds_a_context_wins() -> None:
    pipeline, _ = tracing(None)
    other = PARENT.replace("0af7", "1bf7")
    assert pipeline.identify({"traceparent": ""}, {"traceparent": other}).trace_id_hex[:4] == "1bf7"
    assert (
        pipeline.identify({"traceparent": PARENT}, {"traceparent": other}).trace_id_hex[:4]
        == "0af7"
    )


def test_without_an_exporter_ids_are_drawn_and_nothing_is_exported() -> None:
    pipeline, _ = tracing(None)
    first, second = pipeline.identify(), pipeline.identify()
    assert first.trace_id != second.trace_id
    assert not first.exported
    emit_two(pipeline, first)
    assert pipeline.shutdown(1) == 0


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_ratio_holds(rate: float) -> None:
    pipeline, _ = tracing(InMemorySpanExporter(), rate)
    chosen = sum(pipeline.identify().exported for _ in range(4000))
    # Five standard deviations of a binomial.
    assert chosen / 4000 == pytest.approx(rate, abs=5 * (0.25 * 0.75 / 4000) ** 0.5)
    pipeline.shutdown(1)


def test_the_global_provider_is_not_used() -> None:
    from opentelemetry import trace

    before = trace.get_tracer_provider()
    pipeline, _ = tracing(InMemorySpanExporter())
    assert trace.get_tracer_provider() is before
    pipeline.shutdown(1)


class SilentExporter(SpanExporter):
    """A backend that accepts a connection and never answers."""

    def __init__(self) -> None:
        self.called = threading.Event()
        self.released = threading.Event()
        self.answered = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.called.set()
        self.released.wait(30)
        self.answered.set()
        return SpanExportResult.FAILURE


def test_shutdown_is_bounded_and_logs_what_was_lost(caplog: pytest.LogCaptureFixture) -> None:
    exporter = SilentExporter()
    pipeline, counts = tracing(exporter)
    for _ in range(3):
        emit_two(pipeline)
    start = time.monotonic()
    lost = pipeline.shutdown(0.3)
    assert time.monotonic() - start < 2
    assert lost == 6
    assert counts == {"ended": 6, "shutdown": 6}
    assert [r.message for r in caplog.records if "spans were not exported" in r.message] == [
        "6 spans were not exported within the 0.3 s allowed at shutdown"
    ]
    assert pipeline.left_behind
    exporter.released.set()
    exporter.answered.wait(5)
    assert counts == {"ended": 6, "shutdown": 6}  # a late result is not counted twice


class RaisingExporter(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        raise ConnectionError("no route")


def test_a_failing_exporter_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, counts = tracing(RaisingExporter())
    emit_two(pipeline)
    assert pipeline.shutdown(5) == 0
    assert counts == {"ended": 2, "failed": 2}


def test_the_operators_batch_settings_win() -> None:
    exporter = InMemorySpanExporter()
    pipeline, _ = tracing(exporter, batches=BatchSizes.chosen(queue_size=100))
    for _ in range(40):
        emit_two(pipeline)
    pipeline.shutdown(5)
    assert len(exporter.get_finished_spans()) == 80


def test_ids_of_one_trace_do_not_leak_into_the_next() -> None:
    exporter = InMemorySpanExporter()
    pipeline, _ = tracing(exporter)
    identities = [pipeline.identify() for _ in range(5)]
    for identity in identities:
        emit_two(pipeline, identity)
    pipeline.shutdown(5)
    spans = exporter.get_finished_spans()
    contexts = [span.context for span in spans]
    assert len({c.span_id for c in contexts if c}) == 10
    roots = [s.context.span_id for s in spans if s.name == "root" and s.context]
    assert roots == [identity.span_id for identity in identities]


def test_the_batch_sizes_follow_from_the_requests() -> None:
    assert (
        request_tree(request_timing(run=run_timing(START_NS, (10,) * 30))).size == SPANS_PER_REQUEST
    )
    longest = request_timing(run=run_timing(START_NS, (10,) * 100))
    assert request_tree(longest).size == MOST_SPANS_PER_REQUEST
    assert MAX_QUEUE_SIZE == 8192
    assert MOST_SPANS_PER_REQUEST < MAX_EXPORT_BATCH_SIZE < MAX_QUEUE_SIZE


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_every_span_has_its_probability(rate: float) -> None:
    exporter = InMemorySpanExporter()
    pipeline, _ = tracing(exporter, rate, honeycomb=True)
    while not emit_two(pipeline):
        pass
    pipeline.shutdown(5)
    spans = exporter.get_finished_spans()
    assert len(spans) == 2
    for span in spans:
        assert span.attributes is not None
        assert span.attributes[PROBABILITY] == rate
        assert span.attributes[HONEYCOMB_SAMPLE_RATE] == round(1 / rate)


@pytest.mark.parametrize(
    ("threshold", "weight"),
    [("ffffffff", 2**31 - 1), ("fffffffe", 2**31 - 1), ("fffffffc", 2**30)],
)
def test_honeycombs_sample_rate_fits_32_bits(threshold: str, weight: int) -> None:
    exporter = InMemorySpanExporter()
    pipeline, _ = tracing(exporter, honeycomb=True)
    caller = {
        "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
        "tracestate": f"ot=th:{threshold}",
    }
    pipeline.emit(pipeline.identify(caller), request_tree(request_timing()))
    pipeline.shutdown(5)
    spans = exporter.get_finished_spans()
    assert {(span.attributes or {})[HONEYCOMB_SAMPLE_RATE] for span in spans} == {weight}


def test_only_honeycomb_gets_its_sample_rate() -> None:
    exporter = InMemorySpanExporter()
    pipeline, _ = tracing(exporter)
    emit_two(pipeline)
    pipeline.shutdown(5)
    spans = exporter.get_finished_spans()
    assert [set(span.attributes or {}) for span in spans] == [{PROBABILITY}, {PROBABILITY}]


def test_a_full_queue_drops_whole_trees_and_counts_them() -> None:
    exporter = SilentExporter()
    pipeline, counts = tracing(exporter, batches=BatchSizes(110, 20, 1))
    handed_over = sum(emit_two(pipeline) for _ in range(100))
    assert handed_over == 55  # what waits and what is on its way never exceed the queue's size
    assert pipeline.outstanding == 110
    assert counts == {"ended": 200, "queue_full": 90}
    exporter.released.set()
    assert pipeline.shutdown(10) == 0
    assert counts == {"ended": 200, "queue_full": 90, "failed": 110}


def test_memory_is_bounded_whatever_the_backend_does() -> None:
    exporter = SilentExporter()
    pipeline, counts = tracing(exporter)
    request = request_timing(run=run_timing(START_NS, (10,) * 30))

    def emit(count: int) -> None:
        for _ in range(count):
            pipeline.emit(pipeline.identify(), request_tree(request))

    tracemalloc.start()
    emit(300)  # past the queue's size
    full, _ = tracemalloc.get_traced_memory()
    emit(3000)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pipeline.outstanding <= MAX_QUEUE_SIZE
    assert full < 40e6
    assert after - full < 1e6
    assert peak - full < 1e6
    assert counts["ended"] == 3300 * SPANS_PER_REQUEST
    exporter.released.set()
    pipeline.shutdown(0.1)


def test_the_rejected_spans_of_a_partial_success_are_counted() -> None:
    pipeline, counts = tracing(InMemorySpanExporter(), take_rejected=iter((1, 0)).__next__)
    emit_two(pipeline)
    pipeline.shutdown(5)
    assert counts == {"ended": 2, "exported": 1, "rejected": 1}


def test_the_sdks_own_metrics_reach_the_registry_and_nothing_else_does() -> None:
    from opentelemetry.metrics import get_meter_provider

    before = get_meter_provider()
    registry = CollectorRegistry()
    batches = BatchSizes(schedule_delay_millis=60_000)
    pipeline, _ = tracing(
        InMemorySpanExporter(), batches=batches, meter_provider=sdk_metrics(registry)
    )
    emit_two(pipeline)

    def scraped(name: str) -> float:
        body, _ = render(registry, "")
        values = [
            float(line.split()[-1])
            for line in body.decode().splitlines()
            if line.startswith((name + " ", name + "{"))
        ]
        return sum(values)

    assert scraped("otel_sdk_processor_span_queue_size") == 2
    assert scraped("otel_sdk_processor_span_queue_capacity") == MAX_QUEUE_SIZE
    pipeline.shutdown(5)
    assert scraped("otel_sdk_processor_span_queue_size") == 0
    assert scraped("otel_sdk_processor_span_processed_total") == 2
    assert get_meter_provider() is before
    assert "OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED" not in os.environ
    assert "target_info" not in render(registry, "")[0].decode()


def test_an_operator_may_turn_the_sdks_metrics_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "false")
    registry = CollectorRegistry()
    pipeline, _ = tracing(InMemorySpanExporter(), meter_provider=sdk_metrics(registry))
    emit_two(pipeline)
    pipeline.shutdown(5)
    assert render(registry, "")[0] == b""
