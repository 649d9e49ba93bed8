"""The settings' telemetry, built: tracing, what the metrics need to know, and who pushes them."""

from __future__ import annotations

import logging
import os
import sys
import uuid

from opentelemetry.sdk.resources import Resource

from kernels_warmup.shapes import CompiledShape
from metrics.budget import Budget
from metrics.catalogue import BucketFamilies, GenerationMetrics
from metrics.gpu import Gpu
from metrics.gpu_metrics import GpuMetrics, MemoryUse
from metrics.peaks import peak_flops
from metrics.push import MetricsPush
from metrics.sampling import KeepRules, TraceSampling
from metrics.tracing import BatchSizes, Tracing, otlp_destination, sdk_metrics
from serve import __version__
from serve.settings import ServeSettings

logger = logging.getLogger(__name__)


def build_tracing(
    settings: ServeSettings, metrics: GenerationMetrics, resource: Resource | None = None
) -> Tracing:
    """Tracing as configured; without an endpoint nothing is exported and nothing complains.

    Args:
        resource: what the spans are said to come from; pushed metrics say the same.
    """
    destination = None
    if settings.tracing_enabled:
        if os.environ.get("OTEL_BSP_EXPORT_TIMEOUT"):
            logger.warning(
                "OTEL_BSP_EXPORT_TIMEOUT has no effect in OpenTelemetry's Python SDK; what bounds "
                "an export is OTEL_EXPORTER_OTLP_TIMEOUT, in seconds"
            )
        destination = otlp_destination(settings.exports_to_honeycomb, sdk_metrics(metrics.registry))
    return Tracing(
        sampling=build_sampling(settings),
        destination=destination,
        resource=resource or build_resource(settings),
        on_ended=metrics.spans_ended,
        on_result=metrics.span_results,
        version=__version__,
        batches=BatchSizes.chosen(
            settings.bsp_max_queue_size,
            settings.bsp_max_export_batch_size,
            settings.bsp_schedule_delay,
        ),
    )


def build_sampling(settings: ServeSettings) -> TraceSampling:
    """Both decisions: `OTEL_TRACES_SAMPLER` where it is set, else parent-based at the rate.

    Always is a ratio of 1 and never one of 0, but whoever says never means it: then nothing is kept
    for having failed or been slow either.
    """
    sampler = settings.traces_sampler or "parentbased_traceidratio"
    root = sampler.removeprefix("parentbased_")
    rate = {"always_on": 1.0, "always_off": 0.0}.get(root, settings.rate)
    keep = KeepRules(settings.trace_keep_slow_seconds, settings.trace_keep_slow_step_ms)
    return TraceSampling(
        rate,
        parent_based=sampler.startswith("parentbased_"),
        trust_parent=settings.trace_trust_parent,
        keep=None if root == "always_off" else keep,
    )


def build_resource(settings: ServeSettings, gpu: Gpu | None = None) -> Resource:
    """Service name, version and instance; the GPU and fal's runner where there are any.

    The SDK merges `OTEL_RESOURCE_ATTRIBUTES` in; what is set here stands, and a service name is
    set here only where `OTEL_SERVICE_NAME` or nothing at all names one.
    """
    attributes = {
        "service.version": __version__,
        "service.instance.id": str(uuid.uuid4()),
    }
    named_elsewhere = "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if settings.service_name or not named_elsewhere:
        attributes["service.name"] = settings.service_name or "stepspan"
    # What fal's documentation says it sets on a runner.
    for name, variable in (("fal.runner.id", "FAL_JOB_ID"), ("fal.app.name", "FAL_APP_NAME")):
        if value := os.environ.get(variable):
            attributes[name] = value
    if gpu is not None:
        attributes |= gpu.identity
    return Resource.create(attributes)


# What a guided step at the default shape may take where the operator says nothing. On a GPU: the 50
# ms that published H100-class figures at 1024x1024 stay under, where this service takes 30. On a
# CPU: four times what the demo model takes on two idle cores.
_GPU_STEP_SECONDS = 0.050
_CPU_STEP_SECONDS = 0.100


def build_budget(settings: ServeSettings, default_shape: CompiledShape, device: str) -> Budget:
    """What a request may take on `device` (a torch device's name)."""
    step_seconds = _GPU_STEP_SECONDS if device.startswith("cuda") else _CPU_STEP_SECONDS
    if settings.budget_step_ms is not None:
        step_seconds = settings.budget_step_ms / 1e3
    return Budget(settings.budget_seconds, step_seconds, default_shape.pixels)


def bucket_families(settings: ServeSettings) -> BucketFamilies:
    """The operator's bounds where there are any, else those of `buckets.py`."""
    stated = {
        "request": settings.buckets_request,
        "queue": settings.buckets_queue,
        "stage": settings.buckets_stage,
        "step": settings.buckets_step,
        "gpu_queue": settings.buckets_gpu_queue,
        "image_bytes": settings.buckets_image_bytes,
    }
    return BucketFamilies(**{name: bounds for name, bounds in stated.items() if bounds is not None})


def build_gpu_metrics(
    settings: ServeSettings, metrics: GenerationMetrics, gpu: Gpu | None
) -> GpuMetrics:
    """The GPU's figures, shown with the others; nothing without a GPU."""
    gpu_metrics = GpuMetrics(gpu, torch_memory, lambda: metrics.fault("nvml"))
    metrics.show(gpu_metrics)
    peak = peak_flops("" if gpu is None else gpu.identity["hw.name"], settings.peak_tflops)
    if peak is not None:
        metrics.set_peak_flops(peak)
    return gpu_metrics


def torch_memory() -> MemoryUse | None:
    """What torch's allocator holds on the device in use; None until something has touched it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return MemoryUse(
        allocated=torch.cuda.memory_allocated(),
        reserved=torch.cuda.memory_reserved(),
        peak=torch.cuda.max_memory_allocated(),
    )


def build_push(
    settings: ServeSettings, metrics: GenerationMetrics, resource: Resource
) -> MetricsPush | None:
    """Who pushes the metrics over OTLP, where somebody asked for it."""
    if not settings.otlp_metrics or settings.sdk_disabled:
        return None
    from metrics.otlp import otlp_metric_exporter

    exporter, answers = otlp_metric_exporter()
    return MetricsPush(
        metrics.registry,
        exporter,
        resource,
        # `lowmemory` asks for differences of counters and histograms, and has no say on gauges.
        delta=settings.otlp_metrics_temporality != "cumulative",
        period_seconds=settings.metric_export_interval / 1e3,
        on_pushed=metrics.pushed,
        take_rejected=answers.take_rejected,
    )
