from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from metrics.catalogue import GenerationMetrics, RunFlops, render
from metrics.families.budget import Budget
from metrics.records import Estimate, Failure, StageTiming
from metrics.slow_reason import slow_reason
from tests.metrics.timings import FACTS, START_NS, request_timing, run_timing

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)

EXEMPLAR = {"trace_id": "a" * 32, "span_id": "b" * 16}


def declared(registry: CollectorRegistry) -> GenerationMetrics:
    return GenerationMetrics(
        registry,
        endpoints=("/", "/stream"),
        outcomes=("ok", "error", "rejected", "cancelled"),
        error_types=("queue_full", "deadline_exceeded", "non_finite_output", "internal"),
        rejections=("queue_full", "deadline_exceeded"),
        build={"version": "1"},
    )


@pytest.fixture
def metrics() -> GenerationMetrics:
    metrics = declared(CollectorRegistry())
    metrics.set_warm_shapes(["128x96"])
    return metrics


def parsed(metrics: GenerationMetrics) -> dict[str, str]:
    """The type of every family of a scrape, by its name, as OpenMetrics' own parser reads it."""
    body, _ = render(metrics.registry, OPENMETRICS)
    return {family.name: family.type for family in text_string_to_metric_families(body.decode())}


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
    request = request_timing()
    metrics.observe_request(request, None)
    metrics.observe_request(dataclasses.replace(request, observed_runs=()), None)
    assert value(metrics, "sdxl_stage_duration_seconds_count", stage="denoise") == 1
    assert value(metrics, "sdxl_run_batch_size_count") == 1
    assert value(metrics, "sdxl_images_total") == 2


def test_a_request_of_several_runs_is_counted_once(metrics: GenerationMetrics) -> None:
    run = dataclasses.replace(run_timing(START_NS), batch_size=2)
    request = request_timing(facts=dataclasses.replace(FACTS, num_images=4))
    request = dataclasses.replace(
        request, runs=(run, run), observed_runs=(run, run), image_bytes=(1000,) * 4
    )
    metrics.set_budget(Budget(1, 0.1, 128 * 96))
    metrics.observe_request(request, None)
    assert value(metrics, "sdxl_images_total") == 4
    assert value(metrics, "sdxl_image_bytes_count") == 4
    assert value(metrics, "sdxl_run_batch_size_sum") == 4
    assert value(metrics, "sdxl_stage_duration_seconds_count", stage="denoise") == 2
    labels = {"endpoint": "/", "outcome": "ok"}
    assert value(metrics, "sdxl_request_duration_seconds_count", **labels) == 1
    assert value(metrics, "sdxl_queue_duration_seconds_count") == 1
    assert value(metrics, "sdxl_request_budget_total", result="within") == 1


@pytest.mark.parametrize(
    ("images", "batch"), [(1, "1"), (2, "2"), (3, "4"), (4, "4"), (5, "8"), (8, "8")]
)
def test_a_runs_steps_are_counted_under_the_next_power_of_two(
    metrics: GenerationMetrics, images: int, batch: str
) -> None:
    metrics.set_warm_shapes(["128x96"], max_batch=6)
    run = dataclasses.replace(run_timing(START_NS), batch_size=images)
    metrics.observe_request(request_timing(run=run), None)
    step = {"shape": "128x96", "guidance": "on", "batch": batch}
    assert value(metrics, "sdxl_denoise_step_duration_seconds_count", **step) == 3


def test_the_estimate_is_compared_with_the_time_until_the_images_were_stored(
    metrics: GenerationMetrics,
) -> None:
    request = request_timing()
    upload = request.stage("upload")
    assert upload is not None
    estimate = Estimate(START_NS, 2 * (upload.end_ns - START_NS) / 1e9)
    metrics.observe_request(dataclasses.replace(request, estimate=estimate), EXEMPLAR)
    metrics.observe_request(request, EXEMPLAR)
    assert value(metrics, "sdxl_estimate_ratio_sum") == pytest.approx(0.5)
    assert value(metrics, "sdxl_estimate_ratio_count") == 1


def test_openmetrics_carries_the_exemplar(metrics: GenerationMetrics) -> None:
    metrics.set_budget(Budget(1, 0.1, 128 * 96))
    metrics.observe_request(request_timing(), EXEMPLAR)
    body, content_type = render(metrics.registry, OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    exemplars = {
        sample.name: sample.exemplar.labels
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if sample.exemplar
    }
    for name in ("request", "queue", "stage", "denoise_step"):
        assert exemplars[f"sdxl_{name}_duration_seconds_bucket"] == EXEMPLAR
    for name in ("denoise_step_gpu_queue_seconds", "image_bytes"):
        assert exemplars[f"sdxl_{name}_bucket"] == EXEMPLAR
    assert exemplars["sdxl_request_budget_total"] == EXEMPLAR


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; Version=1.0.0", True),
        ('application/openmetrics-text; version="1.0.0"; charset=utf-8', True),
        ('text/plain; version="0.0.4"', False),
        ("text/plain; version=1.x", False),
        # a version that is not written here
        ("application/openmetrics-text;version=abc", False),
        ("application/openmetrics-text;version=9.0.0", False),
        ("application/openmetrics-text;version=0.0.1", False),
        ("application/openmetrics-text;version=9.0.0,application/openmetrics-text;q=0.5", True),
        # qualities
        ("application/openmetrics-text;q=0,text/plain", False),
        ("application/openmetrics-text;q=0", False),
        ("text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5", False),
        ("application/openmetrics-text;q=high", True),
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
    ],
)
def test_the_accept_header_chooses_the_format(
    metrics: GenerationMetrics, accept: str, openmetrics: bool
) -> None:
    body, content_type = render(metrics.registry, accept)
    assert body.endswith(b"# EOF\n") is openmetrics
    assert content_type == (
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
        if openmetrics
        else "text/plain; version=0.0.4; charset=utf-8"
    )


FORMATS = ("application/openmetrics-text", "text/plain")
HUNDREDTHS = st.dictionaries(st.sampled_from(FORMATS), st.integers(0, 100), min_size=1)
OTHERS = st.sampled_from(
    ["application/json;q=0.9", "image/png", "application/openmetrics-text;q=0"]
)


@pytest.mark.parser
@given(st.text() | st.text(alphabet='applicationtext/plain openmetrics-;,=*."q0123456789'))
def test_any_accept_header_means_one_of_two_formats(accept: str) -> None:
    body, content_type = render(CollectorRegistry(), accept)
    assert content_type.startswith(FORMATS)
    assert content_type.startswith(FORMATS[0]) is body.endswith(b"# EOF\n")


@pytest.mark.parser
@given(HUNDREDTHS, st.lists(OTHERS, max_size=3), st.randoms(use_true_random=False))
def test_the_format_that_is_liked_at_least_as_well_as_text(
    liked: dict[str, int], others: list[str], shuffle: Random
) -> None:
    parts = [f"{name};q={hundredths / 100}" for name, hundredths in liked.items()] + others
    shuffle.shuffle(parts)
    openmetrics, text = (liked.get(name, 0) for name in FORMATS)
    content_type = render(CollectorRegistry(), ",".join(parts))[1]
    assert content_type.startswith(FORMATS[0]) is (0 < openmetrics >= text)


def test_a_trace_that_is_not_exported_leaves_no_exemplar(metrics: GenerationMetrics) -> None:
    metrics.observe_request(request_timing(), None)
    body, _ = render(metrics.registry, "application/openmetrics-text; version=1.0.0")
    assert b"trace_id" not in body


def test_labels_come_from_closed_sets(metrics: GenerationMetrics) -> None:
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


def failing(error_type: str, outcome: str = "error", **changes: Any) -> Any:
    failure = Failure(error_type, "X", "x", START_NS)
    timing = request_timing(outcome=outcome, failure=failure)
    return dataclasses.replace(timing, **changes)


def test_a_rejection_is_a_request_without_any_work(metrics: GenerationMetrics) -> None:
    metrics.observe_request(failing("queue_full", "rejected", runs=()), None)
    metrics.observe_request(failing("deadline_exceeded", runs=()), None)
    metrics.observe_request(failing("deadline_exceeded"), None)  # midway
    assert value(metrics, "sdxl_rejections_total", reason="queue_full") == 1
    assert value(metrics, "sdxl_rejections_total", reason="deadline_exceeded") == 1
    assert value(metrics, "sdxl_errors_total", error_type="deadline_exceeded") == 2


def test_what_is_not_finite_is_counted(metrics: GenerationMetrics) -> None:
    metrics.observe_request(failing("non_finite_output"), None)
    assert value(metrics, "sdxl_non_finite_outputs_total") == 1


def test_a_cancelled_request_is_counted_by_when_it_was_cancelled(
    metrics: GenerationMetrics,
) -> None:
    metrics.observe_request(failing("internal", "cancelled", runs=()), None)
    during = failing("internal", "cancelled")
    before_encoding = [s for s in during.stages if s.name in ("receive", "queue")]
    metrics.observe_request(dataclasses.replace(during, stages=tuple(before_encoding)), None)
    metrics.observe_request(during, None)
    for when in ("waiting", "running", "answering"):
        assert value(metrics, "sdxl_cancelled_total", during=when) == 1


def test_a_budget_follows_shape_and_steps(metrics: GenerationMetrics) -> None:
    budget = Budget(base_seconds=0.01, step_seconds=0.02, pixels=128 * 96)
    assert budget.seconds(128, 96, 3) == pytest.approx(0.07)
    assert budget.seconds(256, 96, 30) == pytest.approx(1.21)
    took = request_timing()
    metrics.observe_request(took, None)
    assert value(metrics, "sdxl_request_budget_total", result="within") == 0  # none is set yet
    seconds = took.duration_ns / 1e9
    for step_seconds in ((seconds - 0.001) / 3, (seconds + 0.001) / 3):
        metrics.set_budget(Budget(0, step_seconds, 128 * 96))
        metrics.observe_request(took, None)
    metrics.observe_request(failing("internal"), None)
    assert value(metrics, "sdxl_request_budget_total", result="within") == 1
    assert value(metrics, "sdxl_request_budget_total", result="over") == 1


def test_queue_time_is_observed_on_a_gpus_clock_only(metrics: GenerationMetrics) -> None:
    metrics.observe_request(request_timing(), None)
    run = dataclasses.replace(run_timing(START_NS), clock="host")
    metrics.observe_request(request_timing(run=run), None)
    assert value(metrics, "sdxl_denoise_step_gpu_queue_seconds_count") == 3


def test_flops_and_seconds_count_the_same_runs(metrics: GenerationMetrics) -> None:
    metrics.set_flops("128x96", RunFlops(guided_text_encode=10, guided_step=100, vae_decode=1000))
    metrics.observe_request(request_timing(), None)
    flops, seconds = "sdxl_model_flops_total", "sdxl_run_seconds_total"
    assert value(metrics, flops) == 10 + 3 * 100 + 1000
    took = value(metrics, seconds)
    run = run_timing(START_NS)
    assert took == pytest.approx((run.stages[-1].end_ns - run.stages[0].start_ns) / 1e9)
    # Without guidance half of the batch, and only the work that was done: a failed run has no
    # decode.
    half = dataclasses.replace(run, guidance=False, stages=run.stages[:2])
    metrics.observe_request(request_timing(run=half), None)
    assert value(metrics, flops) == 1310 + 5 + 3 * 50
    ends = dataclasses.replace(run, guided_steps=1, stages=run.stages[:2])
    metrics.observe_request(request_timing(run=ends), None)
    assert value(metrics, flops) == 1465 + 10 + 100 + 2 * 50
    cold = dataclasses.replace(run, shape="640x64")
    before = value(metrics, flops), value(metrics, seconds)
    metrics.observe_request(request_timing(run=cold), None)
    assert (value(metrics, flops), value(metrics, seconds)) == before
    pair = dataclasses.replace(run, batch_size=2)
    metrics.observe_request(request_timing(run=pair), None)
    assert value(metrics, flops) == 1675 + 2 * 1310


def test_a_step_is_observed_by_its_own_guidance(metrics: GenerationMetrics) -> None:
    metrics.set_warm_shapes(["128x96"], max_batch=1)
    run = dataclasses.replace(run_timing(START_NS, (10, 12, 5)), guided_steps=2)
    metrics.observe_request(request_timing(run=run), None)
    for guidance, count, seconds in (("on", 2, 0.022), ("off", 1, 0.005)):
        labels = {"shape": "128x96", "guidance": guidance, "batch": "1"}
        name = "sdxl_denoise_step_duration_seconds"
        assert value(metrics, f"{name}_count", **labels) == count
        assert value(metrics, f"{name}_sum", **labels) == pytest.approx(seconds)


def test_encoding_a_picture_counts_in_the_runs_that_do_it(metrics: GenerationMetrics) -> None:
    metrics.set_flops("128x96", RunFlops(10, 100, 1000, vae_encode=5000))
    run = run_timing(START_NS)
    text, *others = run.stages
    encoded = StageTiming("vae_encode", text.end_ns, text.end_ns + 1)
    with_picture = dataclasses.replace(run, stages=(text, encoded, *others))
    metrics.observe_request(request_timing(run=run), None)
    metrics.observe_request(request_timing(run=with_picture), None)
    assert value(metrics, "sdxl_model_flops_total") == 2 * 1310 + 5000
    stage = "sdxl_stage_duration_seconds_count"
    assert value(metrics, stage, stage="vae_encode") == 1


def test_a_peak_is_exposed_if_it_is_known(metrics: GenerationMetrics) -> None:
    assert value(metrics, "sdxl_peak_flops_per_second") is None
    metrics.set_peak_flops(989e12)
    assert value(metrics, "sdxl_peak_flops_per_second") == 989e12


def test_counters_exist_before_their_first_event(metrics: GenerationMetrics) -> None:
    assert value(metrics, "sdxl_errors_total", error_type="queue_full") == 0
    assert value(metrics, "sdxl_spans_total", result="failed") == 0
    assert value(metrics, "sdxl_ready") == 0
    assert value(metrics, "sdxl_build_info", version="1") == 1


def test_gauges_show_the_latest_value(metrics: GenerationMetrics) -> None:
    metrics.request_received()
    metrics.set_waiting(3)
    metrics.set_ready(True)
    metrics.set_warmup_phase("compile", 1.5)
    metrics.span_results("queue_full", 4)
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


def test_the_second_service_of_a_process_keeps_its_metrics_to_itself() -> None:
    """The shared scrape stays valid, and each service's own scrape has its own metrics."""
    registry = CollectorRegistry()
    first, second = declared(registry), declared(registry)
    second.observe_request(request_timing(), EXEMPLAR)
    assert first.registry is registry
    assert value(first, "sdxl_images_total") == 0
    assert value(second, "sdxl_images_total") == 1
    assert value(second, "sdxl_telemetry_faults_total", fault="declared_twice") == 1
    assert value(first, "sdxl_telemetry_faults_total", fault="declared_twice") == 0
    for service in (first, second):
        parsed(service)


def test_a_name_taken_by_a_library_does_not_break_the_service() -> None:
    registry = CollectorRegistry()
    Gauge("sdxl_ready", "Somebody else's.", registry=registry)
    metrics = declared(registry)
    metrics.set_ready(True)
    assert value(metrics, "sdxl_ready") == 1
    assert registry.get_sample_value("sdxl_ready") == 0


class Broken:
    """Shows a metric until it breaks."""

    broken = False

    def collect(self) -> Iterator[Metric]:
        if self.broken:
            raise RuntimeError("a driver went away")
        yield GaugeMetricFamily("sdxl_something", "Something.", value=1)


def test_a_metric_registered_twice_is_refused_and_counted(metrics: GenerationMetrics) -> None:
    metrics.show(Broken())
    metrics.show(Broken())
    assert value(metrics, "sdxl_something") == 1
    assert value(metrics, "sdxl_telemetry_faults_total", fault="declared_twice") == 1


def test_a_collector_that_raises_is_left_out_and_counted(metrics: GenerationMetrics) -> None:
    collector = Broken()
    metrics.show(collector)
    collector.broken = True
    assert "sdxl_something" not in parsed(metrics)
    assert value(metrics, "sdxl_ready") == 0
    collector.broken = False
    assert parsed(metrics)["sdxl_something"] == "gauge"
    counted = value(metrics, "sdxl_telemetry_faults_total", fault="collector")
    assert counted is not None
    assert counted >= 1


@pytest.mark.parametrize(
    ("wrong_ns", "fault"),
    [(-5, "negative_value"), (float("nan"), "not_a_number"), (float("inf"), "not_a_number")],
)
def test_a_wrong_duration_is_counted_and_not_summed(
    metrics: GenerationMetrics, wrong_ns: float, fault: str
) -> None:
    metrics.set_flops("128x96", RunFlops(1, 1, 1))
    good = request_timing()
    assert good.run is not None

    def wrong(timing: Any) -> Any:
        return dataclasses.replace(timing, end_ns=timing.start_ns + wrong_ns)

    run = dataclasses.replace(
        good.run,
        stages=tuple(wrong(stage) for stage in good.run.stages),
        steps=tuple(
            dataclasses.replace(wrong(step), gpu_queue_ns=wrong_ns) for step in good.run.steps
        ),
    )
    stages = tuple(wrong(stage) for stage in good.stages)
    metrics.observe_request(
        dataclasses.replace(wrong(good), stages=stages, runs=(run,), observed_runs=(run,)), EXEMPLAR
    )
    # The request, its five stages, the run's three, its steps and their queue times, and possibly
    # its seconds.
    assert value(metrics, "sdxl_telemetry_faults_total", fault=fault) == pytest.approx(16, abs=1)
    metrics.observe_request(good, EXEMPLAR)
    for name in ("sdxl_request_duration_seconds", "sdxl_stage_duration_seconds"):
        sums = [
            sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name == name + "_sum"
        ]
        assert all(math.isfinite(total) and total >= 0 for total in sums)
        assert sum(sums) > 0


def test_an_exemplar_over_the_limit_is_left_out_and_the_rest_observed(
    metrics: GenerationMetrics,
) -> None:
    metrics.observe_request(request_timing(), {"trace_id": "a" * 32, "why": "b" * 100})
    body, _ = render(metrics.registry, OPENMETRICS)
    assert b"trace_id" not in body
    assert value(metrics, "sdxl_images_total") == 1
    assert value(metrics, "sdxl_telemetry_faults_total", fault="exemplar_too_long") == 1


def test_ten_thousand_varied_requests_add_no_series(metrics: GenerationMetrics) -> None:
    random = Random(0)
    metrics.set_warm_shapes(["128x96", "160x96"], max_batch=2)
    metrics.set_budget(Budget(1, 0.1, 128 * 96))
    before = series(metrics)
    for _ in range(10_000):
        failure = None
        outcome = random.choice(("ok", "error", "cancelled", f"odd {random.random()}"))
        if outcome != "ok":
            kind = random.choice(("queue_full", "internal", f"never seen {random.random()}"))
            failure = Failure(kind, "X", "x", START_NS)
        facts = dataclasses.replace(
            FACTS,
            num_inference_steps=random.randrange(1, 101),
            width=8 * random.randrange(8, 257),
            prompt_length=random.randrange(2000),
            seed=random.getrandbits(63),
            guidance_scale=20 * random.random(),
        )
        run = dataclasses.replace(
            run_timing(START_NS, tuple(random.uniform(1, 1000) for _ in range(2))),
            run_id=str(random.random()),
            shape=random.choice(("128x96", f"{facts.width}x96")),
            guidance=random.random() < 0.5,
            batch_size=random.randrange(1, 9),
        )
        request = request_timing(outcome=outcome, failure=failure, run=run, facts=facts)
        request = dataclasses.replace(
            request,
            endpoint=random.choice(("/", "/stream", f"/{random.random()}")),
            image_bytes=(random.randrange(10**7),),
        )
        metrics.observe_request(request, EXEMPLAR)
    assert series(metrics) == before


def series(metrics: GenerationMetrics) -> int:
    return sum(len(family.samples) for family in metrics.registry.collect())


def test_a_profiled_request_is_counted_and_its_times_are_not_observed(
    metrics: GenerationMetrics,
) -> None:
    metrics.set_budget(Budget(1, 0.1, 128 * 96))
    metrics.set_flops("128x96", RunFlops(1, 1, 1))
    run = dataclasses.replace(run_timing(START_NS), profile="a.json")
    metrics.observe_request(request_timing(run=run), EXEMPLAR)
    assert value(metrics, "sdxl_images_total") == 1
    labels = {"endpoint": "/", "outcome": "ok"}
    assert value(metrics, "sdxl_request_duration_seconds_count", **labels) == 0
    assert value(metrics, "sdxl_stage_duration_seconds_count", stage="denoise") == 0
    assert value(metrics, "sdxl_request_budget_total", result="within") == 0
    assert value(metrics, "sdxl_run_seconds_total") == 0


def test_the_other_runs_of_a_profiled_request_are_observed(metrics: GenerationMetrics) -> None:
    profiled = dataclasses.replace(run_timing(START_NS), profile="a.json")
    other = dataclasses.replace(profiled, run_id="other", profile=None)
    both = (profiled, other)
    request = dataclasses.replace(request_timing(), runs=both, observed_runs=both)
    metrics.observe_request(request, EXEMPLAR)
    assert value(metrics, "sdxl_stage_duration_seconds_count", stage="denoise") == 1
    assert value(metrics, "sdxl_run_batch_size_count") == 1
    assert value(metrics, "sdxl_stage_duration_seconds_count", stage="receive") == 0


def test_the_slow_reason_of_a_request_is_counted_as_in_its_trace(
    metrics: GenerationMetrics,
) -> None:
    run = dataclasses.replace(run_timing(START_NS), eager_fallback=True)
    request = request_timing(run=run)
    assert slow_reason(request) == "eager_fallback"
    metrics.observe_request(request, EXEMPLAR)
    assert value(metrics, "sdxl_slow_requests_total", reason="eager_fallback") == 1
    assert value(metrics, "sdxl_slow_requests_total", reason="queue") == 0
