from __future__ import annotations

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from metrics.catalogue import GenerationMetrics
from metrics.recorder import Recorder, StepSpans
from metrics.sampling import KeepRules, Sampling
from metrics.timeline import WarmupTiming
from metrics.tracing import Destination, Tracing
from tests.metrics.timings import START_NS, request_timing


def recorder(
    rate: float = 1.0, steps: StepSpans = "all"
) -> tuple[Recorder, Tracing, InMemorySpanExporter, CollectorRegistry]:
    registry = CollectorRegistry()
    metrics = GenerationMetrics(
        registry,
        endpoints=("/",),
        outcomes=("ok",),
        error_types=("internal",),
        build={"version": "1"},
    )
    exporter = InMemorySpanExporter()
    tracing = Tracing(
        Sampling(rate, keep=KeepRules()),
        Destination(exporter),
        Resource.create({}),
        on_ended=metrics.spans_ended,
        on_settled=metrics.spans_settled,
    )
    return Recorder(tracing, metrics, steps), tracing, exporter, registry


def test_spans_and_metrics_of_one_request() -> None:
    rec, tracing, exporter, registry = recorder()
    identity = tracing.identify()
    rec.record(request_timing(), identity)
    assert rec.close(5) == 0
    spans = exporter.get_finished_spans()
    assert {s.context.trace_id for s in spans if s.context} == {identity.trace_id}
    assert registry.get_sample_value("sdxl_images_total") == 1
    assert registry.get_sample_value("sdxl_spans_total", {"result": "exported"}) == len(spans)


def test_an_unsampled_request_is_counted_without_spans() -> None:
    rec, tracing, exporter, registry = recorder(rate=0.0)
    rec.record(request_timing(), tracing.identify())
    rec.close(5)
    assert exporter.get_finished_spans() == ()
    assert registry.get_sample_value("sdxl_images_total") == 1


def test_a_failure_to_record_is_counted_and_raises_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rec, tracing, _, registry = recorder()

    def broken(*_: object) -> None:
        raise ValueError("an exemplar over the limit")

    monkeypatch.setattr(GenerationMetrics, "observe_request", broken)
    rec.record(request_timing(), tracing.identify())
    monkeypatch.undo()
    rec.record(request_timing(), tracing.identify())  # the thread goes on
    rec.close(5)
    assert registry.get_sample_value("sdxl_record_failures_total") == 1
    assert registry.get_sample_value("sdxl_images_total") == 1
    assert "could not be recorded" in caplog.text


def test_what_comes_after_the_end_is_counted() -> None:
    rec, tracing, _, registry = recorder()
    rec.close(5)
    rec.record(request_timing(), tracing.identify())
    assert registry.get_sample_value("sdxl_record_failures_total") == 1


def test_the_warm_up_is_recorded() -> None:
    rec, _, exporter, _ = recorder()
    rec.record_warmup(WarmupTiming(START_NS, START_NS + 1, ()), {"model.name": "demo"})
    rec.close(5)
    [span] = exporter.get_finished_spans()
    assert span.name == "warmup"
