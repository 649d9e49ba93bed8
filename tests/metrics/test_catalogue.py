from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from metrics.catalogue import GenerationMetrics, render
from metrics.timeline import Failure
from tests.metrics.timings import START_NS, request_timing, run_timing

EXEMPLAR = {"trace_id": "a" * 32, "span_id": "b" * 16}


@pytest.fixture
def metrics() -> GenerationMetrics:
    metrics = GenerationMetrics(
        CollectorRegistry(),
        endpoints=("/", "/stream"),
        outcomes=("ok", "error"),
        error_types=("queue_full", "internal"),
        build={"version": "1"},
    )
    metrics.set_warm_shapes(["128x96"])
    return metrics


def value(metrics: GenerationMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_request_is_observed_once_everywhere(metrics: GenerationMetrics) -> None:
    metrics.observe_request(request_timing(), EXEMPLAR)
    labels = {"endpoint": "/", "outcome": "ok"}
    assert value(metrics, "sdxl_request_duration_seconds_count", **labels) == 1
    assert value(metrics, "sdxl_queue_duration_seconds_sum") == pytest.approx(0.002)
    step = {"shape": "128x96", "guidance": "on", "batch": "1"}
    assert value(metrics, "sdxl_denoise_step_duration_seconds_count", **step) == 3
    assert value(metrics, "sdxl_denoise_step_duration_seconds_sum", **step) == pytest.approx(0.033)
    for stage in ("receive", "text_encode", "denoise", "vae_decode", "upload", "respond"):
        assert value(metrics, "sdxl_stage_duration_seconds_count", stage=stage) == 1
    assert value(metrics, "sdxl_images_total") == 1


def test_a_shared_run_is_observed_once(metrics: GenerationMetrics) -> None:
    import dataclasses

    request = request_timing()
    metrics.observe_request(request, None)
    metrics.observe_request(dataclasses.replace(request, observes_run=False), None)
    assert value(metrics, "sdxl_stage_duration_seconds_count", stage="denoise") == 1
    assert value(metrics, "sdxl_images_total") == 2


def test_openmetrics_carries_the_exemplar(metrics: GenerationMetrics) -> None:
    metrics.observe_request(request_timing(), EXEMPLAR)
    body, content_type = render(metrics.registry, "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    exemplars = {
        sample.name: sample.exemplar.labels
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if sample.exemplar
    }
    for name in ("request", "queue", "stage", "denoise_step"):
        assert exemplars[f"sdxl_{name}_duration_seconds_bucket"] == EXEMPLAR


def test_plain_text_is_the_default(metrics: GenerationMetrics) -> None:
    _, content_type = render(metrics.registry, "")
    assert content_type.startswith("text/plain")


def test_a_trace_that_is_not_exported_leaves_no_exemplar(metrics: GenerationMetrics) -> None:
    metrics.observe_request(request_timing(), None)
    body, _ = render(metrics.registry, "application/openmetrics-text; version=1.0.0")
    assert b"trace_id" not in body


def test_labels_come_from_closed_sets(metrics: GenerationMetrics) -> None:
    import dataclasses

    run = dataclasses.replace(run_timing(START_NS), shape="1000x8")
    failure = Failure("never heard of", "X", "x", START_NS)
    request = dataclasses.replace(
        request_timing(run=run, failure=failure, outcome="odd"), endpoint="/odd"
    )
    metrics.observe_request(request, None)
    cold = {"shape": "cold", "guidance": "on", "batch": "1"}
    assert value(metrics, "sdxl_denoise_step_duration_seconds_count", **cold) == 3
    assert value(metrics, "sdxl_errors_total", error_type="internal") == 1
    labels = {"endpoint": "other", "outcome": "error"}
    assert value(metrics, "sdxl_request_duration_seconds_count", **labels) == 1
    assert value(metrics, "sdxl_images_total") == 0


def test_counters_exist_before_their_first_event(metrics: GenerationMetrics) -> None:
    assert value(metrics, "sdxl_errors_total", error_type="queue_full") == 0
    assert value(metrics, "sdxl_spans_total", result="failed") == 0
    assert value(metrics, "sdxl_ready") == 0
    assert value(metrics, "sdxl_build_info", version="1") == 1


def test_gauges_follow(metrics: GenerationMetrics) -> None:
    metrics.request_received()
    metrics.set_waiting(3)
    metrics.set_ready(True)
    metrics.set_warmup_phase("compile", 1.5)
    metrics.spans_settled("queue_full", 4)
    metrics.upload_fell_back()
    metrics.prompt_truncated()
    metrics.record_failed()
    assert value(metrics, "sdxl_requests_in_flight") == 1
    metrics.request_answered()
    assert value(metrics, "sdxl_requests_in_flight") == 0
    assert value(metrics, "sdxl_requests_waiting") == 3
    assert value(metrics, "sdxl_ready") == 1
    assert value(metrics, "sdxl_warmup_duration_seconds", phase="compile") == 1.5
    assert value(metrics, "sdxl_spans_total", result="queue_full") == 4
    assert value(metrics, "sdxl_upload_fallbacks_total") == 1
    assert value(metrics, "sdxl_truncated_prompts_total") == 1
    assert value(metrics, "sdxl_record_failures_total") == 1


def test_two_services_on_one_registry_are_refused() -> None:
    registry = CollectorRegistry()
    arguments = {
        "endpoints": ("/",),
        "outcomes": ("ok",),
        "error_types": (),
        "build": {"version": "1"},
    }
    GenerationMetrics(registry, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Duplicated"):
        GenerationMetrics(registry, **arguments)  # type: ignore[arg-type]
