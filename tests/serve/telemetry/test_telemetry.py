from __future__ import annotations

import importlib.metadata
from unittest.mock import Mock

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from kernels_warmup.shapes import CompiledShape
from metrics import buckets
from metrics.catalogue import GenerationMetrics, render
from metrics.gpu import Gpu
from metrics.tracing import Tracing
from serve import __version__
from serve.engine.build import build_runtime
from serve.settings import ServeSettings, load_settings
from serve.telemetry.setup import (
    bucket_families,
    build_budget,
    build_gpu_metrics,
    build_push,
    build_resource,
    build_sampling,
    build_tracing,
)
from tests.metrics.fake_nvml import FakeGpu, FakeNvml
from tests.metrics.test_catalogue import OPENMETRICS, declared
from tests.metrics.test_tracing import TWO_SPANS


@pytest.mark.parametrize(
    ("sampler", "argument", "description"),
    [
        (None, None, "ParentBased{root:TraceIdRatioBased{1.0}"),
        (None, 0.5, "ParentBased{root:TraceIdRatioBased{0.5}"),
        ("parentbased_traceidratio", 0.5, "ParentBased{root:TraceIdRatioBased{0.5}"),
        ("traceidratio", 0.5, "TraceIdRatioBased{0.5}"),
        ("always_on", None, "TraceIdRatioBased{1.0}"),
        ("always_off", None, "TraceIdRatioBased{0.0}"),
        ("parentbased_always_on", None, "ParentBased{root:TraceIdRatioBased{1.0}"),
        ("parentbased_always_off", None, "ParentBased{root:TraceIdRatioBased{0.0}"),
    ],
)
def test_the_standard_samplers(
    sampler: str | None, argument: float | None, description: str
) -> None:
    values = {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument}
    sampling = build_sampling(ServeSettings.model_validate(values))
    assert sampling.sampler.get_description().startswith(description)
    kept = sampling.decide_at_end(sampling.decide_at_start(2**128 - 1, 1, None), keep=True).exported
    assert kept == (sampler not in ("always_off", "parentbased_always_off"))


def test_fals_rate_is_the_ratio() -> None:
    sampling = build_sampling(ServeSettings.model_validate({"OTEL_SAMPLE_RATE": 0.0}))
    assert not sampling.decide_at_start(1, 1, None).exported


@pytest.mark.parametrize(
    ("endpoint", "honeycomb"),
    [
        ("https://api.honeycomb.io", True),
        ("https://api.eu1.honeycomb.io:443", True),
        ("https://otlp.nr-data.net", False),
        ("https://honeycomb.io.example.com", False),
    ],
)
def test_honeycomb_is_recognised_by_its_host(endpoint: str, honeycomb: bool) -> None:
    settings = ServeSettings.model_validate({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
    assert settings.exports_to_honeycomb == honeycomb


def test_the_resource_identifies_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_JOB_ID", "runner-7")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    first = build_resource(ServeSettings(device="cpu")).attributes
    second = build_resource(ServeSettings(device="cpu")).attributes
    assert first["service.name"] == "stepspan"
    assert first["service.version"]
    assert first["fal.runner.id"] == "runner-7"
    assert first["deployment.environment.name"] == "test"
    assert first["service.instance.id"] != second["service.instance.id"]


@pytest.mark.parametrize(
    ("explicit", "attributes", "expected"),
    [
        (None, "", "stepspan"),
        (None, "service.name=foo", "foo"),
        ("bar", "service.name=foo", "bar"),
        (None, "peer.service.name=x", "stepspan"),
        (None, "a=1, service.name = y ", "y"),
        (None, "service.name=", "stepspan"),
        (None, "service.name=a%20b%2Cc=d", "a b,c=d"),
    ],
)
def test_the_operators_service_name_is_used(
    monkeypatch: pytest.MonkeyPatch, explicit: str | None, attributes: str, expected: str
) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", attributes)
    settings = ServeSettings.model_validate({"OTEL_SERVICE_NAME": explicit, "device": "cpu"})
    assert build_resource(settings).attributes["service.name"] == expected


def test_the_environment_says_which_version_and_instance_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"service.version": "2.7", "service.instance.id": "pod-3"}
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", ",".join(f"{k}={v}" for k, v in given.items()))
    assert given.items() <= build_resource(load_settings()).attributes.items()


def test_the_resource_names_the_gpu() -> None:
    fake = FakeGpu()
    attributes = build_resource(ServeSettings(device="cuda"), Gpu(FakeNvml(fake), fake)).attributes
    assert (attributes["hw.name"], attributes["hw.id"]) == (fake.name, fake.uuid)


def built(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Tracing:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    metrics = GenerationMetrics(
        CollectorRegistry(), endpoints=(), outcomes=(), error_types=(), build={"version": "1"}
    )
    return build_tracing(load_settings(), metrics)


@pytest.mark.parametrize(
    ("environment", "exports"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "ENABLE_TRACING": "false"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"}, False),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
            False,
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "OTLP"},
            True,
        ),
    ],
)
def test_tracing_is_on_if_an_endpoint_is_set_and_tracing_is_not_disabled(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], exports: bool
) -> None:
    tracing = built(monkeypatch, **environment)
    assert tracing.exporting == exports
    assert tracing.identify().exported == exports
    tracing.shutdown(1)


def test_the_batch_processors_variables_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "metrics.tracing.BatchSpanProcessor", lambda _, **sizes: seen.append(sizes) or Mock()
    )
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    built(monkeypatch, **endpoint, OTEL_BSP_MAX_QUEUE_SIZE="200").shutdown(1)
    built(monkeypatch, OTEL_BSP_MAX_EXPORT_BATCH_SIZE="20", OTEL_BSP_SCHEDULE_DELAY="7").shutdown(1)
    names = ("max_queue_size", "max_export_batch_size", "schedule_delay_millis")
    assert [[sizes[name] for name in names] for sizes in seen] == [[200, 200, 1000], [200, 20, 7]]


def test_spans_go_to_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracing = built(monkeypatch, OTEL_TRACES_EXPORTER="console", OTEL_SERVICE_NAME="mine")
    tracing.emit(tracing.identify(), TWO_SPANS)
    assert tracing.shutdown(5) == 0
    written = capsys.readouterr().out
    assert written.count('"trace_id"') == 2
    assert '"service.name": "mine"' in written


def test_a_budget_follows_the_device_and_the_operator() -> None:
    default = CompiledShape(1024, 1024)
    on_cuda = build_budget(ServeSettings(), default, "cuda:0")
    on_cpu = build_budget(ServeSettings(), default, "cpu")
    assert on_cuda.seconds(1024, 1024, 20) == pytest.approx(2 + 20 * 0.05)
    assert on_cpu.seconds(512, 1024, 20) == pytest.approx(2 + 20 * 0.1 / 2)
    stated = ServeSettings(budget_seconds=0.5, budget_step_ms=10)
    assert build_budget(stated, default, "cuda").seconds(1024, 1024, 10) == pytest.approx(0.6)


def test_the_operators_buckets_replace_one_family_and_no_other() -> None:
    families = bucket_families(ServeSettings.model_validate({"buckets_step": "0.1,0.2"}))
    assert families.step == (0.1, 0.2)
    assert families.queue == buckets.QUEUE


def test_a_peak_is_the_gpus_or_the_operators() -> None:
    fake = FakeGpu(name="NVIDIA H200")
    peaks = []
    for settings in (ServeSettings(), ServeSettings(peak_tflops=2)):
        metrics = declared(CollectorRegistry())
        build_gpu_metrics(settings, metrics, Gpu(FakeNvml(fake), fake))
        peaks.append(metrics.registry.get_sample_value("sdxl_peak_flops_per_second"))
    assert peaks == [989e12, 2e12]


@pytest.mark.parametrize(("device", "shown"), [("auto", 100), ("cuda", 100), ("cuda:1", 101)])
def test_the_memory_shown_is_that_of_the_gpu_that_serves(
    monkeypatch: pytest.MonkeyPatch, device: str, shown: int
) -> None:
    """A scrape's thread has the first GPU as its current one, whatever the model's thread has."""

    def held(index: int | None = None) -> int:
        return 100 + (index or 0)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, held)
    metrics = declared(CollectorRegistry())
    build_gpu_metrics(ServeSettings(device=device), metrics, None)
    for kind in ("allocated", "reserved", "peak"):
        assert metrics.registry.get_sample_value(f"sdxl_gpu_memory_{kind}_bytes") == shown


def test_nothing_is_pushed_unless_the_setting_is_on() -> None:
    metrics = declared(CollectorRegistry())
    named = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    for changes, pushes in (
        ({}, False),
        ({"otlp_metrics": True}, True),
        ({"otlp_metrics": True, "OTEL_SDK_DISABLED": True}, False),
    ):
        settings = ServeSettings.model_validate(named | changes)
        push = build_push(settings, metrics, build_resource(settings))
        assert (push is not None) is pushes


def test_two_services_of_one_process_each_expose_their_own_metrics() -> None:
    registry = CollectorRegistry(auto_describe=True)
    named = {"device": "cpu", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    runtimes = [build_runtime(ServeSettings.model_validate(named), registry) for _ in range(2)]
    runtimes[1].metrics.record_failed()
    scrapes = []
    for runtime in runtimes:
        text, _ = render(runtime.metrics.registry, OPENMETRICS)
        families = list(text_string_to_metric_families(text.decode()))
        names = [family.name for family in families]
        assert len(set(names)) == len(names)
        scrapes.append(
            {sample.name: sample.value for family in families for sample in family.samples}
        )
        runtime.close(0.1)
    assert scrapes[0].keys() == scrapes[1].keys()
    assert [one["sdxl_record_failures_total"] for one in scrapes] == [0, 1]


def test_a_checkout_that_is_not_installed_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.distribution

    def nothing_of_ours(name: str) -> importlib.metadata.Distribution:
        if name == "stepspan":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing_of_ours)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("stepspan")
    registry = CollectorRegistry()
    build_runtime(ServeSettings(), registry).close(1)
    assert registry.get_sample_value("sdxl_requests_in_flight") == 0
    assert f'version="{__version__}"' in render(registry, OPENMETRICS)[0].decode()


def test_the_installed_version_is_the_one_in_the_code() -> None:
    assert importlib.metadata.version("stepspan") == __version__
