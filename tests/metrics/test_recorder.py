from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from metrics.catalogue import GenerationMetrics
from metrics.recorder import Recorder, StepSpans
from metrics.records import Failure, RequestTiming, WarmupTiming
from metrics.sampling import KeepRules, TraceSampling
from metrics.tracing import SpanDestination, Tracing
from tests.metrics.timings import START_NS, request_timing

FAILED = Failure("internal", "E", "m", START_NS)


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
        TraceSampling(rate, keep=KeepRules()),
        SpanDestination(exporter),
        Resource.create({}),
        on_ended=metrics.spans_ended,
        on_result=metrics.span_results,
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
    recorded = threading.Event()
    rec.submit(recorded.set)
    assert recorded.wait(30)
    monkeypatch.undo()
    rec.record(request_timing(), tracing.identify())  # the thread goes on
    rec.close(5)
    assert registry.get_sample_value("sdxl_record_failures_total") == 1
    assert registry.get_sample_value("sdxl_images_total") == 1
    assert "could not be recorded" in caplog.text


def test_a_request_whose_spans_fail_is_in_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    rec, tracing, exporter, registry = recorder()

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    heard: list[RequestTiming] = []
    rec.listen(lambda request, _: heard.append(request))
    monkeypatch.setattr(tracing, "emit", broken)
    request = request_timing()
    rec.record(request, tracing.identify())
    rec.close(5)
    assert exporter.get_finished_spans() == ()
    assert registry.get_sample_value("sdxl_record_failures_total") == 1
    assert registry.get_sample_value("sdxl_images_total") == 1
    assert heard == [request]


def test_a_request_after_the_end_is_counted() -> None:
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


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_failed_request_is_exported_once_whatever_the_ratio(rate: float) -> None:
    rec, tracing, exporter, registry = recorder(rate)
    identity = tracing.identify()
    rec.record(request_timing(failure=FAILED, status_code=500, outcome="error"), identity)
    rec.record(request_timing(), identity)
    assert rec.close(5) == 0
    roots = [span for span in exporter.get_finished_spans() if span.name == "text-to-image"]
    assert len(roots) == (1 if rate == 0 else 2)
    assert roots[0].context is not None
    assert roots[0].context.span_id == identity.span_id
    assert roots[0].context.trace_flags.sampled
    ended = registry.get_sample_value("sdxl_spans_ended_total")
    assert ended == registry.get_sample_value("sdxl_spans_total", {"result": "exported"})
    assert ended == len(exporter.get_finished_spans())


def test_a_refused_request_is_not_kept_as_a_failure() -> None:
    rec, tracing, exporter, _ = recorder(rate=0.0)
    refused = replace(FAILED, server_fault=False)
    rec.record(request_timing(failure=refused, status_code=429), tracing.identify())
    rec.close(5)
    assert exporter.get_finished_spans() == ()


def test_the_weights_of_exported_traces_add_up_to_the_requests() -> None:
    """300 requests of which a tenth failed; the bucket keeps 20 of them despite the ratio."""
    rec, tracing, exporter, registry = recorder(rate=0.3, steps="summary")
    count = 300
    for number in range(count):
        failure = FAILED if number % 10 == 0 else None
        rec.record(request_timing(failure=failure), tracing.identify())
    rec.close(20)
    roots = [span for span in exporter.get_finished_spans() if span.name == "text-to-image"]
    weighted = sum(1 / probability(root) for root in roots)
    # Five standard deviations of the requests that the ratio decided.
    assert weighted == pytest.approx(count, abs=5 * (count * 0.7 / 0.3) ** 0.5)
    kept = [root for root in roots if (root.attributes or {}).get("error.type")]
    assert {probability(root) for root in kept} <= {0.3, 1.0}
    assert sum(probability(root) == 1.0 for root in kept) >= 20
    assert registry.get_sample_value("sdxl_spans_ended_total") == len(exporter.get_finished_spans())


def probability(span: ReadableSpan) -> float:
    assert span.attributes is not None
    value = span.attributes["sampling.probability"]
    assert isinstance(value, float)
    return value


@pytest.mark.parametrize(
    ("steps", "failure", "seen"),
    [
        ("all", None, 3),
        ("slow", None, 0),
        ("slow", Failure("internal", "E", "m", START_NS), 3),
        ("summary", Failure("internal", "E", "m", START_NS), 0),
    ],
)
def test_which_requests_have_step_spans(
    steps: StepSpans, failure: Failure | None, seen: int
) -> None:
    rec, tracing, exporter, _ = recorder(steps=steps)
    rec.record(request_timing(failure=failure), tracing.identify())
    rec.close(5)
    names = [span.name for span in exporter.get_finished_spans()]
    assert names.count("denoise_step") == seen
    assert names.count("denoise") == 1


def test_a_request_with_a_reason_to_be_slow_shows_its_steps() -> None:
    rec, tracing, exporter, _ = recorder(steps="slow")
    request = request_timing()
    assert request.run is not None
    eager = replace(request, runs=(replace(request.run, eager_fallback=True),))
    rec.record(eager, tracing.identify())
    rec.close(5)
    assert "denoise_step" in {span.name for span in exporter.get_finished_spans()}


def test_a_failed_start_is_kept() -> None:
    rec, _, exporter, _ = recorder(rate=0.0)
    rec.record_warmup(WarmupTiming(START_NS, START_NS + 1, ()), {})
    rec.record_warmup(WarmupTiming(START_NS, START_NS + 1, (), FAILED), {"model.name": "demo"})
    rec.close(5)
    [span] = exporter.get_finished_spans()
    assert (span.attributes or {})["error.type"] == "internal"


def test_an_exemplar_leads_to_an_exported_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str] | None] = []
    monkeypatch.setattr(
        GenerationMetrics, "observe_request", lambda self, request, exemplar: seen.append(exemplar)
    )
    rec, tracing, _, _ = recorder(rate=0.0)
    ordinary, failed = tracing.identify(), tracing.identify()
    rec.record(request_timing(), ordinary)
    rec.record(request_timing(failure=FAILED), failed)
    rec.close(5)
    assert seen == [None, {"trace_id": failed.trace_id_hex, "span_id": failed.span_id_hex}]
