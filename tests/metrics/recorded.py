"""A day of metrics from a made-up service on a GPU, one sample a minute.

A machine without a GPU cannot measure them, and a test cannot wait a day. The service's own metrics
and collector write the samples, so a name that changes there changes here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from unittest import mock

from prometheus_client import CollectorRegistry

from metrics.catalogue import GenerationMetrics, RunFlops, render
from metrics.families.budget import Budget
from metrics.families.peaks import peak_flops
from metrics.gpu import Gpu
from metrics.gpu_metrics import GpuMetrics, MemoryUse
from metrics.records import Estimate, Failure
from serve.engine.runtime import ENDPOINTS
from serve.errors import ERROR_TYPES, OUTCOMES, REJECTIONS
from tests.metrics.fake_nvml import FakeGpu, FakeNvml
from tests.metrics.timings import FACTS, START_NS, request_timing, run_timing

SHAPE = "1024x1024"

# The metrics of fal's endpoint according to its documentation; all are gauges.
FAL = """
fal_app_runners{application="owner/sdxl",state="running",machine_type="GPU-H100"} 1
fal_app_runners{application="owner/sdxl",state="pending",machine_type="GPU-H100"} 0
fal_app_queue_size{application="owner/sdxl"} 2
fal_app_concurrent_requests{application="owner/sdxl"} 2
fal_app_requests_completed{application="owner/sdxl",method="POST",status="200"} 50
fal_app_requests_received{application="owner/sdxl",method="POST"} 51
fal_app_request_latency{application="owner/sdxl",le="1.0"} 5
fal_app_request_latency{application="owner/sdxl",le="2.5"} 40
fal_app_request_latency{application="owner/sdxl",le="+Inf"} 50
"""


# Metrics that Prometheus adds to a scrape, and the OpenTelemetry SDK's metrics of itself.
BESIDE = {
    "up": 1,
    "scrape_duration_seconds": 0.02,
    "otel_sdk_processor_span_queue_size": 12,
    "otel_sdk_processor_span_queue_capacity": 8192,
}


def declared_service(registry: CollectorRegistry) -> GenerationMetrics:
    """The metrics as the runtime declares them, on a GPU of the fake driver."""
    metrics = GenerationMetrics(
        registry,
        endpoints=ENDPOINTS,
        outcomes=OUTCOMES,
        error_types=ERROR_TYPES,
        rejections=REJECTIONS,
        loras=("ink",),
        api_keys=("alice",),
        build={"version": "1", "python": "3.11", "torch": "2.13.0", "diffusers": "0.42.1"},
    )
    gpu = FakeGpu(name="NVIDIA H100 80GB HBM3")
    with mock.patch.dict(sys.modules, pynvml=FakeNvml(gpu)):
        collector = GpuMetrics(
            Gpu.open("cuda"),
            lambda: MemoryUse(10 * 2**30, 12 * 2**30, 11 * 2**30),
            lambda: metrics.fault("nvml"),
        )
    collector.read()
    collector.read()  # the first reading has no activity: it is a difference of two samples
    metrics.show(collector)
    peak = peak_flops(gpu.name)
    assert peak is not None
    metrics.set_peak_flops(peak)
    metrics.set_warm_shapes([SHAPE])
    metrics.set_flops(SHAPE, RunFlops(22 * 10**10, 1352 * 10**10, 1047 * 10**10))
    metrics.set_budget(Budget(2, 0.05, 1024 * 1024))
    for phase in ("load_model", "prepare", "compile", "verify", "count_flops", "collect_garbage"):
        metrics.set_warmup_phase(phase, 10)
    metrics.compile_cache("hit")
    metrics.set_ready(True)
    return metrics


def observe_some(metrics: GenerationMetrics, random: Random) -> None:
    """A minute's traffic: twenty images and some failures."""
    facts = dataclasses.replace(FACTS, width=1024, height=1024, num_inference_steps=20)
    for _ in range(20):
        steps = tuple(random.uniform(29, 31) for _ in range(20))
        run = dataclasses.replace(run_timing(START_NS, steps), shape=SHAPE)
        request = request_timing(run=run, facts=facts)
        end_ns = request.start_ns + round(random.uniform(0.8, 3.2) * 1e9)
        estimate = Estimate(request.start_ns, random.uniform(0.5, 0.7))
        request = dataclasses.replace(request, end_ns=end_ns, estimate=estimate)
        metrics.observe_request(request, None)
    metrics.span_results("exported", 400)
    metrics.pushed("exported")
    for error_type, outcome in (("queue_full", "rejected"), ("client_gone", "cancelled")):
        failure = Failure(error_type, "X", "x", START_NS)
        refused = request_timing(outcome=outcome, failure=failure)
        metrics.observe_request(dataclasses.replace(refused, runs=(), observed_runs=()), None)


def samples(end: int, minutes: int) -> Iterator[str]:
    """OpenMetrics lines with timestamps, `minutes` of them up to `end` (Unix seconds)."""
    registry = CollectorRegistry()
    metrics = declared_service(registry)
    random = Random(0)
    where = 'job="sdxl",instance="recorded:8080"'
    for minute in range(minutes):
        at = end - 60 * (minutes - 1 - minute)
        observe_some(metrics, random)
        for family in registry.collect():
            for sample in family.samples:
                labels = "".join(f',{name}="{value}"' for name, value in sample.labels.items())
                yield f"{sample.name}{{{where}{labels}}} {sample.value} {at}"
        for name, value in BESIDE.items():
            yield f"{name}{{{where}}} {value} {at}"
        for line in FAL.strip().splitlines():
            yield f"{line} {at}"


def exposition() -> str:
    """A scrape of such a service as Prometheus text."""
    registry = CollectorRegistry()
    observe_some(declared_service(registry), Random(0))
    return render(registry, "")[0].decode()


def write(path: Path, end: int, minutes: int) -> None:
    path.write_text("\n".join(samples(end, minutes)) + "\n# EOF\n")
