"""The push, through the SDK's own exporter to a real OTLP/HTTP protobuf endpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from opentelemetry.sdk.metrics.export import AggregationTemporality
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry

from metrics.catalogue import PUSH_RESULTS, GenerationMetrics
from metrics.families.budget import Budget
from metrics.otlp import otlp_metric_exporter
from metrics.push import MetricsPush
from tests.metrics.test_catalogue import declared
from tests.metrics.timings import request_timing
from tests.support.otlp_endpoint import Answer, OtlpEndpoint, ReceivedPoint, otlp_endpoint
from tests.support.processes import refusing_port

EXEMPLAR = {"trace_id": "a1" * 16, "span_id": "b2" * 8}
STEP = {"shape": "128x96", "guidance": "on", "batch": "1"}


@pytest.fixture
def endpoint() -> Iterator[OtlpEndpoint]:
    with otlp_endpoint() as endpoint:
        yield endpoint


def metrics_of_one_request() -> GenerationMetrics:
    metrics = declared(CollectorRegistry())
    metrics.set_warm_shapes(["128x96"])
    metrics.set_budget(Budget(1, 0.1, 128 * 96))
    metrics.observe_request(request_timing(), EXEMPLAR)
    return metrics


def pushing(
    metrics: GenerationMetrics, url: str, *, delta: bool = False, period_seconds: float = 60
) -> MetricsPush:
    exporter, answers = otlp_metric_exporter(endpoint=f"{url}/v1/metrics", timeout=0.5)
    return MetricsPush(
        metrics.registry,
        exporter,
        Resource.create({"service.name": "stepspan"}),
        delta=delta,
        period_seconds=period_seconds,
        on_pushed=metrics.pushed,
        take_rejected=answers.take_rejected,
    )


def point(push: list[ReceivedPoint], name: str, **attributes: str) -> ReceivedPoint:
    [found] = [p for p in push if p.name == name and attributes.items() <= p.attributes.items()]
    return found


def test_a_push_has_the_values_of_a_scrape(endpoint: OtlpEndpoint) -> None:
    metrics = metrics_of_one_request()
    assert pushing(metrics, endpoint.url).push()
    [push] = endpoint.pushes
    steps = point(push, "sdxl_denoise_step_duration_seconds", **STEP)
    assert (steps.kind, steps.unit, steps.count) == ("histogram", "s", 3)
    assert steps.value == pytest.approx(0.033)
    assert sum(steps.bucket_counts) == 3
    assert len(steps.bucket_counts) == len(steps.bounds) + 1
    assert {exemplar[:2] for exemplar in steps.exemplars} == {tuple(EXEMPLAR.values())}
    images = point(push, "sdxl_images")
    assert (images.kind, images.value) == ("sum", 1)
    assert images.temporality == AggregationTemporality.CUMULATIVE.value
    assert images.start_ns < images.end_ns
    within = point(push, "sdxl_request_budget", result="within")
    assert [e[:2] for e in within.exemplars] == [tuple(EXEMPLAR.values())]
    assert point(push, "sdxl_ready").kind == "gauge"
    assert images.resource["service.name"] == "stepspan"
    # Every family of the registry, every series of each.
    for family in metrics.registry.collect():
        series = {
            tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
            for sample in family.samples
        }
        pushed = [tuple(sorted(p.attributes.items())) for p in push if p.name == family.name]
        assert sorted(pushed) == sorted(series), family.name


def test_a_delta_is_since_the_last_push_that_arrived(
    endpoint: OtlpEndpoint,
) -> None:
    metrics = metrics_of_one_request()
    working = pushing(metrics, endpoint.url, delta=True)
    assert working.push()
    metrics.observe_request(request_timing(), None)
    metrics.observe_request(request_timing(), None)
    exporter = working._exporter
    with refusing_port() as port:
        nowhere = f"http://127.0.0.1:{port}/v1/metrics"
        working._exporter, _ = otlp_metric_exporter(endpoint=nowhere, timeout=0.2)
        assert not working.push()
    working._exporter = exporter
    metrics.observe_request(request_timing(), None)
    assert working.push()
    assert working.push()
    images = [point(push, "sdxl_images") for push in endpoint.pushes]
    assert [image.value for image in images] == [1, 3, 0]
    steps = [point(p, "sdxl_denoise_step_duration_seconds", **STEP) for p in endpoint.pushes]
    assert [step.count for step in steps] == [3, 9, 0]
    assert [round(step.value, 6) for step in steps] == [0.033, 0.099, 0]
    assert [bool(step.exemplars) for step in steps] == [True, False, False]
    for earlier, later in pairwise(images):
        assert later.temporality == AggregationTemporality.DELTA.value
        assert later.start_ns == earlier.end_ns
    results = {"exported": 3, "failed": 1}
    for result, count in results.items():
        labels = {"result": result}
        assert metrics.registry.get_sample_value("sdxl_otlp_pushes_total", labels) == count


def test_an_interval_does_not_end_before_its_start_if_the_clock_steps_back(
    endpoint: OtlpEndpoint,
) -> None:
    metrics = metrics_of_one_request()
    readings = iter([10**18, 10**18 + 5, 10**18 - 10**12, 10**18 + 10**12])
    push = pushing(metrics, endpoint.url, delta=True)
    push._unix_ns = lambda: next(readings)
    push._arrived_ns = push._began_ns = next(readings)
    for _ in range(3):
        assert push.push()
    for received in endpoint.pushes:
        images = point(received, "sdxl_images")
        assert images.start_ns < images.end_ns


def test_it_pushes_by_itself_and_once_more_at_the_end(endpoint: OtlpEndpoint) -> None:
    metrics = metrics_of_one_request()
    push = pushing(metrics, endpoint.url, period_seconds=0.05)
    push.start()
    endpoint.wait_for_points("sdxl_images")
    metrics.observe_request(request_timing(), None)
    push.begin_end()
    push.end(10)
    assert point(endpoint.pushes[-1], "sdxl_images").value == 2


def test_pushes_to_a_dead_backend_are_counted_and_the_end_is_bounded() -> None:
    metrics = metrics_of_one_request()
    with refusing_port() as port:
        push = pushing(metrics, f"http://127.0.0.1:{port}", period_seconds=0.01)
        push.start()
        deadline = time.monotonic() + 20
        failed = {"result": "failed"}
        while not metrics.registry.get_sample_value("sdxl_otlp_pushes_total", failed):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        start = time.monotonic()
        push.end(0.3)
        assert time.monotonic() - start < 5


def test_an_end_without_a_start_does_nothing() -> None:
    pushing(metrics_of_one_request(), "http://127.0.0.1:1").end(1)


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (Answer(rejected=3), "partial"),
        (Answer(status=400), "failed"),
        (Answer(status=307, headers={"Location": "http://127.0.0.1:9/"}), "failed"),
    ],
)
def test_pushes_are_counted_by_the_backends_answer(answer: Answer, result: str) -> None:
    metrics = metrics_of_one_request()
    with otlp_endpoint(answer) as endpoint:
        assert pushing(metrics, endpoint.url).push() is (result == "partial")
    for each in PUSH_RESULTS:
        counted = metrics.registry.get_sample_value("sdxl_otlp_pushes_total", {"result": each})
        assert counted == (each == result)
