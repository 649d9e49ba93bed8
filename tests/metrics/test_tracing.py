"""Identities, head decisions, export and shutdown, with the SDK's real processor."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Tracer

from metrics.tracing import Tracing, ratio_sampler

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED_PARENT = PARENT[:-2] + "00"


def tracing(exporter: SpanExporter | None, rate: float = 1.0) -> tuple[Tracing, dict[str, int]]:
    settled: dict[str, int] = {}

    def on_settled(result: str, count: int) -> None:
        settled[result] = settled.get(result, 0) + count

    return Tracing(ratio_sampler(rate), exporter, Resource.create({}), on_settled), settled


def two_spans(tracer: Tracer, context: Context) -> int:
    from opentelemetry import trace

    root = tracer.start_span("root", context)
    tracer.start_span("child", trace.set_span_in_context(root, context)).end()
    root.end()
    return 2


def test_a_callers_context_is_continued() -> None:
    exporter = InMemorySpanExporter()
    pipeline, _ = tracing(exporter)
    identity = pipeline.identify({"traceparent": PARENT, "tracestate": "vendor=1"})
    assert identity.trace_id_hex == "0af7651916cd43dd8448eb211c80319c"
    assert identity.exported
    pipeline.emit(identity, two_spans)
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


def test_an_unsampled_caller_is_obeyed() -> None:
    exporter = InMemorySpanExporter()
    pipeline, settled = tracing(exporter)
    identity = pipeline.identify({"traceparent": UNSAMPLED_PARENT})
    assert not identity.exported
    assert identity.trace_id_hex == PARENT[3:35]
    pipeline.emit(identity, two_spans)
    assert pipeline.shutdown(5) == 0
    assert exporter.get_finished_spans() == ()
    assert settled == {}


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
    pipeline.emit(first, two_spans)
    assert pipeline.shutdown(1) == 0


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_ratio_holds(rate: float) -> None:
    pipeline, _ = tracing(InMemorySpanExporter(), rate)
    chosen = sum(pipeline.identify().exported for _ in range(4000))
    # Five standard deviations of a binomial.
    assert chosen / 4000 == pytest.approx(rate, abs=5 * (0.25 * 0.75 / 4000) ** 0.5)
    pipeline.shutdown(1)


def test_the_global_provider_plays_no_part() -> None:
    from opentelemetry import trace

    before = trace.get_tracer_provider()
    pipeline, _ = tracing(InMemorySpanExporter())
    assert trace.get_tracer_provider() is before
    pipeline.shutdown(1)


class SilentExporter(SpanExporter):
    """A backend that accepts a connection and never answers."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.released.wait(30)
        return SpanExportResult.FAILURE


def test_shutdown_is_bounded_and_says_what_was_lost(caplog: pytest.LogCaptureFixture) -> None:
    exporter = SilentExporter()
    pipeline, settled = tracing(exporter)
    for _ in range(3):
        pipeline.emit(pipeline.identify(), two_spans)
    start = time.monotonic()
    lost = pipeline.shutdown(0.3)
    assert time.monotonic() - start < 2
    assert lost == 6
    assert settled == {"dropped": 6}
    assert "6 spans were not exported" in caplog.text
    exporter.released.set()


class RaisingExporter(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        raise ConnectionError("no route")


def test_a_failing_exporter_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, settled = tracing(RaisingExporter())
    pipeline.emit(pipeline.identify(), two_spans)
    assert pipeline.shutdown(5) == 0
    assert settled == {"failed": 2}


def test_the_operators_batch_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "100")
    exporter = InMemorySpanExporter()
    pipeline = Tracing(ALWAYS_ON, exporter, Resource.create({}), lambda *_: None)
    for _ in range(40):
        pipeline.emit(pipeline.identify(), two_spans)
    pipeline.shutdown(5)
    assert len(exporter.get_finished_spans()) == 80


def test_ids_of_one_trace_do_not_leak_into_the_next() -> None:
    exporter = InMemorySpanExporter()
    pipeline, _ = tracing(exporter)
    identities = [pipeline.identify() for _ in range(5)]
    for identity in identities:
        pipeline.emit(identity, two_spans)
    pipeline.shutdown(5)
    spans = exporter.get_finished_spans()
    contexts = [span.context for span in spans]
    assert len({c.span_id for c in contexts if c}) == 10
    roots = [s.context.span_id for s in spans if s.name == "root" and s.context]
    assert roots == [identity.span_id for identity in identities]
