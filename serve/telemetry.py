"""The settings' tracing, built: sampler, exporter and what the spans are said to come from."""

from __future__ import annotations

import logging
import os
import uuid
from importlib.metadata import version

from opentelemetry.sdk.resources import Resource

from metrics.catalogue import GenerationMetrics
from metrics.gpu import Gpu
from metrics.sampling import KeepRules, Sampling
from metrics.tracing import Tracing, otlp_destination, sdk_metrics
from serve.settings import ServeSettings

logger = logging.getLogger(__name__)


def build_tracing(
    settings: ServeSettings, metrics: GenerationMetrics, gpu: Gpu | None = None
) -> Tracing:
    """Tracing as configured; without an endpoint nothing is exported and nothing complains."""
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
        resource=build_resource(settings, gpu),
        on_ended=metrics.spans_ended,
        on_settled=metrics.spans_settled,
        version=version("stepspan"),
    )


def build_sampling(settings: ServeSettings) -> Sampling:
    """Both decisions: `OTEL_TRACES_SAMPLER` where it is set, else parent-based at the rate.

    Always is a ratio of 1 and never one of 0, but whoever says never means it: then nothing is kept
    for having failed or been slow either.
    """
    sampler = settings.traces_sampler or "parentbased_traceidratio"
    root = sampler.removeprefix("parentbased_")
    rate = {"always_on": 1.0, "always_off": 0.0}.get(root, settings.rate)
    keep = KeepRules(settings.trace_keep_slow_seconds, settings.trace_keep_slow_step_ms)
    return Sampling(
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
        "service.version": version("stepspan"),
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
