"""Builds the telemetry from the settings: tracing, what the metrics need, and the metrics' push."""

from __future__ import annotations

import logging
import sys
import uuid
from functools import partial

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanLimits

from kernels_warmup.shapes import CompiledShape
from metrics.batch_sizes import BatchSizes
from metrics.catalogue import BucketFamilies, GenerationMetrics
from metrics.families.budget import Budget
from metrics.families.peaks import peak_flops
from metrics.gpu import Gpu
from metrics.gpu_metrics import GpuMetrics, MemoryUse
from metrics.push import MetricsPush
from metrics.sampling import KeepRules, TraceSampling
from metrics.tracing import (
    SpanDestination,
    Tracing,
    console_destination,
    otlp_destination,
    sdk_metrics,
)
from serve import __version__
from serve.settings import ServeSettings, variables_without_effect

logger = logging.getLogger(__name__)


_STANDARD_LIMIT = 128

_LOG_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "none": logging.CRITICAL + 1,
}


def build_tracing(
    settings: ServeSettings, metrics: GenerationMetrics, resource: Resource | None = None
) -> Tracing:
    """Build tracing as the settings say. Without an endpoint nothing is exported, without an error.

    Args:
        resource: the resource of the spans; by default `build_resource(settings)`. Pass the one
            that pushed metrics have.
    """
    for name, reason in variables_without_effect():
        logger.warning("%s is set and has no effect: %s", name, reason)
    if settings.log_level is not None:
        logging.getLogger("opentelemetry").setLevel(_LOG_LEVELS[settings.log_level])
    return Tracing(
        sampling=build_sampling(settings),
        destination=_destination(settings, metrics),
        resource=resource or build_resource(settings),
        on_ended=metrics.spans_ended,
        on_result=metrics.span_results,
        version=__version__,
        batches=BatchSizes.chosen(
            settings.bsp_max_queue_size,
            settings.bsp_max_export_batch_size,
            settings.bsp_schedule_delay,
        ),
        limits=span_limits(settings),
    )


def _destination(settings: ServeSettings, metrics: GenerationMetrics) -> SpanDestination | None:
    if not settings.tracing_enabled:
        return None
    sdks_own = sdk_metrics(metrics.registry)
    if settings.writes_spans:
        return console_destination(sdks_own)
    return otlp_destination(
        settings.exports_to_honeycomb, sdks_own, settings.traces_timeout_seconds
    )


def span_limits(settings: ServeSettings) -> SpanLimits:
    """The SDK's limits of a span: each setting, else the general one, else the standard's 128."""
    count, length = settings.attribute_count_limit, settings.attribute_value_length_limit
    attributes = _STANDARD_LIMIT if count is None else count
    unlimited = SpanLimits.UNSET if length is None else length

    def chosen(limit: int | None, default: int) -> int:
        return default if limit is None else limit

    # All of them, so that the SDK reads none from the environment by itself.
    return SpanLimits(
        max_attributes=attributes,
        max_events=chosen(settings.span_event_count_limit, _STANDARD_LIMIT),
        max_links=chosen(settings.span_link_count_limit, _STANDARD_LIMIT),
        max_span_attributes=chosen(settings.span_attribute_count_limit, attributes),
        max_event_attributes=chosen(settings.event_attribute_count_limit, attributes),
        max_link_attributes=chosen(settings.link_attribute_count_limit, attributes),
        max_attribute_length=unlimited,
        max_span_attribute_length=chosen(settings.span_attribute_value_length_limit, unlimited),
    )


def build_sampling(settings: ServeSettings) -> TraceSampling:
    """Head and tail sampling as the settings say; parent-based at the rate by default.

    `always_on` is a ratio of 1 and `always_off` one of 0. With `always_off` slow and failed
    requests are not kept either.
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
    """The resource: the service's name, version and instance id, the GPU, and fal's runner.

    The SDK adds what the detectors of `OTEL_EXPERIMENTAL_RESOURCE_DETECTORS` find.
    `OTEL_RESOURCE_ATTRIBUTES` wins over the version and the id here, `OTEL_SERVICE_NAME` over both.
    """
    attributes = {
        "service.version": __version__,
        "service.instance.id": str(uuid.uuid4()),
    } | dict(settings.resource_attributes)
    attributes[SERVICE_NAME] = settings.service_name or attributes.get(SERVICE_NAME) or "stepspan"
    if settings.fal_runner_id is not None:
        attributes["fal.runner.id"] = settings.fal_runner_id
    if settings.fal_app_name is not None:
        attributes["fal.app.name"] = settings.fal_app_name
    if gpu is not None:
        attributes |= gpu.identity
    return Resource.create(attributes)


# The default time budget of a guided step at the default shape. On a GPU: published H100-class
# figures at 1024x1024 are below 50 ms; this service takes 30. On a CPU: four times the demo model's
# step on two idle cores.
_GPU_STEP_SECONDS = 0.050
_CPU_STEP_SECONDS = 0.100


def build_budget(settings: ServeSettings, default_shape: CompiledShape, device: str) -> Budget:
    """The time budget of a request on `device` (a torch device's name)."""
    step_seconds = _GPU_STEP_SECONDS if device.startswith("cuda") else _CPU_STEP_SECONDS
    if settings.budget_step_ms is not None:
        step_seconds = settings.budget_step_ms / 1e3
    return Budget(settings.budget_seconds, step_seconds, default_shape.pixels)


def bucket_families(settings: ServeSettings) -> BucketFamilies:
    """The histogram buckets: the settings' where set, else the defaults of `metrics.buckets`."""
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
    """Export the GPU's metrics beside the others; without a GPU there are none."""
    memory = partial(torch_memory, settings.device)
    gpu_metrics = GpuMetrics(gpu, memory, lambda: metrics.fault("nvml"))
    metrics.show(gpu_metrics)
    peak = peak_flops("" if gpu is None else gpu.identity["hw.name"], settings.peak_tflops)
    if peak is not None:
        metrics.set_peak_flops(peak)
    return gpu_metrics


def torch_memory(device: str = "auto") -> MemoryUse | None:
    """The memory of torch's CUDA allocator; None before CUDA is used.

    Args:
        device: as SDXL_DEVICE. Without a number it is the first GPU: a scrape's thread has another
            current device than the model's thread.
    """
    torch = sys.modules.get("torch")
    # While torch is being imported it is there without its parts.
    if torch is None or not hasattr(torch, "cuda") or not hasattr(torch.cuda, "is_initialized"):
        return None
    if not torch.cuda.is_initialized():
        return None
    index = int(device.split(":")[1]) if ":" in device else 0
    return MemoryUse(
        allocated=torch.cuda.memory_allocated(index),
        reserved=torch.cuda.memory_reserved(index),
        peak=torch.cuda.max_memory_allocated(index),
    )


def build_push(
    settings: ServeSettings, metrics: GenerationMetrics, resource: Resource
) -> MetricsPush | None:
    """What pushes the metrics over OTLP; None unless the settings say so."""
    if not settings.pushes_metrics or settings.sdk_disabled:
        return None
    from metrics.otlp import otlp_metric_exporter

    exporter, answers = otlp_metric_exporter(timeout=settings.metrics_timeout_seconds)
    return MetricsPush(
        metrics.registry,
        exporter,
        resource,
        # `lowmemory` means deltas for counters and histograms.
        delta=settings.otlp_metrics_temporality != "cumulative",
        period_seconds=settings.metric_export_interval / 1e3,
        on_pushed=metrics.pushed,
        take_rejected=answers.take_rejected,
    )
